"""Which clusters make a batch together, for plans over several data sets, and with what chance two rows do. Imports nothing."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from functools import cached_property

import numpy as np


@dataclass(frozen=True, kw_only=True)
class Chances:
    """That a given other row of the same data set is in the batch of an anchor that is dealt.

    Attributes:
        same, other, remainder: The anchor is in a cluster, the other row in the same, in another, in none (a remainder row). `same` is 1
            where no other row can be in the same: clusters of one row, a data set without clusters.
        from_remainder, between_remainders: The anchor is a remainder row, the other one is in a cluster, in none.
    """

    same: float = 0.0
    other: float = 0.0
    remainder: float = 0.0
    from_remainder: float = 0.0
    between_remainders: float = 0.0


@dataclass(frozen=True, kw_only=True, eq=False)
class Deal:
    """How an epoch's clusters are dealt into batches, and who takes their places.

    Rows in no cluster take places of dealt clusters of their data set, as many as its share says on average, but on average at most (T - 1) / 2
    of the T that it has this epoch, so that the clustered rows keep a chance, and two of them a chance to meet. Then single rows of the data
    sets without a cluster take places anywhere, whoever has them: of each data set as many as its share says; where that is more than half of
    the places of the epoch, so many of them, drawn from all together.

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

    @cached_property
    def single_quotas(self) -> list[int]:
        """For each data set without a cluster the single rows that its share says (at least one); 0 for those that have clusters."""
        rows = [0 if size else self._remainder(task) for task, size in enumerate(self._sizes)]
        return [max(1, round(share * count)) if count else 0 for share, count in zip(self.shares, rows, strict=True)]

    @property
    def num_single_rows(self) -> int:
        """Single rows of small data sets in an epoch: at most half of its places."""
        return min(sum(self.single_quotas), self._places // 2)

    @property
    def single_rows(self) -> list[float]:
        """For each data set the single rows of an epoch, on average."""
        kept = self.num_single_rows / max(1, sum(self.single_quotas))
        return [quota * kept for quota in self.single_quotas]

    @property
    def dealt_chances(self) -> list[float]:
        """For each data set the part of its clusters that an epoch deals, on average; 0 for those without."""
        return [
            sum(chance * clusters for chance, clusters, _ in self._dealings(task)) / size if size else 0.0
            for task, size in enumerate(self._sizes)
        ]

    def draw_remainder(self, task: int, places: int, generator: np.random.Generator) -> int:
        """How many rows in no cluster get one of the `places` that the clusters of their data set have this epoch."""
        low, high_chance = _rounded(self._expected_remainder(task, places))
        return low + int(high_chance > 0 and generator.random() < high_chance)

    def chances(self, task: int) -> Chances:
        """The chances of a data set's pairs of rows, over the epochs in which the anchor is dealt.

        With N of its C clusters of K rows dealt, on T = N K places, p of its r remainder rows on them, H = T - p rows at home, and M
        ordered pairs of its clusters in one batch, and S = N K (K - 1) + M K^2 ordered pairs of places in one batch:

            anchor at home       E[H] / (C K)              and a row of its cluster       E[N / C  H (H - 1) / (T (T - 1))]
                                                           and a row of another cluster   E[M / (C (C - 1))  H (H - 1) / (T (T - 1))]
                                                           and a remainder row            E[p / r  S / (T (T - 1))  H] / (C K)
            remainder anchor     E[p] / r                  and another one                E[p (p - 1) / (r (r - 1))  S / (T (T - 1))]

        The expectations are over N and p. Then G single rows of small data sets take places among all T' of the epoch. Beside a row that keeps its
        place another one does with the chance (T' - G - 1) / (T' - 1). Beside a single row of a data set, c of whose r rows are drawn among
        the Q of which G come, another one of them is in the batch of B places with

            (c - 1) / (r - 1)  (G - 1) / (Q - 1)  (B - 1) / (T' - 1).
        """
        size, rows, remainder = self._sizes[task], self.cluster_size, self._remainder(task)
        if not size:
            return Chances(same=1.0, between_remainders=self._chance_between_single_rows(task))
        home = loose = same = other = mixed = both = 0.0
        for chance, clusters, mates in self._dealings(task):
            places = clusters * rows
            pairs = places * max(1, places - 1)
            together = clusters * rows * (rows - 1) + mates * rows**2
            low, high_chance = _rounded(self._expected_remainder(task, places))
            for placed, weight in ((low, 1 - high_chance), (low + 1, high_chance)):
                weight *= chance
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
        at_home, at_large = max(home, 1e-300), max(loose, 1e-300)
        kept = (self._places - self.num_single_rows - 1) / max(1, self._places - 1)
        found = Chances(
            same=same / at_home * kept if rows > 1 else 1.0,
            other=other / at_home * kept,
            remainder=mixed / at_home * kept,
            from_remainder=mixed / at_large * kept,
            between_remainders=both / at_large * kept,
        )
        return Chances(**{name: min(1.0, value) for name, value in asdict(found).items()})  # rounding goes a hair above

    @cached_property
    def _sizes(self) -> list[int]:
        return np.bincount(self.cluster_task, minlength=len(self.shares)).tolist()

    def _remainder(self, task: int) -> int:
        return self.remainders[task] if self.remainders else 0

    def _expected_remainder(self, task: int, places: int) -> float:
        return min(self.shares[task] * self._remainder(task), max(0, places - 1) / 2)

    def _dealings(self, task: int) -> list[tuple[float, int, float]]:
        """(chance, N clusters of this set dealt, ordered pairs of them that share a batch): all that can happen."""
        quotas, m = self.quotas, self.clusters_per_batch
        left = [quota % m for quota in quotas] if self.within else quotas
        own, pool = left[task], sum(left)
        out = pool % m  # of the pool, those that find no batch
        found = []
        for missing, chance in _drawn_without_return(pool, own, out):
            drawn, whole = own - missing, quotas[task] - own
            mates = whole * (m - 1) + drawn * (drawn - 1) * (m - 1) / max(1, pool - out - 1)
            found.append((chance, whole + drawn, mates))
        return found

    @property
    def _places(self) -> int:
        return self.num_batches * self.clusters_per_batch * self.cluster_size

    def _chance_between_single_rows(self, task: int) -> float:
        drawn, rows, pool = self.single_quotas[task], self._remainder(task), sum(self.single_quotas)
        both = (drawn - 1) * (self.num_single_rows - 1) / max(1, (rows - 1) * (pool - 1))
        return both * (self.clusters_per_batch * self.cluster_size - 1) / max(1, self._places - 1)


def _drawn_without_return(pool: int, own: int, out: int) -> list[tuple[int, float]]:
    """(k, chance that k of `own` are among `out` drawn of `pool` without return) for all k of a chance that a float64 holds.

    From the likeliest k outwards by the ratio of neighbours, (own - k) (out - k) / ((k + 1) (pool - own - out + k + 1)), and divided by
    their sum: no binomial coefficient, which would have thousands of digits, and no logarithm of one, which would lose as many digits as it has.
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
