"""`anybatch recommend`: what to train with, before any training, and the command that does it."""

from __future__ import annotations

import json
import shlex
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from anybatch.cli.options import TrainOptions, check_new, with_options
from anybatch.cli.progress import Bars, say, show

if TYPE_CHECKING:
    from anybatch.insight.recommend import Recommendation


@with_options
def command(
    options: TrainOptions,
    seconds: Annotated[
        float, typer.Option(help="Time to spend, about, once data and models are loaded.", min=1)
    ] = 60.0,
    json_file: Annotated[
        Path | None, typer.Option("--json", help="Also write what was found to this JSON file; it must be new.")
    ] = None,
) -> None:
    """Look at data, student, teacher and machine for a minute; propose how to train, why, and what it will cost.

    Takes the options of `anybatch train`; what you set is kept. Nothing is trained or kept.
    """
    from anybatch.core.files import write_text
    from anybatch.insight.recommend import recommend
    from anybatch.insight.tables import figure_table, rich_table

    check_new(json_file, "--json")
    config = replace(options, output=options.output or "unused").resolve()
    keep = options.batch_size is not None or config.batch_size != type(config).batch_size
    with Bars() as bars:
        found = recommend(config, keep_batch_size=keep, seconds=seconds, progress=bars)
    line = train_command(options, found)
    # 1. What to take; what it costs; what speaks for and against it.
    show(rich_table(["setting", "value", "why"], found.choices, left=(0, 1, 2), title="Recommended"))
    say(
        f"Cost: {found.step_seconds:.2g} s per step and {found.step.peak_bytes / 2**30:.1f} GiB of memory; "
        f"{found.num_steps:,} steps, {_duration(found.run_seconds)} in all with embedding and evaluation, with the "
        "machine as busy as it is now."
    )
    show(figure_table(found.figures, "Measured"))
    for figure in found.figures:
        if figure.passed is False:
            say(f"{figure.name}: {figure.why}")
    for note in found.notes:
        say(note)
    for sentence in found.against:
        say(f"Speaks against it: {sentence}")
    # 2. The command.
    say(f"What the figures mean: docs/inspect.md. Train with:\n\n  {line}\n")
    if json_file is not None:
        figures = [asdict(figure) | {"verdict": figure.verdict} for figure in found.figures]
        kept = {name: getattr(found, name) for name in ("against", "notes", "num_steps", "step_seconds", "run_seconds")}
        choices = [choice._asdict() for choice in found.choices]
        whole = {"command": line, "choices": choices, "figures": figures, "step": asdict(found.step), **kept}
        write_text(json_file, json.dumps(whole, indent=2))


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def train_command(options: TrainOptions, found: Recommendation) -> str:
    """`anybatch train` with the options that were given and what was chosen beside them."""
    sets, train = [*(options.sets or [])], found.config.train
    given = {item.partition("=")[0] for item in sets}
    if train.mini_batch_size == "auto" and "train.mini_batch_size" not in given:
        sets.append("train.mini_batch_size=auto")
    rate = None if "train.learning_rate" in given else train.learning_rate
    chosen = replace(options, batch_size=found.config.batch_size, learning_rate=rate, sets=sets or None)
    words = ["anybatch", "train"]
    for field in fields(chosen):
        value = getattr(chosen, field.name)
        flag = "--set" if field.name == "sets" else "--" + field.name.replace("_", "-")
        for item in value if isinstance(value, list) else [] if value is None else [value]:
            words += [flag, str(item)]
    return shlex.join(words)
