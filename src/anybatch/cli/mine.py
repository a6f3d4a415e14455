"""`anybatch mine`: data and teacher in, plan out."""

from __future__ import annotations

from typing import Annotated

import typer

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
from anybatch.pipeline import make_plan, open_run, read_training_pairs


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
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the mining in the output folder.")] = False,
) -> None:
    """Choose the batches: rank the data with a teacher and write OUTPUT/plan.safetensors."""
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
    )
    pairs = read_training_pairs(settings)
    folder = open_run(settings, resume=resume)
    with Bars() as bars:
        plan = make_plan(settings, pairs, bars)
    console.print(
        f"{folder / 'plan.safetensors'}: {plan.num_batches} batches of {plan.batch_size} over {plan.num_rows} rows an epoch.",
        highlight=False,
    )
    console.print(f"See what is in it with: anybatch inspect {folder}", highlight=False)
