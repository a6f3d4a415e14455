"""Embed texts with a sentence-transformers model: in shards, onto disk, resumable, over several ranks. Replaces one long `encode` call.

Cost: one forward pass per text; memory is one shard, whatever the number of texts.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from anybatch import distributed
from anybatch.blocks import BlockArrays
from anybatch.errors import AnybatchError
from anybatch.files import digest_of, write_text

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

SHARD = 2048  # texts between two records of progress


def embed_texts(
    model: SentenceTransformer,
    texts: Sequence[str],
    *,
    batch_size: int = 64,
    prompt: str = "",
    progress: Callable[[int], None] | None = None,
) -> np.ndarray:
    """L2-normalised embeddings of `texts`, in memory.

    Args:
        model: Any sentence-transformers model whose output is one vector a text.
        texts: N texts; each is embedded as `prompt + text`.
        batch_size: Texts per forward pass; inside a shard they are sorted by length.
        prompt: Text put in front of each, for models trained with instructions.
        progress: Called with the number of texts embedded since the last call.

    Returns:
        float32 (N, D).
    """
    parts = []
    for start in range(0, len(texts), SHARD):
        shard = list(texts[start : start + SHARD])
        parts.append(_encode(model, shard, batch_size, prompt))
        if progress is not None:
            progress(len(shard))
    return np.concatenate(parts) if parts else np.zeros((0, model.get_embedding_dimension() or 0), np.float32)


def embed_to_file(
    model: SentenceTransformer,
    texts: Sequence[str],
    path: str | os.PathLike[str],
    *,
    identity: dict[str, Any],
    batch_size: int = 64,
    prompt: str = "",
    precision: Literal["float32", "float16"] = "float32",
    progress: Callable[[int], None] | None = None,
) -> np.ndarray:
    """As `embed_texts`, onto `path` (.npy), going on where a killed run stopped; under several ranks each embeds its share of the shards.

    Args:
        model, texts, batch_size, prompt, progress: See `embed_texts`.
        path: The final file; `path.progress` says whose it is. While work is under way it is in the folder `path.partial`.
        identity: What made the embeddings (name, lengths, data digest), beside what is seen here: texts, prompt and the model's
            weights. Work of another identity is not resumed, and a finished file of another identity is refused.
        precision: Of the file.

    Returns:
        The memory-mapped array (N, D).

    Raises:
        AnybatchError: `path` exists and was made by another model or of other texts.

    Cost: as `embed_texts`, and one digest of the model's weights (about 1 GB a second).
    """
    path = Path(path)
    partial, journal = path.with_name(path.name + ".partial"), path.with_name(path.name + ".progress")
    identity = json.loads(
        json.dumps(
            {
                **identity,
                "prompt": prompt,
                "texts": digest_of(text.encode() for text in texts),
                "weights": _weights_digest(model),
            }
        )
    )
    if precision != "float32":
        identity["precision"] = precision
    record = _read_journal(journal)
    if path.exists():
        if record is None or record["identity"] != identity:
            raise AnybatchError(
                f"{path} holds embeddings of another model or of other texts. Choose another output folder, or delete that file."
            )
        if progress is not None:
            progress(len(texts))
        return np.load(path, mmap_mode="r")
    width = model.get_embedding_dimension()
    if width is None:
        raise AnybatchError(
            "The teacher does not state its embedding dimension; give precomputed embeddings (.npy) instead."
        )
    shapes = {"embeddings": ((len(texts), width), np.dtype(precision).type)}
    kept = BlockArrays(shapes, -(-len(texts) // SHARD), folder=partial, identity=json.dumps(identity, sort_keys=True))
    left = kept.mine()
    done = sum(len(texts[block * SHARD : (block + 1) * SHARD]) for block in kept.share() if block not in left)
    if progress is not None and done:
        progress(done)
    for block in left:
        shard = list(texts[block * SHARD : (block + 1) * SHARD])
        kept.arrays["embeddings"][block * SHARD : block * SHARD + len(shard)] = _encode(
            model, shard, batch_size, prompt
        )
        kept.finish(block)
        if progress is not None:
            progress(len(shard))
    kept.wait()
    with distributed.alone() as chosen:
        if chosen:
            write_text(journal, json.dumps({"identity": identity}))
            os.replace(partial / "embeddings.npy", path)
            shutil.rmtree(partial)
    return np.load(path, mmap_mode="r")


def _encode(model: SentenceTransformer, texts: list[str], batch_size: int, prompt: str) -> np.ndarray:
    # encode() sorts by length itself, so a shard costs little more than its real tokens.
    vectors = model.encode(
        texts,
        batch_size=batch_size,
        prompt=prompt,  # also the empty one: for None the model would take its own default prompt, which training does not
        normalize_embeddings=True,
        convert_to_numpy=True,
        show_progress_bar=False,
    )
    return np.asarray(vectors, dtype=np.float32)


def _weights_digest(model: SentenceTransformer) -> str:
    """Tells a model from one of the same name that was trained further."""
    import torch

    def parts() -> Iterator[bytes]:
        for name, tensor in sorted(model.state_dict().items()):
            yield f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode()
            yield tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()

    return digest_of(parts())


def _read_journal(journal: Path) -> dict[str, Any] | None:
    try:
        return json.loads(journal.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
