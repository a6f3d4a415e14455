"""The teacher's ranking, approximately: documents in k-means cells, of which each query visits the nearest. A block of
queries visits cell after cell, so the work is matrix products, as in `exact_neighbors`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from anybatch.core import distributed
from anybatch.core.blocks import BlockArrays
from anybatch.mining.inputs import as_tensor, on_cpu
from anybatch.mining.neighbors import Neighbors, Progress, Search, exact_neighbors, search_units
from anybatch.mining.top import Piece, best_columns

SAMPLE = 1024  # queries on which recall is measured
QUERY_ROWS = 8192  # queries searched together
TRAIN_ROWS = 40  # documents a centroid is made of, about
ROUNDS = 6  # of k-means
PIECE_ROWS = 4096  # documents converted to float32 at once
SCORED_ROWS = 512  # of them compared with every centroid at once, so that the scores stay in the cache


def ivf_neighbors(
    queries: np.ndarray,
    documents: np.ndarray,
    num_neighbors: int,
    *,
    anchor_id: np.ndarray,
    positive_id: np.ndarray,
    columns: np.ndarray | None = None,
    target_recall: float = 0.95,
    seed: int = 0,
    device: str | None = None,
    folder: Path | None = None,
    progress: Progress | None = None,
    unit_rows: int = QUERY_ROWS,
) -> Neighbors:
    """As `exact_neighbors`, approximately, with as many cells visited as the wanted recall needs on a sample.

        C = 4 sqrt(d) unit centroids, by k-means; a document belongs to the cell whose centroid it has the largest inner
        product with, a query visits the num_probes cells whose centroids it has the largest inner products with

    Further arguments and errors as in `exact_neighbors`; `folder` holds the cells and the sorted documents too.

    Args:
        target_recall: Wanted share of the true top k. For a sample of queries the true neighbours are searched; the
            cells that they lie in say what recall any number of visited cells gives. The least number is taken whose
            recall is a standard error above the target.
        seed: Of k-means and of the sample.

    Cost: multiplications: k-means TRAIN_ROWS * ROUNDS * C * C * D, finding cells 2 n C D, the sample SAMPLE * n * D,
        the search n * n * D * (share of the documents visited). Under several ranks only the search is shared; rank 0
        makes the cells.
    """
    ids = {"anchor_id": anchor_id, "positive_id": positive_id}
    search = Search.checked(queries, documents, num_neighbors, columns, device, **ids)
    identity = "" if folder is None else search.identity("ivf", target_recall, seed)
    cells = _Cells(search, seed=seed, folder=folder, identity=identity)
    recall, num_probes = cells.probes(target_recall)
    order = cells.query_order(search)
    runs = [order[start : start + unit_rows] for start in range(0, len(queries), unit_rows)]
    pieces, identity = partial(cells.pieces, num_probes=num_probes), f"{identity} {num_probes}"
    units = [(run, run) for run in runs]
    found = search_units(search, units, pieces, folder=folder, identity=identity, progress=progress)
    return replace(found, recall=recall, num_probes=num_probes)


class _Cells:
    """Documents in the order of their cells, in memory or in files (`folder`, `identity`: see `BlockArrays`)."""

    def __init__(self, search: Search, *, seed: int, folder: Path | None, identity: str) -> None:
        num_columns, width = len(search.columns), search.documents.shape[1]
        self.device = search.device
        self.num_cells = max(1, min(int(4 * np.sqrt(num_columns)), num_columns))
        shapes = {
            "centroids": ((self.num_cells, width), np.float32),
            "documents": ((num_columns, width), search.documents.dtype.type),
            "order": ((num_columns,), np.int32),
            "starts": ((self.num_cells + 1,), np.int64),
            "recall": ((2, self.num_cells), np.float64),
        }
        kept = BlockArrays(shapes, 1, folder=folder and folder / "cells", identity=identity)
        self.arrays = kept.arrays
        self.order, self.starts = kept.arrays["order"], kept.arrays["starts"]
        with distributed.alone() as chosen:
            if chosen and kept.mine():
                self._sort(search, seed)
                self.arrays["recall"][:] = self._recall(search, seed)
                kept.finish(0)
        kept.wait()

    def probes(self, target_recall: float) -> tuple[float, int]:
        """The recall reached, and the least number of cells whose recall is a standard error above the target."""
        recall, lower = self.arrays["recall"]
        reached = np.flatnonzero(lower >= target_recall)
        last = int(reached[0]) if len(reached) else self.num_cells - 1
        return float(recall[last]), last + 1

    def pieces(self, block: Tensor, num_probes: int) -> Iterator[Piece]:
        """For each cell that any query of the block (B, D) visits: its documents, and the queries that do."""
        every = np.arange(self.num_cells + 1, dtype=np.int32)
        centroids = Piece(every[:-1], as_tensor(self.arrays["centroids"], self.device))
        nobody = np.full(len(block), self.num_cells)  # no centroid is any query's own
        visits, _ = best_columns(
            block, nobody, [centroids], num_probes, ids=(every, every), by_loop=block.device.type == "cpu"
        )
        order = np.argsort(visits, axis=None, kind="stable")
        lines, cells = order // num_probes, visits.ravel()
        ends = np.cumsum(np.bincount(cells, minlength=self.num_cells)).tolist()
        starts = self.starts.tolist()
        for cell, (first, last) in enumerate(zip([0, *ends[:-1]], ends, strict=True)):
            run = slice(starts[cell], starts[cell + 1])
            if first < last and run.start < run.stop:
                documents = as_tensor(self.arrays["documents"][run], self.device)
                yield Piece(self.order[run], documents, lines[first:last])

    def query_order(self, search: Search) -> np.ndarray:
        """(n,) int32 all rows, cell after cell of their own documents, which may be searched under another row."""
        if len(self.order) == len(search.queries):
            return self.order
        place = np.full(len(search.queries), len(self.order), np.int32)  # of each positive in the order of the cells
        place[search.ids[1][self.order]] = np.arange(len(self.order), dtype=np.int32)
        return np.argsort(place[search.ids[1]], kind="stable").astype(np.int32)

    def _sort(self, search: Search, seed: int) -> None:
        documents = search.documents_of(slice(None))
        centroids = spherical_kmeans(documents, self.num_cells, seed, self.device)
        self.arrays["centroids"][:] = centroids.cpu().numpy()
        cell = assign_cells(documents, centroids, self.device)
        order = np.argsort(cell, kind="stable")
        self.order[:] = search.columns[order]
        self.starts[1:] = np.cumsum(np.bincount(cell, minlength=self.num_cells))
        for start in range(0, len(documents), PIECE_ROWS):
            self.arrays["documents"][start : start + PIECE_ROWS] = documents[order[start : start + PIECE_ROWS]]

    def _recall(self, search: Search, seed: int) -> np.ndarray:
        """(2, C): for every number of visited cells the recall on a sample, and that less its standard error."""
        num_rows = len(search.queries)
        rows = np.sort(np.random.default_rng(seed).choice(num_rows, min(SAMPLE, num_rows), replace=False))
        anchor_id, positive_id = search.ids
        asked: dict[str, Any] = {"rows": rows, "columns": search.columns, "device": self.device}
        asked |= {"anchor_id": anchor_id, "positive_id": positive_id}
        truth = exact_neighbors(search.queries, search.documents, search.num_neighbors, **asked)
        cell = np.empty(num_rows, np.int32)
        cell[self.order] = np.repeat(np.arange(self.num_cells, dtype=np.int32), np.diff(self.starts))
        scores = np.asarray(search.queries[rows], np.float32) @ self.arrays["centroids"].T
        reached = np.empty((len(rows), self.num_cells), np.float32)
        turn = np.empty(self.num_cells, np.int32)
        for place, found in enumerate(truth.ids):  # the share of true neighbours found with 1, 2, ... cells
            turn[np.argsort(-scores[place], kind="stable")] = np.arange(self.num_cells)
            turns = np.bincount(turn[cell[found[found >= 0]]], minlength=self.num_cells)
            reached[place] = np.cumsum(turns) / turns.sum() if turns.any() else 1.0
        mean, spread = reached.mean(axis=0, dtype=np.float64), reached.std(axis=0, dtype=np.float64)
        lower = mean - spread / np.sqrt(len(rows))
        return np.stack([mean, np.where(spread == 0, mean, lower)])


def spherical_kmeans(documents: np.ndarray, num_cells: int, seed: int, device: str | None) -> Tensor:
    """(C, D) unit centroids: each the direction of the mean of the sampled documents nearest to it."""
    generator = np.random.default_rng(seed)
    size = min(len(documents), TRAIN_ROWS * num_cells)
    sample = documents[np.sort(generator.choice(len(documents), size, replace=False))]
    first = np.sort(generator.choice(size, num_cells, replace=False))
    centroids = torch.nn.functional.normalize(as_tensor(sample[first], device))
    for _ in range(ROUNDS):
        cell = torch.from_numpy(assign_cells(sample, centroids, device)).to(centroids.device)
        sums = torch.zeros_like(centroids)
        for start in range(0, size, PIECE_ROWS):
            sums.index_add_(0, cell[start : start + PIECE_ROWS], as_tensor(sample[start : start + PIECE_ROWS], device))
        # A centroid that lost all its documents stays where it was.
        centroids = torch.where(sums.any(dim=1, keepdim=True), torch.nn.functional.normalize(sums), centroids)
    return centroids


def assign_cells(rows: np.ndarray, centroids: Tensor, device: str | None) -> np.ndarray:
    """(n,) int64: the centroid with the largest inner product."""
    # Every buffer is made once: small results between freed blocks left holes, of 10 GB at a million rows.
    cells = np.empty(len(rows), np.int64)
    workspace = torch.empty((min(PIECE_ROWS, len(rows)), rows.shape[1]), device=device or "cpu")
    scores = torch.empty((SCORED_ROWS, len(centroids)), device=device or "cpu")
    for start in range(0, len(rows), PIECE_ROWS):
        given = np.ascontiguousarray(rows[start : start + PIECE_ROWS])
        piece = workspace[: len(given)]
        piece.copy_(on_cpu(given))
        for place, few in enumerate(piece.split(SCORED_ROWS)):
            torch.mm(few, centroids.T, out=scores[: len(few)])
            first = start + place * SCORED_ROWS
            cells[first : first + len(few)] = scores[: len(few)].argmax(dim=1).cpu().numpy()
    return cells
