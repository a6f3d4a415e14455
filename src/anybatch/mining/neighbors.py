"""The teacher's ranking: for every row the best other rows, exactly or with an inverted file.

Memory: one tile of scores (`TILE_BYTES`) and 8 bytes for each kept neighbour; never n x n.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numba
import numpy as np
import torch

from anybatch.errors import AnybatchError

TILE_BYTES = 16 * 2**20
SAMPLE = 512  # rows on which the recall of the inverted file is measured


@dataclass(frozen=True, kw_only=True, eq=False)
class Neighbors:
    """The best rows for each row, best first.

    Attributes:
        ids: (n, k) int32; -1 where there are fewer than k.
        scores: (n, k) float32; -inf beside -1.
        own_score: (n,) float32: the score of the row with itself, that is of the anchor with its own positive.
        recall: Of the true top k, measured on a sample; 1.0 for exact search.
    """

    ids: np.ndarray
    scores: np.ndarray
    own_score: np.ndarray
    recall: float


def check_embeddings(name: str, embeddings: np.ndarray, num_rows: int | None = None) -> None:
    """Refuse embeddings that cannot be ranked.

    Raises:
        AnybatchError: Wrong shape or number of rows; NaN, infinite or all-zero rows, with the first of them.
    """
    if embeddings.ndim != 2 or (num_rows is not None and len(embeddings) != num_rows):
        expected = "(rows, dimensions)" if num_rows is None else f"({num_rows}, dimensions)"
        raise AnybatchError(
            f"The {name} embeddings have shape {embeddings.shape}; expected {expected}, one row for each row of the data."
        )
    for start in range(0, len(embeddings), 65536):  # in blocks: the array may be a file larger than memory
        block = np.asarray(embeddings[start : start + 65536], dtype=np.float32)
        for what, bad in (("NaN or infinite", ~np.isfinite(block).all(axis=1)), ("all zero", ~block.any(axis=1))):
            if bad.any():
                rows = np.flatnonzero(bad)
                raise AnybatchError(
                    f"{len(rows)} of the {name} embeddings in rows {start} to {start + len(block) - 1} are {what}; the first is row {start + rows[0]}. "
                    "Embed these rows again; a teacher cannot rank them."
                )


def exact_neighbors(
    queries: np.ndarray,
    documents: np.ndarray,
    num_neighbors: int,
    *,
    anchor_id: np.ndarray,
    positive_id: np.ndarray,
    rows: np.ndarray | None = None,
    progress: Callable[[float], None] | None = None,
) -> Neighbors:
    """The exact best documents of each query by inner product, leaving out the row's own texts under any row.

    Scores are made in tiles by matrix products; each tile is read once, a number at a time against the row's k-th best so
    far, so that selecting costs little beside multiplying. Equal scores: the lower row number first.

    Args:
        queries, documents: (n, D) float, row i's own document being document i; may be memory-mapped.
        num_neighbors: k.
        anchor_id, positive_id: (n,) int; a row that shares either with the query's row is left out.
        rows: Only these queries; None for all.
        progress: Called with the fraction done.

    Cost: n * n * D multiplications; see the module for memory.
    """
    rows = np.arange(len(queries)) if rows is None else np.asarray(rows)
    ids = np.full((len(rows), num_neighbors), -1, np.int32)
    scores = np.full((len(rows), num_neighbors), -np.inf, np.float32)
    own = np.empty(len(rows), np.float32)
    width = min(len(documents), 4096)
    height = max(1, TILE_BYTES // (4 * width))
    for start in range(0, len(rows), height):
        chosen = rows[start : start + height]
        block = torch.from_numpy(np.array(queries[chosen], dtype=np.float32))
        own[start : start + height] = np.einsum(
            "ij,ij->i", block.numpy(), np.asarray(documents[chosen], dtype=np.float32)
        )
        kept = slice(start, start + len(chosen))
        for first in range(0, len(documents), width):
            other = torch.from_numpy(
                np.array(documents[first : first + width], dtype=np.float32)
            )  # a copy: files are read-only
            tile = (block @ other.T).numpy()
            with _torch_threads():
                _keep_best(tile, first, chosen, anchor_id, positive_id, ids[kept], scores[kept])
        if progress is not None:
            progress((start + len(chosen)) / len(rows))
    with _torch_threads():
        _sort_best(ids, scores)
    return Neighbors(ids=ids, scores=scores, own_score=own, recall=1.0)


def ivf_neighbors(
    queries: np.ndarray,
    documents: np.ndarray,
    num_neighbors: int,
    *,
    anchor_id: np.ndarray,
    positive_id: np.ndarray,
    target_recall: float = 0.95,
    seed: int = 0,
    progress: Callable[[float], None] | None = None,
) -> Neighbors:
    """As `exact_neighbors`, approximately: faiss's inverted file, with as many cells visited as the wanted recall needs.

    Args:
        queries, documents, num_neighbors, anchor_id, positive_id, progress: See `exact_neighbors`.
        target_recall: Wanted share of the true top k; the number of visited cells is doubled until a sample of rows reaches it.
        seed: Of the sample.

    Cost: a k-means of 4 sqrt(n) cells and a share of the exact search's multiplications.
    """
    import faiss

    num_rows, width = documents.shape
    data = np.ascontiguousarray(documents, dtype=np.float32)
    num_cells = int(4 * np.sqrt(num_rows))
    index: Any = faiss.IndexIVFFlat(faiss.IndexFlatIP(width), width, num_cells, faiss.METRIC_INNER_PRODUCT)
    index.cp.seed, index.cp.niter, index.cp.max_points_per_centroid = seed + 1, 8, 64
    index.train(data)
    index.add(data)
    sample = np.sort(np.random.default_rng(seed).choice(num_rows, min(SAMPLE, num_rows), replace=False))
    truth = exact_neighbors(
        queries, documents, num_neighbors, anchor_id=anchor_id, positive_id=positive_id, rows=sample
    )
    spare = 32  # room for the row's own texts, which are left out afterwards
    recall, probes = 0.0, 4
    while recall < target_recall and probes < num_cells:
        probes = min(2 * probes, num_cells)
        index.nprobe = probes
        found = _search(index, queries, sample, num_neighbors, spare, anchor_id, positive_id)
        hits = sum(len(np.intersect1d(a[a >= 0], b[b >= 0])) for a, b in zip(found[0], truth.ids, strict=True))
        recall = hits / max(1, int((truth.ids >= 0).sum()))
    ids = np.empty((num_rows, num_neighbors), np.int32)
    scores = np.empty((num_rows, num_neighbors), np.float32)
    own = np.empty(num_rows, np.float32)
    step = 16384
    for start in range(0, num_rows, step):
        rows = np.arange(start, min(start + step, num_rows))
        ids[rows], scores[rows] = _search(index, queries, rows, num_neighbors, spare, anchor_id, positive_id)
        own[rows] = np.einsum("ij,ij->i", np.asarray(queries[rows], dtype=np.float32), data[rows])
        if progress is not None:
            progress((start + len(rows)) / num_rows)
    return Neighbors(ids=ids, scores=scores, own_score=own, recall=recall)


@contextmanager
def _torch_threads() -> Iterator[None]:
    """Run compiled code on as many threads as torch uses, and leave torch's number as it was.

    numba's OpenMP layer sets the number of threads of the whole process, so that a training run after mining would sum in
    another order than the same run resumed from a checkpoint, and ignore the limit that its user set.
    """
    before = torch.get_num_threads()
    most: int = numba.config.NUMBA_NUM_THREADS  # pyright: ignore[reportAttributeAccessIssue]
    numba.set_num_threads(max(1, min(before, most)))
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _search(
    index: Any,
    queries: np.ndarray,
    rows: np.ndarray,
    num_neighbors: int,
    spare: int,
    anchor_id: np.ndarray,
    positive_id: np.ndarray,
) -> tuple[np.ndarray, np.ndarray]:
    scores, found = index.search(np.ascontiguousarray(queries[rows], dtype=np.float32), num_neighbors + spare)
    ids = np.full((len(rows), num_neighbors), -1, np.int32)
    best = np.full((len(rows), num_neighbors), -np.inf, np.float32)
    _drop_own(found, scores, rows, anchor_id, positive_id, ids, best)
    return ids, best


@numba.njit(cache=True, parallel=True)
def _keep_best(tile, first, rows, anchor_id, positive_id, ids, scores):  # pragma: no cover - compiled
    """Scan a tile of scores into each row's heap; the root is the worst kept (lowest score, then highest id)."""
    depth = ids.shape[1]
    for line in numba.prange(tile.shape[0]):
        row = rows[line]
        heap, heap_ids = scores[line], ids[line]
        threshold = heap[0]
        for column in range(tile.shape[1]):
            score = tile[line, column]
            if score > threshold:
                other = first + column
                if other == row or anchor_id[other] == anchor_id[row] or positive_id[other] == positive_id[row]:
                    continue
                place = 0
                while True:  # sift the newcomer down from the root
                    child = 2 * place + 1
                    if child >= depth:
                        break
                    right = child + 1
                    if right < depth and (
                        heap[right] < heap[child] or (heap[right] == heap[child] and heap_ids[right] > heap_ids[child])
                    ):
                        child = right
                    if heap[child] < score or (heap[child] == score and heap_ids[child] > other):
                        heap[place], heap_ids[place] = heap[child], heap_ids[child]
                        place = child
                    else:
                        break
                heap[place], heap_ids[place] = score, other
                threshold = heap[0]


@numba.njit(cache=True, parallel=True)
def _sort_best(ids, scores):  # pragma: no cover - compiled
    """Each row by score, descending, then by id."""
    for line in numba.prange(ids.shape[0]):
        by_id = np.argsort(ids[line], kind="mergesort")
        order = by_id[np.argsort(-scores[line][by_id], kind="mergesort")]
        ids[line] = ids[line][order]
        scores[line] = scores[line][order]


@numba.njit(cache=True)
def _drop_own(found, found_scores, rows, anchor_id, positive_id, ids, scores):  # pragma: no cover - compiled
    for line in range(found.shape[0]):
        row, kept = rows[line], 0
        for column in range(found.shape[1]):
            other = found[line, column]
            if (
                other < 0
                or other == row
                or anchor_id[other] == anchor_id[row]
                or positive_id[other] == positive_id[row]
            ):
                continue
            if kept == ids.shape[1]:
                break
            ids[line, kept], scores[line, kept] = other, found_scores[line, column]
            kept += 1
