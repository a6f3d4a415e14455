"""What all steps of mining ask of their inputs, and how rows of arrays reach a device."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from anybatch.core.errors import AnybatchError
from anybatch.core.files import digest_of
from anybatch.core.ids import as_ids, renumbered

BLOCK_ROWS = 65536  # looked at, or added to a digest, at once: the arrays may be files larger than memory


def check_at_least(name: str, value: int, least: int) -> None:
    """Refuse a number below `least`."""
    if value < least:
        raise AnybatchError(f"{name} is {value}; expected at least {least}.")


def compact_ids(num_rows: int, **ids: np.ndarray | None) -> tuple[np.ndarray, ...]:
    """Ids of any size as (num_rows,) int64 numbers below num_rows, equal where the ids are equal; None: all differ."""
    found = []
    for name, given in ids.items():
        numbers = np.arange(num_rows) if given is None else as_ids(name, given)
        if numbers.shape != (num_rows,):
            raise AnybatchError(f"{name} has shape {numbers.shape}; expected ({num_rows},), one id for each row.")
        found.append(numbers if given is None else renumbered(numbers))
    return tuple(found)


def check_embeddings(name: str, embeddings: np.ndarray, num_rows: int | None = None, *, zeros: bool = False) -> None:
    """Refuse embeddings that cannot be ranked; rows of all zeros too, without `zeros`."""
    if not isinstance(embeddings, np.ndarray) or embeddings.dtype.kind not in "fiu":
        given = f"an array of {embeddings.dtype}" if isinstance(embeddings, np.ndarray) else type(embeddings).__name__
        raise AnybatchError(f"The {name} embeddings are {given}; expected a NumPy array of numbers (rows, dimensions).")
    if embeddings.ndim != 2 or not embeddings.size or (num_rows is not None and len(embeddings) != num_rows):
        expected = "(rows, dimensions)" if num_rows is None else f"({num_rows}, dimensions)"
        raise AnybatchError(
            f"The {name} embeddings have shape {embeddings.shape}; expected {expected}, one row for each row of the "
            "data."
        )
    for start in range(0, len(embeddings), BLOCK_ROWS):
        with np.errstate(over="ignore"):  # is infinite in float32, which is found at once
            block = np.asarray(embeddings[start : start + BLOCK_ROWS], dtype=np.float32)
        for what, bad in (("NaN or infinite", ~np.isfinite(block).all(axis=1)), ("all zero", ~block.any(axis=1))):
            if bad.any() and not (zeros and what == "all zero"):
                rows = np.flatnonzero(bad)
                raise AnybatchError(
                    f"{len(rows)} of the {name} embeddings in rows {start} to {start + len(block) - 1} are {what}; the "
                    f"first is row {start + rows[0]}. Embed these rows again; a teacher cannot rank them."
                )


def as_tensor(rows: np.ndarray, device: str | None) -> Tensor:
    """Rows of an array, which may be a read-only file of any type of numbers, as float32 on the device."""
    return on_cpu(rows).to(device or "cpu", torch.float32)


def on_cpu(rows: np.ndarray) -> Tensor:
    """The same in the array's own type where torch knows it."""
    if rows.dtype not in (np.float16, np.float32, np.float64) or not rows.dtype.isnative:
        rows = rows.astype(np.float32)  # whole numbers, another machine's byte order
    if not rows.flags.writeable:
        rows = np.array(rows)  # torch wants writable memory
    return torch.from_numpy(np.ascontiguousarray(rows))


def identity_of(*inputs: object) -> str:
    """Digest of arrays (by content) and of anything else (by its text). Cost: about 1 GB a second."""

    def parts() -> Iterator[bytes]:
        for given in inputs:
            if not isinstance(given, np.ndarray):
                yield repr(given).encode()
                continue
            yield f"{given.shape} {given.dtype}".encode()
            for start in range(0, len(given), BLOCK_ROWS):
                yield np.ascontiguousarray(given[start : start + BLOCK_ROWS]).tobytes()

    return digest_of(parts())


def first_rows(ids: np.ndarray) -> np.ndarray:
    """(n,) int64, of each row the first one with the same id."""
    _, first, which = np.unique(ids, return_index=True, return_inverse=True)
    return first[which]
