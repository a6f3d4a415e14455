"""`anybatch inspect gradient`: which method comes nearest to the gradient over all data, before any training."""

from __future__ import annotations

from anybatch.cli.options import with_options
from anybatch.cli.plan_options import PlanOptions, PlanSources
from anybatch.cli.progress import Bars, say, show
from anybatch.core.errors import AnybatchError


@with_options
def command(options: PlanOptions) -> None:
    """Compare the methods' gradients with the exact one over all data, on the plan's batches and on random ones."""
    from anybatch.insight.gradient_methods import compare_methods, comparison_rows, recommendation
    from anybatch.insight.tables import rich_table

    sources = PlanSources(options)
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
    for sentence in recommendation(comparison):
        say(sentence)
    if pairs is None:
        say(
            "Not taken into account: Repeated texts: the data is not at hand, so that all rows count as different. "
            "Give it with --data."
        )
