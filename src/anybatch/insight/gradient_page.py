"""The page of `anybatch inspect gradient`: the methods compared before training, on one HTML file that needs nothing else."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from markupsafe import Markup

from anybatch.insight.charts import bar_chart
from anybatch.insight.page import load_template

if TYPE_CHECKING:
    from anybatch.insight.gradient_methods import GradientComparison


def render_gradient_page(comparison: GradientComparison, *, title: str, missing: Sequence[str] = ()) -> str:
    """The page as text; all texts are escaped.

    Args:
        comparison: What was measured.
        title: Heading, such as the plan's path.
        missing: What could not be taken into account, in words.
    """
    from anybatch.insight.gradient_methods import comparison_rows, recommendation

    header, lines = comparison_rows(comparison)
    names = [f"{line.method} ({line.batches})" for line in comparison.lines]
    plain = next(line for line in comparison.lines if (line.method, line.batches) == ("infonce", "random"))
    drawing = bar_chart(
        "Shared direction of each method",
        names,
        [max(0.0, line.error.shared_cosine) for line in comparison.lines],
        baseline=max(0.0, plain.error.shared_cosine),
    )
    sizes = [f"batch of {size:,}" for size in comparison.curve]
    curve = bar_chart("Error of random InfoNCE by batch size", sizes, list(comparison.curve.values()))
    return load_template("gradient.html").render(
        title=title,
        comparison=comparison,
        header=header,
        lines=lines,
        sentences=recommendation(comparison),
        missing=missing,
        drawing=Markup(drawing),
        curve=Markup(curve),
    )
