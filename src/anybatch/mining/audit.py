"""What mined clusters hold, beside random ones, and what figures of a plan advise against."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from scipy import sparse

from anybatch.mining.graph import MiningGraph
from anybatch.mining.inputs import first_rows

WEAK_TEACHER = 0.4  # own positives first: midway between MiniLM, .70, and LSA of 128 dimensions, .21, on 10,000 pairs
MUCH_MASKED = 1 / 3  # .14 to .49 on the study's text tasks
MANY_SUSPECTS = 1.0  # an anchor: .03 to .4 were measured at the default conflict weight, 1.3 in the published recipe
LITTLE_GAIN = 3.0  # over random batches: 1.6 to 7.4 on the study's text tasks in batches of 64


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

    @property
    def gain(self) -> float:
        """Wanted negatives beside an anchor, over what random clusters would hold; 0 where these hold none."""
        return self.window_per_anchor / self.random_window_per_anchor if self.random_window_per_anchor else 0.0


def audit_clusters(graph: MiningGraph, cluster: np.ndarray, *, anchor_id: np.ndarray, positive_id: np.ndarray) -> Audit:
    """Count, in one pass over the edges: `cluster` (n,) int, -1 for none; ids (n,) int, equal for identical texts."""
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
    """Who sits beside an anchor: how many rows of a `cluster` (n,) have a `text` (n,), as `first_rows` numbers them."""

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


class Mark(NamedTuple):
    """A figure of a plan, what is good, and what it advises against where it is not."""

    name: str
    value: str
    good: str
    passed: bool
    advice: str


def marks(figures: Mapping[str, float], *, mask_suspects: bool = False) -> list[Mark]:
    """The figures that decide whether mined batches help, beside their pass marks; that of the teacher is first.

    A mined batch trusts the teacher twice: that what it ranks high is hard, and that what it ranks just below the top
    is not also right. The limits are rules of thumb: in a later study (docs/log.md) batches of a weak teacher trained
    no worse than those of a good one. So a warning is a question to look into, not a verdict.

    Args:
        figures: See `PlanInspection.figures`.
        mask_suspects: Whether the loss is known to mask them.
    """
    own_first, suspects, masked, gain = (figures[name] for name in ("own_first", "suspects", "masked", "gain"))
    masks = "" if mask_suspects else ", or set loss.mask_suspects"
    return [
        Mark(
            *("own positive first", f"{own_first:.1%}", f"{WEAK_TEACHER:.0%} or more", own_first >= WEAK_TEACHER),
            f"The teacher finds the own positive first for only {own_first:.1%} of the anchors (good: "
            f"{WEAK_TEACHER:.0%} or more; it falls as data grow). What it takes for hard may be easy, or right. Use a "
            "better teacher, or random batches.",
        ),
        Mark(
            *("softmax mass in the batch", f"{gain:.1f} times random", f"{LITTLE_GAIN:g} times random or more"),
            gain >= LITTLE_GAIN,
            f"The batches hold {gain:.1f} times the softmax mass that random ones hold (good: {LITTLE_GAIN:g} or "
            "more): mining changes little here. Save the time and use mining.method=random.",
        ),
        Mark(
            *("softmax mass masked", f"{masked:.1%}", f"{MUCH_MASKED:.0%} or less", masked <= MUCH_MASKED),
            f"The teacher suspects negatives that hold {masked:.1%} of the softmax mass (good: {MUCH_MASKED:.0%} or "
            "less) of being right; with loss.mask_suspects the model never learns to tell them apart. Compare with "
            "mining.method=random, or use a better teacher.",
        ),
        Mark(
            *("suspected false negatives per anchor", f"{suspects:.2f}", f"{MANY_SUSPECTS:g} or less"),
            suspects <= MANY_SUSPECTS,
            f"{suspects:.2f} suspected false negatives are in an anchor's batch (good: {MANY_SUSPECTS:g} or less). "
            f"Read some of them (anybatch inspect plan); raise mining.conflict_weight{masks}.",
        ),
    ]


def advice(figures: Mapping[str, float], *, mined: bool = True, mask_suspects: bool = False) -> list[str]:
    """What figures of a plan advise against, in words; of random batches, which chose nothing, the teacher alone."""
    judged = marks(figures, mask_suspects=mask_suspects)
    return [mark.advice for mark in (judged if mined else judged[:1]) if not mark.passed]


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
