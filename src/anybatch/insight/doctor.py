"""Check on the model, data and loss of a run that caching is exact for them, before time is spent on training."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from anybatch.core.errors import AnybatchError
from anybatch.insight.verify import Verification, verify
from anybatch.integrations.sentence_transformers.loss import CachedLoss
from anybatch.integrations.sentence_transformers.model import is_pretrained, load_model
from anybatch.integrations.sentence_transformers.two_views import TwoViewLoss
from anybatch.losses.registry import build_loss
from anybatch.losses.rows import RowTable
from anybatch.run.config import RunConfig
from anybatch.run.make_plan import existing_plan
from anybatch.run.read_data import read_training_pairs
from anybatch.run.recipe import with_batches, with_recipe
from anybatch.run.try_step import check_kinds, inputs_of, precision_of, telling_rows
from anybatch.vision.views import KEYS, both_ways


def examine(config: RunConfig, *, num_rows: int = 16) -> Verification:
    """One small batch of the run both ways, plain and cached: the errors of every parameter, and what is in the way.

    The model trains (dropout on) in the precision of the run, on `num_rows` rows of each kind that its data have, under
    its loss; a mini-batch is at most a quarter of them. Nothing is written. What the cached step refuses, such as a
    BatchNorm, is a finding.

    Raises:
        AnybatchError: Data or model cannot be read; fewer than 8 rows asked for.

    Cost: two training steps.
    """
    if num_rows < 8:
        raise AnybatchError(
            f"The check was asked for {num_rows} rows; it needs at least 8 to split them into mini-batches."
        )
    pairs = read_training_pairs(config)
    plan = existing_plan(config)
    model = load_model(config.model).train()
    config = with_recipe(config, pairs, plan, pretrained=is_pretrained(model))
    config = with_batches(config, mined=True)  # what waits for a plan's figures, as for a good one
    check_kinds(config, pairs, model, plan)
    chosen = telling_rows(model, pairs, num_rows)[0]
    rows, inputs = len(chosen), inputs_of(model, pairs, chosen)
    table = RowTable(pairs.anchor_id, pairs.positive_id, negative_id=pairs.negative_id).to(model.device)
    index = torch.from_numpy(chosen).to(model.device)
    loss = build_loss(config.loss, num_rows=len(pairs)).to(model.device).train()
    cached, of_batch = CachedLoss(model, loss), loss
    if config.data.views is not None:
        cached = TwoViewLoss(model, loss)
        cached.step = 0
        [column] = cached.prepared(inputs[:1], index)
        inputs = [{**column, KEYS: key[:, None]} for key in column[KEYS].unbind(dim=1)]  # each view a column
        of_batch, index = _OfViews(loss), index.repeat(2)
    wanted, most = config.train.mini_batch_size, max(1, rows // 4)
    try:
        with precision_of(config, model.device):
            return verify(
                cached.encode,
                inputs,
                of_batch,
                mini_batch_size=most if wanted == "auto" else min(wanted, most),
                loss_kwargs=table.arguments(index, num_negatives=len(pairs.negatives)),
                modules=[model],
            )
    except AnybatchError as error:  # what the cached step refuses is the diagnosis
        return Verification.refused(str(error))


class _OfViews(torch.nn.Module):
    """A loss of two views, whose state is put back between the two ways."""

    def __init__(self, loss: torch.nn.Module) -> None:
        super().__init__()
        self.loss = loss

    def forward(self, first: Tensor, second: Tensor, **known: Any) -> Tensor:
        return self.loss(*both_ways(first, second), **known)
