"""Clusters found in coarse cells that know nothing of each other: a part of the memory each, and each rank takes its
share.

A partitioner holds the whole graph, on one core, with 32-bit edge numbers: at 100 neighbours a row that ends near 10
million rows. Here k-means cuts the rows into a few cells; inside each cell graph, partition and search are those of the
whole. What the borders cost is mended afterwards by the search over all rows.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from anybatch.core import distributed
from anybatch.core.blocks import BlockArrays
from anybatch.mining.config import MiningConfig
from anybatch.mining.graph import Window, build_graph
from anybatch.mining.inputs import identity_of
from anybatch.mining.inverted import assign_cells, spherical_kmeans
from anybatch.mining.neighbors import Neighbors, Progress
from anybatch.mining.partition import SWEEPS, equal_clusters, metis_clusters


def cell_clusters(
    neighbors: Neighbors,
    documents: np.ndarray,
    window: Window,
    *,
    config: MiningConfig,
    anchor_id: np.ndarray,
    positive_id: np.ndarray,
    folder: Path | None = None,
    progress: Progress | None = None,
) -> np.ndarray:
    """A start for `equal_clusters`: clusters of exactly `cluster_size` inside each of `config.cells` cells, then the
    rest.

    Args:
        neighbors: Of all rows; may be memory-mapped.
        documents: (n, D) float, by which the rows are cut into cells.
        window: Which ranks are wanted, as the data allow it.
        config: Its `cells` (fewer for small data), `cluster_size`, `conflict_weight` and `seed`.
        anchor_id, positive_id: (n,) int.
        folder: Where finished cells are kept; needed under several ranks, each of which takes every world_size-th cell.
        progress: Called with the fraction of this rank's cells done.

    Returns:
        (n,) int32 clusters 0 .. n // cluster_size - 1; of that size but for the rows that the cells had left over.

    Cost: n * cells * D * ROUNDS multiplications for the cells; then the partition of the largest cell at a time.
        Memory: the graph of one cell.
    """
    num_rows, size = len(neighbors.ids), config.cluster_size
    num_cells = min(config.cells, max(1, num_rows // (4 * size)))
    settings = (num_cells, size, window, config.conflict_weight, SWEEPS, config.seed)
    identity = "" if folder is None else identity_of(*settings, neighbors.ids, documents, anchor_id, positive_id)

    # 1. Cut the rows into cells.
    cut = BlockArrays({"cell": ((num_rows,), np.int64)}, 1, folder=folder and folder / "cut", identity=identity)
    with distributed.alone() as chosen:
        if chosen and cut.mine():
            centroids = spherical_kmeans(documents, num_cells, config.seed, None)
            cut.arrays["cell"][:] = assign_cells(documents, centroids, None)
            cut.finish(0)
    cut.wait()
    cells = cut.arrays["cell"]

    # 2. Make clusters of each.
    kept = BlockArrays(
        {"cluster": ((num_rows,), np.int32)},
        num_cells,
        folder=folder,
        identity=identity,
        rows=lambda cell: np.flatnonzero(cells == cell),
    )
    left = kept.mine()
    for number, cell in enumerate(left, start=1):
        rows = np.flatnonzero(cells == cell)
        found = np.full(len(rows), -1, np.int32)
        if len(rows) >= size:
            graph = build_graph(_inside(neighbors, rows), window)
            found = equal_clusters(
                metis_clusters(graph.weight, len(rows) // size, recursive=True, seed=config.seed),
                graph.signed(config.conflict_weight),
                size,
                anchor_id=anchor_id[rows],
                positive_id=positive_id[rows],
                seed=config.seed,
            )
        kept.arrays["cluster"][rows] = found
        kept.finish(cell)
        if progress is not None:
            progress(number / len(left))
    kept.wait()
    return _joined(cells, kept.arrays["cluster"], num_cells, size)


def _inside(neighbors: Neighbors, rows: np.ndarray) -> Neighbors:
    """The neighbours of a cell's rows, numbered within the cell. Ranks stay: a neighbour in another cell is missing."""
    local = np.full(len(neighbors.ids), -1, np.int32)
    local[rows] = np.arange(len(rows))
    ids = neighbors.ids[rows]
    return Neighbors(
        ids=np.where(ids >= 0, local[ids], -1), scores=neighbors.scores[rows], own_score=neighbors.own_score[rows]
    )


def _joined(cell: np.ndarray, cluster: np.ndarray, num_cells: int, cluster_size: int) -> np.ndarray:
    """Number the cells' clusters through; left-over rows fill further clusters, in the order of their cells."""
    per_cell = np.bincount(cell, minlength=num_cells) // cluster_size
    first = np.concatenate([[0], np.cumsum(per_cell)])
    joined = np.where(cluster >= 0, first[cell] + cluster, -1)
    spare = np.flatnonzero(joined < 0)
    spare = spare[np.argsort(cell[spare], kind="stable")]
    num_clusters = len(cell) // cluster_size
    joined[spare] = np.minimum(first[-1] + np.arange(len(spare)) // cluster_size, num_clusters - 1)
    return joined.astype(np.int32)
