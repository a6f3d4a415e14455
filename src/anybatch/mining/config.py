"""What mining is asked for, and what it reports."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, fields
from typing import Annotated, ClassVar, Literal

from anybatch.core.configuration import Configuration, Count, CountOrZero, NotNegative, Range, Seed
from anybatch.core.errors import AnybatchError
from anybatch.core.files import check_name
from anybatch.mining.graph import Window
from anybatch.mining.recipes import SAHA_POOL

RankWindow = Literal["auto"] | tuple[CountOrZero, CountOrZero]
MOST = 32  # rows of a cluster
PUBLISHED = {"published": 32, "saha": 8}  # methods whose "auto" is their paper's, and the rows of their clusters
MARGIN = 0.95  # of the own positive's score, from which a pair is suspected: NV-Retriever's
CONFLICT_WEIGHT = 30.0
LABEL_ROWS = 5  # rows of a positive, in the mean, from which positives are labels
LABEL_PERCENT = 30  # of all labels, the hardest wrong ones are an anchor's window: published


@dataclass(frozen=True, kw_only=True)
class MiningConfig(Configuration):
    """How batches are chosen.

    Attributes:
        method: "anybatch" (union of windows, recursive bisection, search by exchanges with conflicts), "published" (B3
            as released: mutual edges, METIS k-way, conflicts left out of the graph but not kept apart; cut to equal
            sizes, which plans need), "saha" (SaHa: texts of the first ranks whose anchors are far), "random"; to
            compare with: "kmeans" (cells of [anchor; positive]), "bandwidth" (GCBS), "loss_ordered" (OSGD under the
            teacher). "auto": "anybatch"; in a run "random" without a teacher, with images, for models that are no
            transformers under loss.name "auto", or where a figure of the mined plan is not good (docs/recipe.md).
        batch_size: Rows of a batch, over all ranks.
        cluster_size: Rows that sit together; the batch is a multiple of it. "auto": the largest divisor of the batch up
            to a sixteenth of it, 2 to 32; 32 for "published", 8 for "saha".
        window: Ranks of distinct positives, [p, m]: the first p are suspected false negatives, the m after them are
            wanted. "auto": see `auto_window`; for "published" and "saha" their papers'.
        margin: Also suspected: what scores above this share of the own positive, both counted from the mean score.
            "auto": 0.95, for "published" and "saha" none; None for ranks alone.
        conflict_weight: What a suspected false negative in the cluster costs, in wanted edges; of method "anybatch"
            alone. "auto": 30.
        neighbors: "exact", "ivf", or "auto" by the number of rows.
        num_negatives: Explicit hard negatives drawn for each row (B3++).
        mixing: With several data sets: batches "within" one (B3), or "mixed".
        seed: Of everything random.

    Example:
        >>> MiningConfig(batch_size=256).settled().cluster_size
        16
    """

    method: Literal["auto", "anybatch", "published", "random", "saha", "kmeans", "bandwidth", "loss_ordered"] = "auto"
    batch_size: Count = 64
    cluster_size: Literal["auto"] | Annotated[int, Range(2)] = "auto"
    window: RankWindow = "auto"
    margin: Literal["auto"] | NotNegative | None = "auto"
    conflict_weight: Literal["auto"] | Annotated[float, Range(0, 1e6)] = "auto"
    neighbors: Literal["auto", "exact", "ivf"] = "auto"
    num_negatives: CountOrZero = 0
    mixing: Literal["within", "mixed"] = "within"
    seed: Seed = 0

    section: ClassVar[str] = "mining"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.method == "random" and self.num_negatives:
            raise AnybatchError(
                f"mining.num_negatives is {self.num_negatives}, and mining.method 'random' ranks nothing to draw them "
                "from. Remove it, or choose another method."
            )
        if self.method not in ("auto", "anybatch") and self.conflict_weight not in ("auto", 0.0):
            raise AnybatchError(
                f"mining.conflict_weight is {self.conflict_weight}, and mining.method '{self.method}' has no conflict "
                "term. Remove it, or choose method 'anybatch'."
            )
        _check_window("mining.window", self.window)

    def settled(self) -> SettledConfig:
        """The same with numbers for "auto", but for the window, which depends on the data (`window_for`)."""
        published = self.method in PUBLISHED
        numbers = {
            "method": "anybatch",
            "cluster_size": MOST,
            "margin": None if published else MARGIN,
            "conflict_weight": CONFLICT_WEIGHT if self.method in ("auto", "anybatch") else 0.0,
        }
        if self.cluster_size == "auto" and self.method != "random":
            numbers["cluster_size"] = auto_cluster_size(
                self.batch_size, PUBLISHED.get(self.method, self.batch_size // 16)
            )
        given = {field.name: getattr(self, field.name) for field in fields(self)}
        return SettledConfig(**given | {name: value for name, value in numbers.items() if given[name] == "auto"})


@dataclass(frozen=True, kw_only=True)
class SettledConfig(MiningConfig):
    """A `MiningConfig` without "auto", but for the window."""

    method: Literal["anybatch", "published", "random", "saha", "kmeans", "bandwidth", "loss_ordered"] = "anybatch"
    cluster_size: Annotated[int, Range(2)] = MOST
    margin: NotNegative | None = MARGIN
    conflict_weight: Annotated[float, Range(0, 1e6)] = CONFLICT_WEIGHT

    def window_for(self, num_rows: int, num_texts: int, asked: RankWindow | None = None) -> tuple[Window, Window]:
        """The window as asked for by a data set (None: by the configuration), and as its distinct texts can fill it."""
        asked = self.window if asked is None else asked
        ranks = auto_window(self.method, self.cluster_size, num_rows, num_texts) if asked == "auto" else asked
        window = Window(*ranks, self.margin)
        return window, window.fitted(num_texts)


def auto_cluster_size(batch_size: int, most: int) -> int:
    """The largest divisor of the batch that is at most `most` and 32; where there is none, the smallest above 1.

    Clusters are many and small: nDCG@10 at 64 with exact weights was .535, .564, .568 for clusters of 32, 8, 4.
    """
    most = min(max(most, 2), MOST)
    for size in (*range(most, 1, -1), *range(most + 1, MOST + 1)):
        if batch_size % size == 0:
            return size
    raise AnybatchError(
        f"batch_size is {batch_size}, which no cluster of 2 to {MOST} rows divides; mined batches are whole clusters. "
        "Choose another batch_size, such as a multiple of 16, or mining.method 'random'."
    )


def label_like(num_rows: int, num_texts: int) -> bool:
    """Whether positives are labels: few texts that many rows have."""
    return num_rows >= LABEL_ROWS * num_texts


def auto_window(method: str, cluster_size: int, num_rows: int, num_texts: int) -> tuple[int, int]:
    """The ranks [p, m] of a data set.

        anybatch    p = 5     m = 2 K, at least 32        p at most: see `Window.to_conflicts`
        published   p = 30    m = 100
        saha        p = 0     m = 12 (K - 1)
        labels      p = 0, m = 30% of the labels (published); p = 5, m = a tenth, at least 10 (anybatch)

    Measured on 4,096 titles and abstracts, batches of 64: with clusters of 4 windows of 8 to 64 ranks are alike.
    """
    labels = label_like(num_rows, num_texts)
    if method == "saha":
        return 0, max(1, min(2 * SAHA_POOL * (cluster_size - 1), num_texts // 2))
    if method == "published":
        return (0, math.ceil(LABEL_PERCENT * num_texts / 100)) if labels else (30, 100)
    take = max(32, 2 * cluster_size)
    return min(5, num_texts // 10), max(1, min(take, max(10, num_texts // 10) if labels else take, num_texts // 2))


def _check_window(name: str, window: RankWindow | None) -> None:
    if isinstance(window, tuple) and window[1] < 1:
        raise AnybatchError(f"{name} is {list(window)}; expected [p, m] with at least one wanted rank, m.")


@dataclass(frozen=True, kw_only=True)
class MiningSet(Configuration):
    """One of several data sets that lie one after the other.

    Attributes:
        name: For the plan, the report and the folder of its neighbours; a plain file name.
        num_rows: Its rows.
        window: Its own rank window; None for the configuration's.

    Example:
        >>> MiningSet(name="questions", num_rows=1000, window=(70, 100)).num_rows
        1000
    """

    name: str
    num_rows: CountOrZero
    window: RankWindow | None = None

    section: ClassVar[str] = "sets[]"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_name(self.name, "data set")
        _check_window("sets[].window", self.window)


@dataclass(kw_only=True)
class MiningReport:
    """What mining found.

    Attributes:
        figures: See `PlanInspection.figures`; none of random batches, and of a data set without a cluster.
        warnings: What is likely to hurt, in words.
        recall: Of the neighbours, measured; 1.0 if exact.
        notes: What had to be changed, in words.
        sets: The reports on the data sets, if there are several.

    Example:
        >>> MiningReport().recall
        1.0
    """

    figures: dict[str, float] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)
    recall: float = 1.0
    notes: list[str] = field(default_factory=list)
    sets: dict[str, MiningReport] = field(default_factory=dict)
