"""From rankings to one signed graph: wanted edges positive, suspected false negatives negative.

Ranks are of distinct positives (texts). A text that several rows have is one rank; only the edges of the graph, which
join rows, lead to some of its rows.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
from scipy import sparse

from anybatch.core.errors import AnybatchError
from anybatch.mining.inputs import BLOCK_ROWS, check_at_least
from anybatch.mining.neighbors import Neighbors

UNSURE = 1 / 3  # of the rows: a rank that the margin suspects of so many is skipped in all
EDGES = 128  # about as many lead from a row whose ranks are texts of several rows: of 50 rows of a label a few do


@dataclass(frozen=True)
class Window:
    """Which ranks are what.

    Attributes:
        skip: The first ranks, which are suspected false negatives.
        take: The ranks after them, which are wanted.
        margin: Also suspected: whatever scores above this share of the row's own positive, both counted from the mean
            score (NV-Retriever: 0.95, from 0). None: ranks alone.

    Example:
        >>> Window(skip=30, take=64).depth
        94
        >>> Window(skip=30, take=64).fitted(100)  # what 100 texts can fill
        Window(skip=10, take=50, margin=None)
    """

    skip: int
    take: int
    margin: float | None = None

    @property
    def depth(self) -> int:
        """Neighbours that are needed."""
        return self.skip + self.take

    def fitted(self, num_texts: int) -> Window:
        """One that the data can fill: skip at most a tenth of the distinct positives, take at most half of them."""
        return Window(min(self.skip, num_texts // 10), min(self.take, max(1, num_texts // 2)), self.margin)

    def to_conflicts(self, neighbors: Neighbors) -> Window:
        """One that skips only those of its first ranks that the margin suspects of every third row or more: elsewhere
        these are the hardest negatives, and hold the most softmax mass. Without a margin all are skipped.
        """
        if self.margin is None:
            return self
        first = replace(neighbors, ids=neighbors.ids[:, : self.skip], scores=neighbors.scores[:, : self.skip])
        _, suspected = replace(self, skip=0).cut(first)
        return replace(self, skip=int(np.cumprod(suspected.mean(axis=0) >= UNSURE).sum()))

    def cut(self, neighbors: Neighbors) -> tuple[np.ndarray, np.ndarray]:
        """(rows, depth) bool twice: which neighbours are wanted negatives, and which suspected to be false ones."""
        check_at_least("skip", self.skip, 0)
        check_at_least("take", self.take, 1)
        present = neighbors.ids[:, : self.depth] >= 0
        suspected = present & (np.arange(present.shape[1]) < self.skip)[None]
        if self.margin is not None:
            # Of an own positive above the mean only: times a negative number, the margin would forbid everything.
            above = neighbors.own_score - neighbors.mean_score
            limit = np.where(above > 0, self.margin * above + neighbors.mean_score, np.inf)
            suspected |= present & (neighbors.scores[:, : self.depth] > limit[:, None])
        return present & ~suspected, suspected


@dataclass(frozen=True, kw_only=True, eq=False)
class MiningGraph:
    """Who wants to sit beside whom, and who must not.

    Attributes:
        window: (n, n) CSR, 1.0 where text j is in i's rank window: a wanted negative of i. Of a text that several rows
            have, j is the row that was ranked.
        conflict: (n, n) CSR, 1.0 where text j is among i's excluded ranks: suspected to be a false negative.
        weight: (n, n) symmetric CSR of what a partitioner maximises inside clusters: the number of wanted edges.
        apart: (n, n) symmetric CSR: the number of conflicts between two rows.

    Example:
        >>> ids = np.array([[1, 2], [0, 2], [0, 1]], np.int32)  # of each row the nearest others, best first
        >>> neighbors = Neighbors(ids=ids, scores=np.ones((3, 2), np.float32), own_score=np.ones(3, np.float32))
        >>> build_graph(neighbors, Window(skip=1, take=1)).conflict.toarray().tolist()
        [[0.0, 1.0, 0.0], [1.0, 0.0, 0.0], [1.0, 0.0, 0.0]]
    """

    window: sparse.csr_matrix
    conflict: sparse.csr_matrix
    weight: sparse.csr_matrix
    apart: sparse.csr_matrix

    def signed(self, conflict_weight: float) -> sparse.csr_matrix:
        """The one objective's matrix: `weight - conflict_weight * apart`, symmetric, float32."""
        total = sparse.csr_matrix(self.weight - conflict_weight * self.apart, dtype=np.float32)
        total.sort_indices()
        return total

    def attraction(self, conflict_weight: float) -> sparse.csr_matrix:
        """The positive entries of `signed`: what a partitioner, which knows no repulsion, can begin with."""
        total = self.signed(conflict_weight)
        total.data = np.maximum(total.data, 0)
        total.eliminate_zeros()
        return total


def build_graph(
    neighbors: Neighbors,
    window: Window,
    *,
    text: np.ndarray | None = None,
    edges: Literal["union", "mutual"] = "union",
    seed: int = 0,
) -> MiningGraph:
    """Cut the rank windows and join them.

    Args:
        neighbors: At least as many ranks as the window is deep.
        window: Which ranks are wanted, which suspected.
        text: (n,) int, of each row the row that was ranked for its text (`first_rows`); None: each row itself.
        edges: "union": wanted by either side (twice the weight if by both); "mutual": wanted by both sides, as
            published.
        seed: Of which rows of a text that several rows have an edge leads to.

    Cost: 12 bytes an edge and side; of `EDGES` edges a row, or one for each rank where these are more.
    """
    num_rows = len(neighbors.ids)
    ids = neighbors.ids[:, : window.depth]
    if ids.size and int(ids.max()) >= num_rows:  # sparse products check no index
        raise AnybatchError(f"A neighbour is row {int(ids.max())} of {num_rows}. Search these rows' neighbours anew.")
    wanted, conflict = (_matrix(ids[chosen], chosen.sum(axis=1), num_rows) for chosen in window.cut(neighbors))
    text = np.arange(num_rows) if text is None else np.asarray(text)
    joined, conflicts = (_to_rows(matrix, text, seed) for matrix in (wanted, conflict))
    if edges == "mutual":
        joined = _mutual(joined, wanted, text)
    weight = sparse.csr_matrix(joined + joined.T, dtype=np.float32)
    weight.sort_indices()
    return MiningGraph(window=wanted, conflict=conflict, weight=weight, apart=conflicts + conflicts.T)


def suspect_pairs(conflict: sparse.csr_matrix) -> np.ndarray:
    """All suspected false negatives: (p, 2) int32, sorted: a row, and one whose text may be right for its anchor.

    The other way round is a pair of its own: a text that many anchors come near need not be near to theirs. Those of
    other clusters too: they meet in a batch, and a loss that stands for the whole data would weigh them most.
    """
    rows = np.repeat(np.arange(len(conflict.indptr) - 1), np.diff(conflict.indptr))
    return np.stack([rows, conflict.indices], axis=1).astype(np.int32)


def _matrix(indices: np.ndarray, counts: np.ndarray, num_rows: int) -> sparse.csr_matrix:
    """(num_rows, num_rows) CSR of ones, `counts` of them in each row."""
    pointers = np.zeros(num_rows + 1, np.int64)
    np.cumsum(counts, out=pointers[1:])
    matrix = sparse.csr_matrix((np.ones(len(indices), np.float32), indices, pointers), shape=(num_rows, num_rows))
    matrix.sort_indices()
    return matrix


def _to_rows(matrix: sparse.csr_matrix, text: np.ndarray, seed: int) -> sparse.csr_matrix:
    """From texts to rows that have them: to all, or to some where a row's edges would be more than `EDGES`."""
    num_rows, generator = len(text), np.random.default_rng(seed)
    if len(np.unique(text)) == num_rows:
        return matrix
    order = np.argsort(text, kind="stable").astype(np.int32)  # the rows of a text, one after the other
    size = np.bincount(text, minlength=num_rows)
    first = np.cumsum(size) - size
    found, counts = [], []
    for start in range(0, num_rows, BLOCK_ROWS):
        pointers = matrix.indptr[start : start + BLOCK_ROWS + 1]
        texts, ranks = matrix.indices[pointers[0] : pointers[-1]], np.diff(pointers)
        copies = np.minimum(size[texts], np.repeat(np.maximum(1, EDGES // np.maximum(1, ranks)), ranks))
        ends = np.cumsum(copies)
        turn = np.arange(ends[-1] if len(ends) else 0) - np.repeat(ends - copies, copies)
        turn += np.repeat(generator.integers(size[texts]), copies)  # a run of them, from a random one on
        found.append(order[np.repeat(first[texts], copies) + turn % np.repeat(size[texts], copies)])
        counts.append(np.diff(np.concatenate([[0], ends])[pointers - pointers[0]]))
    return _matrix(np.concatenate(found), np.concatenate(counts), num_rows)


def _mutual(joined: sparse.csr_matrix, wanted: sparse.csr_matrix, text: np.ndarray) -> sparse.csr_matrix:
    """The edges between two rows of which each wants the other's text."""
    num_rows = len(text)
    rows = np.repeat(np.arange(num_rows), np.diff(joined.indptr))
    back = joined.indices.astype(np.int64) * num_rows + text[rows]
    keys = np.repeat(np.arange(num_rows), np.diff(wanted.indptr)) * num_rows + wanted.indices  # ascending
    keys = np.append(keys, num_rows**2)  # above them all, so that a search ends in the array
    keep = keys[np.searchsorted(keys, back)] == back
    return _matrix(joined.indices[keep], np.bincount(rows[keep], minlength=num_rows), num_rows)
