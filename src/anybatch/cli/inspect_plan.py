"""`anybatch inspect plan`: whether a plan's batches help, in figures with pass marks and in texts."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.markup import escape

from anybatch.cli.options import check_new, with_options
from anybatch.cli.plan_options import PlanOptions, PlanSources
from anybatch.cli.progress import Bars, say, show

if TYPE_CHECKING:
    from anybatch.data.pairs import PairData
    from anybatch.mining.inspection import RowPair

EXAMPLES = 3  # suspected false negatives of a data set whose texts are printed; the page has more
WIDTH = 100  # characters of a printed text


@with_options
def command(
    options: PlanOptions,
    html: Annotated[
        Path | None, typer.Option(help="Also write a page that explains itself; the file must be new.")
    ] = None,
    json_file: Annotated[
        Path | None, typer.Option("--json", help="Also write the figures to this JSON file; it must be new.")
    ] = None,
) -> None:
    """Show what a plan holds beside random batches, with warnings where mining is likely to hurt.

    Data, embeddings, loss and temperature are found in the run's folder; the options are for plans kept elsewhere.
    """
    from anybatch.core.files import write_text
    from anybatch.insight.gradient_methods import compare_methods, gradient_figures, name_of
    from anybatch.insight.plan_figures import plan_sentence, plan_warnings, set_figures, stored_warnings
    from anybatch.insight.plan_page import render_plan_page
    from anybatch.insight.tables import figure_table
    from anybatch.mining.inspection import inspect_plan

    # 1. Find what belongs to the plan.
    check_new(html, "--html")
    check_new(json_file, "--json")
    sources = PlanSources(options)
    plan, missing = sources.plan, sources.missing
    pairs, vectors, masks = sources.pairs(), sources.embeddings(), sources.loss.mask_suspects is True

    # 2. Measure it under the teacher's scores, each data set by itself, and its gradient if there is one set.
    inspections, gradients = {}, None
    if vectors is not None:
        if pairs is None:
            missing.append("Repeated texts are not recognised without the data: their rows count as different.")
        with Bars() as bars:
            inspections = inspect_plan(
                plan,
                *vectors,
                **({} if pairs is None else pairs.ids),
                temperature=sources.temperature,
                num_anchors=options.anchors,
                progress=lambda fraction: bars("softmax mass", round(100 * fraction), 100),
            )
            if len(plan.task_names) > 1:
                missing.append("The gradient's error: of several data sets each has an own. Mine one by itself.")
            else:
                bars("gradient", 0, 1)
                missing += sources.left_out
                gradients = compare_methods(sources.frozen(vectors, pairs), plan, methods=[sources.loss])
                bars("gradient", 1, 1)
    seen = inspections.get("") if len(inspections) == 1 else None
    warnings = plan_warnings(plan, seen, gradients, mask_suspects=masks)
    for name, seen in inspections.items():
        if name:
            warnings += [f"{name}: {warning}" for warning in plan_warnings(plan, seen, None, mask_suspects=masks)]
    if not inspections:
        warnings += stored_warnings(sources.path.parent, plan)

    # 3. Print warnings, figures, suspected false negatives, and what could not be shown.
    tables = {name or "Figures": set_figures(seen, plan) for name, seen in inspections.items()}
    name = name_of(sources.loss)
    if gradients is not None and (planned := gradients.of(name, "plan")) is not None:
        tables["Figures"] += gradient_figures(name, planned, "random batches", gradients.plain)
    say(plan_sentence(plan))
    for warning in warnings:
        say(f"Warning: {warning}")
    for title, figures in tables.items():
        show(figure_table(figures, escape(title)))
    for name, seen in inspections.items():
        if pairs is not None and seen.suspects:
            _print_suspects(name, seen.suspects, pairs)
    for line in missing:
        say(f"Not shown: {line}")

    # 4. Write page and figures.
    if html is not None:
        page = render_plan_page(
            plan, title=f"Plan {sources.path}", tables=tables, warnings=warnings, inspections=inspections, pairs=pairs,
            missing=missing,
        )  # fmt: skip
        write_text(html, page)
        say(f"Page: {html}")
    if json_file is not None:
        sets = {name: asdict(seen) for name, seen in inspections.items()}
        errors = [
            {"method": method, "batches": batches, "error": asdict(error)}
            for (method, batches), error in (gradients.errors.items() if gradients is not None else ())
        ]
        found = {"sets": sets, "gradient": errors, "warnings": warnings, "missing": missing}
        write_text(json_file, json.dumps({"plan": plan.digest, **found}, indent=2))


def _print_suspects(name: str, suspects: list[RowPair], pairs: PairData) -> None:
    from anybatch.data.inputs import describe

    say(f"Suspected false negatives{name and f' of {name}'} (is the second positive a right answer to the anchor?):")
    for pair in suspects[:EXAMPLES]:
        say(f"  row {pair.row} anchor: {describe(pairs.anchors[pair.row], pair.row)[:WIDTH]}")
        say(f"  own positive: {describe(pairs.positives[pair.row], pair.row)[:WIDTH]}")
        say(f"  row {pair.other} positive: {describe(pairs.positives[pair.other], pair.other)[:WIDTH]}\n")
