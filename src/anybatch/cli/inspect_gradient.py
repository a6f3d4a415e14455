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
    from anybatch.insight.gradient_methods import bias_sentence, compare_methods, gradient_figures, name_of
    from anybatch.insight.tables import figure_lines, rich_table
    from anybatch.losses.registry import LossConfig

    sources = PlanSources(options)
    pairs, vectors = sources.pairs(), sources.embeddings()
    if vectors is None:
        raise AnybatchError(
            "The comparison needs embeddings of the data, and none are in the run's folder or named by its "
            "configuration. Give them with --embeddings ANCHORS.npy POSITIVES.npy (any model's, best the student's at "
            "its start; `anybatch mine` writes its teacher's)."
        )
    loss, suspects = sources.loss, sources.plan.suspects if sources.loss.mask_suspects is True else None
    plain = LossConfig(name="infonce", mask_suspects=suspects is not None)
    with Bars() as bars:
        bars("full-data gradient", 0, 1)
        frozen = sources.frozen(vectors, pairs, suspects)
        bars("full-data gradient", 1, 1)
        comparison = compare_methods(
            frozen,
            sources.plan,
            methods=[plain, *([loss] if name_of(loss) != name_of(plain) else [])],
            progress=lambda done, total: bars("methods", done, total),
        )
    figures = []
    for line in comparison.lines:
        of_line = gradient_figures(f"{line.method} on {line.batches} batches", line.error, "InfoNCE", comparison.plain)
        figures += of_line[line.error is comparison.plain :]  # which has nothing to be nearer than
    header, lines = figure_lines(figures)
    both = ", both directions" if sources.direction == "both" else ""
    show(rich_table(header, lines, left=range(len(header)), title=f"Distance to the gradient over all data{both}"))
    say(bias_sentence(comparison.plain, comparison.batch_size))
    say(
        "This compares gradients on embeddings that stand still. It does not know that a model moves, that hard "
        "negatives may be false, or that memory grows stale: take it for a first choice, and measure on held-out data."
    )
    if pairs is None:
        say(
            "Not taken into account: Repeated texts: the data is not at hand, so that all rows count as different. "
            "Give it with --data."
        )
