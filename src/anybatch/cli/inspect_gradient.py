"""`anybatch inspect gradient`: how near a run's batches come to the gradient over all data, before any training."""

from __future__ import annotations

from anybatch.cli.options import with_options
from anybatch.cli.plan_options import PlanOptions, PlanSources
from anybatch.cli.progress import Bars, say, show
from anybatch.core.errors import AnybatchError


@with_options
def command(options: PlanOptions) -> None:
    """Compare the gradient of the run's loss with the exact one over all data, on the plan's batches and random ones.

    Beside it plain InfoNCE on random batches, whose bias is what a correction or a memory is for.
    """
    from anybatch.insight.gradient_methods import beside_plain, bias_sentence, compare_methods, gradient_figures
    from anybatch.insight.tables import figure_table

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
        comparison = compare_methods(
            frozen,
            sources.plan,
            methods=beside_plain(sources.loss, sources.plan),
            progress=lambda done, total: bars("methods", done, total),
        )
    figures = []
    for (method, batches), error in comparison.errors.items():
        of_line = gradient_figures(f"{method} on {batches} batches", error, "InfoNCE", comparison.plain)
        figures += of_line[error is comparison.plain :]  # which has nothing to be nearer than
    both = ", both directions" if frozen.direction == "both" else ""
    show(figure_table(figures, f"Distance to the gradient over all data{both}"))
    say(bias_sentence(comparison.plain, sources.plan.batch_size))
    say(
        "This compares gradients on embeddings that stand still. It does not know that a model moves, that hard "
        "negatives may be false, or that memory grows stale: take it for a first choice, and measure on held-out data."
    )
    if pairs is None:
        sources.left_out.append(
            "Repeated texts: the data is not at hand, so that all rows count as different. Give it with --data."
        )
    for line in sources.left_out:
        say(f"Not taken into account: {line}")
