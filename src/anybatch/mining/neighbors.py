"""The teacher's ranking, exactly: for every row the best other rows.

Memory beside the embeddings, which may be files (float16 or float32; read in pieces): with k neighbours and D dimensions

    threads * (UNIT_ROWS * (4 D + 16 k) + PIECE_ROWS * 4 D + 4 MB)       in work: 9 MB a thread for k = 130, D = 384
    n * (8 k + 4)                                                        the result, in `folder` if one is given, else in memory

never n x n. `inverted.py` does the same approximately, for more rows than n * n allows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from anybatch.core.blocks import BlockArrays
from anybatch.core.errors import AnybatchError
from anybatch.core.files import digest_of
from anybatch.core.ids import as_ids, renumbered
from anybatch.mining.top import Piece, best_columns, best_columns_on_device, workers

UNIT_ROWS = 512  # queries whose reservoirs a thread holds at once
DEVICE_ROWS = 4096  # the same on an accelerator
BLOCK_UNITS = 8  # between two records of progress
PIECE_ROWS = 2048  # documents converted to float32 at once: one tile's
DIGEST_ROWS = 65536


@dataclass(frozen=True, kw_only=True, eq=False)
class Neighbors:
    """The best rows for each row, best first.

    Attributes:
        ids: (n, k) int32; -1 where there are fewer than k.
        scores: (n, k) float32; -inf beside -1.
        own_score: (n,) float32: the score of the row with itself, that is of the anchor with its own positive.
        recall: Of the true top k, measured on a sample; 1.0 for exact search.
        num_probes: Cells that each query visited; 0 for exact search.
    """

    ids: np.ndarray
    scores: np.ndarray
    own_score: np.ndarray
    recall: float
    num_probes: int = 0


@dataclass(frozen=True, eq=False)
class Stacked:
    """Two embedding arrays side by side, joined only for the rows that are read: (n, D) and (n, D) as (n, 2 D).

    The symmetric score q_i . p_j + q_j . p_i is the inner product of Stacked(q, p)[i] and Stacked(p, q)[j].
    """

    left: np.ndarray
    right: np.ndarray

    @property
    def shape(self) -> tuple[int, int]:
        """(rows, dimensions of both)."""
        return len(self.left), self.left.shape[1] + self.right.shape[1]

    @property
    def dtype(self) -> np.dtype:
        """The wider of the two."""
        return np.result_type(self.left, self.right)

    def __len__(self) -> int:
        return len(self.left)

    def __getitem__(self, rows: slice | np.ndarray) -> np.ndarray:
        return np.concatenate([self.left[rows], self.right[rows]], axis=1)


Embeddings = np.ndarray | Stacked


def check_at_least(name: str, value: int, least: int) -> None:
    """Refuse a number below `least`."""
    if value < least:
        raise AnybatchError(f"{name} is {value}; expected at least {least}.")


def compact_ids(name: str, ids: np.ndarray, num_rows: int) -> np.ndarray:
    """Ids of any size as (num_rows,) int64 numbers below num_rows, equal where the ids are equal.

    Raises:
        AnybatchError: Not one whole number for each row; negative ones.
    """
    ids = as_ids(name, ids)
    if ids.shape != (num_rows,):
        raise AnybatchError(f"{name} has shape {ids.shape}; expected ({num_rows},), one id for each row.")
    return renumbered(ids)


def check_embeddings(name: str, embeddings: np.ndarray, num_rows: int | None = None, *, zeros: bool = False) -> None:
    """Refuse embeddings that cannot be ranked.

    Raises:
        AnybatchError: No array of numbers; wrong shape or number of rows; NaN, infinite or (without `zeros`) all-zero rows, with the first of them.
    """
    if not isinstance(embeddings, np.ndarray) or embeddings.dtype.kind not in "fiu":
        given = f"an array of {embeddings.dtype}" if isinstance(embeddings, np.ndarray) else type(embeddings).__name__
        raise AnybatchError(
            f"The {name} embeddings are {given}; expected a NumPy array of numbers, (rows, dimensions)."
        )
    if embeddings.ndim != 2 or not embeddings.size or (num_rows is not None and len(embeddings) != num_rows):
        expected = "(rows, dimensions)" if num_rows is None else f"({num_rows}, dimensions)"
        raise AnybatchError(
            f"The {name} embeddings have shape {embeddings.shape}; expected {expected}, one row for each row of the data."
        )
    for start in range(0, len(embeddings), 65536):  # in blocks: the array may be a file larger than memory
        with np.errstate(over="ignore"):  # is infinite in float32, which is found at once
            block = np.asarray(embeddings[start : start + 65536], dtype=np.float32)
        for what, bad in (("NaN or infinite", ~np.isfinite(block).all(axis=1)), ("all zero", ~block.any(axis=1))):
            if bad.any() and not (zeros and what == "all zero"):
                rows = np.flatnonzero(bad)
                raise AnybatchError(
                    f"{len(rows)} of the {name} embeddings in rows {start} to {start + len(block) - 1} are {what}; the first is row {start + rows[0]}. "
                    "Embed these rows again; a teacher cannot rank them."
                )


def exact_neighbors(
    queries: Embeddings,
    documents: Embeddings,
    num_neighbors: int,
    *,
    anchor_id: np.ndarray,
    positive_id: np.ndarray,
    rows: np.ndarray | None = None,
    device: str | None = None,
    folder: Path | None = None,
    progress: Callable[[float], None] | None = None,
) -> Neighbors:
    """The exact best documents of each query by inner product, leaving out the row's own texts under any row.

        ids[i] = argsort_j(-queries[i] . documents[j])[:k]   over j that share neither anchor nor positive with i; equal scores: lower j first

    Args:
        queries, documents: (n, D) float16 or float32, row i's own document being document i; may be memory-mapped, or `Stacked`.
        num_neighbors: k.
        anchor_id, positive_id: (n,) int; a row that shares either with the query's row is left out.
        rows: Only these queries; None for all.
        device: Where to compute. None: the compiled search on the CPU. A torch device ("cuda"): products and torch.topk there.
        folder: Finished blocks are kept here: a killed search goes on, a finished one is read, and under torchrun each rank makes its
            share of the blocks and sees the whole result.
        progress: Called with the fraction done (of this rank's share).

    Raises:
        AnybatchError: Several ranks without a folder; a folder that cannot be written.

    Cost: n * n * D multiplications; see the module for memory. With `folder` also one pass over the embeddings for their digest; two
        barriers under several ranks.
    """
    rows = np.arange(len(queries)) if rows is None else np.asarray(rows)
    if rows.dtype.kind not in "iu" or (len(rows) and not 0 <= rows.min() <= rows.max() < len(queries)):
        raise AnybatchError(
            f"rows are {rows.dtype}, {rows[:3]}...; expected whole numbers from 0 to {len(queries) - 1}."
        )
    ids = check_search(queries, documents, num_neighbors, (anchor_id, positive_id))
    height = UNIT_ROWS if device is None else DEVICE_ROWS
    units = [slice(start, min(start + height, len(rows))) for start in range(0, len(rows), height)]

    def pieces(_: Tensor) -> Iterator[Piece]:
        for first in range(0, len(documents), PIECE_ROWS):
            last = min(first + PIECE_ROWS, len(documents))
            yield Piece(np.arange(first, last, dtype=np.int32), as_tensor(documents[first:last], device))

    return search_units(
        queries,
        documents,
        num_neighbors,
        [(unit, rows[unit]) for unit in units],
        pieces,
        ids=ids,
        num_results=len(rows),
        device=device,
        folder=folder,
        identity="" if folder is None else identity_of("exact", num_neighbors, queries, documents, *ids, rows),
        progress=progress,
    )


def check_search(
    queries: Embeddings, documents: Embeddings, num_neighbors: int, ids: tuple[np.ndarray, np.ndarray]
) -> tuple[np.ndarray, np.ndarray]:
    """The ids as the compiled search takes them, which checks no index.

    Raises:
        AnybatchError: Embeddings without a ranking; sizes that do not fit together.
    """
    check_at_least("num_neighbors", num_neighbors, 1)
    for name, side in (("query", queries), ("document", documents)):
        for part in (side.left, side.right) if isinstance(side, Stacked) else (side,):
            check_embeddings(name, part, zeros=True)
    if queries.shape != documents.shape:
        raise AnybatchError(
            f"The queries have shape {queries.shape}, the documents {documents.shape}; expected the same."
        )
    return compact_ids("anchor_id", ids[0], len(queries)), compact_ids("positive_id", ids[1], len(queries))


Unit = tuple[slice | np.ndarray, np.ndarray]


def search_units(
    queries: Embeddings,
    documents: Embeddings,
    num_neighbors: int,
    units: Sequence[Unit],
    pieces: Callable[[Tensor], Iterator[Piece]],
    *,
    ids: tuple[np.ndarray, np.ndarray],
    num_results: int,
    device: str | None,
    folder: Path | None,
    identity: str,
    progress: Callable[[float], None] | None,
) -> Neighbors:
    """What exact and approximate search share: units of queries, several at once, recorded block by block.

    Args:
        queries, documents, num_neighbors, device, folder, progress: See `exact_neighbors`.
        units: (places in the result, query rows) of the queries that are searched together.
        pieces: From a unit's query embeddings to the documents that they are compared with, a few thousand at a time.
        ids: anchor_id and positive_id.
        num_results: Rows of the result.
        identity: Of the folder's contents; see `BlockArrays`.

    Returns:
        The neighbours, with the recall of a search of everything.
    """
    shapes = {
        "ids": ((num_results, num_neighbors), np.int32),
        "scores": ((num_results, num_neighbors), np.float32),
        "own_score": ((num_results,), np.float32),
    }
    num_blocks = -(-len(units) // BLOCK_UNITS)

    def of_block(block: int) -> np.ndarray:
        places = [places for places, _ in units[block * BLOCK_UNITS : (block + 1) * BLOCK_UNITS]]
        return np.concatenate([np.arange(num_results)[one] for one in places])

    kept = BlockArrays(shapes, num_blocks, folder=folder, identity=identity, rows=of_block)
    best = best_columns if device is None else best_columns_on_device

    def search(unit: Unit) -> None:
        places, rows = unit
        block = as_tensor(queries[rows], device)
        found = best(block, rows, pieces(block), num_neighbors, anchor_id=ids[0], positive_id=ids[1])
        kept.arrays["ids"][places], kept.arrays["scores"][places] = found
        own = (block * as_tensor(documents[rows], device)).sum(dim=1)
        kept.arrays["own_score"][places] = own.cpu().numpy()

    share, left = kept.share(), kept.mine()
    with workers() if device is None else nullcontext(map) as spread:
        for number, block in enumerate(left, start=len(share) - len(left) + 1):
            list(spread(search, units[block * BLOCK_UNITS : (block + 1) * BLOCK_UNITS]))
            kept.finish(block)
            if progress is not None:
                progress(number / len(share))
    kept.wait()
    ids_found, scores, own_score = (kept.arrays[name] for name in ("ids", "scores", "own_score"))
    return Neighbors(ids=ids_found, scores=scores, own_score=own_score, recall=1.0)


def as_tensor(rows: np.ndarray, device: str | None) -> Tensor:
    """Rows of an array as float32 on the device; see `on_cpu`."""
    return on_cpu(rows).to(device or "cpu", torch.float32)


def on_cpu(rows: np.ndarray) -> Tensor:
    """Rows of an array, which may be a read-only file of any type of numbers, as a tensor."""
    if rows.dtype not in (np.float16, np.float32, np.float64) or not rows.dtype.isnative:
        rows = rows.astype(np.float32)  # whole numbers, another machine's byte order
    if not rows.flags.writeable:
        rows = np.array(rows)  # torch wants writable memory
    return torch.from_numpy(np.ascontiguousarray(rows))


def identity_of(*inputs: object) -> str:
    """Digest of arrays (by content) and of anything else (by its text). Cost: about 1 GB a second."""

    def parts() -> Iterator[bytes]:
        for given in inputs:
            for array in (given.left, given.right) if isinstance(given, Stacked) else (given,):
                if not isinstance(array, np.ndarray):
                    yield repr(array).encode()
                    continue
                yield f"{array.shape} {array.dtype}".encode()
                for start in range(0, len(array), DIGEST_ROWS):
                    yield np.ascontiguousarray(array[start : start + DIGEST_ROWS]).tobytes()

    return digest_of(parts())
