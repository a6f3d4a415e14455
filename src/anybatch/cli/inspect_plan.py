"""`anybatch inspect plan`: what a plan's batches hold, on the terminal and as one HTML page."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.markup import escape

from anybatch.cli.options import with_options
from anybatch.cli.plan_options import PlanOptions, PlanSources
from anybatch.cli.progress import Bars, say, show

if TYPE_CHECKING:
    from rich.table import Table

    from anybatch.data.pairs import PairData
    from anybatch.insight import Figure
    from anybatch.insight.inspection import PlanInspection

EXAMPLES = 3  # suspected false negatives of a data set whose texts are printed; the page has more
WIDTH = 100  # characters of a printed text


@with_options
def command(options: PlanOptions) -> None:
    """Show what a plan holds beside random batches, with warnings where mining is likely to hurt.

    Data, embeddings and temperature are found in the run's folder; the options are for plans kept elsewhere.
    """
    from anybatch.core.files import write_text
    from anybatch.insight import plan_sizes, render_plan_page, set_figures
    from anybatch.insight.inspection import inspect_plan
    from anybatch.insight.plan_figures import statistics_of, stored_of

    # 1. Find what belongs to the plan.
    sources = PlanSources(options)
    plan, missing = sources.plan, sources.missing
    pairs, vectors = sources.pairs(), sources.embeddings()
    mining = sources.mining()

    # 2. Measure it under the teacher's scores, each data set by itself.
    inspections: dict[str, PlanInspection] = {}
    if vectors is not None:
        if pairs is None:
            missing.append("Repeated texts are not recognised without the data: their rows count as different.")
        with Bars() as bars:
            inspections = inspect_plan(
                plan,
                *vectors,
                anchor_id=None if pairs is None else pairs.anchor_id,
                positive_id=None if pairs is None else pairs.positive_id,
                temperature=sources.temperature,
                num_anchors=options.anchors,
                progress=lambda fraction: bars("ranking", round(100 * fraction), 100),
            )

    # 3. Print warnings, figures, suspected false negatives, and what could not be shown.
    stored = {name: stored_of(mining, name) for name in plan.set_rows}
    for name, of_set in stored.items():
        for warning in statistics_of(inspections.get(name), of_set).get("warnings") or ():
            say(f"Warning{name and f' ({name})'}: {warning}")
    tables = {
        name: set_figures(plan, inspection=inspections.get(name), stored=of_set) for name, of_set in stored.items()
    }
    table = _table(f"Plan {sources.path}", [*plan_sizes(plan), *tables.pop("", [])])
    for stage, seconds in (mining or {}).get("seconds", {}).items():
        peak = (mining or {}).get("peak_bytes", {}).get(stage, 0)
        table.add_row(f"mining: {stage}", f"{seconds:.1f} s", "", f"peak {peak / 2**30:.2f} GiB")
    show(table)
    for name, figures in tables.items():
        if figures:
            show(_table(f"Data set {name}", figures))
    for name in stored:
        _print_suspects(name, inspections.get(name), pairs)
    for line in missing:
        say(f"Not shown: {line}")

    # 4. Write the page.
    if options.html is not None:
        page = render_plan_page(
            plan,
            title=f"Plan {sources.path}",
            pairs=pairs,
            inspections=inspections,
            mining=mining,
            missing=missing,
        )
        write_text(options.html, page)
        say(f"Page: {options.html}")


def _table(title: str, figures: list[Figure]) -> Table:
    from anybatch.insight.tables import rich_table

    lines = [(figure.name, figure.plan, figure.random, figure.good) for figure in figures]
    return rich_table(["", "this plan", "random", "good"], lines, left=(0, 3), title=escape(title))


def _print_suspects(name: str, inspection: PlanInspection | None, pairs: PairData | None) -> None:
    from anybatch.data.images import describe

    if inspection is None or pairs is None or not inspection.suspects:
        return
    say(f"The most suspect pairs{name and f' of {name}'} (is the second positive a right answer to the anchor?):")
    for pair in inspection.suspects[:EXAMPLES]:
        say(f"  row {pair.row} anchor: {describe(pairs.anchors[pair.row], pair.row)[:WIDTH]}")
        say(f"  own positive: {describe(pairs.positives[pair.row], pair.row)[:WIDTH]}")
        say(f"  row {pair.other} positive: {describe(pairs.positives[pair.other], pair.other)[:WIDTH]}\n")
