"""Embed texts or images with a sentence-transformers model: in shards, onto disk, resumable, over several ranks.

Memory is one shard of texts, or one forward pass of decoded images, whatever their number.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch

from anybatch.core import distributed
from anybatch.core.blocks import BlockArrays
from anybatch.core.errors import AnybatchError
from anybatch.core.files import digest_of, file_digest, read_json, write_json
from anybatch.data.images import ImageColumn
from anybatch.data.inputs import Column, MixedColumn, NegativeColumn, guest_input, kinds_of_rows, row_keys
from anybatch.integrations.sentence_transformers.collating import preprocess_rows
from anybatch.integrations.sentence_transformers.model import Side, side_prompt, side_task

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

SHARD = 2048  # texts between two records of progress


def embed_texts(
    model: SentenceTransformer,
    texts: Column,
    *,
    side: Side | None = None,
    batch_size: int = 64,
    progress: Callable[[int], None] | None = None,
) -> np.ndarray:
    """L2-normalised embeddings of `texts`, in memory: float32 (N, D).

    Args:
        model: Any sentence-transformers model whose output is one vector a text.
        texts: N texts; or a column of images, for a model that takes them.
        side: "query" for anchors, "document" for positives and negatives: the prompt and the route (tower) of
            `encode_query` and `encode_document`, from `model.prompts`. None: those of `encode`.
        batch_size: Texts or images per forward pass; inside a shard texts are sorted by length.
        progress: Called with the number of texts embedded here since the last call.
    """
    check_content(model, texts)
    settings = _settings(model, side)
    parts: list[np.ndarray] = []
    for start in range(0, len(texts), SHARD):
        shard = texts[start : start + SHARD]
        parts.append(_encode(model, shard, batch_size, settings))
        if progress is not None:
            progress(len(shard))
    return np.concatenate(parts or [np.zeros((0, model.get_embedding_dimension() or 0), np.float32)])


def embed_to_file(
    model: SentenceTransformer,
    texts: Column,
    path: str | os.PathLike[str],
    *,
    identity: dict[str, Any],
    side: Side | None = None,
    batch_size: int = 64,
    precision: Literal["float32", "float16"] = "float32",
    progress: Callable[[int], None] | None = None,
) -> np.ndarray:
    """As `embed_texts`, onto `path` (.npy), going on where a killed run stopped; ranks share the shards.

    Args:
        model, texts, side, batch_size, progress: See `embed_texts`.
        path: The final file; `path.origin` says what made it, and its digest. While work is under way it is in the
            folder `path.partial`.
        identity: What made the embeddings (name, lengths, data digest), beside what is seen here: texts, prompt, route
            and the model's weights. Work of another identity is not resumed, and a finished file of another is refused.
        precision: Of the file.

    Returns the memory-mapped array (N, D).
    """
    # 1. What made the embeddings; a finished file must be of it.
    check_content(model, texts)
    path, settings = Path(path), _settings(model, side)
    seen = {**settings, "texts": digest_of(row_keys(texts)), "weights": weights_digest(model)}
    stored_as = {} if precision == "float32" else {"precision": precision}
    identity = json.loads(json.dumps({**identity, **seen, **stored_as}))
    report = progress or (lambda count: None)
    if path.exists():
        with distributed.alone() as chosen:
            if chosen:
                check_embedded(path, identity)
        report(len(texts))
        return np.load(path, mmap_mode="r")

    # 2. This rank's shards, but for those that a killed run has left.
    width = model.get_embedding_dimension()
    if width is None:
        raise AnybatchError("The teacher does not state its embedding dimension; give precomputed embeddings (.npy).")
    partial = path.with_name(path.name + ".partial")
    kept = BlockArrays(
        {"embeddings": ((len(texts), width), np.dtype(precision).type)},
        -(-len(texts) // SHARD),
        folder=partial,
        identity=json.dumps(identity, sort_keys=True),
        rows=lambda block: slice(block * SHARD, (block + 1) * SHARD),
    )
    left = kept.mine()
    if done := sum(len(texts[block * SHARD : (block + 1) * SHARD]) for block in kept.share() if block not in left):
        report(done)
    for block in left:
        shard = texts[block * SHARD : (block + 1) * SHARD]
        rows = slice(block * SHARD, block * SHARD + len(shard))
        kept.arrays["embeddings"][rows] = _encode(model, shard, batch_size, settings)
        kept.finish(block)
        report(len(shard))
    kept.wait()

    # 3. The file, once all ranks are done.
    with distributed.alone() as chosen:
        if chosen:
            embeddings = partial / "embeddings.npy"
            write_json(_origin(path), {"identity": identity, "content": file_digest(embeddings)})
            os.replace(embeddings, path)
            shutil.rmtree(partial)
    return np.load(path, mmap_mode="r")


def check_embedded(path: Path, identity: dict[str, Any] | None = None) -> None:
    """Refuse a file of `embed_to_file` that is not what was written, or not of this `identity`. A file of somebody
    else's, which has no record of its origin, is refused only if an identity is given.
    """
    origin, remedy = _origin(path), f"Delete {path}; it is made anew then."
    record: dict[str, Any] = {}
    if origin.exists():
        record = read_json(origin, remedy, "identity", "content")
        if record["content"] != file_digest(path):
            raise AnybatchError(f"{path} is damaged: it is not what was written there. {remedy}")
    if identity is not None and record.get("identity") != identity:
        raise AnybatchError(
            f"{path} holds embeddings of another model or of other texts. Choose another output folder, or delete it."
        )


def _origin(path: Path) -> Path:
    return path.with_name(path.name + ".origin")


def check_content(model: SentenceTransformer, column: NegativeColumn) -> None:
    """Refuse a column with content that the model does not take; one with a chat template takes all together."""
    from transformers import PreTrainedTokenizerBase

    both = isinstance(column, MixedColumn) and bool((column.has_images & column.has_text).any())
    alone = isinstance(column, ImageColumn) or (isinstance(column, MixedColumn) and bool(column.has_images.any()))
    if both and not (model.supports("message") or model.supports(("image", "text"))):
        what = "images with texts in one input, and the model takes one of them at a time"
    elif alone and not model.supports("image"):
        what = f"images, and the model takes {', '.join(map(str, model.modalities))} only"
    elif alone and isinstance(getattr(model[0], "processor", None), PreTrainedTokenizerBase):
        # What transformers falls back to; sentence-transformers would leave all images out without a word.
        what = "images, and the model has a tokenizer alone: files of its processor, or a package for it, are missing"
    else:
        return
    kinds = (
        "images and texts together (Qwen2-VL and the like)" if both else "images and texts (CLIP, SigLIP and the like)"
    )
    raise AnybatchError(
        f"The column {getattr(column, 'where', '')} holds {what}. Choose a model for {kinds}, or give precomputed "
        "embeddings (.npy) where they are enough."
    )


def _settings(model: SentenceTransformer, side: Side | None) -> dict[str, Any]:
    """What `encode` would look up itself. The prompt is a text, "" too: for None it would take the model's default."""
    task = side_task(model, side)
    return {"prompt": side_prompt(model, side)} | ({} if task is None else {"task": task})


def _encode(model: SentenceTransformer, texts: Column, batch_size: int, settings: dict[str, Any]) -> np.ndarray:
    if not isinstance(texts, (ImageColumn, MixedColumn)):
        return _forward(model, list(texts), batch_size, settings)
    # Rows of one kind after the other, as a model without a chat template wants them; decoded by the forward pass, as a
    # shard of photographs would take gigabytes.
    kinds = kinds_of_rows(texts)
    order = np.argsort(kinds, kind="stable")
    changes = np.flatnonzero(np.diff(kinds[order])) + 1
    found = np.empty((len(texts), 0), np.float32)
    for rows in np.split(order, changes):
        for start in range(0, len(rows), batch_size):
            part = rows[start : start + batch_size]
            values = [texts[int(row)] for row in part]
            try:
                embeddings = _forward(model, [guest_input(value) for value in values], batch_size, settings)
            except ValueError:
                preprocess_rows(model, values, **settings)  # which names the row that a processor refuses
                raise
            if not found.shape[1]:
                found = np.empty((len(texts), embeddings.shape[1]), np.float32)
            found[part] = embeddings
    return found


def _forward(model: SentenceTransformer, inputs: list[Any], batch_size: int, settings: dict[str, Any]) -> np.ndarray:
    # encode() sorts by length itself, so a shard costs little more than its real tokens.
    settings = settings | {"normalize_embeddings": True, "convert_to_numpy": True, "show_progress_bar": False}
    return np.asarray(model.encode(inputs, batch_size=batch_size, **settings), dtype=np.float32)


def weights_digest(model: SentenceTransformer) -> str:
    """Tells a model from one of the same name that was trained further."""

    def parts() -> Iterator[bytes]:
        for name, tensor in sorted(model.state_dict().items()):
            yield f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode()
            yield tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()

    return digest_of(parts())
