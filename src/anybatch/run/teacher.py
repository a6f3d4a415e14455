"""The teacher's embeddings of a run's pairs: from files, or computed into its folder."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, get_args

import numpy as np

from anybatch.core.errors import AnybatchError
from anybatch.core.progress import Progress, counter, no_progress
from anybatch.data.pairs import PairData
from anybatch.integrations.sentence_transformers.embed import check_content, check_embedded, embed_to_file
from anybatch.integrations.sentence_transformers.model import ModelConfig, Side, lengths_of, load_model
from anybatch.run.config import RunConfig

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer


def teacher_embeddings(
    config: RunConfig, pairs: PairData, progress: Progress = no_progress
) -> tuple[np.ndarray, np.ndarray]:
    """Teacher embeddings of anchors and positives, two float arrays (n, D), memory-mapped where they are files.

    Raises:
        AnybatchError: No teacher and no files; files that do not match the data.

    Cost: without files one forward pass a text, shared by the ranks; half-done work is resumed.
    """
    teacher = config.teacher
    if teacher.embeddings is not None:
        anchors, positives = (read_embeddings(path, len(pairs)) for path in teacher.embeddings)
        return anchors, positives
    model = load_teacher(config)
    sides = list(zip(("anchor", "positive"), get_args(Side), (pairs.anchors, pairs.positives), strict=True))
    same = pairs.anchors is pairs.positives  # one column of images
    for _, _, texts in sides:
        check_content(model, texts)  # of both, before hours of one
    identity = {"model": teacher.name, "max_length": lengths_of(model), "data": pairs.digest}
    identity |= {"kwargs": teacher.kwargs} if teacher.kwargs else {}
    embedded = [
        embed_to_file(
            model,
            texts,
            Path(config.output) / f"teacher_{name}.npy",
            identity=identity,
            side=side,
            precision=teacher.precision,
            progress=counter(progress, f"teacher: {name}s", len(texts)),
        )
        for name, side, texts in sides[: 1 if same else 2]
    ]
    return embedded[0], embedded[-1]


def load_teacher(config: RunConfig) -> SentenceTransformer:
    """The model that ranks the data; an AnybatchError where none is named."""
    if config.teacher.name is None:
        mining = config.mining
        negatives = f", and mining.num_negatives {mining.num_negatives}" if mining.num_negatives else ""
        raise AnybatchError(
            f"mining.method is '{mining.method}'{negatives}, which needs a teacher: set teacher.name to a "
            "sentence-transformers model, or teacher.embeddings to two .npy files, or mining.method to 'random'"
            f"{' and mining.num_negatives to 0' if negatives else ''}."
        )
    shared = ("name", "max_length", "anchor_prompt", "positive_prompt", "kwargs")
    settings = {name: getattr(config.teacher, name) for name in shared}
    return load_model(ModelConfig(**settings, device=config.model.device))


def read_embeddings(path: str, num_rows: int) -> np.ndarray:
    """The embeddings of a `.npy` file, (num_rows, dimensions) floats of any width and byte order, memory-mapped (in
    memory where the byte order is not this machine's).

    Raises:
        AnybatchError: No such file, no array, or another shape; a file that this library made and that is damaged.
    """
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise AnybatchError(
            f"Cannot read the embeddings {path}: {error}. Expected a .npy file of shape (rows, dimensions)."
        ) from error
    if not isinstance(array, np.ndarray):
        array.close()
        raise AnybatchError(f"{path} is an archive of several arrays (.npz). Save the one of the embeddings as .npy.")
    if array.ndim != 2 or len(array) != num_rows or not np.issubdtype(array.dtype, np.floating):
        quantised = " Quantised embeddings have to be turned into floats first." if array.dtype.kind in "iu" else ""
        raise AnybatchError(
            f"{path} holds a {array.dtype} array of shape {array.shape}; expected floats of shape ({num_rows}, "
            "dimensions), one row for each row of the data, in its order. Embed this very file, or set data.limit to "
            f"what was embedded.{quantised}"
        )
    check_embedded(Path(path))
    native = np.dtype(np.float32) if array.dtype.itemsize > 8 else array.dtype.newbyteorder("=")
    return array.astype(native, copy=False)
