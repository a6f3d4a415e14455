"""The page of `anybatch inspect plan`: one HTML file that explains itself and needs nothing else."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from markupsafe import Markup

from anybatch.report.charts import bar_chart, heat_map, line_chart
from anybatch.report.page import load_template
from anybatch.report.plan_figures import plan_figures

if TYPE_CHECKING:
    from anybatch.data import PairData
    from anybatch.mining import PlanInspection
    from anybatch.mining.inspection import ClusterExample, RowPair
    from anybatch.plan import BatchPlan

TEXT_LENGTH = 220  # characters of a text that are shown
HEAT_ROWS = 32  # of a cluster that are drawn
UNSCORED = 20  # suspects shown where there are no scores to order them


def render_plan_page(
    plan: BatchPlan,
    *,
    title: str,
    pairs: PairData | None = None,
    inspection: PlanInspection | None = None,
    mining: Mapping[str, Any] | None = None,
    missing: Sequence[str] = (),
) -> str:
    """The page as text.

    Args:
        plan: The plan.
        title: Heading, such as its path.
        pairs: The data, for its texts; None shows row numbers.
        inspection: What was measured from the embeddings; None leaves those parts out.
        mining: What mining stored (`mining.json`); None leaves those parts out.
        missing: What could not be shown and which option gives it, in words.

    All texts are escaped.
    """
    texts = _Texts(pairs)
    stored = mining or {}
    warnings = inspection.outlook.warnings if inspection else (stored.get("outlook") or {}).get("warnings")
    hubs = [tuple(hub) for hub in stored.get("hubs") or ()] or (inspection.hubs if inspection else [])
    return load_template("plan.html").render(
        title=title,
        plan=plan,
        inspection=inspection,
        missing=missing,
        warnings=warnings,
        notes=stored.get("notes") or (),
        figures=plan_figures(plan, inspection=inspection, mining=mining),
        charts=_score_charts(inspection) if inspection else [],
        stages=_stage_charts(stored),
        hubs=[{"count": count, **texts.row(row)} for row, count in hubs[:10]],
        hubs_estimated=not stored.get("hubs"),
        suspects=_suspects(plan, inspection, texts),
        duplicates=[texts.pair(pair) for pair in inspection.duplicates] if inspection else [],
        clusters=_clusters(inspection, texts) if inspection else [],
        settings=plan.meta,
    )


class _Texts:
    """Rows with their texts, cut to a readable length; without data, row numbers alone."""

    def __init__(self, pairs: PairData | None) -> None:
        self.pairs = pairs

    def row(self, row: int) -> dict[str, Any]:
        if self.pairs is None:
            return {"row": row, "anchor": "", "positive": ""}
        return {"row": row, "anchor": _cut(self.pairs.anchors[row]), "positive": _cut(self.pairs.positives[row])}

    def pair(self, pair: RowPair) -> dict[str, Any]:
        return {"score": f"{pair.score:.3f}", "first": self.row(pair.row), "second": self.row(pair.other)}


def _cut(text: str) -> str:
    return text if len(text) <= TEXT_LENGTH else text[:TEXT_LENGTH].rstrip() + " …"


def _suspects(plan: BatchPlan, inspection: PlanInspection | None, texts: _Texts) -> list[dict[str, Any]]:
    if inspection is not None:
        return [texts.pair(pair) for pair in inspection.suspects]
    first = [] if plan.suspects is None else plan.suspects[:UNSCORED].tolist()
    return [{"score": "", "first": texts.row(row), "second": texts.row(other)} for row, other in first]


def _score_charts(seen: PlanInspection) -> list[tuple[str, Markup]]:
    from anybatch.mining.cosines import BINS

    shown = np.flatnonzero(seen.planned.histogram + seen.random.histogram)
    if not len(shown):
        return []
    kept = slice(shown[0], shown[-1] + 1)
    middle = ((BINS[:-1] + BINS[1:]) / 2)[kept].tolist()
    series = [
        (name, list(zip(middle, scores.histogram[kept].tolist(), strict=True)))
        for name, scores in (("this plan", seen.planned), ("random batches", seen.random))
    ]
    drawing = line_chart("Scores of negatives", "negative's score minus the own positive's", series, mark=0.0)
    caption = (
        "How hard the negatives are: the teacher's score of each negative in a batch minus that of the anchor's own positive. Far left is easy, near 0 "
        "(dashed) is hard, right of it the teacher prefers the negative. A good plan lies right of random batches and ends near 0."
    )
    return [(caption, Markup(drawing))]


def _stage_charts(stored: Mapping[str, Any]) -> list[tuple[str, Markup]]:
    seconds, peak = stored.get("seconds") or {}, stored.get("peak_bytes") or {}
    charts = []
    if seconds:
        charts.append(
            ("Seconds of each stage", bar_chart("Seconds of each stage", list(seconds), list(seconds.values())))
        )
    if peak:
        gib = [value / 2**30 for value in peak.values()]
        charts.append(("Peak memory in each stage, GiB", bar_chart("Peak memory of each stage", list(peak), gib)))
    return [(title, Markup(drawing)) for title, drawing in charts]


def _clusters(seen: PlanInspection, texts: _Texts) -> list[dict[str, Any]]:
    if not seen.clusters:
        return []
    every = np.concatenate([example.scores.ravel() for example in seen.clusters])
    low, high = float(every.min()), float(every.max())
    return [_cluster(example, texts, low, high) for example in seen.clusters]


def _cluster(example: ClusterExample, texts: _Texts, low: float, high: float) -> dict[str, Any]:
    own = np.diag(example.scores)
    others = np.where(np.eye(len(own), dtype=bool), -np.inf, example.scores)
    name = (
        "Random rows, for comparison"
        if example.number < 0
        else f"Cluster {example.number}, the {example.kind} of those looked at"
    )
    rows = [
        {
            **texts.row(int(row)),
            "own": f"{own[place]:.2f}",
            "best": f"{others[place].max():.2f}",
            "above": bool(others[place].max() > own[place]),
        }
        for place, row in enumerate(example.rows[:HEAT_ROWS])
    ]
    drawing = heat_map(name, example.scores[:HEAT_ROWS, :HEAT_ROWS].tolist(), low, high)
    mean = float(example.scores[np.isfinite(others)].mean())
    return {
        "name": name,
        "mean": f"{mean:.2f}",
        "own": f"{own.mean():.2f}",
        "size": len(own),
        "rows": rows,
        "drawing": Markup(drawing),
    }
