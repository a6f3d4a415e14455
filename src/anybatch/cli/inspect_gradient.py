"""`anybatch inspect gradient`: which method comes nearest to the gradient over all data, before any training."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from anybatch.cli.inspect_plan import _embeddings, _given, _pairs, find_plan
from anybatch.cli.options import AnchorOption, DataOption, ImageOption, PositiveOption
from anybatch.cli.progress import Bars, console
from anybatch.core.errors import AnybatchError
from anybatch.core.files import write_text
from anybatch.insight import render_gradient_page
from anybatch.losses.config import LossConfig, first_temperature
from anybatch.plans.plan import BatchPlan


def command(
    path: Annotated[Path, typer.Argument(metavar="PLAN", help="A plan (.safetensors), or the folder of its run.")],
    data: DataOption = None,
    anchor: AnchorOption = None,
    positive: PositiveOption = None,
    image: ImageOption = None,
    embeddings: Annotated[
        tuple[Path, Path] | None,
        typer.Option(
            "--embeddings", metavar="ANCHORS POSITIVES", help="Embeddings of the data, two .npy files in row order."
        ),
    ] = None,
    temperature: Annotated[float | None, typer.Option("--temperature", help="By default the run's.")] = None,
    direction: Annotated[
        str | None, typer.Option("--direction", help="Of the loss, one_way or both. By default the run's.")
    ] = None,
    anchors: Annotated[
        int, typer.Option("--anchors", help="Anchors measured, drawn at random. More is slower and more exact.", min=2)
    ] = 2000,
    html: Annotated[
        Path | None, typer.Option("--html", help="Also write a page that explains itself; the file must be new.")
    ] = None,
) -> None:
    """Compare the methods' gradients with the exact one over all data, on the plan's batches and on random ones."""
    from anybatch.insight.gradient_error import FrozenPairs
    from anybatch.insight.gradient_methods import compare_methods, comparison_rows, recommendation

    if html is not None and html.exists():
        raise AnybatchError(f"{html} exists. Choose another file for --html.")
    folder, config, plan_path = find_plan(path)
    plan = BatchPlan.load(plan_path)
    pairs = _pairs(
        plan,
        _given(config, data, {"anchor": anchor, "positive": positive, "images": tuple(image or ())}),
        config,
        [],
    )
    missing = (
        ["Repeated texts: the data is not at hand, so that all rows count as different. Give it with --data."]
        if pairs is None
        else []
    )
    vectors = _embeddings(plan, embeddings, folder, config, [])
    if vectors is None:
        raise AnybatchError(
            "The comparison needs embeddings of the data, and none are in the run's folder or named by its configuration. Give them with --embeddings "
            "ANCHORS.npy POSITIVES.npy (any model's; `anybatch mine` writes its teacher's)."
        )
    if temperature is None:
        temperature = first_temperature(LossConfig() if config is None else config.loss)
    if direction is None:
        configured = LossConfig() if config is None else config.loss
        direction = configured.direction or ("both" if configured.name == "fastclip" else "one_way")
    if direction not in ("one_way", "both"):
        raise AnybatchError(f"--direction is {direction!r}; expected one_way or both.")
    with Bars() as bars:
        bars("exact gradient", 0, 1)
        frozen = FrozenPairs.prepare(
            *vectors,
            temperature=temperature,
            direction=direction,
            anchor_id=None if pairs is None else pairs.anchor_id,
            positive_id=None if pairs is None else pairs.positive_id,
            num_probes=anchors,
        )
        bars("exact gradient", 1, 1)
        comparison = compare_methods(frozen, plan, progress=lambda done, total: bars("methods", done, total))
    header, lines = comparison_rows(comparison)
    both = ", both directions" if direction == "both" else ""
    table = Table(title=f"Distance to the gradient over all data{both}", title_justify="left")
    for number, name in enumerate(header):
        table.add_column(name, justify="left" if number < 2 else "right")
    for line in lines:
        table.add_row(*line)
    console.print(table)
    for sentence in (*recommendation(comparison), *(f"Not taken into account: {line}" for line in missing)):
        console.print(sentence, highlight=False, markup=False)
    if html is not None:
        write_text(html, render_gradient_page(comparison, title=f"Gradients of {plan_path}", missing=missing))
        console.print(f"Page: {html}", highlight=False, markup=False, soft_wrap=True)
