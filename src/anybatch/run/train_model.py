"""Train the model of a run on its plan: the loss, what happens to it while training, the Trainer, the saved model."""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from anybatch.core.errors import AnybatchError
from anybatch.core.files import seal_folder
from anybatch.core.progress import Progress
from anybatch.data.pairs import PairData
from anybatch.integrations.sentence_transformers.collating import as_columns
from anybatch.integrations.sentence_transformers.loss import CachedLoss
from anybatch.integrations.sentence_transformers.training import TrainConfig, TrainResult, train_model
from anybatch.integrations.sentence_transformers.two_views import TwoViewLoss
from anybatch.losses.registry import build_loss
from anybatch.losses.rows import RowTable
from anybatch.plans.plan import BatchPlan
from anybatch.run.config import RunConfig
from anybatch.run.folder import run_digest

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

logger = logging.getLogger("anybatch")


def train_on_plan(
    config: RunConfig,
    model: SentenceTransformer,
    pairs: PairData,
    plan: BatchPlan,
    *,
    resume: bool,
    evaluate: Callable[[SentenceTransformer], dict[str, float]] | None,
    progress: Progress,
) -> TrainResult:
    """Train `model` in place on the batches of `plan`, in the folder of the run: what it did, and what it cost.
    Arguments as in `train_model`.
    """
    rows = RowTable(
        pairs.anchor_id,
        pairs.positive_id,
        negative_id=pairs.negative_id,
        plan=plan,
        weights="inclusion" if config.loss.weights == "inclusion" else "none",
        mask_suspects=config.loss.mask_suspects is True,
    )
    with torch.random.fork_rng():  # a network of the loss begins with the same weights in each run, on every rank
        torch.manual_seed(config.seed)
        inner = build_loss(config.loss, num_rows=len(pairs))
    (dataset, columns), settings, kind = as_columns(pairs), config.train, CachedLoss
    if config.data.views is not None:
        dataset, kind = dataset.remove_columns("positive"), partial(TwoViewLoss, seed=config.seed)
        columns = {name: column for name, column in columns.items() if name != "positive"}
        settings = replace(settings, args={"lr_scheduler_type": "cosine", **settings.args})
    loss = kind(
        model,
        inner,
        rows=rows.to(model.device),
        mini_batch_size=config.train.mini_batch_size,
        keep_graphs=config.train.keep_graphs,
        memory=config.train.memory,
    )
    if getattr(inner, "over_data", False):
        logger.info("Loss values are of a softmax over all %s rows, so higher than over a batch.", f"{len(pairs):,}")
    if config.train.learning_rate == TrainConfig.learning_rate:
        logger.info(
            "Learning rate %g, the default. It matters more than the loss: compare others with --learning-rate.",
            config.train.learning_rate,
        )
    return train_model(
        model,
        loss,
        dataset,
        plan,
        settings,
        output=config.output,
        seed=config.seed,
        resume=resume,
        evaluate=evaluate,
        progress=lambda done, total, figures: progress("training", done, total, figures),
        run=run_digest(Path(config.output)),
        columns=columns,
    )


def save_model(model: SentenceTransformer, folder: Path) -> None:
    """Save a model so that `folder` is either whole or absent; its list of contents lets `load_model` find damage."""
    temporary = folder.with_name(folder.name + ".tmp")
    try:
        if temporary.exists():
            shutil.rmtree(temporary)
        model.eval()
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
