"""The figures that decide whether a plan's batches help (`mining.audit.marks`), in words; and what they warn of."""

from __future__ import annotations

from pathlib import Path

from anybatch.core.files import read_json
from anybatch.insight.gradient_methods import GradientComparison, is_further
from anybatch.insight.tables import Figure
from anybatch.mining.audit import advice, marks
from anybatch.mining.config import MARGIN
from anybatch.mining.inspection import PlanInspection
from anybatch.plans.plan import BatchPlan


def plan_sentence(plan: BatchPlan) -> str:
    """What an epoch of it is, and why a run took it where "auto" decided."""
    chosen = f", each of {plan.clusters_per_batch} clusters of {plan.cluster_size}" if plan.cluster_size > 1 else ""
    left_out = plan.num_rows - plan.num_batches * plan.batch_size
    why = f" {plan.meta['decision']}" if "decision" in plan.meta else ""
    rest = f"; {left_out:,} rows that do not fill a batch sit out, other ones each epoch" if left_out else ""
    return f"{plan.num_rows:,} rows; an epoch is {plan.num_batches:,} batches of {plan.batch_size}{chosen}{rest}.{why}"


WHY = {  # what a figure of `marks` is, and what it was in the study
    "own positive first": "How often the right answer is the teacher's best of all rows: what it ranks high is only "
    "hard if it knows the pairs. It falls as data grow. A question, no verdict: a weak teacher's batches once trained "
    "no worse.",
    "softmax mass in the batch": "Share of the negatives' softmax mass over the whole data set, under the teacher, "
    "that an anchor's batch holds: what mining is for. The study's plans, batches of 64, had 1.6 to 10.4 times.",
    "softmax mass masked": "Share that mining suspects of being right, which loss.mask_suspects removes: of that the "
    "model learns nothing. The study's text tasks had 24% to 49%.",
    "suspected false negatives per anchor": "Negatives in its batch that mining suspects of being right (where it did "
    f"not look, those that score above {MARGIN:g} of the own positive). Read some of them. The study's plans had .01 "
    "to .3.",
}


def set_figures(seen: PlanInspection, plan: BatchPlan) -> list[Figure]:
    """What was measured of one data set, with its pass marks; of random batches the teacher alone."""
    planned, random = seen.planned, seen.random
    shown = {  # value and comparison, of a figure that the page shows in more than the words of its mark
        "softmax mass in the batch": (f"{planned.in_batch:.1%}", f"random batches: {random.in_batch:.1%}"),
        "suspected false negatives per anchor": (f"{planned.suspects:.2f}", f"random batches: {random.suspects:.2f}"),
    }
    figures = []
    for name, value, good, passed, _ in marks(seen.figures)[: None if plan.cluster_size > 1 else 1]:
        value, beside = shown.get(name, (value, ""))
        figures.append(Figure(name=name, value=value, beside=beside, good=good, passed=passed, why=WHY[name]))
    return figures


def plan_warnings(
    plan: BatchPlan,
    seen: PlanInspection | None,
    gradients: GradientComparison | None = None,
    *,
    mask_suspects: bool = False,
) -> list[str]:
    """What a plan's figures, and the gradients of its loss (the last of the methods), advise against, in words."""
    found = []
    loss = "" if gradients is None else gradients.order[-1]
    planned, random = (None if gradients is None else gradients.of(loss, batches) for batches in ("plan", "random"))
    if planned is not None and random is not None and is_further(planned, random):
        found.append(
            f"The gradient speaks against this plan: with loss.name={loss} its batches' parameter gradient is further "
            f"from the full-data gradient than that of random batches of {plan.batch_size} (error of an epoch "
            f"{planned.epoch_error:.2f} against {random.epoch_error:.2f}). The anchors of a cluster are alike, so a "
            "batch of few clusters says little of the data. A question, no verdict: so it was on all five tasks of the "
            "study, and on one of them mined batches trained better (docs/recipe.md). Compare with "
            "mining.method=random on held-out pairs, or mine smaller clusters (mining.cluster_size)."
        )
        if planned.bias + planned.bias_se < random.bias - random.bias_se:
            found.append(
                f"Its bias is the smaller one ({planned.bias:.2f} against {random.bias:.2f}), its noise decides "
                f"({planned.noise:.2f} against {random.noise:.2f}): larger batches lower the noise alone."
            )
    if seen is None:
        return found
    return found + advice(seen.figures, mined=plan.cluster_size > 1, mask_suspects=mask_suspects)


def stored_warnings(folder: Path, plan: BatchPlan) -> list[str]:
    """What mining warned of, where that lies in the plan's folder."""
    path = folder / "mining.json"
    stored = read_json(path, "Delete it, or bring back the file that mining wrote.", "plan") if path.exists() else {}
    parts = [stored, *(stored.get("sets") or {}).values()] if stored.get("plan") == plan.digest else []
    return [warning for part in parts for warning in part.get("warnings", ())]
