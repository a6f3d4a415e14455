"""The report: one HTML file that needs nothing else."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.resources import files

import jinja2
from markupsafe import Markup

from anybatch.insight.charts import bar_chart, line_chart
from anybatch.insight.tables import MethodResult, comparison_rows


@dataclass(frozen=True, kw_only=True)
class Report:
    """What the page shows.

    Attributes:
        title: Heading.
        intro: Paragraphs.
        results: Methods compared; may be empty.
        baseline: Name of the result the others are compared with.
        sections: Title to figures by name, each a table.
        examples: Title to groups of texts (clusters, for instance).
    """

    title: str
    intro: Sequence[str] = ()
    results: Sequence[MethodResult] = ()
    baseline: str = ""
    sections: Mapping[str, Mapping[str, object]] = field(default_factory=dict)
    examples: Mapping[str, Sequence[Sequence[str]]] = field(default_factory=dict)


def render_report(report: Report) -> str:
    """The page as text. All of the user's text is escaped."""
    header: list[str] = []
    lines: list[list[str]] = []
    charts: list[tuple[str, Markup]] = []
    if report.results:
        header, lines = comparison_rows(report.results, report.baseline)
        names = [result.name for result in report.results]
        ndcg = [result.metrics["ndcg@10"] for result in report.results]
        base = ndcg[names.index(report.baseline)]
        trained = [(result.name, result.seconds) for result in report.results if result.seconds is not None]
        drawn = [
            (
                "nDCG@10 on held-out pairs (dashed: the baseline)",
                bar_chart("nDCG@10 of each method", names, ndcg, baseline=base),
            ),
            (
                "Training time in seconds",
                bar_chart("Training seconds of each method", [n for n, _ in trained], [s for _, s in trained]),
            ),
            (
                "nDCG@10 along the way",
                line_chart(
                    "nDCG@10 by pairs seen", "pairs seen", [(result.name, result.curve) for result in report.results]
                ),
            ),
            (
                "Training loss (each method has its own scale: compare shapes, not heights)",
                line_chart(
                    "Training loss by pairs seen",
                    "pairs seen",
                    [(result.name, result.loss) for result in report.results],
                ),
            ),
        ]
        charts = [(title, Markup(drawing)) for title, drawing in drawn if drawing]
    return load_template("page.html").render(
        title=report.title, report=report, header=header, lines=lines, charts=charts
    )


def load_template(name: str) -> jinja2.Template:
    """A page of this room; whatever is put into it is escaped."""
    environment = jinja2.Environment(
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        loader=jinja2.FunctionLoader(lambda file: files("anybatch.insight").joinpath(file).read_text(encoding="utf-8")),
    )
    return environment.get_template(name)
