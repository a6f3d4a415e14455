"""`anybatch inspect gradient`: which method comes nearest to the gradient over all data, before any training."""

from __future__ import annotations

from typing import Annotated

import typer

from anybatch.cli.options import with_options
from anybatch.cli.plan_options import PlanOptions, PlanSources
from anybatch.cli.progress import Bars, say, show
from anybatch.core.errors import AnybatchError


@with_options
def command(
    options: PlanOptions,
    direction: Annotated[str | None, typer.Option(help="Of the loss, one_way or both. By default the run's.")] = None,
) -> None:
    """Compare the methods' gradients with the exact one over all data, on the plan's batches and on random ones."""
    from anybatch.core.files import write_text
    from anybatch.insight.gradient_methods import compare_methods, comparison_rows, recommendation
    from anybatch.insight.pages import render_gradient_page
    from anybatch.insight.tables import rich_table

    sources = PlanSources(options)
    if direction not in (None, "one_way", "both"):
        raise AnybatchError(f"--direction is {direction!r}; expected one_way or both.")
    sources.direction = direction or sources.direction
    pairs, vectors = sources.pairs(), sources.embeddings()
    if vectors is None:
        raise AnybatchError(
            "The comparison needs embeddings of the data, and none are in the run's folder or named by its "
            "configuration. Give them with --embeddings ANCHORS.npy POSITIVES.npy (any model's, best the student's at "
            "its start; `anybatch mine` writes its teacher's)."
        )
    with Bars() as bars:
        bars("full-data gradient", 0, 1)
        frozen = sources.frozen(vectors, pairs)
        bars("full-data gradient", 1, 1)
        comparison = compare_methods(frozen, sources.plan, progress=lambda done, total: bars("methods", done, total))
    header, lines = comparison_rows(comparison)
    both = ", both directions" if comparison.direction == "both" else ""
    show(rich_table(header, lines, left=(0, 1), title=f"Distance to the gradient over all data{both}"))
    without = "Repeated texts: the data is not at hand, so that all rows count as different. Give it with --data."
    missing = [without] if pairs is None else []
    for sentence in (*recommendation(comparison), *(f"Not taken into account: {line}" for line in missing)):
        say(sentence)
    if options.html is not None:
        page = render_gradient_page(comparison, title=f"Gradients of {sources.path}", missing=missing)
        write_text(options.html, page)
        say(f"Page: {options.html}")
