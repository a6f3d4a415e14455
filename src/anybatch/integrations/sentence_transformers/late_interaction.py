"""The cached step for multi-vector (ColBERT) models of sentence-transformers.

What it replaces: `CachedMultiVectorMultipleNegativesRankingLoss`. The leaves are token embeddings, padded to the width of the
batch; the mask of the tokens that count comes out of the model beside them.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from anybatch.caching.encoder import Encoder, modules_of, parameters_of
from anybatch.caching.memory import StepMemory
from anybatch.caching.recording import Auto, record_towers
from anybatch.caching.replay import Aside
from anybatch.caching.schedule import check_limits
from anybatch.caching.state import without_autocast
from anybatch.core.errors import AnybatchError
from anybatch.integrations.sentence_transformers.batches import num_rows_of, row_numbers
from anybatch.integrations.sentence_transformers.loss import deferred_backward
from anybatch.losses.late_interaction import LateInteraction
from anybatch.losses.rows import RowTable

if TYPE_CHECKING:
    from sentence_transformers import MultiVectorEncoder


class CachedLateInteraction(nn.Module):
    """`LateInteraction` as a loss of sentence-transformers' MultiVectorEncoderTrainer, with gradient caching.

    Args:
        model: The multi-vector model that is trained. It must be the one given to the Trainer.
        loss: The loss on token embeddings.
        rows, micro_batch, max_tokens, keep_graphs, memory: As in `CachedLoss`.

    Inputs:
        Columns (anchor, positive) or (anchor, positive, negative, ...). A column is encoded as a query if it is the first and as
        a document otherwise, unless the collator has stamped another `task` on it. Row numbers as in `CachedLoss`.

    Raises:
        AnybatchError: A limit that no batch could use; fewer than two columns; row numbers missing where they are needed.

    Relations:
        With `LateInteraction(temperature=1.0)` the gradients are those of `MultiVectorMultipleNegativesRankingLoss(scale=1.0)`.

    Cost: as `CachedLoss`; 4 bytes times rows, tokens and dimensions for the leaves of a column, and as much for their gradient.
    """

    uses_gradient_cache = True

    def __init__(
        self,
        model: MultiVectorEncoder,
        loss: LateInteraction,
        *,
        rows: RowTable | None = None,
        micro_batch: int | Auto = 32,
        max_tokens: int | None = None,
        keep_graphs: float | Auto = "auto",
        memory: str | int = "80%",
    ) -> None:
        super().__init__()
        check_limits(micro_batch=micro_batch, max_tokens=max_tokens, keep_graphs=keep_graphs)
        self.model = model  # a child, else the Trainer would not train it
        self.loss = loss
        self.rows = rows
        self.micro_batch: int | Auto = micro_batch
        self.max_tokens = max_tokens
        self.keep_graphs: float | Auto = keep_graphs
        self.memory = StepMemory(memory)

    def forward(self, sentence_features: Iterable[dict[str, Any]], labels: Tensor | None = None) -> Tensor:
        """The loss of one batch; its backward pass replays the encoder."""
        features = list(sentence_features)
        if len(features) < 2:
            raise AnybatchError(
                f"Got {len(features)} input column; expected an anchor, a positive and optionally negatives, in this order."
            )
        if labels is not None and torch.is_grad_enabled():
            labels = row_numbers(labels, features, num_rows_of(self.loss, self.rows))
        encoders: list[Encoder] = [
            _TokenEncoder(self.model, task="query" if column == 0 else "document", width=_width(part))
            for column, part in enumerate(features)
        ]
        recordings = record_towers(
            encoders,
            features,
            micro_batch=self.micro_batch,
            max_tokens=self.max_tokens,
            keep_graphs=self.keep_graphs,
            memory=self.memory,
            modules=[self.model],
        )
        leaves = [recording.leaves for recording in recordings]
        if not torch.is_grad_enabled():
            return self._value(leaves, None)
        aside = Aside(parameters_of([self.model, *modules_of(self.loss)]))
        try:
            with without_autocast():
                value = self._value(leaves, labels)
                value.backward()
        finally:
            beside = aside.put_back()  # they wait for the outer gradient
        value = value.detach().requires_grad_()
        gradients: list[list[Tensor | None]] = [[tokens.grad, None] for tokens, _ in leaves]
        value.register_hook(partial(deferred_backward, recordings=recordings, gradients=gradients, beside=beside))
        return value

    def _value(self, leaves: list[tuple[Tensor, ...]], labels: Tensor | None) -> Tensor:
        (anchors, anchor_mask), *others = leaves
        width = max(tokens.shape[1] for tokens, _ in others)
        candidates = torch.cat([_padded(tokens, width) for tokens, _ in others])
        candidate_mask = torch.cat([_padded(mask, width) for _, mask in others])
        arguments: dict[str, Any] = {}
        if self.rows is not None and torch.is_grad_enabled():  # rows of the evaluation set are not in the table
            if labels is None:
                raise AnybatchError(
                    "Row numbers are missing: add them as the column 'label' with with_index(dataset) before training."
                )
            arguments = self.rows.arguments(labels.to(anchors.device), num_negatives=len(others) - 1)
        return self.loss(anchors, candidates, anchor_mask=anchor_mask, candidate_mask=candidate_mask, **arguments)

    def get_config_dict(self) -> dict[str, Any]:
        """What the model card says of this loss."""
        return {"loss": type(self.loss).__name__, "micro_batch": self.micro_batch, "max_tokens": self.max_tokens}


class _TokenEncoder:
    """A column's encoder: token embeddings and mask `(b, width, ...)`; rows cut narrower are padded to the batch's width."""

    def __init__(self, model: MultiVectorEncoder, *, task: str, width: int) -> None:
        self.model, self.task, self.width = model, task, width

    def __call__(self, features: dict[str, Any]) -> tuple[Tensor, ...]:
        output = self.model(features, task=features.get("task", self.task))
        tokens, mask = output["token_embeddings"], output["attention_mask"]
        tokens = tokens * mask[..., None].to(
            tokens.dtype
        )  # what is masked counts for nothing, here as beyond the width
        return _padded(tokens, self.width), _padded(mask.to(torch.float32), self.width)


def _width(features: dict[str, Any]) -> int:
    mask = features.get("attention_mask")
    if not isinstance(mask, Tensor) or mask.ndim != 2:
        raise AnybatchError(
            "Late interaction needs padded inputs with a two-dimensional attention_mask. Use a collator that pads."
        )
    return mask.shape[1]


def _padded(value: Tensor, width: int) -> Tensor:
    """`(b, T, ...)` with zeros up to `(b, width, ...)`."""
    missing = width - value.shape[1]
    return nn.functional.pad(value, (*[0, 0] * (value.ndim - 2), 0, missing)) if missing else value
