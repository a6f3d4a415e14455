"""`anybatch mine`: data and teacher in, plan out."""

from __future__ import annotations

from dataclasses import replace

from anybatch.cli.options import ResumeOption, RunOptions, with_options
from anybatch.cli.progress import Bars, say


@with_options
def command(options: RunOptions, resume: ResumeOption = False) -> None:
    """Choose the batches: rank the data with a teacher and write OUTPUT/plan.safetensors.

    Under torchrun (`torchrun --nproc-per-node 4 -m anybatch mine ...`) the processes share embedding and search.
    """
    from anybatch.core.distributed import launched_ranks, rank
    from anybatch.integrations.sentence_transformers.model import is_pretrained, load_model
    from anybatch.losses.registry import AUTO
    from anybatch.run.folder import open_run
    from anybatch.run.make_plan import check_start, existing_plan, make_plan
    from anybatch.run.read_data import read_training_pairs
    from anybatch.run.recipe import with_recipe

    config = options.resolve(resume=resume)
    with launched_ranks():
        pairs = read_training_pairs(config)
        plan = existing_plan(config)
        if config.plan is None and config.teacher.is_named and config.mining.method == AUTO:  # who asks for it gets it
            config = replace(config, mining=replace(config.mining, method="anybatch"))
        loads = config.loss.name == AUTO and config.model.name is not None  # the student decides on the loss
        pretrained = not loads or is_pretrained(load_model(config.model))
        config = with_recipe(config, pairs, plan, pretrained=pretrained)
        if not resume:
            check_start(config, pairs, plan)
        with open_run(config, resume=resume) as folder, Bars(quiet=rank() > 0) as bars:
            if not resume and rank() == 0:
                say(f"Everything goes into {folder}.")
            plan = make_plan(config, pairs, bars, plan=plan)
        if rank() > 0:
            return  # one of several ranks speaks
    batches = f"{plan.num_batches} batches of {plan.batch_size} over {plan.num_rows} rows an epoch"
    say(f"{folder / 'plan.safetensors'}: {batches}.")
    say(f"See what is in it with: anybatch inspect plan {folder} --html {folder / 'plan.html'}")
