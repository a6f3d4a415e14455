"""What mined clusters hold, beside random ones: the figures that tell whether mining did its work."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy import sparse

from anybatch.mining.graph import MiningGraph


@dataclass(frozen=True, kw_only=True)
class Audit:
    """Figures of a clustering. "An anchor" averages over all rows, those without a cluster included.

    Attributes:
        window_per_anchor: Wanted negatives in the anchor's own cluster.
        conflicts_per_anchor: Suspected false negatives in it.
        random_window_per_anchor, random_conflicts_per_anchor: The same expected of random clusters of this size.
        hard_pairs: Pairs of rows with identical content in one cluster; 0 unless it cannot be avoided.
        smallest, largest: Sizes of clusters.
        remainder_rows: Rows in no cluster.
        isolated_rows: Rows with no wanted edge at all.
        kept_weight: Share of the graph's weight that lies inside clusters.
        largest_in_degree: How many windows the most wanted row is in (a hub).

    Example:
        >>> from anybatch.mining import MiningConfig, mine_plan
        >>> vectors = np.random.default_rng(0).normal(size=(64, 8)).astype(np.float32)
        >>> config = MiningConfig(batch_size=16, cluster_size=8, skip=2, take=16)
        >>> audit = mine_plan(vectors, vectors, config=config).report.audit
        >>> audit.smallest, audit.largest, audit.window_per_anchor > audit.random_window_per_anchor
        (8, 8, True)
    """

    window_per_anchor: float
    conflicts_per_anchor: float
    random_window_per_anchor: float
    random_conflicts_per_anchor: float
    hard_pairs: int
    smallest: int
    largest: int
    remainder_rows: int
    isolated_rows: int
    kept_weight: float
    largest_in_degree: int


def audit_clusters(graph: MiningGraph, cluster: np.ndarray, *, anchor_id: np.ndarray, positive_id: np.ndarray) -> Audit:
    """Count.

    Args:
        graph: From `build_graph`.
        cluster: (n,) int; -1 for none.
        anchor_id, positive_id: (n,) int, equal for identical texts.

    Cost: one pass over the edges.
    """
    num_rows = len(cluster)
    sizes = np.bincount(cluster[cluster >= 0])
    sizes = sizes[sizes > 0]
    by_chance = together_by_chance(cluster)
    total_weight = float(graph.weight.sum())
    return Audit(
        window_per_anchor=_inside(graph.window, cluster).nnz / num_rows,
        conflicts_per_anchor=_inside(graph.conflict, cluster).nnz / num_rows,
        random_window_per_anchor=graph.window.nnz / num_rows * by_chance,
        random_conflicts_per_anchor=graph.conflict.nnz / num_rows * by_chance,
        hard_pairs=_hard_pairs(cluster, anchor_id, positive_id),
        smallest=int(sizes.min(initial=num_rows)),
        largest=int(sizes.max(initial=0)),
        remainder_rows=int((cluster < 0).sum()),
        isolated_rows=int((np.diff(graph.weight.indptr) == 0).sum()),
        kept_weight=float(_inside(graph.weight, cluster).data.sum()) / total_weight if total_weight else 0.0,
        largest_in_degree=int(np.bincount(graph.window.indices, minlength=1).max(initial=0)),
    )


def together_by_chance(cluster: np.ndarray) -> float:
    """How often two rows drawn at random share a cluster; -1 for rows in none."""
    sizes = np.bincount(cluster[cluster >= 0])
    return float(np.sum(sizes * (sizes - 1.0))) / len(cluster) / max(1, len(cluster) - 1)


def suspect_pairs(graph: MiningGraph, cluster: np.ndarray) -> np.ndarray:
    """Suspected false negatives that share a cluster all the same: (p, 2) int32, lower row first, distinct, sorted."""
    inside = _inside(graph.conflict, cluster).tocoo()
    pairs = np.stack([np.minimum(inside.row, inside.col), np.maximum(inside.row, inside.col)], axis=1)
    return np.unique(pairs, axis=0).astype(np.int32)


def most_wanted(wanted: np.ndarray, num: int = 20) -> list[tuple[int, int]]:
    """Hubs: the rows that occur most often among `wanted` (the rows of all windows), each with its count, the most
    wanted first.

    Equal counts: the lower row first.
    """
    counts = np.bincount(wanted)
    order = np.argsort(-counts, kind="stable")[:num]
    return [(int(row), int(counts[row])) for row in order if counts[row]]


def _inside(matrix: sparse.csr_matrix, cluster: np.ndarray) -> sparse.csr_matrix:
    """The entries whose row and column share a cluster."""
    num_rows = len(matrix.indptr) - 1
    rows = np.repeat(np.arange(num_rows), np.diff(matrix.indptr))
    keep = (cluster[rows] == cluster[matrix.indices]) & (cluster[rows] >= 0)
    pointers = np.concatenate([[0], np.cumsum(np.bincount(rows[keep], minlength=num_rows))])
    return sparse.csr_matrix((matrix.data[keep], matrix.indices[keep], pointers), shape=(num_rows, num_rows))


def _hard_pairs(cluster: np.ndarray, anchor_id: np.ndarray, positive_id: np.ndarray) -> int:
    """Pairs in one cluster that share an anchor or a positive: sharing either, minus sharing both."""
    placed = cluster >= 0

    def pairs(*keys: np.ndarray) -> int:
        _, counts = np.unique(
            np.stack([cluster[placed], *(key[placed] for key in keys)], axis=1), axis=0, return_counts=True
        )
        return int(np.sum(counts * (counts - 1) // 2))

    return pairs(anchor_id) + pairs(positive_id) - pairs(anchor_id, positive_id)
