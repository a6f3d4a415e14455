"""The teacher's ranking, exactly: for every row the best other rows.

Memory beside the embeddings, which may be files (float16 or float32; read in pieces), with k neighbours:

    threads * (UNIT_ROWS * (4 D + 16 k) + PIECE_ROWS * 4 D + 4 MB)       in work: 9 MB a thread for k = 130, D = 384
    n * (8 k + 4)                                                        the result, in `folder` if given

`inverted.py` does the same approximately, for more rows than n * n allows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from torch import Tensor

from anybatch.core.blocks import BlockArrays
from anybatch.core.errors import AnybatchError
from anybatch.mining.inputs import as_tensor, check_at_least, check_embeddings, compact_ids, identity_of
from anybatch.mining.top import Piece, best_columns, workers

UNIT_ROWS = 512  # queries whose reservoirs a thread holds at once
DEVICE_ROWS = 4096  # the same on an accelerator
BLOCK_UNITS = 8  # between two records of progress
PIECE_ROWS = 2048  # documents converted to float32 at once: one tile's

Progress = Callable[[float], None]
Pieces = Callable[[Tensor], Iterator[Piece]]
Unit = tuple[slice | np.ndarray, np.ndarray]  # places in the result, and the query rows that are searched together


@dataclass(frozen=True, kw_only=True, eq=False)
class Neighbors:
    """The best rows for each row, best first.

    Attributes:
        ids: (n, k) int32; -1 where there are fewer than k.
        scores: (n, k) float32; -inf beside -1.
        own_score: (n,) float32: the score of the row with itself, that is of the anchor with its own positive.
        mean_score: Of all anchors with all positives: from where a margin counts.
        recall: Of the true top k, measured on a sample; 1.0 for exact search.
        num_probes: Cells that each query visited; 0 for exact search.

    Example:
        >>> vectors, rows = np.eye(3, 2, dtype=np.float32), np.arange(3)
        >>> exact_neighbors(vectors, vectors, 2, anchor_id=rows, positive_id=rows).ids.shape
        (3, 2)
    """

    ids: np.ndarray
    scores: np.ndarray
    own_score: np.ndarray
    mean_score: float = 0.0
    recall: float = 1.0
    num_probes: int = 0


@dataclass(frozen=True, eq=False)
class Search:
    """What is searched, checked: of each query the `num_neighbors` best documents that share no text with its row."""

    queries: np.ndarray  # (n, D)
    documents: np.ndarray  # (n, D), document i being row i's own
    num_neighbors: int
    ids: tuple[np.ndarray, ...]  # of anchors and positives, (n,) int64 below n: the compiled search checks no index
    columns: np.ndarray  # (d,) int32, the documents that are searched, ascending
    device: str | None  # None for the compiled search

    @classmethod
    def checked(
        cls,
        queries: np.ndarray,
        documents: np.ndarray,
        num_neighbors: int,
        columns: np.ndarray | None,
        device: str | None,
        **ids: np.ndarray,
    ) -> Search:
        """With any integers as ids; columns of None are all documents."""
        check_at_least("num_neighbors", num_neighbors, 1)
        check_embeddings("query", queries, zeros=True)
        check_embeddings("document", documents, zeros=True)
        if queries.shape != documents.shape:
            raise AnybatchError(f"Queries have shape {queries.shape}, documents {documents.shape}; expected the same.")
        chosen = checked_rows("columns", columns, len(documents)).astype(np.int32)
        return cls(queries, documents, num_neighbors, compact_ids(len(queries), **ids), chosen, device)

    def identity(self, *settings: object) -> str:
        """Digest of everything that decides the result."""
        return identity_of(self.num_neighbors, self.queries, self.documents, *self.ids, self.columns, *settings)

    def documents_of(self, places: slice) -> np.ndarray:
        """The documents of some of the columns; nothing is copied where these are all."""
        every = len(self.columns) == len(self.documents)
        return self.documents[places if every else self.columns[places]]


def checked_rows(name: str, rows: np.ndarray | None, num_rows: int) -> np.ndarray:
    """Row numbers, checked; None for all."""
    rows = np.arange(num_rows) if rows is None else np.asarray(rows)
    if rows.dtype.kind not in "iu" or (len(rows) and not 0 <= rows.min() <= rows.max() < num_rows):
        raise AnybatchError(f"{name} are {rows.dtype}, {rows[:3]}...; expected whole numbers from 0 to {num_rows - 1}.")
    return rows


def exact_neighbors(
    queries: np.ndarray,
    documents: np.ndarray,
    num_neighbors: int,
    *,
    anchor_id: np.ndarray,
    positive_id: np.ndarray,
    rows: np.ndarray | None = None,
    columns: np.ndarray | None = None,
    device: str | None = None,
    folder: Path | None = None,
    progress: Progress | None = None,
    unit_rows: int | None = None,
) -> Neighbors:
    """The exact best documents of each query by inner product, leaving out the row's own texts under any row.

        ids[i] = argsort_j(-queries[i] . documents[j])[:k]   over j that share neither anchor nor positive with i;
                                                             equal scores: lower j first

    Args:
        queries, documents: (n, D) float16 or float32, row i's own document being document i; may be memory-mapped.
        num_neighbors: k.
        anchor_id, positive_id: (n,) int; a row that shares either with the query's row is left out.
        rows: Only these queries; None for all.
        columns: (d,) int, only these documents, ascending; None for all. With `first_rows` a text counts once, however
            many rows have it.
        device: Where to compute, such as "cuda". None: the compiled search on the CPU.
        folder: Finished blocks are kept here: a killed search goes on, a finished one is read, and under torchrun each
            rank makes its share of the blocks and sees the whole result.
        progress: Called with the fraction done (of this rank's share).
        unit_rows: Queries that are searched together; None for what the caches hold.

    Raises:
        AnybatchError: Embeddings without a ranking; several ranks without a folder; a folder that cannot be written.

    Cost: n * n * D multiplications; see the module for memory; two barriers under several ranks.
    """
    ids = {"anchor_id": anchor_id, "positive_id": positive_id}
    search = Search.checked(queries, documents, num_neighbors, columns, device, **ids)
    rows = checked_rows("rows", rows, len(queries))
    height = unit_rows or (UNIT_ROWS if device is None else DEVICE_ROWS)
    units = [slice(start, min(start + height, len(rows))) for start in range(0, len(rows), height)]

    def pieces(_: Tensor) -> Iterator[Piece]:
        for first in range(0, len(search.columns), PIECE_ROWS):
            piece = slice(first, first + PIECE_ROWS)
            yield Piece(search.columns[piece], as_tensor(search.documents_of(piece), device))

    identity = "" if folder is None else search.identity("exact", rows)
    of_rows = [(unit, rows[unit]) for unit in units]
    return search_units(search, of_rows, pieces, folder=folder, identity=identity, progress=progress)


def search_units(
    search: Search,
    units: Sequence[Unit],
    pieces: Pieces,
    *,
    folder: Path | None,
    identity: str,
    progress: Progress | None,
) -> Neighbors:
    """What exact and approximate search share: units of queries, several at once, recorded block by block.

    `pieces` leads from a unit's query embeddings to the documents that they are compared with, some thousand at a time.
    """
    size, k = sum(len(rows) for _, rows in units), search.num_neighbors
    blocks = [units[start : start + BLOCK_UNITS] for start in range(0, len(units), BLOCK_UNITS)]
    shapes = {"ids": ((size, k), np.int32), "scores": ((size, k), np.float32), "own_score": ((size,), np.float32)}

    def rows_of(block: int) -> np.ndarray:
        return np.concatenate([np.arange(size)[places] for places, _ in blocks[block]])

    kept = BlockArrays(shapes, len(blocks), folder=folder, identity=identity, rows=rows_of)
    ids, scores, own_score = (kept.arrays[name] for name in ("ids", "scores", "own_score"))
    by_loop = search.device is None

    def run(unit: Unit) -> None:
        places, rows = unit
        block = as_tensor(search.queries[rows], search.device)
        ids[places], scores[places] = best_columns(block, rows, pieces(block), k, ids=search.ids, by_loop=by_loop)
        own = (block * as_tensor(search.documents[rows], search.device)).sum(dim=1)
        own_score[places] = own.cpu().numpy()

    share, left = kept.share(), kept.mine()
    with workers() if by_loop else nullcontext(map) as spread:
        for number, block in enumerate(left, start=len(share) - len(left) + 1):
            list(spread(run, blocks[block]))
            kept.finish(block)
            if progress is not None:
                progress(number / len(share))
    kept.wait()
    return Neighbors(ids=ids, scores=scores, own_score=own_score)
