"""`anybatch train`: the whole run."""

from __future__ import annotations

import os
from typing import Annotated

import typer

from anybatch import pipeline
from anybatch.cli.options import (
    AnchorOption,
    BatchSizeOption,
    ConfigOption,
    DataOption,
    ModelOption,
    NegativeOption,
    OutputOption,
    PositiveOption,
    SetOption,
    TeacherOption,
    resolve,
    resumed,
)
from anybatch.cli.progress import Bars, console
from anybatch.configuration import to_yaml
from anybatch.report.tables import metrics_table
from anybatch.run_config import resolved


def command(
    config: ConfigOption = None,
    sets: SetOption = None,
    output: OutputOption = None,
    data: DataOption = None,
    anchor: AnchorOption = None,
    positive: PositiveOption = None,
    negative: NegativeOption = None,
    model: ModelOption = None,
    teacher: TeacherOption = None,
    batch_size: BatchSizeOption = None,
    plan: Annotated[
        str | None, typer.Option("--plan", help="A plan made by `anybatch mine`; without one it is made here.")
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the run in the output folder.")] = False,
    show_config: Annotated[
        bool, typer.Option("--show-config", help="Print the resolved configuration and stop.")
    ] = False,
) -> None:
    """Train a model: choose the batches (unless a plan is given), fine-tune, evaluate; everything lands in OUTPUT."""
    if resume and config is None:
        config = resumed(output)
    settings = resolve(
        config,
        sets,
        output=output,
        data__path=data,
        data__anchor=anchor,
        data__positive=positive,
        data__negatives=negative,
        model__name=model,
        teacher__name=teacher,
        batch_size=batch_size,
        plan=plan,
    )
    if show_config:
        typer.echo(to_yaml(resolved(settings)))
        return
    with Bars() as bars:
        result = pipeline.train(settings, resume=resume, progress=bars)
    if int(os.environ.get("RANK", "0")) > 0:
        return  # one of several ranks speaks
    console.print(
        f"Model: {settings.output}/model   log: {settings.output}/log.jsonl   figures: {settings.output}/metrics.json",
        highlight=False,
    )
    if result.metrics:
        console.print(metrics_table({"untrained": result.metrics_untrained, "trained": result.metrics}))
