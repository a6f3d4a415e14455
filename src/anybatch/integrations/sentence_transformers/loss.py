"""Our cached step behind sentence-transformers' protocol for cached losses.

What it replaces: `CachedMultipleNegativesRankingLoss`. The Trainer, `MatryoshkaLoss`, PEFT and trackers see the same
protocol (`uses_gradient_cache`, `calculate_loss`, a backward pass deferred to a hook on the returned loss); underneath are
length-sorted micro-batches, replay inside the caller's autocast, graphs kept while asked, and any loss of `anybatch.losses`.

Cost: one more forward pass than the plain step for the micro-batches whose graph is not kept.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from anybatch.caching.encoder import modules_of, parameters_of
from anybatch.caching.memory import StepMemory
from anybatch.caching.recording import Auto, Recording, record_towers
from anybatch.caching.replay import Aside, replay
from anybatch.caching.schedule import check_limits
from anybatch.caching.state import without_autocast
from anybatch.core.errors import AnybatchError
from anybatch.integrations.sentence_transformers.batches import num_rows_of, row_numbers
from anybatch.losses import InfoNCE
from anybatch.losses.rows import RowTable

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer


class CachedLoss(nn.Module):
    """Any anybatch loss as a sentence-transformers loss, with gradient caching.

    Args:
        model: The model that is trained. It must be the one given to the Trainer.
        loss: A loss of `anybatch.losses`: `loss(anchors, candidates, ...)`.
        rows: What is known of each training row (identical texts, mined clusters). None: only the batch itself counts.
        micro_batch: Rows per forward pass; the memory of the encoder is that of this many rows, whatever the batch size.
            "auto" finds the padded tokens that `memory` has room for, once, and halves them when memory runs out.
        max_tokens: Padded tokens per forward pass, in place of a fixed number of rows; None to go by `micro_batch` alone.
        keep_graphs: Fraction of the micro-batches, longest first, whose graph is kept so that no second forward
            is needed: 0.0 is GradCache, 1.0 is plain training, "auto" keeps what `memory` has room for. The gradient is
            the same to the last bit.
        memory: For "auto": the most memory in use on the device, "8GiB" or "80%".
        pad_to_multiple: Widths of micro-batches are multiples of it, so that a compiled model sees few shapes; None for the longest row's.

    Inputs:
        Columns (anchor, positive) or (anchor, positive, negative, ...), texts or anything the model takes. A `label` column
        holding the row number (`anybatch.integrations.sentence_transformers.with_index`) is required by a loss with memory and
        by `rows`.

    Raises:
        AnybatchError: A limit that no batch could use; fewer than two columns; row numbers missing where they are needed.

    Relations:
        With `InfoNCE(temperature=0.05)` the gradients are those of `CachedMultipleNegativesRankingLoss(scale=20)`, except
        that identical texts are never negatives of each other when `rows` is given. Gradient accumulation does not enlarge
        the set of negatives: raise `per_device_train_batch_size`, which costs no encoder memory here.

    Reference:
        Gao et al., "Scaling Deep Contrastive Learning Batch Size under Memory Limited Setup", arXiv 2101.06983, section 3.
    """

    uses_gradient_cache = True

    def __init__(
        self,
        model: SentenceTransformer,
        loss: nn.Module,
        *,
        rows: RowTable | None = None,
        micro_batch: int | Auto = 32,
        max_tokens: int | None = None,
        keep_graphs: float | Auto = "auto",
        memory: str | int = "80%",
        pad_to_multiple: int | None = None,
    ) -> None:
        super().__init__()
        check_limits(
            micro_batch=micro_batch, max_tokens=max_tokens, keep_graphs=keep_graphs, pad_to_multiple=pad_to_multiple
        )
        self.model = model  # a child, else the Trainer would not train it
        self.loss = loss
        self.rows = rows
        self.micro_batch: int | Auto = micro_batch
        self.max_tokens = max_tokens
        self.keep_graphs: float | Auto = keep_graphs
        self.memory = StepMemory(memory)
        self.pad_to_multiple = pad_to_multiple
        self._looked = False  # whether the Trainer saves the state, in the first step

    def forward(self, sentence_features: Iterable[dict[str, Any]], labels: Tensor | None = None) -> Tensor:
        """The loss of one batch; its backward pass replays the encoder. Without gradients: plain InfoNCE, memory untouched."""
        features = list(sentence_features)
        if len(features) < 2:
            raise AnybatchError(
                f"Got {len(features)} input column; expected an anchor, a positive and optionally negatives, in this order."
            )
        if torch.is_grad_enabled() and not self._looked:
            from anybatch.integrations.sentence_transformers.callback import check_is_saved

            self._looked = True
            check_is_saved(self)
        if labels is not None and torch.is_grad_enabled():
            labels = row_numbers(labels, features, num_rows_of(self.loss, self.rows))
        recordings = record_towers(
            [self._encode] * len(features),
            features,
            micro_batch=self.micro_batch,
            max_tokens=self.max_tokens,
            keep_graphs=self.keep_graphs,
            memory=self.memory,
            pad_to_multiple=self.pad_to_multiple,
            modules=[self.model],
        )
        embeddings = [[recording.embeddings] for recording in recordings]
        if not torch.is_grad_enabled():
            return self.calculate_loss(embeddings, labels)
        aside = Aside(parameters_of([self.model, *modules_of(self.loss)]))
        try:
            loss = self.calculate_loss(embeddings, labels, with_backward=True).detach().requires_grad_()
        finally:
            beside = aside.put_back()  # they wait for the outer gradient
        gradients = []
        for column, [leaf] in enumerate(embeddings):
            if leaf.grad is None and leaf.requires_grad:
                raise AnybatchError(
                    f"Input column {column} received no gradient: the loss never read it. Remove it from the data set."
                )
            gradients.append([leaf.grad])
        loss.register_hook(partial(deferred_backward, recordings=recordings, gradients=gradients, beside=beside))
        return loss

    def calculate_loss(
        self, reps: list[list[Tensor]], labels: Tensor | None = None, *, with_backward: bool = False
    ) -> Tensor:
        """The loss on embeddings already computed: one list of blocks a column. `MatryoshkaLoss` wraps this method.

        Args:
            reps: For each column the blocks of its embeddings, (rows, D) each.
            labels: (B,) row numbers, or None.
            with_backward: Leave the gradient in the blocks' `.grad` and return the loss detached.
        """
        columns = [torch.cat(blocks) if len(blocks) > 1 else blocks[0] for blocks in reps]
        anchors, candidates = columns[0], torch.cat(columns[1:])
        if not torch.is_grad_enabled():
            # Evaluation rows are not training rows: their numbers mean nothing to the memory or to the table.
            return InfoNCE(temperature=float(getattr(self.loss, "temperature", 0.05)), normalize=True)(
                anchors, candidates
            )
        arguments: dict[str, Any] = {}
        if labels is not None:
            index = labels.to(anchors.device, torch.int64)
            arguments = {"index": index}
            if self.rows is not None:
                arguments = self.rows.arguments(index, num_negatives=len(columns) - 2)
        elif self.rows is not None:
            raise AnybatchError(
                "Row numbers are missing: add them as the column 'label' with with_index(dataset) before training."
            )
        with without_autocast():  # the embeddings are float32 or better, and so is all that the loss does with them
            value = self.loss(anchors, candidates, **arguments)
            if with_backward:
                value.backward()
                return value.detach()
        return value

    def get_config_dict(self) -> dict[str, Any]:
        """What the model card says of this loss."""
        return {"loss": type(self.loss).__name__, "micro_batch": self.micro_batch, "max_tokens": self.max_tokens}

    @property
    def citation(self) -> str:
        """BibTeX of the caching method."""
        return (
            "@misc{gao2021scaling, title={Scaling Deep Contrastive Learning Batch Size under Memory Limited Setup}, "
            "author={Luyu Gao and Yunyi Zhang and Jiawei Han and Jamie Callan}, year={2021}, eprint={2101.06983}}"
        )

    def _encode(self, features: dict[str, Any]) -> Tensor:
        return self.model(features)["sentence_embedding"]


@torch.no_grad()
def deferred_backward(
    outer: Tensor,
    *,
    recordings: list[Recording],
    gradients: list[list[Tensor | None]],
    beside: list[tuple[nn.Parameter, Tensor]],
) -> None:
    """The deferred backward pass: `outer` is the gradient that reached the loss (1 / accumulation steps, a scaler)."""
    replay(recordings, gradients, scale=outer, beside=beside)
