"""Which clusters and rows make an epoch's batches, and with what chance two rows share one."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property

import numpy as np


@dataclass(frozen=True, kw_only=True)
class Chances:
    """That a given other row of the same data set is in the batch of an anchor that is sampled."""

    # The anchor is in a cluster, the other row in the same (1 where none can be), in another, in none.
    same: float = 0.0
    other: float = 0.0
    remainder: float = 0.0
    # The anchor is in no cluster, the other row is in one, in none.
    from_remainder: float = 0.0
    between_remainders: float = 0.0


@dataclass(frozen=True, kw_only=True, eq=False)
class ClusterSampling:
    """How an epoch's batches are sampled from the clusters of a plan.

    1. The clusters are combined at random, m of them to a batch; those that are left over sit out.
    2. Rows in no cluster take places of the clusters of their data set: on average at most (T - 1) / 2 of the T places
       that it has this epoch, so that every row keeps a chance.
    3. Rows of data sets without a cluster (small ones) take single places anywhere, whoever has them; where they are
       more than half of the epoch's places, half of these, drawn from all such rows.

    Attributes:
        cluster_task: (C,) int, the data set of each cluster.
        num_sets: Data sets.
        clusters_per_batch: m.
        within: Batches of one data set each, but for the clusters that are left over of every set, which share batches;
            otherwise all sets are mixed.
        cluster_size: K, rows of a cluster.
        remainders: For each data set its rows in no cluster; () for none.
    """

    cluster_task: np.ndarray
    num_sets: int
    clusters_per_batch: int
    within: bool
    cluster_size: int = 1
    remainders: tuple[int, ...] = ()

    @property
    def num_batches(self) -> int:
        """Batches an epoch."""
        return len(self.cluster_task) // self.clusters_per_batch

    @cached_property
    def single_rows(self) -> list[int]:
        """For each data set without a cluster its rows; 0 for the others."""
        return [0 if clusters else self._num_loose(task) for task, clusters in enumerate(self._num_clusters)]

    @property
    def num_single_rows(self) -> int:
        """Rows of small data sets in an epoch: at most half of its places."""
        return min(sum(self.single_rows), self._num_places // 2)

    @property
    def sampled_shares(self) -> list[float]:
        """For each data set the part of its clusters that is in an epoch, on average; 0 for those without."""
        return [
            sum(chance * clusters for chance, clusters, _ in self._draws(task)) / count if count else 0.0
            for task, count in enumerate(self._num_clusters)
        ]

    def order(self, generator: np.random.Generator) -> np.ndarray:
        """(num_batches, m) cluster numbers, each at most once."""
        m = self.clusters_per_batch
        drawn = [generator.permutation(np.flatnonzero(self.cluster_task == task)) for task in range(self.num_sets)]
        if not self.within:
            return generator.permutation(np.concatenate(drawn))[: self.num_batches * m].reshape(-1, m)
        full = [clusters[: len(clusters) // m * m].reshape(-1, m) for clusters in drawn]
        left = generator.permutation(np.concatenate([clusters[len(clusters) // m * m :] for clusters in drawn]))
        full.append(left[: len(left) // m * m].reshape(-1, m))
        return generator.permutation(np.concatenate(full))

    def batches(self, members: np.ndarray, loose: Sequence[np.ndarray], generator: np.random.Generator) -> np.ndarray:
        """The batches of one epoch: (num_batches, m K) int row numbers, cluster after cluster within a batch.

        `members` (C, K) are the rows of each cluster, `loose` for each data set its rows in no cluster.
        """
        members, order = members.copy(), self.order(generator)
        # Only clusters that are in this epoch give up places, so every row that takes one is really trained on.
        sampled = order.reshape(-1)
        tasks = self.cluster_task[sampled]
        for task in np.unique(self.cluster_task).tolist():
            clusters = sampled[tasks == task]
            low, up = _rounded(self._expected_remainder(task, len(clusters) * self.cluster_size))
            count = low + int(up > 0 and generator.random() < up)
            if count:
                self._replace(members, clusters, _draw(loose[task], count, generator), generator)
        if self.num_single_rows:
            drawn = [_draw(rows, count, generator) for rows, count in zip(loose, self.single_rows, strict=True)]
            rows = _draw(np.concatenate(drawn), self.num_single_rows, generator)
            self._replace(members, sampled, rows, generator)
        return members[order].reshape(len(order), -1)

    def _replace(
        self, members: np.ndarray, clusters: np.ndarray, rows: np.ndarray, generator: np.random.Generator
    ) -> None:
        """Put rows in the places of randomly chosen ones of these clusters."""
        chosen = generator.choice(len(clusters) * self.cluster_size, size=len(rows), replace=False)
        members[clusters[chosen // self.cluster_size], chosen % self.cluster_size] = rows

    def chances(self, task: int) -> Chances:
        """The chances of a data set's pairs of rows, over the epochs that the anchor is in.

        With N of its C clusters of K rows drawn, on T = N K places, p of its r remainder rows on them, H = T - p rows
        at home, and M ordered pairs of its clusters in one batch, and S = N K (K - 1) + M K^2 ordered pairs of places
        in one:

            anchor at home     E[H] / (C K)   and a row of its cluster      E[N / C  H (H - 1) / (T (T - 1))]
                                              and a row of another cluster  E[M / (C (C - 1))  H (H - 1) / (T (T - 1))]
                                              and a remainder row           E[p / r  S / (T (T - 1))  H] / (C K)
            remainder anchor   E[p] / r       and another one               E[p (p - 1) / (r (r - 1))  S / (T (T - 1))]

        The expectations are over N and p. Then G rows of small data sets take places among all T' of the epoch. Beside
        a row that keeps its place another one does with the chance (T' - G - 1) / (T' - 1). Beside a row of a small
        data set, among the Q such rows of which G come, another one of them is in the batch of B places with

            (G - 1) / (Q - 1)  (B - 1) / (T' - 1).
        """
        num_clusters, num_loose, size = self._num_clusters[task], self._num_loose(task), self.cluster_size
        if not num_clusters:
            return Chances(same=1.0, between_remainders=self._chance_between_single_rows(task))
        home = loose = same = other = mixed = both = 0.0
        for weight, clusters, mates, placed in self._outcomes(task):
            places = clusters * size
            pairs = places * max(1, places - 1)
            together = places * (size - 1) + mates * size**2
            at_home = places - placed
            home += weight * at_home / (num_clusters * size)
            loose += weight * placed / max(1, num_loose)
            stay = weight * at_home * (at_home - 1) / pairs
            same += stay * clusters / num_clusters
            other += stay * mates / (num_clusters * max(1, num_clusters - 1))
            mixed += weight * placed / max(1, num_loose) * together / pairs * at_home / (num_clusters * size)
            both += weight * placed * (placed - 1) / max(1, num_loose * (num_loose - 1)) * together / pairs
        home, loose = max(home, 1e-300), max(loose, 1e-300)
        beside = (self._num_places - self.num_single_rows - 1) / max(1, self._num_places - 1)
        found = Chances(
            same=same / home * beside if size > 1 else 1.0,
            other=other / home * beside,
            remainder=mixed / home * beside,
            from_remainder=mixed / loose * beside,
            between_remainders=both / loose * beside,
        )
        return Chances(**{name: min(1.0, value) for name, value in asdict(found).items()})  # rounding goes a hair above

    def _chance_between_single_rows(self, task: int) -> float:
        both = (self.num_single_rows - 1) / max(1, sum(self.single_rows) - 1)
        return both * (self.clusters_per_batch * self.cluster_size - 1) / max(1, self._num_places - 1)

    @cached_property
    def _num_clusters(self) -> list[int]:
        return np.bincount(self.cluster_task, minlength=self.num_sets).tolist()

    @property
    def _num_places(self) -> int:
        return self.num_batches * self.clusters_per_batch * self.cluster_size

    def _num_loose(self, task: int) -> int:
        return self.remainders[task] if self.remainders else 0

    def _expected_remainder(self, task: int, places: int) -> float:
        return min(self._num_loose(task), max(0, places - 1) / 2)

    def _outcomes(self, task: int) -> Iterator[tuple[float, int, float, int]]:
        """(chance, N clusters, M ordered pairs of them that share a batch, p remainder rows): all that can happen."""
        for chance, clusters, mates in self._draws(task):
            low, up = _rounded(self._expected_remainder(task, clusters * self.cluster_size))
            for placed, weight in ((low, (1 - up) * chance), (low + 1, up * chance)):
                if clusters and weight:
                    yield weight, clusters, mates, placed

    def _draws(self, task: int) -> list[tuple[float, int, float]]:
        """(chance, N clusters of this set, M ordered pairs of them that share a batch): all that can happen."""
        counts, m = self._num_clusters, self.clusters_per_batch
        left = [count % m for count in counts] if self.within else counts
        own, pool = left[task], sum(left)
        out = pool % m  # of the pool, those that find no batch
        found = []
        for missing, chance in _drawn_without_return(pool, own, out):
            drawn, whole = own - missing, counts[task] - own
            mates = whole * (m - 1) + drawn * (drawn - 1) * (m - 1) / max(1, pool - out - 1)
            found.append((chance, whole + drawn, mates))
        return found


def _draw(rows: np.ndarray, count: int, generator: np.random.Generator) -> np.ndarray:
    return rows if count >= len(rows) else generator.permutation(rows)[:count]


def _drawn_without_return(pool: int, own: int, out: int) -> list[tuple[int, float]]:
    """(k, chance that k of `own` are among `out` drawn of `pool` without return), for all k of a chance above 0.

    From the likeliest k outwards by the ratio of neighbours, and divided by their sum: no binomial coefficient, which
    would have thousands of digits.
    """
    least, most = max(0, own + out - pool), min(own, out)
    k = np.arange(least, most, dtype=np.float64)
    up = (own - k) * (out - k) / ((k + 1) * (pool - own - out + k + 1))
    mode = min(max((own + 1) * (out + 1) // (pool + 2), least), most) - least
    above, below = np.cumprod(up[mode:]), np.cumprod(1 / up[:mode][::-1])[::-1]
    chances = np.concatenate([below, [1.0], above])
    chances /= chances.sum()
    return [(least + int(place), float(chances[place])) for place in np.flatnonzero(chances)]


def _rounded(expected: float) -> tuple[int, float]:
    """A whole number, and the chance that it is one more, so that the mean is `expected`."""
    return int(expected), expected - int(expected)
