"""The main job from one configuration: data, teacher, plan, training, evaluation, all in one run folder.

The command line calls this; everything here can be called from Python as well. Imports every room but report and cli.
"""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Callable, Sequence
from dataclasses import asdict, fields
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

import numpy as np
import torch

from anybatch.core import distributed
from anybatch.core.errors import AnybatchError
from anybatch.core.files import CONTENTS, seal_folder, write_json
from anybatch.core.progress import Progress, counter, no_progress
from anybatch.core.resources import Measure
from anybatch.data.images import Column
from anybatch.data.pairs import PairData, RetrievalData
from anybatch.integrations.sentence_transformers.model import Side, load_model, side_inputs, warn_of_instructions
from anybatch.plans.plan import BatchPlan
from anybatch.run.config import RunConfig, RunResult, resolved
from anybatch.run.data import check_sizes, mining_sets, read_evaluation, read_training_pairs
from anybatch.run.folder import open_run, read_record, run_digest
from anybatch.run.plan import check_start, make_plan, with_mined_negatives

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer
    from transformers import TrainerCallback

    from anybatch.integrations.sentence_transformers.loss import CachedLoss

logger = logging.getLogger("anybatch")
TRIED_ROWS = 4  # of the step that is tried before mining
BATCH_LOSSES = ("infonce", "decoupled", "siglip", "auc_cl")  # whose negatives are the batch's own


def try_batch(config: RunConfig, pairs: PairData, model: SentenceTransformer) -> None:
    """One training step on a few rows, forgotten at once: what caching refuses is refused before anything is mined or written.

    Raises:
        AnybatchError: The cached step refuses the model or the loss, on every rank.

    Cost: four forward and two backward passes of two rows, for each column.
    """
    from anybatch.integrations.sentence_transformers.loss import CachedLoss
    from anybatch.integrations.sentence_transformers.training import forgotten
    from anybatch.losses.config import build_loss

    with distributed.alone() as chosen, forgotten(model):
        if not chosen:
            return
        inputs = first_inputs(model, pairs, TRIED_ROWS)
        loss = CachedLoss(
            model.train(),
            build_loss(config.loss, num_rows=len(pairs)).to(model.device),
            micro_batch=TRIED_ROWS // 2,
            keep_graphs=0.0,
        )
        loss(inputs, torch.arange(min(TRIED_ROWS, len(pairs)), device=model.device)).backward()


def first_inputs(model: SentenceTransformer, pairs: PairData, num_rows: int) -> list[dict[str, Any]]:
    """What the model is given of the first rows: a dictionary of tensors on its device for each column."""
    columns = [
        [one if isinstance(one, str) else one.decode() for one in islice(column, num_rows)] for column in pairs.prompted
    ]
    return [
        {
            key: value.to(model.device) if isinstance(value, torch.Tensor) else value
            for key, value in side_inputs(model, column, "document" if place else "query").items()
        }
        for place, column in enumerate(columns)
    ]


def evaluate_model(
    model: SentenceTransformer,
    data: PairData | RetrievalData,
    *,
    prompts: tuple[str | None, str | None] = (None, None),
    batch_size: int = 128,
    progress: Progress = no_progress,
) -> dict[str, float]:
    """Retrieval figures of a model: recall@1, recall@10, MRR@10, nDCG@10 and so on.

    Args:
        model: Any sentence-transformers model.
        data: Pairs (each anchor must find its positive among all distinct ones) or a retrieval set.
        prompts: Text put before each anchor (query) and each positive (document); None for the model's own, "" for none.
        batch_size: Texts per forward pass.
        progress: Told how many texts are embedded.
    """
    from anybatch.evaluation.retrieval import pair_metrics, retrieval_metrics
    from anybatch.integrations.sentence_transformers.embed import embed_texts

    def embed(stage: str, texts: Column, side: Side) -> np.ndarray:
        report = counter(progress, f"embedding: {stage}", len(texts))
        prompt = prompts[side == "document"]
        return embed_texts(model, texts, side=side, batch_size=batch_size, prompt=prompt, progress=report)

    if isinstance(data, PairData):
        anchors = embed("anchors", data.anchors, "query")
        positives = embed("positives", data.positives, "document")
        return pair_metrics(anchors, positives, anchor_id=data.anchor_id, positive_id=data.positive_id)
    queries = embed("queries", data.query_texts, "query")
    corpus = embed("documents", data.corpus_texts, "document")
    return retrieval_metrics(queries, corpus, data.relevance, query_ids=data.query_ids, corpus_ids=data.corpus_ids)


def train(config: RunConfig, *, resume: bool = False, progress: Progress = no_progress) -> RunResult:
    """The whole run: read, mine, train, save, evaluate.

    Leaves in `config.output`: config.yaml, plan.safetensors, mining.json (if mined), warm_start* (if asked for), log.jsonl, checkpoints/, model/, metrics.json.

    Under torchrun the ranks share each batch of `config.batch_size` rows; rank 0 mines, evaluates and writes, the others wait.
    `train_peak_bytes` is then rank 0's.

    Args:
        config: The run.
        resume: Go on with the run in the folder; a finished one is only read.
        progress: Told where the work is.

    Raises:
        AnybatchError: See `open_run`, `read_training_pairs`, `make_plan`.
    """
    with distributed.launched_ranks():
        return _train(config, resume, progress if distributed.rank() == 0 else no_progress)


def _train(config: RunConfig, resume: bool, progress: Progress) -> RunResult:
    from anybatch.integrations.sentence_transformers.training import check_shared_equally

    pairs = read_training_pairs(config)  # before the folder: bad data leaves nothing behind
    check_sizes(config, pairs)
    check_shared_equally(config.batch_size)
    held_out = read_evaluation(config)
    model = load_model(config.model)
    warn_of_instructions(model, pairs.sets)
    if not resume:
        check_start(config, pairs)
        try_batch(config, pairs, model)
    with open_run(config, resume=resume) as folder:
        if (folder / "metrics.json").exists():
            if not (folder / "model").exists():
                logger.warning("%s is gone. To train it again, delete metrics.json there and resume.", folder / "model")
            return _read_result(folder)
        return _train_in(folder, config, pairs, held_out, model, resume, progress)


def _train_in(
    folder: Path,
    config: RunConfig,
    pairs: PairData,
    held_out: PairData | RetrievalData | None,
    model: SentenceTransformer,
    resume: bool,
    progress: Progress,
) -> RunResult:
    from anybatch.integrations.sentence_transformers.loss import CachedLoss
    from anybatch.integrations.sentence_transformers.training import train_model
    from anybatch.losses.config import build_loss
    from anybatch.losses.rows import RowTable

    run = run_digest(folder)
    plan = make_plan(config, pairs, progress)
    if (
        plan.cluster_size > 1
        and config.loss.name not in BATCH_LOSSES
        and not plan.negatives_per_row
        and distributed.rank() == 0
    ):
        logger.warning(
            "Before you train: mined batches with a loss that stands for the whole data set ('%s') did no better than random ones in any of our "
            "measurements, and worse in half of them (docs/mining.md). Compare with mining.method=random, or use loss.name=infonce.",
            config.loss.name,
        )
    pairs = with_mined_negatives(pairs, plan)

    def evaluate(current: SentenceTransformer) -> dict[str, float]:
        return {} if held_out is None else evaluate_model(current, held_out)

    with distributed.alone() as chosen:
        untrained = _untrained(folder, run, model, held_out, evaluate) if chosen else {}
    rows = RowTable(
        pairs.anchor_id,
        pairs.positive_id,
        negative_id=pairs.negative_id,
        plan=plan,
        weights=config.loss.weights,
        weight_cap=config.loss.weight_cap,
        mask_suspects=config.loss.mask_suspects,
    )
    loss = CachedLoss(
        model,
        build_loss(config.loss, num_rows=len(pairs)),
        rows=rows.to(model.device),
        micro_batch=config.train.micro_batch,
        max_tokens=config.train.max_tokens,
        keep_graphs=config.train.keep_graphs,
        memory=config.train.memory,
        pad_to_multiple=config.train.pad_to_multiple,
    )
    callbacks = [
        *prepare_refresh(config, model, pairs, loss, resume=resume, progress=progress),
        *prepare_memory(config, model, pairs, loss, resume=resume, progress=progress),
    ]
    dataset = pairs.to_dataset()
    with Measure() as measure:
        trained = train_model(
            model,
            loss,
            dataset,
            plan,
            config.train,
            output=folder,
            seed=config.seed,
            resume=resume,
            evaluate=evaluate if held_out is not None else None,
            progress=lambda done, total, figures: progress("training", done, total, figures),
            callbacks=callbacks,
            run=run,
        )
    with distributed.alone() as chosen:
        if chosen:
            model.eval()
            save_model(model, folder / "model")
            result = RunResult(
                metrics=evaluate(model),
                metrics_untrained=untrained,
                log=trained.log,
                train_seconds=measure.seconds - trained.evaluation_seconds,
                train_peak_bytes=measure.peak_bytes,
                num_steps=trained.num_steps,
            )
            # Last: its presence says that the run is finished.
            write_json(folder / "metrics.json", {"run": run, **asdict(result)})
    return _read_result(folder)


def _untrained(
    folder: Path,
    run: str,
    model: SentenceTransformer,
    held_out: PairData | RetrievalData | None,
    evaluate: Callable[[SentenceTransformer], dict[str, float]],
) -> dict[str, float]:
    """The figures that the run began with, measured once; a resume with another model or other held-out data is refused."""
    from anybatch.integrations.sentence_transformers.embed import weights_digest

    path = folder / "metrics_untrained.json"
    made_from = {"the weights of model.name": weights_digest(model)}
    if held_out is not None:
        made_from["the held-out data"] = held_out.digest
    if not path.exists():
        write_json(path, {"run": run, "made_from": made_from, "untrained": evaluate(model)})
    kept = read_record(path, run, "made_from", "untrained")
    changed = [name for name, digest in made_from.items() if kept["made_from"].get(name) != digest]
    if changed:
        raise AnybatchError(
            f"The run in {folder} began with others than it has now: {' and '.join(changed)} changed since. Put back what it began with, or start a new "
            "run in another output folder."
        )
    return kept["untrained"]


def _read_result(folder: Path) -> RunResult:
    names = [field.name for field in fields(RunResult)]
    return RunResult(**read_record(folder / "metrics.json", run_digest(folder), *names))


def prepare_refresh(
    config: RunConfig,
    model: SentenceTransformer,
    pairs: PairData,
    loss: CachedLoss,
    *,
    resume: bool = False,
    progress: Progress = no_progress,
) -> Sequence[TrainerCallback]:
    """The callback that mines anew with the student's embeddings, if `config.mining.refresh_epochs` asks for it."""
    from anybatch.integrations.sentence_transformers.embed import embed_texts
    from anybatch.integrations.sentence_transformers.refresh import RefreshPlan
    from anybatch.mining import mine_plan

    if not config.mining.refresh_epochs:
        return []
    if config.plan is not None:
        raise AnybatchError(
            "mining.refresh_epochs needs a plan that this run mines itself, with the settings of its own configuration; remove plan, or set "
            "mining.refresh_epochs to 0."
        )

    def make(current: BatchPlan) -> BatchPlan:
        sides = [
            embed_texts(model, texts, side=side, progress=counter(progress, "refresh: embedding", len(texts)))
            for side, texts in zip(get_args(Side), pairs.prompted[:2], strict=True)
        ]
        result = mine_plan(
            *sides,
            config=resolved(config).mining,
            anchor_id=pairs.anchor_id,
            positive_id=pairs.positive_id,
            sets=mining_sets(config, pairs),
            data_digest=current.data_digest,
            start=current.partition_clusters,
            progress=lambda stage, fraction: progress(f"refresh: {stage}", round(100 * fraction), 100),
        )
        return result.plan

    return [RefreshPlan(loss, make, every=config.mining.refresh_epochs, folder=config.output, restart=resume)]


def prepare_memory(
    config: RunConfig,
    model: SentenceTransformer,
    pairs: PairData,
    loss: CachedLoss,
    *,
    resume: bool = False,
    progress: Progress = no_progress,
) -> Sequence[TrainerCallback]:
    """Fill the memory of the loss as `config.loss` asks, unless a checkpoint will bring it, and make the callback that refills and measures it.

    Returns:
        Callbacks for `train_model`; none if nothing is asked for while training.
    """
    from anybatch.integrations.sentence_transformers.memory import MemoryCallback, warm_start_from_model

    settings, folder = config.loss, Path(config.output)
    resumed = resume and any((folder / "checkpoints").glob(f"*/{CONTENTS}"))
    if settings.warm_start and not resumed:
        loss.to(model.device)
        warm_start_from_model(
            model,
            pairs,
            loss.loss,  # pyright: ignore[reportArgumentType] - one without memory is refused by name
            sample=settings.warm_start_sample,
            seed=config.seed,
            folder=folder,
            progress=progress,
        )
    if settings.warm_start_steps is None and settings.probe_steps is None:
        return []
    return [
        MemoryCallback(
            model,
            pairs,
            loss.loss,  # pyright: ignore[reportArgumentType]
            refill_steps=settings.warm_start_steps,
            sample=settings.warm_start_sample,
            probe_steps=settings.probe_steps,
        )
    ]


def save_model(model: SentenceTransformer, folder: Path) -> None:
    """Save a model so that `folder` is either whole or absent; the list of its contents lets `load_model` find damage."""
    temporary = folder.with_name(folder.name + ".tmp")
    try:
        if temporary.exists():
            shutil.rmtree(temporary)
        model.save_pretrained(str(temporary))
        seal_folder(temporary)
        if folder.exists():
            shutil.rmtree(folder)
        os.replace(temporary, folder)
    except Exception as error:  # disk full comes as OSError or as the SafetensorError of the writer
        if not isinstance(error, (OSError, AnybatchError)) and type(error).__name__ != "SafetensorError":
            raise
        raise AnybatchError(
            f"Cannot save the model to {folder}: {error}. Free some space, then run again with --resume."
        ) from error
