"""What mining is asked for, and what it reports."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Annotated, Any, ClassVar, Literal

from anybatch.core.configuration import Configuration, Count, CountOrZero, NotNegative, Range, Seed, Share
from anybatch.core.errors import AnybatchError
from anybatch.core.files import check_name
from anybatch.mining.audit import Audit
from anybatch.mining.graph import Window
from anybatch.mining.statistics import BatchStatistics


@dataclass(frozen=True, kw_only=True)
class MiningConfig(Configuration):
    """How batches are chosen.

    Attributes:
        method: "anybatch" (union of windows, recursive bisection, search by exchanges with conflicts), "published" (B3
            as released: mutual edges, METIS k-way, conflicts left out of the graph but not kept apart; cut to equal
            sizes, which plans need), "random"; to compare with: "kmeans" (cells of [anchor; positive]), "bandwidth"
            (GCBS), "loss_ordered" (OSGD under the teacher).
        batch_size: Rows of a batch, over all ranks.
        cluster_size: Rows that sit together; the batch is a multiple of it.
        skip: First ranks, suspected false negatives. B3: 30 for retrieval, 70 for short repeated answers. Lower it for
            small data.
        take: Ranks after them that are wanted. More than twice the cluster size shrinks everything and gains nothing.
        margin: Also suspected: what scores above this share of the own positive (0.95 is usual); None for ranks alone.
        conflict_weight: What a suspected false negative in the cluster costs, in wanted edges.
        neighbors: "exact", "ivf", or "auto" by the number of rows.
        num_negatives: Explicit hard negatives drawn for each row (B3++).
        mixing: With several data sets: batches "within" one (B3), or "mixed".
        seed: Of everything random.

    Example:
        >>> MiningConfig(cluster_size=16, skip=5).take
        64
    """

    method: Literal["anybatch", "published", "random", "kmeans", "bandwidth", "loss_ordered"] = "anybatch"
    batch_size: Count = 64
    cluster_size: Annotated[int, Range(2)] = 32
    skip: CountOrZero = 30
    take: Count = 64
    margin: NotNegative | None = None
    conflict_weight: Annotated[float, Range(0, 1e6)] = 3.0
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

    @property
    def window(self) -> Window:
        """Which ranks are wanted, which suspected."""
        return Window(self.skip, self.take, self.margin)


@dataclass(frozen=True, kw_only=True)
class MiningSet(Configuration):
    """One of several data sets that lie one after the other.

    Attributes:
        name: For the plan, the report and the folder of its neighbours; a plain file name.
        num_rows: Its rows.
        skip, take: Its own rank window; None for the configuration's.
        share: Of its clusters, how many are in an epoch (rounded, at least one), and of its rows in no cluster, how
            many on average; in (0, 1].

    Example:
        >>> MiningSet(name="questions", num_rows=1000, skip=70).share
        1.0
    """

    name: str
    num_rows: CountOrZero
    skip: CountOrZero | None = None
    take: Count | None = None
    share: Share = 1.0

    section: ClassVar[str] = "sets[]"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_name(self.name, "data set")

    def windowed(self, window: Window) -> Window:
        """Its own window, where it has one."""
        skip = window.skip if self.skip is None else self.skip
        return Window(skip, window.take if self.take is None else self.take, window.margin)


@dataclass(kw_only=True)
class MiningReport:
    """What mining did and what it cost.

    Attributes:
        audit: What the clusters hold; None for random batches and for several data sets.
        statistics: Whether mining is likely to help, with warnings; None as `audit`.
        hubs: The rows that are in most rank windows, with the number of windows, most wanted first.
        recall: Of the neighbours, measured; 1.0 if exact.
        seconds, peak_bytes: Wall time and peak resident memory of each stage.
        notes: What had to be changed, in words.
        sets: The reports on the data sets, if there are several; times and memory are in each.

    Example:
        >>> MiningReport(seconds={"graph": 1.5}).as_dict()["seconds"]
        {'graph': 1.5}
    """

    audit: Audit | None = None
    statistics: BatchStatistics | None = None
    hubs: list[tuple[int, int]] = field(default_factory=list)
    recall: float = 1.0
    seconds: dict[str, float] = field(default_factory=dict)
    peak_bytes: dict[str, int] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    sets: dict[str, MiningReport] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)
