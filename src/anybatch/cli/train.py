"""`anybatch train`: the whole run."""

from __future__ import annotations

import os
from dataclasses import replace
from typing import Annotated

import typer

from anybatch.cli.options import ResumeOption, TrainOptions, with_options
from anybatch.cli.progress import Bars, say, show_metrics


@with_options
def command(
    options: TrainOptions,
    resume: ResumeOption = False,
    push: Annotated[
        str | None,
        typer.Option("--push", metavar="NAME", help="Push the model and its card to the Hugging Face hub at the end."),
    ] = None,
    show_config: Annotated[
        bool, typer.Option("--show-config", help="Print every setting and its value, and stop.")
    ] = False,
) -> None:
    """Train a model: choose the batches (unless a plan is given), fine-tune, evaluate; everything lands in OUTPUT."""
    from anybatch.core.yaml_files import to_yaml
    from anybatch.run import job
    from anybatch.run.config import resolved
    from anybatch.run.push import check_push, push_model

    if show_config:
        if options.config is None and not resume:  # the defaults; a run has to name these two
            named = {value.partition("=")[0].strip() for value in options.sets or []}
            output = options.output or (None if "output" in named else "OUTPUT")
            data = options.data or (None if {"data.path", "data.sets"} & named else "DATA")
            options = replace(options, output=output, data=data)
        typer.echo(to_yaml(resolved(options.resolve(resume=resume))))
        return
    if push is not None:
        check_push(push)
    config = options.resolve(resume=resume)
    with Bars() as bars:
        result = job.train(config, resume=resume, progress=bars)
    if int(os.environ.get("RANK", "0")) > 0:
        return  # one of several ranks speaks
    folder = config.output
    if result.metrics:
        show_metrics({"untrained": result.metrics_untrained, "trained": result.metrics})
    say(
        f"{result.num_steps} steps in {result.train_seconds:,.0f} s, at most {result.train_peak_bytes / 2**30:.1f} GiB."
    )
    say(f'Use the model: SentenceTransformer("{folder}/model")')
    say(f"Measure it on other data: anybatch evaluate {folder} --data FILE")
    say(f"Log: {folder}/log.jsonl   figures: {folder}/metrics.json")
    if push is not None:
        say(f"Pushed: {push_model(config, push)}")
