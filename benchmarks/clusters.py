"""What the clusters of a mining graph hold, beside random ones: for tables of mining, and tests of the search."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy import sparse

from anybatch.mining import MiningGraph, MiningResult
from anybatch.mining.inputs import first_rows


@dataclass(frozen=True, kw_only=True)
class Audit:
    """Figures of a clustering. "An anchor" averages over all rows, those without a cluster included.

    Attributes:
        window_per_anchor: Wanted negatives in the anchor's own cluster.
        conflicts_per_anchor: Suspected false negatives in it.
        random_window_per_anchor: Wanted negatives expected of random clusters of this size.
        hard_pairs: Pairs of rows with identical content in one cluster; 0 unless it cannot be avoided.
        smallest, largest: Sizes of clusters.
        remainder_rows: Rows in no cluster.
    """

    window_per_anchor: float
    conflicts_per_anchor: float
    random_window_per_anchor: float
    hard_pairs: int
    smallest: int
    largest: int
    remainder_rows: int


def audit_clusters(graph: MiningGraph, cluster: np.ndarray, *, anchor_id: np.ndarray, positive_id: np.ndarray) -> Audit:
    """Count, in one pass over the edges: `cluster` (n,) int, -1 for none; ids (n,) int, equal for identical texts."""
    num_rows, text = len(cluster), first_rows(positive_id)
    sizes = np.bincount(cluster[cluster >= 0])
    sizes = sizes[sizes > 0]
    by_chance = float(np.sum(sizes * (sizes - 1.0))) / num_rows / max(1, num_rows - 1)
    rows_of_text = np.bincount(text, minlength=num_rows)
    return Audit(
        window_per_anchor=_beside(graph.window, cluster, text) / num_rows,
        conflicts_per_anchor=_beside(graph.conflict, cluster, text) / num_rows,
        random_window_per_anchor=int(rows_of_text[graph.window.indices].sum()) / num_rows * by_chance,
        hard_pairs=_hard_pairs(cluster, anchor_id, positive_id),
        smallest=int(sizes.min(initial=num_rows)),
        largest=int(sizes.max(initial=0)),
        remainder_rows=int((cluster < 0).sum()),
    )


def audit_of(result: MiningResult, **ids: np.ndarray) -> Audit:
    """Of what was mined of one data set; ids as in `audit_clusters`, all different unless given."""
    assert result.graph is not None
    every = np.arange(result.plan.num_rows)
    return audit_clusters(result.graph, result.plan.cluster, **{"anchor_id": every, "positive_id": every, **ids})


def _beside(matrix: sparse.csr_matrix, cluster: np.ndarray, text: np.ndarray) -> int:
    """Pairs of a row and one of its cluster that has a text which the matrix lists for the row."""
    num_rows, placed = len(text), np.flatnonzero(cluster >= 0)
    keys, counts = np.unique(cluster[placed].astype(np.int64) * num_rows + text[placed], return_counts=True)
    home = np.repeat(cluster, np.diff(matrix.indptr)).astype(np.int64)
    wanted = (home * num_rows + matrix.indices)[home >= 0]
    place = np.minimum(np.searchsorted(keys, wanted), len(keys) - 1)
    return int(counts[place][keys[place] == wanted].sum())


def _hard_pairs(cluster: np.ndarray, anchor_id: np.ndarray, positive_id: np.ndarray) -> int:
    """Pairs in one cluster that share an anchor or a positive: sharing either, minus sharing both."""
    placed = cluster >= 0

    def pairs(*keys: np.ndarray) -> int:
        columns = np.stack([cluster[placed], *(key[placed] for key in keys)], axis=1)
        _, counts = np.unique(columns, axis=0, return_counts=True)
        return int(np.sum(counts * (counts - 1) // 2))

    return pairs(anchor_id) + pairs(positive_id) - pairs(anchor_id, positive_id)
