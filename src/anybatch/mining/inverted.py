"""The teacher's ranking, approximately: documents sorted into cells, queries of a cell searched together.

faiss's inverted file walks its lists query by query. Here the queries that belong to the same cell go through the same cells, those whose
centroids score highest with their mean, so that the search is a few large matrix products with the exact search's selection; only what
is looked at differs.

Memory beside that of `neighbors.py`: one copy of the documents in the order of their cells, in their own type (2 n D bytes in
float16), in `folder` if one is given; C centroids, 4 C D bytes, and TRAIN_ROWS times as much while they are made; 8 n bytes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from anybatch.blocks import BlockArrays
from anybatch.mining.neighbors import Embeddings, Neighbors, as_tensor, exact_neighbors, identity_of, search_units

SAMPLE = 1024  # queries on which recall is measured
SAMPLE_GROUPS = 64  # groups they come from
GROUP_ROWS = 512  # queries that visit the same cells, at most
TRAIN_ROWS = 40  # documents a centroid is made of, about
ROUNDS = 6  # of k-means
PIECE_ROWS = 4096  # documents converted to float32 at once


def ivf_neighbors(
    queries: Embeddings,
    documents: Embeddings,
    num_neighbors: int,
    *,
    anchor_id: np.ndarray,
    positive_id: np.ndarray,
    target_recall: float = 0.95,
    seed: int = 0,
    device: str | None = None,
    folder: Path | None = None,
    progress: Callable[[float], None] | None = None,
) -> Neighbors:
    """As `exact_neighbors`, approximately, with as many cells visited as the wanted recall needs on a sample.

        C = 4 sqrt(n) unit centroids; every document and every query belongs to the cell whose centroid it has the largest inner product with
        group = at most GROUP_ROWS queries of one cell; it visits the num_probes cells whose centroids score highest with the mean of its queries

    Args:
        queries, documents, num_neighbors, anchor_id, positive_id, device, progress: See `exact_neighbors`.
        target_recall: Wanted share of the true top k. For a sample of queries the true neighbours are searched; the cells that they lie in say what
            recall any number of visited cells gives, without another search. The least number is taken whose recall is a standard error above the target.
        seed: Of k-means and of the sample.
        folder: See `exact_neighbors`; it holds the cells and the sorted documents too.

    Returns:
        The neighbours; `recall` is that of the sample with the cells visited, `num_probes` their number.

    Raises:
        AnybatchError: See `exact_neighbors`.

    Cost: multiplications: k-means TRAIN_ROWS * ROUNDS * C * C * D, both assignments 2 n C D, the sample SAMPLE * n * D, the search
        n * n * D * num_probes / C. Under several ranks the search alone is shared; rank 0 makes the cells.
    """
    ids = (np.asarray(anchor_id, np.int64), np.asarray(positive_id, np.int64))
    identity = ""
    if folder is not None:
        identity = identity_of("ivf", num_neighbors, queries, documents, *ids, target_recall, seed)
    cells = _Cells(queries, documents, num_neighbors, ids, seed=seed, device=device, folder=folder, identity=identity)
    recall, num_probes = cells.probes(target_recall)

    def pieces(group: Tensor) -> Iterator[tuple[np.ndarray, Tensor]]:
        return cells.pieces(cells.visits(group.cpu().numpy())[:num_probes], device)

    found = search_units(
        queries,
        documents,
        num_neighbors,
        [(group, group) for group in cells.groups()],
        pieces,
        ids=ids,
        num_results=len(queries),
        device=device,
        folder=folder,
        identity=f"{identity} {num_probes}",
        progress=progress,
    )
    return Neighbors(**found, recall=recall, num_probes=num_probes)


class _Cells:
    """Documents in the order of their cells, queries in the order of theirs.

    Args:
        queries, documents, num_neighbors, seed, device, folder: See `ivf_neighbors`.
        ids: anchor_id and positive_id.
        identity: See `BlockArrays`.
    """

    def __init__(
        self,
        queries: Embeddings,
        documents: Embeddings,
        num_neighbors: int,
        ids: tuple[np.ndarray, np.ndarray],
        *,
        seed: int,
        device: str | None,
        folder: Path | None,
        identity: str,
    ) -> None:
        num_rows, width = documents.shape
        self.num_cells = max(1, min(int(4 * np.sqrt(num_rows)), num_rows))
        shapes = {
            "centroids": ((self.num_cells, width), np.float32),
            "documents": ((num_rows, width), documents.dtype.type),
            "order": ((num_rows,), np.int32),
            "starts": ((self.num_cells + 1,), np.int64),
            "query_order": ((num_rows,), np.int32),
            "query_starts": ((self.num_cells + 1,), np.int64),
            "recall": ((2, self.num_cells), np.float64),
        }
        kept = BlockArrays(shapes, 1, folder=folder and folder / "cells", identity=identity)
        self.arrays = kept.arrays
        self.centroids, self.order, self.starts = (kept.arrays[name] for name in ("centroids", "order", "starts"))
        for block in kept.mine():
            self._sort(queries, documents, seed, device)
            self.arrays["recall"][:] = self._recall(queries, documents, num_neighbors, ids, seed, device)
            kept.finish(block)
        kept.wait()

    def probes(self, target_recall: float) -> tuple[float, int]:
        """The recall reached and the number of cells to visit for it: the least whose recall is a standard error above the target."""
        recall, lower = self.arrays["recall"]
        reached = np.flatnonzero(lower >= target_recall)
        last = int(reached[0]) if len(reached) else self.num_cells - 1
        return float(recall[last]), last + 1

    def groups(self) -> list[np.ndarray]:
        """Query rows that are searched together: those of a cell, at most GROUP_ROWS at a time."""
        order, starts = self.arrays["query_order"], self.arrays["query_starts"]
        return [
            np.asarray(order[first : min(first + GROUP_ROWS, last)])
            for start, last in zip(starts[:-1].tolist(), starts[1:].tolist(), strict=True)
            for first in range(start, last, GROUP_ROWS)
        ]

    def visits(self, group: np.ndarray) -> np.ndarray:
        """All cells, in the order in which a group of queries (g, D) visits them."""
        scores = self.centroids @ np.asarray(group, np.float32).mean(axis=0)
        return np.argsort(-scores, kind="stable")

    def pieces(self, cells: np.ndarray, device: str | None) -> Iterator[tuple[np.ndarray, Tensor]]:
        """Row numbers and documents of the cells, a few thousand at a time."""
        ends = np.cumsum(self.starts[cells + 1] - self.starts[cells])
        for part in np.split(cells, np.searchsorted(ends, np.arange(PIECE_ROWS, ends[-1], PIECE_ROWS))):
            runs = [slice(self.starts[cell], self.starts[cell + 1]) for cell in part]
            if runs:
                columns = np.concatenate([self.order[run] for run in runs])
                yield columns, as_tensor(np.concatenate([self.arrays["documents"][run] for run in runs]), device)

    def _sort(self, queries: Embeddings, documents: Embeddings, seed: int, device: str | None) -> None:
        centroids = _spherical_kmeans(documents, self.num_cells, seed, device)
        self.centroids[:] = centroids.cpu().numpy()
        for side, order, starts in (
            (documents, self.order, self.starts),
            (queries, self.arrays["query_order"], self.arrays["query_starts"]),
        ):
            cell = _assign(side, centroids, device)
            order[:] = np.argsort(cell, kind="stable")
            starts[1:] = np.cumsum(np.bincount(cell, minlength=self.num_cells))
        for start in range(0, len(documents), PIECE_ROWS):
            self.arrays["documents"][start : start + PIECE_ROWS] = documents[self.order[start : start + PIECE_ROWS]]

    def _recall(
        self,
        queries: Embeddings,
        documents: Embeddings,
        num_neighbors: int,
        ids: tuple[np.ndarray, np.ndarray],
        seed: int,
        device: str | None,
    ) -> np.ndarray:
        """(2, C): for every number of visited cells the recall on a sample of queries, and the same less its standard error."""
        generator = np.random.default_rng(seed)
        groups = self.groups()
        sizes = np.array([len(group) for group in groups])
        chosen = generator.choice(len(groups), min(SAMPLE_GROUPS, len(groups)), replace=False, p=sizes / sizes.sum())
        share = -(-SAMPLE // len(chosen))
        samples = [generator.permutation(groups[number])[:share] for number in chosen]
        truth = exact_neighbors(
            queries,
            documents,
            num_neighbors,
            anchor_id=ids[0],
            positive_id=ids[1],
            rows=np.concatenate(samples),
            device=device,
        )
        cell = np.empty(len(self.order), np.int32)
        cell[self.order] = np.repeat(np.arange(self.num_cells, dtype=np.int32), np.diff(self.starts))
        turn = np.empty(self.num_cells, np.int32)
        reached = []  # for each group the share of true neighbours found with 1, 2, ... cells
        for number, found in zip(chosen, np.split(truth.ids, np.cumsum([len(s) for s in samples])[:-1]), strict=True):
            turn[self.visits(queries[groups[number]])] = np.arange(self.num_cells)
            turns = np.bincount(turn[cell[found[found >= 0]]], minlength=self.num_cells)
            reached.append(np.cumsum(turns) / max(1, turns.sum()))
        mean, spread = np.mean(reached, axis=0), np.std(reached, axis=0) / np.sqrt(len(reached))
        return np.stack([mean, np.where(mean == 1.0, 1.0, mean - spread)])


def _spherical_kmeans(documents: Embeddings, num_cells: int, seed: int, device: str | None) -> Tensor:
    """(C, D) unit centroids: each the direction of the mean of the sampled documents nearest to it."""
    generator = np.random.default_rng(seed)
    size = min(len(documents), TRAIN_ROWS * num_cells)
    sample = documents[np.sort(generator.choice(len(documents), size, replace=False))]
    first = np.sort(generator.choice(size, num_cells, replace=False))
    centroids = torch.nn.functional.normalize(as_tensor(sample[first], device))
    for _ in range(ROUNDS):
        cell = torch.from_numpy(_assign(sample, centroids, device)).to(centroids.device)
        sums = torch.zeros_like(centroids)
        for start in range(0, size, PIECE_ROWS):
            sums.index_add_(0, cell[start : start + PIECE_ROWS], as_tensor(sample[start : start + PIECE_ROWS], device))
        # A centroid that lost all its documents stays where it was.
        centroids = torch.where(sums.any(dim=1, keepdim=True), torch.nn.functional.normalize(sums), centroids)
    return centroids


def _assign(rows: Embeddings, centroids: Tensor, device: str | None) -> np.ndarray:
    """(n,) int64: the centroid with the largest inner product."""
    cells = []
    for start in range(0, len(rows), PIECE_ROWS):
        piece = as_tensor(rows[start : start + PIECE_ROWS], device)
        # Few rows at a time, so that their scores stay in the cache.
        cells += [(few @ centroids.T).argmax(dim=1).cpu() for few in piece.split(512)]
    return torch.cat(cells).numpy()
