"""From rankings to one signed graph: wanted edges positive, suspected false negatives negative. Imports neighbours."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
from scipy import sparse

from anybatch.core.errors import AnybatchError
from anybatch.mining.inputs import check_at_least
from anybatch.mining.neighbors import Neighbors


@dataclass(frozen=True)
class Window:
    """Which ranks are what.

    Attributes:
        skip: The first ranks, which are suspected false negatives.
        take: The ranks after them, which are wanted.
        margin: Also suspected: whatever scores above `margin` times the row's own positive (NV-Retriever: 0.95). None:
            ranks alone.

    Example:
        >>> Window(skip=30, take=64).depth
        94
        >>> Window(skip=30, take=64).fitted(100)  # what 100 rows can fill
        Window(skip=10, take=50, margin=None)
    """

    skip: int
    take: int
    margin: float | None = None

    @property
    def depth(self) -> int:
        """Neighbours that are needed."""
        return self.skip + self.take

    def fitted(self, num_rows: int) -> Window:
        """One that the data can fill: skip at most a tenth of the rows, take at most half of them."""
        return Window(min(self.skip, num_rows // 10), min(self.take, max(1, num_rows // 2)), self.margin)

    def cut(self, neighbors: Neighbors) -> tuple[np.ndarray, np.ndarray]:
        """Which of each row's neighbours are wanted negatives, and which are suspected to be false ones.

        Returns:
            Two bool arrays (rows, depth): wanted, suspected. Missing neighbours are neither.
        """
        check_at_least("skip", self.skip, 0)
        check_at_least("take", self.take, 1)
        present = neighbors.ids[:, : self.depth] >= 0
        suspected = present & (np.arange(present.shape[1]) < self.skip)[None]
        if self.margin is not None:
            # Relative to a positive score only: times a negative one, the margin would forbid everything.
            limit = np.where(neighbors.own_score > 0, self.margin * neighbors.own_score, np.inf)
            suspected |= present & (neighbors.scores[:, : self.depth] > limit[:, None])
        return present & ~suspected, suspected


@dataclass(frozen=True, kw_only=True, eq=False)
class MiningGraph:
    """Who wants to sit beside whom, and who must not.

    Attributes:
        window: (n, n) CSR, 1.0 where j is in i's rank window: a wanted negative of i.
        conflict: (n, n) CSR, 1.0 where j is among i's excluded top ranks: suspected to be a false negative.
        weight: (n, n) symmetric CSR of what a partitioner maximises inside clusters: the number of wanted edges.

    Example:
        >>> ids = np.array([[1, 2], [0, 2], [0, 1]], np.int32)  # of each row the nearest others, best first
        >>> neighbors = Neighbors(ids=ids, scores=np.ones((3, 2), np.float32), own_score=np.ones(3, np.float32))
        >>> build_graph(neighbors, Window(skip=1, take=1)).conflict.toarray().tolist()
        [[0.0, 1.0, 0.0], [1.0, 0.0, 0.0], [1.0, 0.0, 0.0]]
    """

    window: sparse.csr_matrix
    conflict: sparse.csr_matrix
    weight: sparse.csr_matrix

    def signed(self, conflict_weight: float) -> sparse.csr_matrix:
        """The one objective's matrix: `weight - conflict_weight * (conflict + its transpose)`, symmetric, float32."""
        total = self.weight - conflict_weight * (self.conflict + self.conflict.T)
        total = sparse.csr_matrix(total, dtype=np.float32)
        total.sort_indices()
        return total

    def attraction(self, conflict_weight: float) -> sparse.csr_matrix:
        """The positive entries of `signed`: what a partitioner, which knows no repulsion, can begin with."""
        total = self.signed(conflict_weight)
        total.data = np.maximum(total.data, 0)
        total.eliminate_zeros()
        return total


def build_graph(neighbors: Neighbors, window: Window, *, edges: Literal["union", "mutual"] = "union") -> MiningGraph:
    """Cut the rank windows and join them.

    Args:
        neighbors: At least as many ranks as the window is deep.
        window: Which ranks are wanted, which suspected.
        edges: "union": wanted by either side (twice the weight if by both); "mutual": wanted by both sides, as
            published.

    Cost: 12 bytes an edge and side.
    """
    num_rows = len(neighbors.ids)
    ids = neighbors.ids[:, : window.depth]
    if ids.size and int(ids.max()) >= num_rows:  # sparse products check no index
        raise AnybatchError(
            f"A neighbour is row {int(ids.max())} of {num_rows}. Search the neighbours of these rows anew."
        )
    wanted, conflict = (_csr(ids, chosen, num_rows) for chosen in window.cut(neighbors))
    both = wanted + wanted.T
    if edges == "mutual":
        both = both.multiply(wanted.multiply(wanted.T))
    weight = sparse.csr_matrix(both, dtype=np.float32)
    weight.sort_indices()
    return MiningGraph(window=wanted, conflict=conflict, weight=weight)


def _csr(ids: np.ndarray, chosen: np.ndarray, num_rows: int) -> sparse.csr_matrix:
    pointers = np.zeros(num_rows + 1, np.int64)
    np.cumsum(chosen.sum(axis=1), out=pointers[1:])
    matrix = sparse.csr_matrix(
        (np.ones(int(pointers[-1]), np.float32), ids[chosen], pointers), shape=(num_rows, num_rows)
    )
    matrix.sort_indices()
    return matrix
