"""The figures of a plan with what each means and what a good value is: for the terminal and for the page."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from anybatch.insight.inspection import PlanInspection
    from anybatch.plans.plan import BatchPlan


@dataclass(frozen=True, kw_only=True)
class Figure:
    """One line of the table.

    Attributes:
        name: What was counted.
        plan: Its value in this plan.
        random: Its value in random batches, where there is one.
        good: What to wish for.
        meaning: What it is, in a sentence for a reader who knows nothing of it.
    """

    name: str
    plan: str
    random: str = ""
    good: str = ""
    meaning: str


def plan_figures(
    plan: BatchPlan, *, inspection: PlanInspection | None = None, mining: Mapping[str, Any] | None = None
) -> list[Figure]:
    """All figures that are known.

    Args:
        plan: The plan.
        inspection: What was measured from the embeddings, or None.
        mining: What mining stored (`mining.json`), or None.
    """
    return [*plan_sizes(plan), *set_figures(plan, inspection=inspection, mining=mining)]


def set_figures(
    plan: BatchPlan, *, inspection: PlanInspection | None = None, mining: Mapping[str, Any] | None = None
) -> list[Figure]:
    """What was measured and stored, of the plan's one data set or of one of several; arguments as in `plan_figures`."""
    statistics = inspection.statistics.as_dict() if inspection is not None else (mining or {}).get("statistics")
    return [
        *(_batches(plan, inspection) if inspection is not None else []),
        *(_teacher(statistics, plan.cluster_size > 1) if statistics else []),
        *_stored(mining or {}),
        *(_repeats(inspection) if inspection is not None else []),
    ]


def plan_sizes(plan: BatchPlan) -> list[Figure]:
    """What the plan itself says."""
    stats = plan.stats()
    lines = [
        Figure(
            name="batches an epoch",
            plan=f"{plan.num_batches:,} of {plan.batch_size}",
            meaning=f"The {plan.num_rows:,} rows, each at most once an epoch, in batches of equal size.",
        )
    ]
    if plan.cluster_size > 1:
        lines.append(
            Figure(
                name="clusters",
                plan=f"{plan.num_clusters:,} of {plan.cluster_size}",
                good="all of one size",
                meaning=f"Rows that always sit together; a batch is {plan.clusters_per_batch} of them, drawn anew every epoch. A plan with clusters of other sizes is refused.",
            )
        )
    return [
        *lines,
        Figure(
            name="remainder rows",
            plan=f"{stats['remainder_rows']:,}",
            good=f"below {plan.cluster_size}",
            meaning="Rows in no cluster, because the rows do not divide evenly. They take turns with others, so none is lost for ever.",
        ),
        Figure(
            name="rows that sit out an epoch",
            plan=f"{stats['rows_left_out_each_epoch']:,}",
            good=f"below {plan.batch_size}",
            meaning="What does not fill a whole batch; other rows the next epoch.",
        ),
        Figure(
            name="suspect pairs",
            plan=f"{stats['suspect_pairs']:,}",
            good="few",
            meaning="Pairs that share a cluster although one scores so high for the other that it may be a right answer too (a false negative).",
        ),
    ]


def _batches(plan: BatchPlan, seen: PlanInspection) -> list[Figure]:
    guess = math.log(plan.batch_size)
    window = f"ranks {seen.skip + 1} to {seen.skip + seen.take}"
    return [
        Figure(
            name="wanted negatives in the batch",
            plan=f"{seen.window_in_batch:.2f}",
            random=f"{seen.random_window_in_batch:.2f}",
            good="many times random",
            meaning=f"Rows beside an anchor that the teacher ranks hard but probably wrong ({window} of all rows). They are what mining is for.",
        ),
        Figure(
            name="conflicts in the batch",
            plan=f"{seen.conflicts_in_batch:.2f}",
            random=f"{seen.random_conflicts_in_batch:.2f}",
            good="well below the wanted negatives",
            meaning=f"Rows beside an anchor among its first {seen.skip} ranks or above the margin: probably right answers, which training would push away.",
        ),
        Figure(
            name=f"expected loss at temperature {seen.temperature:g}",
            plan=f"{seen.planned.loss:.3f}",
            random=f"{seen.random.loss:.3f}",
            good=f"above random, well below {guess:.2f} (guessing)",
            meaning="The loss (InfoNCE, in nats) that the teacher itself would have in these batches. Harder batches teach more; batches that the teacher cannot solve teach noise.",
        ),
        Figure(
            name="own positive first in the batch",
            plan=f"{seen.planned.own_first:.1%}",
            random=f"{seen.random.own_first:.1%}",
            good="below random, above 50%",
            meaning="How often the teacher scores an anchor's own positive above all other positives of its batch.",
        ),
        Figure(
            name="negatives above the own positive",
            plan=f"{seen.planned.above_own:.2%}",
            random=f"{seen.random.above_own:.2%}",
            good="a few per cent at most",
            meaning="Share of all negatives in the batch that the teacher holds to be better answers than the right one.",
        ),
    ]


def _teacher(statistics: Mapping[str, Any], clustered: bool) -> list[Figure]:
    from anybatch.mining.statistics import LIMITS, NEAR

    teacher = [
        Figure(
            name="own positive first among all rows",
            plan=f"{statistics['own_first']:.1%}",
            good=f"{LIMITS.own_first:.0%} or more",
            meaning="How well the teacher knows the data: how often an anchor's own positive is its best match of all rows. It falls as the data grow.",
        ),
        Figure(
            name="own positive behind the skipped ranks",
            plan=f"{statistics['own_behind_skip']:.1%}",
            good=f"{LIMITS.own_behind_skip:.0%} or less",
            meaning="Anchors whose wanted negatives begin above their own positive: for them the teacher misleads.",
        ),
    ]
    if not clustered:
        return teacher
    return [
        *teacher,
        Figure(
            name="wanted negatives in the cluster",
            plan=f"{statistics['window_per_anchor']:.2f}",
            good=f"{LIMITS.window_gain:g} times random clusters or more (here {statistics['window_gain']:.0f} times)",
            meaning="As above, in the anchor's own cluster alone, which stays the same in every epoch.",
        ),
        Figure(
            name="conflicts in the cluster",
            plan=f"{statistics['suspects_per_anchor']:.2f}",
            good=f"{LIMITS.suspects_per_anchor:g} or less",
            meaning="Probably right answers in the anchor's own cluster.",
        ),
        Figure(
            name="wanted negatives above the own positive",
            plan=f"{statistics['negatives_above_own']:.1%}",
            good=f"{LIMITS.negatives_above_own:.0%} or less",
            meaning="Share of the wanted negatives in the cluster that score above the own positive.",
        ),
        Figure(
            name=f"wanted negatives above {NEAR:g} of the own positive",
            plan=f"{statistics['negatives_near_own']:.1%}",
            good="little more than the line above",
            meaning="The same with a margin: what comes this near is often right too.",
        ),
        Figure(
            name="score of wanted negatives against own positives",
            plan=f"{statistics['relative_score']:.2f}",
            good="0.5 to 0.8",
            meaning="Mean score of the wanted negatives over the mean score of the positives that they stand against: near 0 they are easy, near 1 they may be right.",
        ),
        Figure(
            name="anchors without a wanted negative",
            plan=f"{statistics['isolated']:.1%}",
            good=f"{LIMITS.isolated:.0%} or less",
            meaning="For these the cluster is as good as random.",
        ),
    ]


def _stored(mining: Mapping[str, Any]) -> list[Figure]:
    audit = mining.get("audit")
    if not audit:
        return []
    return [
        Figure(
            name="kept weight",
            plan=f"{audit['kept_weight']:.1%}",
            good="compare plans of the same data; a cluster has room for few",
            meaning=f"Share of the graph of wanted pairs that lies inside clusters; the other {1 - audit['kept_weight']:.1%} were cut.",
        ),
        Figure(
            name="isolated rows",
            plan=f"{audit['isolated_rows']:,}",
            good="near 0",
            meaning="Rows without any edge in the graph of wanted pairs: nobody's negatives, placed where there was room.",
        ),
        Figure(
            name="identical texts in one cluster",
            plan=f"{audit['hard_pairs']:,}",
            good="0",
            meaning="Pairs of rows with the same anchor or the same positive that could not be kept apart. Our losses leave them out.",
        ),
        Figure(
            name="windows of the greatest hub",
            plan=f"{audit['largest_in_degree']:,}",
            good="a small multiple of the window",
            meaning="How many anchors want the most wanted row. Rows that everybody wants are often empty of content.",
        ),
        Figure(
            name="recall of the neighbour search",
            plan=f"{mining.get('recall', 1.0):.3f}",
            good="0.95 or more",
            meaning="Share of the true nearest rows that were found; 1 for exact search.",
        ),
    ]


def _repeats(seen: PlanInspection) -> list[Figure]:
    return [
        Figure(
            name="rows that repeat an anchor",
            plan=f"{seen.repeated_anchors:,}",
            meaning="Their positives are all right for the anchor; they are never each other's negatives.",
        ),
        Figure(
            name="rows that repeat a positive",
            plan=f"{seen.repeated_positives:,}",
            meaning="The same text letter by letter; never a negative of its own anchors.",
        ),
        Figure(
            name="rows with a near duplicate",
            plan=f"{seen.duplicate_share:.1%}",
            good="below 5%",
            meaning="Another row's positive says nearly the same (looked for among each anchor's eight nearest rows). Such rows are false negatives of each other: remove them from the data.",
        ),
    ]
