"""A few rows of a run through one training step, forgotten at once: caching's refusals come before hours of mining."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from anybatch.caching.state import untouched
from anybatch.core import distributed
from anybatch.core.errors import AnybatchError
from anybatch.data.inputs import NONE, MixedColumn, kinds_of_rows, pick
from anybatch.data.pairs import PairData
from anybatch.integrations.sentence_transformers.embed import check_content
from anybatch.integrations.sentence_transformers.loss import CachedLoss
from anybatch.integrations.sentence_transformers.model import checkpoint_layers, side_inputs
from anybatch.integrations.sentence_transformers.two_views import TwoViewLoss
from anybatch.losses.registry import build_loss
from anybatch.plans.plan import BatchPlan
from anybatch.run.config import RunConfig

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

TRIED_ROWS = 4
KINDS = {1: "texts", 2: "images", 3: "texts with images"}  # of rows, as `kinds_of_rows` numbers them


def try_step(config: RunConfig, pairs: PairData, model: SentenceTransformer, plan: BatchPlan | None = None) -> None:
    """One training step on a few rows of each kind: what the cached step refuses is refused here, on every rank."""
    with distributed.alone() as chosen, untouched([model]):
        if not chosen:
            return
        small = replace(config.train, mini_batch_size=TRIED_ROWS // 2, keep_graphs=0.0)
        step = step_of(replace(config, train=small), pairs, model, plan)
        for rows in telling_rows(model, pairs, TRIED_ROWS):
            step(rows)


def step_of(
    config: RunConfig, pairs: PairData, model: SentenceTransformer, plan: BatchPlan | None = None
) -> Callable[[np.ndarray], None]:
    """What takes rows through the cached step under the run's loss, as training does, and leaves their gradients.

    Raises:
        AnybatchError: See `check_kinds`.
    """
    check_kinds(config, pairs, model, plan)
    if config.train.gradient_checkpointing:
        checkpoint_layers(model)
    loss = build_loss(config.loss, num_rows=len(pairs)).to(model.device)
    kind = CachedLoss if config.data.views is None else TwoViewLoss
    settings = {name: getattr(config.train, name) for name in ("mini_batch_size", "keep_graphs", "memory")}
    cached = kind(model.train(), loss, **settings)
    cached.step = 0

    def step(rows: np.ndarray) -> None:
        inputs = inputs_of(model, pairs, rows)
        inputs = inputs if config.data.views is None else inputs[:1]
        cached(inputs, torch.from_numpy(rows).to(model.device)).backward()

    return step


def precision_of(config: RunConfig, device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """The autocast that the run trains in."""
    bf16 = config.train.args.get("bf16")
    return torch.autocast(device.type, dtype=torch.bfloat16) if bf16 else contextlib.nullcontext()


def check_kinds(config: RunConfig, pairs: PairData, model: SentenceTransformer, plan: BatchPlan | None) -> None:
    """Refuse sides that the model does not read, or not in one batch."""
    names = ("anchors", "positives", *["negatives"] * len(pairs.negatives))
    for column in pairs.prompted:
        check_content(model, column)
    of_columns = [(name, kinds_of_rows(column)) for name, column in zip(names, pairs.prompted, strict=True)]
    mixed = [(name, kinds) for name, kinds in of_columns if len(np.unique(kinds[kinds > 0])) > 1]
    if not mixed or _reads_all_together(model):
        return
    # One data set after the other, where batches are of one.
    mixing = config.mining.mixing if plan is None else plan.mixing
    apart = mixing == "within" and pairs.sets
    ends = np.cumsum([of_set.num_rows for of_set in pairs.sets])[:-1] if apart else []
    for name, of_column in mixed:
        for of_set in np.split(of_column, ends):
            kinds = [KINDS[kind] for kind in np.unique(of_set).tolist() if kind]
            if len(kinds) > 1:
                raise AnybatchError(
                    f"Some {name} are {', others '.join(kinds)}, and this model reads each in a batch of its own. "
                    "Choose a model with a chat template (Qwen2-VL and the like), or make data sets of one kind each "
                    "(data.sets) and mine within them (mining.mixing=within)."
                )


def telling_rows(model: SentenceTransformer, pairs: PairData, num_rows: int) -> list[np.ndarray]:
    """The first rows, and further ones so that each column shows all kinds of content that it has (a text, images,
    both) and its most images in a row: (b,) ascending, of `num_rows` or some more. Of a model that reads the kinds
    apart, one batch for each combination of kinds.
    """
    kinds = np.stack([kinds_of_rows(column) for column in pairs.prompted])
    if not _reads_all_together(model):
        of_pairs = 4 * kinds[0] + kinds[1]
        return [np.flatnonzero(of_pairs == combined)[:num_rows] for combined in np.unique(of_pairs)]
    chosen: list[int] = []
    for column, of_column in zip(pairs.prompted, kinds, strict=True):
        if isinstance(column, MixedColumn):
            chosen.append(int((column.places != NONE).sum(axis=1).argmax()))
        for kind, first in zip(*np.unique(of_column, return_index=True), strict=True):
            if kind not in of_column[chosen]:
                chosen.append(int(first))
    further = [row for row in range(min(num_rows, len(pairs))) if row not in chosen]
    return [np.sort(chosen + further[: max(0, num_rows - len(set(chosen)))])]


def _reads_all_together(model: SentenceTransformer) -> bool:
    return "message" in model.modalities


def inputs_of(model: SentenceTransformer, pairs: PairData, rows: np.ndarray) -> list[dict[str, Any]]:
    """What the model is given of some rows: a dictionary of tensors on its device for each column, of its rows that
    there are.
    """
    columns = [[value for value in pick(column, rows) if value is not None] for column in pairs.prompted]
    return [
        {
            key: value.to(model.device) if isinstance(value, torch.Tensor) else value
            for key, value in side_inputs(model, column, "document" if place else "query").items()
        }
        for place, column in enumerate(columns)
        if column
    ]
