"""A few rows of a run through one training step, forgotten at once: caching's refusals come before hours of mining."""

from __future__ import annotations

from itertools import islice
from typing import TYPE_CHECKING, Any

import torch

from anybatch.core import distributed
from anybatch.data.inputs import guest_input
from anybatch.data.pairs import PairData
from anybatch.integrations.sentence_transformers.loss import CachedLoss
from anybatch.integrations.sentence_transformers.model import checkpoint_layers, side_inputs
from anybatch.integrations.sentence_transformers.training import forgotten
from anybatch.integrations.sentence_transformers.two_views import TwoViewLoss
from anybatch.losses.registry import build_loss
from anybatch.run.config import RunConfig

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

TRIED_ROWS = 4


def try_step(config: RunConfig, pairs: PairData, model: SentenceTransformer) -> None:
    """One training step on a few rows: what the cached step refuses is refused here, on every rank."""
    with distributed.alone() as chosen, forgotten(model):
        if not chosen:
            return
        if config.train.gradient_checkpointing:
            checkpoint_layers(model)
        inputs = first_inputs(model, pairs, TRIED_ROWS)
        loss = build_loss(config.loss, num_rows=len(pairs)).to(model.device)
        kind = CachedLoss
        if config.data.views is not None:
            kind, inputs = TwoViewLoss, inputs[:1]
        cached = kind(model.train(), loss, micro_batch=TRIED_ROWS // 2, keep_graphs=0.0)
        cached.step = 0
        cached(inputs, torch.arange(min(TRIED_ROWS, len(pairs)), device=model.device)).backward()


def first_inputs(model: SentenceTransformer, pairs: PairData, num_rows: int) -> list[dict[str, Any]]:
    """What the model is given of the first rows: a dictionary of tensors on its device for each column, of its rows
    that there are.
    """
    columns = [
        [guest_input(value) for value in islice(column, num_rows) if value is not None] for column in pairs.prompted
    ]
    return [
        {
            key: value.to(model.device) if isinstance(value, torch.Tensor) else value
            for key, value in side_inputs(model, column, "document" if place else "query").items()
        }
        for place, column in enumerate(columns)
        if column
    ]
