"""The page of `anybatch demo`, and its figure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from anybatch.insight.charts import bar_chart, error_chart
from anybatch.insight.curves import Curves
from anybatch.insight.pages import drawings, render
from anybatch.insight.plan_page import Texts, suspect_lines

if TYPE_CHECKING:
    from anybatch.data.pairs import PairData
    from anybatch.mining.inspection import PlanInspection
    from anybatch.plans.plan import BatchPlan
    from anybatch.run.config import RunResult

BASELINE, METHOD = "InfoNCE", "recommended"
SUSPECTS, CLUSTERS = 5, 4  # shown


def quality_chart(curves: Curves) -> str:
    """nDCG@10 against the batch size, as SVG."""
    title = " ".join(["nDCG@10 against batch size.", *curves.sentences(METHOD, BASELINE)])
    return error_chart(title, "pairs in a batch", "nDCG@10 on held-out pairs", curves.means, error=curves.error)


def render_demo_page(
    curves: Curves,
    *,
    intro: Sequence[str],
    memory: Mapping[str, RunResult],
    plan: BatchPlan,
    seen: PlanInspection,
    pairs: PairData,
) -> str:
    """The page as text; all texts are escaped.

    Args:
        curves: Of the methods `BASELINE` and `METHOD`.
        intro: Paragraphs: what was trained and measured.
        memory: One training step on one large batch, by how it was trained, each in a process of its own.
        plan, seen, pairs: A mined plan, what a teacher says of it, and its data.
    """
    header, lines = curves.rows(METHOD, BASELINE)
    bars = [(way, "memory", round(result.train_peak_bytes / 2**30, 2)) for way, result in memory.items()]
    mined = np.concatenate([np.flatnonzero(plan.cluster == cluster) for cluster in range(CLUSTERS)])
    others = np.random.default_rng(0).permutation(len(pairs))
    texts = Texts(pairs)
    return render(
        "demo.html",
        title="anybatch demo: quality against batch size",
        intro=intro,
        sentences=curves.sentences(METHOD, BASELINE),
        header=header,
        lines=lines,
        quality=drawings(("Bars: one standard error.", quality_chart(curves))),
        memory=drawings(("Memory of the process at its peak, in GiB.", bar_chart("Memory at its peak in GiB", bars))),
        seconds={way: result.train_seconds for way, result in memory.items()},
        plan=plan,
        seen=seen,
        suspects=suspect_lines(seen, texts, SUSPECTS),
        clusters=[[texts.cells(int(row), int(row))[0] for row in side] for side in zip(mined, others)],
    )
