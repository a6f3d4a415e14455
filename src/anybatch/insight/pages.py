"""HTML pages, each one file that needs nothing else: one skeleton (base.html), tables and charts shared by all."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.resources import files
from typing import TYPE_CHECKING, Any

import jinja2
from markupsafe import Markup

from anybatch.insight.charts import bar_chart

if TYPE_CHECKING:
    from anybatch.insight.gradient_methods import GradientComparison


def render(template: str, **values: Any) -> str:
    """The page as text. Whatever is put into it is escaped; charts are given as (caption, SVG) pairs of `drawings`."""
    environment = jinja2.Environment(
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        loader=jinja2.FunctionLoader(lambda file: files("anybatch.insight").joinpath(file).read_text(encoding="utf-8")),
    )
    return environment.get_template(template).render(**values)


def drawings(*charts: tuple[str, str]) -> list[tuple[str, Markup]]:
    """Charts with their captions, as a page takes them; what could not be drawn is left out."""
    return [(caption, Markup(drawing)) for caption, drawing in charts if drawing]


def render_gradient_page(comparison: GradientComparison, *, title: str, missing: Sequence[str] = ()) -> str:
    """The page of `anybatch inspect gradient` as text; all texts are escaped.

    Args:
        comparison: What was measured.
        title: Heading, such as the plan's path.
        missing: What could not be taken into account, in words.
    """
    from anybatch.insight.gradient_methods import comparison_rows, recommendation

    header, lines = comparison_rows(comparison)
    bars = [
        (f"{line.method} ({line.batches})", line.method, round(line.error.epoch_error, 2)) for line in comparison.lines
    ]
    chart = bar_chart("Error of each method", bars, baseline=comparison.plain.epoch_error)
    return render(
        "gradient.html",
        title=title,
        comparison=comparison,
        header=header,
        lines=lines,
        sentences=recommendation(comparison),
        missing=missing,
        drawings=drawings(("Error of an epoch; dashed: plain InfoNCE on random batches of this size.", chart)),
    )
