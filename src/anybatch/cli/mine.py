"""`anybatch mine`: data and teacher in, plan out."""

from __future__ import annotations

from typing import Annotated

import typer

from anybatch.cli.options import RunOptions, with_run_options
from anybatch.cli.progress import Bars, console
from anybatch.core.distributed import launched_ranks, rank
from anybatch.run.data import check_sizes, read_training_pairs
from anybatch.run.folder import open_run
from anybatch.run.plan import check_start, make_plan


@with_run_options
def command(
    options: RunOptions,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the mining in the output folder.")] = False,
) -> None:
    """Choose the batches: rank the data with a teacher and write OUTPUT/plan.safetensors.

    Under torchrun (`torchrun --nproc-per-node 4 -m anybatch mine ...`) the processes share embedding and search.
    """
    settings = options.resolve(resume=resume)
    with launched_ranks():
        pairs = read_training_pairs(settings)
        check_sizes(settings, pairs)
        if not resume:
            check_start(settings, pairs)
        with open_run(settings, resume=resume) as folder, Bars(quiet=rank() > 0) as bars:
            plan = make_plan(settings, pairs, bars)
        if rank() > 0:
            return
    console.print(
        f"{folder / 'plan.safetensors'}: {plan.num_batches} batches of {plan.batch_size} over {plan.num_rows} rows an epoch.",
        highlight=False,
        markup=False,  # a folder may be called runs/[a]
        soft_wrap=True,
    )
    console.print(
        f"See what is in it with: anybatch inspect plan {folder} --html {folder / 'plan.html'}",
        highlight=False,
        markup=False,  # a folder may be called runs/[a]
        soft_wrap=True,
    )
