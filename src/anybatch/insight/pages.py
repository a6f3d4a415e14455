"""HTML pages, each one file that needs nothing else: one skeleton (base.html), tables and charts shared by all."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.resources import files
from typing import TYPE_CHECKING, Any

import jinja2
from markupsafe import Markup

from anybatch.insight.charts import bar_chart, line_chart
from anybatch.insight.tables import MethodResult, comparison_rows

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


@dataclass(frozen=True, kw_only=True)
class Report:
    """What the page of a comparison shows.

    Attributes:
        title: Heading.
        intro: Paragraphs.
        results: Methods compared; may be empty.
        baseline: Name of the result the others are compared with.
        sections: Title to figures by name, each a table.
        examples: Title to groups of texts (clusters, for instance).

    Example:
        >>> page = render_report(Report(title="My plan", sections={"Mining": {"window": 3}}))
        >>> "<h2>Mining</h2>" in page
        True
    """

    title: str
    intro: Sequence[str] = ()
    results: Sequence[MethodResult] = ()
    baseline: str = ""
    sections: Mapping[str, Mapping[str, object]] = field(default_factory=dict)
    examples: Mapping[str, Sequence[Sequence[str]]] = field(default_factory=dict)


def render_report(report: Report) -> str:
    """The page of a comparison as text. All of the user's text is escaped."""
    if not report.results:
        return render("page.html", title=report.title, report=report, header=[], lines=[], drawings=[])
    header, lines = comparison_rows(report.results, report.baseline)
    names = [result.name for result in report.results]
    ndcg = [result.metrics["ndcg@10"] for result in report.results]
    timed = {result.name: result.seconds for result in report.results if result.seconds is not None}
    losses = [(result.name, result.loss) for result in report.results]
    charts = drawings(
        (
            "nDCG@10 on held-out pairs (dashed: the baseline)",
            bar_chart("nDCG@10 of each method", names, ndcg, baseline=ndcg[names.index(report.baseline)]),
        ),
        ("Training time in seconds", bar_chart("Training seconds of each method", list(timed), list(timed.values()))),
        (
            "Training loss (each method has its own scale: compare shapes, not heights)",
            line_chart("Training loss by pairs seen", "pairs seen", losses),
        ),
    )
    return render("page.html", title=report.title, report=report, header=header, lines=lines, drawings=charts)


def render_gradient_page(comparison: GradientComparison, *, title: str, missing: Sequence[str] = ()) -> str:
    """The page of `anybatch inspect gradient` as text; all texts are escaped.

    Args:
        comparison: What was measured.
        title: Heading, such as the plan's path.
        missing: What could not be taken into account, in words.
    """
    from anybatch.insight.gradient_methods import ERRORS, recommendation
    from anybatch.insight.gradient_methods import comparison_rows as method_rows

    header, lines = method_rows(comparison)
    names = [f"{line.method} ({line.batches})" for line in comparison.lines]
    errors = [line.error.epoch_error for line in comparison.lines]
    chart = bar_chart("Error of each method", names, errors, baseline=comparison.plain.error.epoch_error)
    return render(
        "gradient.html",
        title=title,
        comparison=comparison,
        meanings=ERRORS,
        header=header,
        lines=lines,
        sentences=recommendation(comparison),
        missing=missing,
        drawings=drawings(("Error of an epoch; dashed: plain InfoNCE on random batches of this size.", chart)),
    )
