"""The page of `anybatch inspect plan`: one HTML file that explains itself and needs nothing else."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import numpy as np
from markupsafe import Markup

from anybatch.data.images import EncodedImage, describe
from anybatch.insight.charts import bar_chart, heat_map, line_chart
from anybatch.insight.pages import drawings, render
from anybatch.insight.plan_figures import plan_sizes, set_figures, statistics_of, stored_of

if TYPE_CHECKING:
    from anybatch.data.pairs import PairData
    from anybatch.insight.inspection import ClusterExample, PlanInspection, RowPair
    from anybatch.plans.plan import BatchPlan

TEXT_LENGTH = 220  # characters of a text that are shown
HEAT_ROWS = 32  # of a cluster that are drawn
UNSCORED = 20  # suspects shown where there are no scores to order them
IMAGE_CHARACTERS = 2**21  # of all thumbnails of a page; further images are named, not shown


def render_plan_page(
    plan: BatchPlan,
    *,
    title: str,
    pairs: PairData | None = None,
    inspections: Mapping[str, PlanInspection] = MappingProxyType({}),
    mining: Mapping[str, Any] | None = None,
    missing: Sequence[str] = (),
) -> str:
    """The page as text.

    Args:
        plan: The plan.
        title: Heading, such as its path.
        pairs: The data, for its texts and images; None shows row numbers.
        inspections: What `inspect_plan` measured from the embeddings; those parts are left out without.
        mining: What mining stored (`mining.json`); None leaves those parts out.
        missing: What could not be shown and which option gives it, in words.

    All texts are escaped. Images are shown small, re-encoded, `IMAGE_CHARACTERS` in all at most.
    """
    texts = _Texts(pairs)
    parts = [
        _part(plan, name, rows, inspections.get(name), stored_of(mining, name), texts)
        for name, rows in plan.set_rows.items()
    ]
    known = [part["warnings"] for part in parts if part["warnings"] is not None]
    return render(
        "plan.html",
        title=title,
        plan=plan,
        missing=missing,
        warnings=[warning for part in known for warning in part] if known else None,
        notes=[note for part in parts for note in part["notes"]],
        sizes=plan_sizes(plan),
        parts=parts,
        stages=_stage_charts(mining or {}),
        settings=plan.meta,
    )


def _part(
    plan: BatchPlan,
    name: str,
    rows: np.ndarray,
    seen: PlanInspection | None,
    stored: Mapping[str, Any],
    texts: _Texts,
) -> dict[str, Any]:
    """What is known of one data set."""
    warnings = statistics_of(seen, stored).get("warnings")
    hubs = [(row + int(rows[0]), count) for row, count in stored.get("hubs") or ()]  # mining numbered its rows from 0
    prefix = f"{name}: " if name else ""
    return {
        "name": name,
        "num_rows": len(rows),
        "num_anchors": seen.num_anchors if seen else 0,
        "warnings": None if warnings is None else [prefix + warning for warning in warnings],
        "notes": [prefix + note for note in stored.get("notes") or ()],
        "figures": set_figures(plan, inspection=seen, stored=stored),
        "charts": _score_charts(seen) if seen else [],
        "hubs": [{"count": count, **texts.row(row)} for row, count in (hubs or (seen.hubs if seen else []))[:10]],
        "hubs_estimated": not hubs,
        "suspects": [texts.pair(pair) for pair in seen.suspects] if seen else _unscored(plan, rows, texts),
        "duplicates": [texts.pair(pair) for pair in seen.duplicates] if seen else [],
        "clusters": _clusters(seen, texts) if seen else [],
    }


class _Texts:
    """Rows with their texts, cut to a readable length, or thumbnails of images; without data, row numbers alone."""

    def __init__(self, pairs: PairData | None) -> None:
        self.pairs = pairs
        self.left = IMAGE_CHARACTERS

    def row(self, row: int) -> dict[str, Any]:
        pairs = self.pairs
        sides = ("", "") if pairs is None else [self._show(side[row], row) for side in (pairs.anchors, pairs.positives)]
        return {"row": row, "anchor": sides[0], "positive": sides[1]}

    def pair(self, pair: RowPair) -> dict[str, Any]:
        return {"score": f"{pair.score:.3f}", "first": self.row(pair.row), "second": self.row(pair.other)}

    def _show(self, value: str | EncodedImage, row: int) -> str | Markup:
        if isinstance(value, str):
            return value if len(value) <= TEXT_LENGTH else value[:TEXT_LENGTH].rstrip() + " …"
        name, thumbnail = describe(value, row), value.thumbnail() if self.left > 0 else None
        if thumbnail is None:
            return name
        self.left -= len(thumbnail)
        return Markup('<img src="{}" alt="{}" title="{}">').format(thumbnail, name, name)


def _unscored(plan: BatchPlan, rows: np.ndarray, texts: _Texts) -> list[dict[str, Any]]:
    """The first suspects of these rows, where there are no scores."""
    suspects = np.zeros((0, 2), np.int64) if plan.suspects is None else plan.suspects
    suspects = suspects[np.isin(suspects[:, 0], rows)][:UNSCORED].tolist()
    return [{"score": "", "first": texts.row(row), "second": texts.row(other)} for row, other in suspects]


def _score_charts(seen: PlanInspection) -> list[tuple[str, Markup]]:
    from anybatch.insight.cosines import BINS

    shown = np.flatnonzero(seen.planned.histogram + seen.random.histogram)
    if not len(shown):
        return []
    kept = slice(shown[0], shown[-1] + 1)
    middle = ((BINS[:-1] + BINS[1:]) / 2)[kept].tolist()
    series = [
        (name, list(zip(middle, scores.histogram[kept].tolist(), strict=True)))
        for name, scores in (("this plan", seen.planned), ("random batches", seen.random))
    ]
    caption = (
        "How hard the negatives are: the teacher's score of each negative in a batch minus that of the anchor's own "
        "positive. Far left is easy, near 0 (dashed) is hard, right of it the teacher prefers the negative. A good "
        "plan lies right of random batches and ends near 0."
    )
    chart = line_chart("Scores of negatives", "negative's score minus the own positive's", series, mark=0.0)
    return drawings((caption, chart))


def _stage_charts(stored: Mapping[str, Any]) -> list[tuple[str, Markup]]:
    seconds, peak = stored.get("seconds") or {}, stored.get("peak_bytes") or {}
    figures = {"Seconds of each stage": seconds}
    figures["Peak memory in each stage, GiB"] = {stage: value / 2**30 for stage, value in peak.items()}
    charts = [(title, bar_chart(title, list(of), list(of.values()))) for title, of in figures.items() if of]
    return drawings(*charts)


def _clusters(seen: PlanInspection, texts: _Texts) -> list[dict[str, Any]]:
    every = [example.scores.ravel() for example in seen.clusters]
    low, high = (float(np.concatenate(every).min()), float(np.concatenate(every).max())) if every else (0.0, 0.0)
    return [_cluster(example, texts, low, high) for example in seen.clusters]


def _cluster(example: ClusterExample, texts: _Texts, low: float, high: float) -> dict[str, Any]:
    own = np.diag(example.scores)
    others = np.where(np.eye(len(own), dtype=bool), -np.inf, example.scores)
    best = others.max(axis=1)
    of_those = f"Cluster {example.number}, the {example.kind} of those looked at"
    name = "Random rows, for comparison" if example.number < 0 else of_those
    return {
        "name": name,
        "mean": f"{example.scores[np.isfinite(others)].mean():.2f}",
        "own": f"{own.mean():.2f}",
        "size": len(own),
        "rows": [
            {
                **texts.row(int(row)),
                "own": f"{own[place]:.2f}",
                "best": f"{best[place]:.2f}",
                "above": bool(best[place] > own[place]),
            }
            for place, row in enumerate(example.rows[:HEAT_ROWS])
        ],
        "drawing": Markup(heat_map(name, example.scores[:HEAT_ROWS, :HEAT_ROWS].tolist(), low, high)),
    }
