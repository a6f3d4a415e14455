"""The figures of a plan with what each means and what a good value is: for the terminal and for the page."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from anybatch.insight.inspection import PlanInspection
    from anybatch.plans.plan import BatchPlan


@dataclass(frozen=True)
class Figure:
    """One line of the table.

    Attributes:
        name: What was counted.
        plan: Its value in this plan.
        meaning: What it is, in a sentence for a reader who knows nothing of it.
        random: Its value in random batches, where there is one.
        good: What to wish for.

    Example:
        >>> from anybatch.plans.plan import BatchPlan
        >>> [(figure.name, figure.plan) for figure in plan_sizes(BatchPlan.random(10, 4, seed=0))][:2]
        [('batches an epoch', '2 of 4'), ('remainder rows', '0')]
    """

    name: str
    plan: str
    meaning: str
    random: str = ""
    good: str = ""


def stored_of(mining: Mapping[str, Any] | None, name: str) -> Mapping[str, Any]:
    """What mining stored of the data set called `name` ("": of the only one); empty where nothing."""
    mining = mining or {}
    return (mining.get("sets") or {}).get(name) or {} if name else mining


def statistics_of(inspection: PlanInspection | None, stored: Mapping[str, Any]) -> Mapping[str, Any]:
    """The figures of `BatchStatistics`, measured anew or as mining stored them; empty where neither is known."""
    return asdict(inspection.statistics) if inspection is not None else stored.get("statistics") or {}


def set_figures(plan: BatchPlan, *, inspection: PlanInspection | None, stored: Mapping[str, Any]) -> list[Figure]:
    """What is known of one data set.

    Args:
        plan: The plan.
        inspection: What was measured from the embeddings, or None.
        stored: What mining stored (`stored_of`).
    """
    statistics = statistics_of(inspection, stored)
    return [
        *(_batches(plan, inspection) if inspection is not None else []),
        *(_teacher(statistics) if statistics else []),
        *(_clusters(statistics) if statistics and plan.cluster_size > 1 else []),
        *_stored(stored),
        *(_repeats(inspection) if inspection is not None else []),
    ]


def plan_sizes(plan: BatchPlan) -> list[Figure]:
    """What the plan itself says."""
    stats = plan.stats()
    batches = Figure(
        "batches an epoch",
        f"{plan.num_batches:,} of {plan.batch_size}",
        f"The {plan.num_rows:,} rows, each at most once an epoch, in batches of equal size.",
    )
    clusters = Figure(
        "clusters",
        f"{plan.num_clusters:,} of {plan.cluster_size}",
        f"Rows that always sit together; a batch is {plan.clusters_per_batch} of them, drawn anew every epoch.",
        good="all of one size (others are refused)",
    )
    rest = [
        Figure(
            "remainder rows",
            f"{stats['remainder_rows']:,}",
            "Rows in no cluster, as the rows do not divide evenly. They take turns with others: none is lost.",
            good=f"below {plan.cluster_size}",
        ),
        Figure(
            "rows that sit out an epoch",
            f"{stats['rows_left_out_each_epoch']:,}",
            "What does not fill a whole batch; other rows the next epoch.",
            good=f"below {plan.batch_size}",
        ),
        Figure(
            "suspect pairs",
            f"{stats['suspect_pairs']:,}",
            "Pairs in one cluster where one may be a right answer to the other too (a false negative).",
            good="few",
        ),
    ]
    return [batches, *([clusters] if plan.cluster_size > 1 else []), *rest]


def _batches(plan: BatchPlan, seen: PlanInspection) -> list[Figure]:
    """What was measured in the plan's batches and in random ones."""
    guess = math.log(plan.batch_size)
    window = f"ranks {seen.skip + 1} to {seen.skip + seen.take}"
    return [
        Figure(
            "wanted negatives in the batch",
            f"{seen.window_in_batch:.2f}",
            f"Rows beside an anchor that are hard but probably wrong ({window} of all rows): what mining is for.",
            random=f"{seen.random_window_in_batch:.2f}",
            good="many times random",
        ),
        Figure(
            "conflicts in the batch",
            f"{seen.conflicts_in_batch:.2f}",
            f"Rows beside an anchor among its first {seen.skip} ranks or above the margin: probably right answers.",
            random=f"{seen.random_conflicts_in_batch:.2f}",
            good="well below the wanted negatives",
        ),
        Figure(
            f"expected loss at temperature {seen.temperature:g}",
            f"{seen.planned.loss:.3f}",
            "InfoNCE, in nats, of the teacher itself. Hard batches teach; those that it cannot solve teach noise.",
            random=f"{seen.random.loss:.3f}",
            good=f"above random, well below {guess:.2f} (guessing)",
        ),
        Figure(
            "own positive first in the batch",
            f"{seen.planned.own_first:.1%}",
            "How often the teacher scores an anchor's own positive above all others of its batch.",
            random=f"{seen.random.own_first:.1%}",
            good="below random, above 50%",
        ),
        Figure(
            "negatives above the own positive",
            f"{seen.planned.above_own:.2%}",
            "Share of all negatives in the batch that the teacher scores above the right answer.",
            random=f"{seen.random.above_own:.2%}",
            good="a few per cent at most",
        ),
    ]


def _teacher(statistics: Mapping[str, Any]) -> list[Figure]:
    """How well the teacher knows the pairs."""
    from anybatch.mining.statistics import LIMITS

    return [
        Figure(
            "own positive first among all rows",
            f"{statistics['own_first']:.1%}",
            "How well the teacher knows the data: how often the right answer is its best. Falls as the data grow.",
            good=f"{LIMITS.own_first:.0%} or more",
        ),
        Figure(
            "own positive behind the skipped ranks",
            f"{statistics['own_behind_skip']:.1%}",
            "Anchors whose wanted negatives begin above their own positive: for them the teacher misleads.",
            good=f"{LIMITS.own_behind_skip:.0%} or less",
        ),
    ]


def _clusters(statistics: Mapping[str, Any]) -> list[Figure]:
    """What is beside an anchor in every epoch."""
    from anybatch.mining.statistics import LIMITS, NEAR

    gain = statistics["window_gain"]
    return [
        Figure(
            "wanted negatives in the cluster",
            f"{statistics['window_per_anchor']:.2f}",
            "As above, in the anchor's own cluster alone, which stays the same in every epoch.",
            good=f"{LIMITS.window_gain:g} times random clusters or more (here {gain:.0f} times)",
        ),
        Figure(
            "conflicts in the cluster",
            f"{statistics['suspects_per_anchor']:.2f}",
            "Probably right answers in the anchor's own cluster.",
            good=f"{LIMITS.suspects_per_anchor:g} or less",
        ),
        Figure(
            "wanted negatives above the own positive",
            f"{statistics['negatives_above_own']:.1%}",
            "Share of the wanted negatives in the cluster that score above the own positive.",
            good=f"{LIMITS.negatives_above_own:.0%} or less",
        ),
        Figure(
            f"wanted negatives above {NEAR:g} of the own positive",
            f"{statistics['negatives_near_own']:.1%}",
            "The same with a margin: what comes this near is often right too.",
            good="little more than the line above",
        ),
        Figure(
            "score of wanted negatives against own positives",
            f"{statistics['relative_score']:.2f}",
            "Ratio of their mean scores: near 0 the wanted negatives are easy, near 1 they may be right.",
            good="0.5 to 0.8",
        ),
        Figure(
            "anchors without a wanted negative",
            f"{statistics['isolated']:.1%}",
            "For these the cluster is as good as random.",
            good=f"{LIMITS.isolated:.0%} or less",
        ),
    ]


def _stored(mining: Mapping[str, Any]) -> list[Figure]:
    """What mining counted over all rows."""
    audit = mining.get("audit")
    if not audit:
        return []
    kept = audit["kept_weight"]
    return [
        Figure(
            "kept weight",
            f"{kept:.1%}",
            f"Share of the graph of wanted pairs that lies inside clusters; the other {1 - kept:.1%} were cut.",
            good="compare plans of the same data; a cluster has room for few",
        ),
        Figure(
            "isolated rows",
            f"{audit['isolated_rows']:,}",
            "Rows without any edge in the graph of wanted pairs: nobody's negatives, placed where there was room.",
            good="near 0",
        ),
        Figure(
            "identical texts in one cluster",
            f"{audit['hard_pairs']:,}",
            "Pairs with the same anchor or positive that could not be kept apart. Our losses leave them out.",
            good="0",
        ),
        Figure(
            "windows of the greatest hub",
            f"{audit['largest_in_degree']:,}",
            "How many anchors want the most wanted row. Rows that everybody wants are often empty of content.",
            good="a small multiple of the window",
        ),
        Figure(
            "recall of the neighbour search",
            f"{mining.get('recall', 1.0):.3f}",
            "Share of the true nearest rows that were found; 1 for exact search.",
            good="0.95 or more",
        ),
    ]


def _repeats(seen: PlanInspection) -> list[Figure]:
    """Rows that say the same."""
    return [
        Figure(
            "rows that repeat an anchor",
            f"{seen.repeated_anchors:,}",
            "Their positives are all right for the anchor; they are never each other's negatives.",
        ),
        Figure(
            "rows that repeat a positive",
            f"{seen.repeated_positives:,}",
            "The same text letter by letter; never a negative of its own anchors.",
        ),
        Figure(
            "rows with a near duplicate",
            f"{seen.duplicate_share:.1%}",
            "Another positive, of the anchor's eight nearest rows, says nearly the same: remove such rows.",
            good="below 5%",
        ),
    ]
