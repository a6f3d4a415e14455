"""What mined clusters hold, beside random ones: the figures that tell whether mining did its work."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy import sparse

from anybatch.mining.graph import MiningGraph
from anybatch.mining.inputs import first_rows


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

    Example:
        >>> from anybatch.mining import MiningConfig, mine_plan
        >>> vectors = np.random.default_rng(0).normal(size=(64, 8)).astype(np.float32)
        >>> config = MiningConfig(batch_size=16, cluster_size=8)
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


def audit_clusters(graph: MiningGraph, cluster: np.ndarray, *, anchor_id: np.ndarray, positive_id: np.ndarray) -> Audit:
    """Count.

    Args:
        graph: From `build_graph`.
        cluster: (n,) int; -1 for none.
        anchor_id, positive_id: (n,) int, equal for identical texts.

    Cost: one pass over the edges.
    """
    num_rows, beside = len(cluster), Beside(cluster, first_rows(positive_id))
    sizes = np.bincount(cluster[cluster >= 0])
    sizes = sizes[sizes > 0]
    by_chance = together_by_chance(cluster)
    return Audit(
        window_per_anchor=beside.edges(graph.window) / num_rows,
        conflicts_per_anchor=beside.edges(graph.conflict) / num_rows,
        random_window_per_anchor=int(beside.rows_of_text[graph.window.indices].sum()) / num_rows * by_chance,
        random_conflicts_per_anchor=int(beside.rows_of_text[graph.conflict.indices].sum()) / num_rows * by_chance,
        hard_pairs=_hard_pairs(cluster, anchor_id, positive_id),
        smallest=int(sizes.min(initial=num_rows)),
        largest=int(sizes.max(initial=0)),
        remainder_rows=int((cluster < 0).sum()),
    )


def together_by_chance(cluster: np.ndarray) -> float:
    """How often two rows drawn at random share a cluster; -1 for rows in none."""
    sizes = np.bincount(cluster[cluster >= 0])
    return float(np.sum(sizes * (sizes - 1.0))) / len(cluster) / max(1, len(cluster) - 1)


class Beside:
    """Who sits beside an anchor: how many rows of a cluster have a text.

    Args:
        cluster: (n,) int; -1 for none.
        text: (n,) int, of each row the row that was ranked for its text (`first_rows`).
    """

    def __init__(self, cluster: np.ndarray, text: np.ndarray) -> None:
        self.cluster, self.rows_of_text = cluster, np.bincount(text, minlength=len(text))
        self._num_rows, self._counts = len(text), None
        placed = np.flatnonzero(cluster >= 0)
        if np.any(self.rows_of_text > 1):
            keys = cluster[placed].astype(np.int64) * self._num_rows + text[placed]
            self._keys, self._counts = np.unique(np.append(keys, np.iinfo(np.int64).max), return_counts=True)

    def count(self, home: np.ndarray, texts: np.ndarray) -> np.ndarray:
        """For each text (a row that was ranked) the rows of cluster `home` that have it; 0 where either is -1."""
        if self._counts is None:
            found = self.cluster[texts] == home
        else:
            keys = home.astype(np.int64) * self._num_rows + texts
            place = np.searchsorted(self._keys, keys)
            found = np.where(self._keys[place] == keys, self._counts[place], 0)
        return np.where((home >= 0) & (texts >= 0), found, 0)

    def edges(self, matrix: sparse.csr_matrix) -> int:
        """Pairs of a row and one beside it that has a text which the matrix lists for the row."""
        rows = np.repeat(np.arange(self._num_rows), np.diff(matrix.indptr))
        return int(self.count(self.cluster[rows], matrix.indices).sum())


def suspect_pairs(conflict: sparse.csr_matrix) -> np.ndarray:
    """All suspected false negatives: (p, 2) int32, sorted: a row, and one whose text may be right for its anchor.

    The other way round is a pair of its own: a text that many anchors come near need not be near to theirs. Those of
    other clusters too: they meet in a batch, and a loss that stands for the whole data would weigh them most.
    """
    rows = np.repeat(np.arange(len(conflict.indptr) - 1), np.diff(conflict.indptr))
    return np.stack([rows, conflict.indices], axis=1).astype(np.int32)


def _hard_pairs(cluster: np.ndarray, anchor_id: np.ndarray, positive_id: np.ndarray) -> int:
    """Pairs in one cluster that share an anchor or a positive: sharing either, minus sharing both."""
    placed = cluster >= 0

    def pairs(*keys: np.ndarray) -> int:
        _, counts = np.unique(
            np.stack([cluster[placed], *(key[placed] for key in keys)], axis=1), axis=0, return_counts=True
        )
        return int(np.sum(counts * (counts - 1) // 2))

    return pairs(anchor_id) + pairs(positive_id) - pairs(anchor_id, positive_id)
