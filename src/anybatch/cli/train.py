"""`anybatch train`: the whole run."""

from __future__ import annotations

import os
from typing import Annotated

import typer

from anybatch.cli.options import RunOptions, with_run_options
from anybatch.cli.progress import Bars, console
from anybatch.core.configuration import to_yaml
from anybatch.insight.tables import metrics_table
from anybatch.run import pipeline
from anybatch.run.config import resolved


@with_run_options
def command(
    options: RunOptions,
    plan: Annotated[
        str | None, typer.Option("--plan", help="A plan made by `anybatch mine`; without one it is made here.")
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the run in the output folder.")] = False,
    show_config: Annotated[
        bool, typer.Option("--show-config", help="Print the resolved configuration and stop.")
    ] = False,
) -> None:
    """Train a model: choose the batches (unless a plan is given), fine-tune, evaluate; everything lands in OUTPUT."""
    settings = options.resolve(resume=resume, plan=plan)
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
        markup=False,  # a folder may be called runs/[a]
        soft_wrap=True,
    )
    if result.metrics:
        console.print(metrics_table({"untrained": result.metrics_untrained, "trained": result.metrics}))
