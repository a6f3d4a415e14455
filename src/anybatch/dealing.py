"""Which clusters make a batch together, for plans over several data sets, and with what chance two rows do. Imports nothing."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from math import comb

import numpy as np


@dataclass(frozen=True, kw_only=True)
class Chances:
    """That a given other row of the same data set is in the batch of an anchor that is dealt.

    Attributes:
        same, other, remainder: The anchor is in a cluster, the other row in the same, in another, in none (a remainder row).
        from_remainder, between_remainders: The anchor is a remainder row, the other one is in a cluster, in none.
    """

    same: float = 0.0
    other: float = 0.0
    remainder: float = 0.0
    from_remainder: float = 0.0
    between_remainders: float = 0.0


@dataclass(frozen=True, kw_only=True, eq=False)
class Deal:
    """How an epoch's clusters are dealt into batches.

    Attributes:
        cluster_task: (C,) int, the data set of each cluster.
        shares: For each data set the share of its clusters dealt in an epoch, in (0, 1].
        clusters_per_batch: m.
        within: Batches of one data set each, but for the clusters that are left over of every set, which share
            batches; otherwise all sets are mixed.
        cluster_size: K, rows of a cluster.
        remainders: For each data set its rows in no cluster; () for none.
    """

    cluster_task: np.ndarray
    shares: tuple[float, ...]
    clusters_per_batch: int
    within: bool
    cluster_size: int = 1
    remainders: tuple[int, ...] = ()

    @property
    def quotas(self) -> list[int]:
        """Clusters dealt of each data set."""
        return [
            max(1, round(share * size)) if size else 0 for share, size in zip(self.shares, self._sizes, strict=True)
        ]

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

    def draw_remainder(self, task: int, generator: np.random.Generator) -> int:
        """How many rows in no cluster get a place this epoch: their share of them on average."""
        low, high_chance = self._expected_remainder(task)
        return low + int(high_chance > 0 and generator.random() < high_chance)

    def chances(self, task: int) -> Chances:
        """The chances of a data set's pairs of rows, over the epochs in which the anchor is dealt.

        With N of its C clusters of K rows dealt, on T = N K places, p of its r remainder rows on them, H = T - p rows at home, and M
        ordered pairs of its clusters in one batch, and S = N K (K - 1) + M K^2 ordered pairs of places in one batch:

            anchor at home       E[H] / (C K)              and a row of its cluster       E[N / C  H (H - 1) / (T (T - 1))]
                                                           and a row of another cluster   E[M / (C (C - 1))  H (H - 1) / (T (T - 1))]
                                                           and a remainder row            E[p / r  S / (T (T - 1))  H] / (C K)
            remainder anchor     E[p] / r                  and another one                E[p (p - 1) / (r (r - 1))  S / (T (T - 1))]

        The expectations are over N and p. Rows of sets without a cluster are guests on places that are left, and their number, which is random
        where their share is below 1, is taken at its mean.
        """
        size, rows, remainder = self._sizes[task], self.cluster_size, self._remainder(task)
        low, high_chance = self._expected_remainder(task)
        if not size:
            return Chances(between_remainders=self._chance_between_guests(task))
        home = loose = same = other = mixed = both = 0.0
        for chance, clusters, mates in self._dealings(task):
            places = clusters * rows
            pairs = places * max(1, places - 1)
            together = clusters * rows * (rows - 1) + mates * rows**2
            for placed, weight in ((low, 1 - high_chance), (low + 1, high_chance)):
                placed, weight = min(placed, places), weight * chance
                if not places or not weight:
                    continue
                at_home = places - placed
                home += weight * at_home / (size * rows)
                loose += weight * placed / max(1, remainder)
                stay = weight * at_home * (at_home - 1) / pairs
                same += stay * clusters / size
                other += stay * mates / (size * max(1, size - 1))
                mixed += weight * placed / max(1, remainder) * together / pairs * at_home / (size * rows)
                both += weight * placed * (placed - 1) / max(1, remainder * (remainder - 1)) * together / pairs
        free, guests = self._free_and_guests()
        kept = [max(0.0, 1 - guests / max(1.0, total)) for total in (free - 1, free)]
        at_home, at_large = max(home, 1e-300), max(loose, 1e-300)
        return Chances(
            same=same / at_home * kept[0],
            other=other / at_home * kept[0],
            remainder=mixed / at_home,
            from_remainder=mixed / at_large * kept[1],
            between_remainders=both / at_large,
        )

    @cached_property
    def _sizes(self) -> list[int]:
        return np.bincount(self.cluster_task, minlength=len(self.shares)).tolist()

    def _remainder(self, task: int) -> int:
        return self.remainders[task] if self.remainders else 0

    def _expected_remainder(self, task: int) -> tuple[int, float]:
        """The least number of remainder rows that get a place, and the chance that it is one more."""
        expected = self.shares[task] * self._remainder(task)
        return int(expected), expected - int(expected)

    def _dealings(self, task: int) -> list[tuple[float, int, float]]:
        """(chance, N clusters of this set dealt, ordered pairs of them that share a batch): all that can happen."""
        quotas, m = self.quotas, self.clusters_per_batch
        left = [quota % m for quota in quotas] if self.within else quotas
        own, pool = left[task], sum(left)
        out = pool % m  # of the pool, those that find no batch
        found = []
        for missing in range(min(own, out) + 1):
            chance = comb(own, missing) * comb(pool - own, out - missing) / comb(pool, out)
            drawn, whole = own - missing, quotas[task] - own
            mates = whole * (m - 1) + drawn * (drawn - 1) * (m - 1) / max(1, pool - out - 1)
            found.append((chance, whole + drawn, mates))
        return found

    def _free_and_guests(self) -> tuple[float, float]:
        """Places of an epoch that no remainder row of a set with clusters has, and rows of sets without, on average."""
        expected = [share * self._remainder(task) for task, share in enumerate(self.shares)]
        taken = sum(rows for rows, size in zip(expected, self._sizes, strict=True) if size)
        return self.num_batches * self.clusters_per_batch * self.cluster_size - taken, sum(expected) - taken

    def _chance_between_guests(self, task: int) -> float:
        remainder, (low, high_chance) = self._remainder(task), self._expected_remainder(task)
        pairs = low * (low - 1) + high_chance * 2 * low  # (low + 1) low - low (low - 1)
        batch = self.clusters_per_batch * self.cluster_size
        expected = max(1e-300, (low + high_chance) * (remainder - 1))
        return pairs / expected * (batch - 1) / max(1, self.num_batches * batch - 1)
