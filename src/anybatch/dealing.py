"""Which clusters make a batch together, for plans over several data sets. Imports nothing."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, kw_only=True, eq=False)
class Deal:
    """How an epoch's clusters are dealt into batches.

    Attributes:
        cluster_task: (C,) int, the data set of each cluster.
        shares: For each data set the share of its clusters dealt in an epoch, in (0, 1].
        clusters_per_batch: m.
        within: Batches of one data set each, but for the clusters that are left over of every set, which share
            batches; otherwise all sets are mixed.
    """

    cluster_task: np.ndarray
    shares: tuple[float, ...]
    clusters_per_batch: int
    within: bool

    @property
    def quotas(self) -> list[int]:
        """Clusters dealt of each data set."""
        sizes = np.bincount(self.cluster_task, minlength=len(self.shares))
        return [max(1, round(share * int(size))) if size else 0 for share, size in zip(self.shares, sizes, strict=True)]

    @property
    def num_batches(self) -> int:
        """Batches an epoch."""
        return sum(self.quotas) // self.clusters_per_batch

    def order(self, generator: np.random.Generator) -> np.ndarray:
        """(num_batches, m) cluster numbers; each at most once."""
        m = self.clusters_per_batch
        drawn = [
            generator.permutation(np.flatnonzero(self.cluster_task == task))[:quota]
            for task, quota in enumerate(self.quotas)
        ]
        if not self.within:
            return generator.permutation(np.concatenate(drawn))[: self.num_batches * m].reshape(-1, m)
        full = [clusters[: len(clusters) // m * m].reshape(-1, m) for clusters in drawn]
        left = generator.permutation(np.concatenate([clusters[len(clusters) // m * m :] for clusters in drawn]))
        full.append(left[: len(left) // m * m].reshape(-1, m))
        return generator.permutation(np.concatenate(full))

    def chance_beside(self, task: int) -> float:
        """That a given other cluster of the same data set shares the batch of a cluster that is dealt."""
        quotas, m = self.quotas, self.clusters_per_batch
        size = int(np.count_nonzero(self.cluster_task == task))
        if size < 2 or quotas[task] == 0:
            return 0.0
        if (
            not self.within
        ):  # m - 1 of the other clusters dealt, which are of this set as often as its share of them says
            dealt = sum(quotas)
            return (m - 1) * (quotas[task] - 1) / (dealt - 1) / (size - 1) if dealt > 1 else 0.0
        left = [quota % m for quota in quotas]
        whole, pool = quotas[task] - left[task], sum(left)
        shared = left[task] * (pool // m * m) / pool if pool else 0.0  # of those left over, how many find a batch
        mates = whole * (m - 1)
        if pool > 1:
            mates += shared * (m - 1) * (left[task] - 1) / (pool - 1)
        return mates / (whole + shared) / (size - 1) if whole + shared else 0.0
