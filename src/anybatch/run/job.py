"""The main job from one configuration, as named steps: read, try, plan, train, evaluate, all in one run folder."""

from __future__ import annotations

import logging
from dataclasses import asdict, fields
from functools import partial
from pathlib import Path

from anybatch.core import distributed
from anybatch.core.errors import AnybatchError
from anybatch.core.files import write_json
from anybatch.core.progress import Progress, no_progress
from anybatch.integrations.sentence_transformers.arguments import check_arguments, check_best
from anybatch.integrations.sentence_transformers.lora import merge_lora
from anybatch.integrations.sentence_transformers.model import (
    check_model,
    is_pretrained,
    load_model,
    warn_of_instructions,
)
from anybatch.integrations.sentence_transformers.training import check_shared_equally
from anybatch.integrations.sentence_transformers.two_views import add_head
from anybatch.losses.registry import AUTO
from anybatch.run.config import RunConfig, RunResult
from anybatch.run.evaluate_model import check_held_out, evaluate_model, untrained_figures
from anybatch.run.folder import check_vacant, open_run, read_record, run_digest
from anybatch.run.hard_negatives import with_mined_negatives
from anybatch.run.make_plan import check_start, existing_plan, make_plan
from anybatch.run.read_data import hold_out, read_held_out, read_training_pairs, warn_of_shared
from anybatch.run.recipe import recipe_line, with_batches, with_recipe
from anybatch.run.train_model import save_model, train_on_plan
from anybatch.run.try_step import try_step

logger = logging.getLogger("anybatch")


def train(config: RunConfig, *, resume: bool = False, progress: Progress = no_progress) -> RunResult:
    """The whole run: read, mine, train, save, evaluate.

    Leaves in `config.output`: config.yaml, plan.safetensors, mining.json (if mined), log.jsonl, checkpoints/, model/,
    metrics.json. `resume` goes on with the run in the folder; a finished one is read.

    Under torchrun the ranks share each batch of `config.batch_size` rows; rank 0 mines, evaluates and writes, the
    others wait. `train_peak_bytes` is then rank 0's.
    """
    with distributed.launched_ranks():
        progress = progress if distributed.rank() == 0 else no_progress

        # 1. Read everything before the folder is touched: bad input leaves nothing behind.
        check_model(config.model)
        if not resume:
            check_vacant(config)
        pairs, plan = read_training_pairs(config), existing_plan(config)
        pairs, split = hold_out(config, pairs, plan)
        model = load_model(config.model)
        asked, config = config, with_recipe(config, pairs, plan, pretrained=is_pretrained(model))
        check_shared_equally(config.batch_size)
        held_out = split or read_held_out(config)
        warn_of_shared(pairs, held_out)
        if held_out is None and config.train.eval_steps is not None:
            raise AnybatchError("train.eval_steps is given, and nothing is held out to evaluate on. Name it: --eval.")
        check_arguments(config.train, on_cpu=model.device.type == "cpu")
        if config.data.views is not None:
            add_head(model, seed=config.seed)
        warn_of_instructions(model, pairs.sets)
        with distributed.alone() as chosen:
            if chosen:
                check_held_out(model, held_out)

        # 2. Of a new run, refuse now what mining or the cached step would refuse hours later.
        if not resume:
            check_start(config, pairs, plan)
            try_step(with_batches(config, mined=True), pairs, model, plan)

        # 3. Hold the folder against all others.
        with open_run(config, resume=resume) as folder:
            if (folder / "metrics.json").exists():
                return read_result(folder)
            if not resume:
                logger.info("Everything goes into %s.", folder)

            # 4. Choose the batches.
            plan = make_plan(config, pairs, progress, plan=plan)
            why = plan.meta.get("decision") if config.plan is None else None
            if why and distributed.rank() == 0:
                logger.info("%s See docs/recipe.md.", why)
            undecided, config = config.loss.name == AUTO, with_batches(config, mined=plan.cluster_size > 1)
            if undecided and distributed.rank() == 0:
                logger.info("Taken: %s.", recipe_line(asked, config))
            pairs = with_mined_negatives(pairs, plan)

            # 5. Measure the model as it is.
            evaluate = partial(evaluate_model, data=held_out)
            untrained: dict[str, float] = {}
            with distributed.alone() as chosen:
                if chosen:
                    untrained = untrained_figures(folder, model, held_out, evaluate)
                    check_best(config.train, untrained)

            # 6. Train.
            trained = train_on_plan(
                config, model, pairs, plan, resume=resume, evaluate=evaluate if held_out else None, progress=progress
            )

            # 7. Leave the model and the figures; metrics.json is last, its presence says that the run is finished.
            with distributed.alone() as chosen:
                if chosen:
                    from anybatch.integrations.sentence_transformers.card import describe

                    merge_lora(model)
                    if config.data.views is not None:
                        del model[-1]
                    metrics = evaluate(model)
                    facts = {"Recipe": recipe_line(asked, config)} | ({"Why these batches": why} if why else {})
                    describe(model, facts, before=untrained, after=metrics)
                    save_model(model, folder / "model")
                    result = RunResult(metrics=metrics, metrics_untrained=untrained, **vars(trained))
                    write_json(folder / "metrics.json", {"run": run_digest(folder), **asdict(result)})
            return read_result(folder)


def read_result(folder: Path) -> RunResult:
    """What a finished run left."""
    if not (folder / "model").exists():
        logger.warning("%s is gone. To train it again, delete metrics.json there and resume.", folder / "model")
    names = [field.name for field in fields(RunResult)]
    return RunResult(**read_record(folder / "metrics.json", run_digest(folder), *names))
