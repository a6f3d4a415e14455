"""Our cached step behind sentence-transformers' protocol for cached losses: it replaces
`CachedMultipleNegativesRankingLoss` for the Trainer, `MatryoshkaLoss`, PEFT and trackers.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from anybatch.caching.encoder import modules_of, parameters_of
from anybatch.caching.memory import StepMemory
from anybatch.caching.pieces import PIXELS
from anybatch.caching.recording import Auto, record_towers
from anybatch.caching.replay import Aside, replay
from anybatch.caching.schedule import check_limits
from anybatch.caching.state import without_autocast
from anybatch.core.errors import AnybatchError
from anybatch.integrations.sentence_transformers.collating import UndecodedRows
from anybatch.integrations.sentence_transformers.sets import num_rows_of, row_numbers
from anybatch.losses import InfoNCE, Matryoshka
from anybatch.losses.base import ContrastiveLoss
from anybatch.losses.rows import RowTable

BARE = (ContrastiveLoss, Matryoshka)  # losses of embeddings, without a model


class CachedLoss(nn.Module):
    """Any anybatch loss as a sentence-transformers loss, with gradient caching.

    Args:
        model: The model that is trained. It must be the one given to the Trainer.
        loss: A loss of `anybatch.losses`: `loss(anchors, candidates, ...)`.
        rows: What is known of each training row (identical texts, mined clusters). None: only the batch itself counts.
        mini_batch_size: Rows that are encoded at once: the `mini_batch_size` of `cached_step`.
        max_tokens, keep_graphs, memory: See `cached_step`. The gradient is the same to the last bit
            whatever is kept: 0.0 is GradCache, 1.0 is plain training.

    Inputs:
        Columns (anchor, positive) or (anchor, positive, negative, ...), texts or anything the model takes. A column of
        negatives holds those of its rows that have one, in their order; with `rows` it may hold fewer than the batch.
        A `label` column holding the row number (`with_index`) is required by a loss with memory and by `rows`.

    Warns:
        UserWarning: In the first step, of a Trainer whose checkpoints leave out the loss, or of a loss over the data
            set on mined batches without inclusion weights.

    Relations:
        With `InfoNCE(temperature=0.05)` the gradients are those of `CachedMultipleNegativesRankingLoss(scale=20)`,
        except that identical texts are never negatives of each other when `rows` is given. Gradient accumulation does
        not enlarge the set of negatives: raise `per_device_train_batch_size`, which costs no encoder memory here.

    Reference: Gao et al. 2021, "Scaling Deep Contrastive Learning Batch Size under Memory Limited Setup", arXiv
    2101.06983.

    Example:
        >>> class Model(nn.Module):  # or a SentenceTransformer
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.layer = nn.Linear(3, 2)
        ...     def forward(self, features):
        ...         return {"sentence_embedding": self.layer(features["x"])}
        >>> loss = CachedLoss(Model(), InfoNCE(temperature=0.05), mini_batch_size=2)
        >>> loss([{"x": torch.eye(3)}, {"x": torch.eye(3)}]).backward()
        >>> loss.model.layer.weight.grad.shape
        torch.Size([2, 3])
    """

    uses_gradient_cache = True
    fewest_columns = 2
    step: int | None = None  # of the Trainer, as `LossStateCallback` tells it

    def __init__(
        self,
        model: Any,
        loss: nn.Module,
        *,
        rows: RowTable | None = None,
        mini_batch_size: int | Auto = 32,
        max_tokens: int | None = None,
        keep_graphs: float | Auto = "auto",
        memory: str | int = "80%",
    ) -> None:
        super().__init__()
        check_limits(mini_batch_size=mini_batch_size, max_tokens=max_tokens, keep_graphs=keep_graphs)
        self.model = model  # a child, else the Trainer would not train it
        self.loss = loss
        self.rows = rows
        self.mini_batch_size: int | Auto = mini_batch_size
        self.max_tokens = max_tokens
        self.keep_graphs: float | Auto = keep_graphs
        self.memory = StepMemory(memory)
        self._looked = False  # whether the Trainer saves the state, in the first step

    def _rows(self, column: dict[str, Any]) -> Any:
        """What the cached step takes of a column."""
        undecoded = column.get(PIXELS)
        if not isinstance(undecoded, UndecodedRows):
            return column
        return undecoded.on_demand(self.model, {key: value for key, value in column.items() if key != PIXELS})

    def _value(self, leaves: list[tuple[Tensor, ...]], labels: Tensor | None) -> Tensor:
        """The loss of what the encoders returned; where gradients are on, detached, its gradient left in the leaves."""
        return self.calculate_loss([[embeddings] for (embeddings,) in leaves], labels, with_backward=True)

    def forward(self, sentence_features: Iterable[dict[str, Any]], labels: Tensor | None = None) -> Tensor:
        """The loss of one batch; its backward pass replays the encoder. Without gradients nothing is remembered."""
        # 1. What can be refused before any forward pass.
        features = list(sentence_features)
        if len(features) < self.fewest_columns:
            raise AnybatchError(
                f"Got {len(features)} input column; expected an anchor, a positive and optionally negatives, in this "
                "order."
            )
        training = torch.is_grad_enabled()
        if training and not self._looked:
            from anybatch.integrations.sentence_transformers.callback import check_first_step

            self._looked = True
            check_first_step(self)
        if labels is not None and training:
            labels = row_numbers(labels, features, num_rows_of(self.loss, self.rows))

        # 2. Forward passes, mini-batch by mini-batch; images are decoded as they are taken.
        features = [self._rows(column) for column in features]
        recordings = record_towers(
            [self.encode] * len(features),
            features,
            mini_batch_size=self.mini_batch_size,
            max_tokens=self.max_tokens,
            keep_graphs=self.keep_graphs,
            memory=self.memory,
            modules=[self.model],
        )
        leaves = [recording.leaves for recording in recordings]
        if not training:
            return self._value(leaves, labels)

        # 3. The loss, and its gradient for the embeddings and for its own parameters, which wait for the outer one.
        aside = Aside(parameters_of([self.model, *modules_of(self.loss)]))
        try:
            value = self._value(leaves, labels).detach().requires_grad_()
        finally:
            beside = aside.put_back()
        for column, (leaf, *_) in enumerate(leaves):
            if leaf.grad is None and leaf.requires_grad:
                raise AnybatchError(
                    f"Input column {column} received no gradient: the loss never read it. Remove it from the data set."
                )

        # 4. The second half, once the outer gradient (1 / accumulation steps, a scaler) is known.
        gradients = [[leaf.grad for leaf in of_column] for of_column in leaves]

        @torch.no_grad()
        def second_half(outer: Tensor) -> None:
            replay(recordings, gradients, scale=outer, beside=beside)

        value.register_hook(second_half)
        return value

    def _arguments(self, labels: Tensor | None, device: torch.device, num_candidates: int) -> dict[str, Any]:
        """What the loss is told of the batch's rows. Rows of an evaluation set are not in the table."""
        if labels is None and self.rows is not None:
            raise AnybatchError(
                "Row numbers are missing: add them as the column 'label' with with_index(dataset) before training."
            )
        if labels is None:
            return {}
        index = labels.to(device, torch.int64)
        return {"index": index} if self.rows is None else self.rows.arguments(index, num_candidates=num_candidates)

    def get_config_dict(self) -> dict[str, Any]:
        """What the model card says of this loss."""
        temperature = getattr(self.loss, "temperature", None)
        known = {} if temperature is None else {"temperature": round(float(temperature), 6)}
        return {"loss": type(self.loss).__name__, **known, "mini_batch_size": self.mini_batch_size}

    @property
    def citation(self) -> str:
        """BibTeX of the papers behind the cached step and the loss."""
        from anybatch.integrations.sentence_transformers.card import bibtex

        return bibtex(CachedLoss, *map(type, self.loss.modules()))

    def calculate_loss(
        self, reps: list[list[Tensor]], labels: Tensor | None = None, *, with_backward: bool = False
    ) -> Tensor:
        """The loss on embeddings computed already: blocks (rows, D) of each column. `MatryoshkaLoss` wraps this method.

        `with_backward` leaves the gradient in the blocks' `.grad` and returns the loss detached.
        """
        columns = [torch.cat(blocks) if len(blocks) > 1 else blocks[0] for blocks in reps]
        anchors, candidates = columns[0], torch.cat(columns[1:])
        if not torch.is_grad_enabled():  # row numbers of an evaluation set mean nothing to the memory or to the table
            plain = InfoNCE(temperature=float(getattr(self.loss, "temperature", 0.05)), normalize=True)
            return plain(anchors, candidates)
        arguments = self._arguments(labels, anchors.device, len(candidates))
        with without_autocast():  # the embeddings are float32 or better, and so is all that the loss does with them
            value = self.loss(anchors, candidates, **arguments)
            if with_backward:
                value.backward()
                return value.detach()
        return value

    def encode(self, features: dict[str, Any]) -> Tensor:
        """The embeddings of a mini-batch, (B, D)."""
        return self.model(features)["sentence_embedding"]


def is_ours(loss: Any) -> bool:
    """Whether it is a loss of this library, or holds one."""
    return isinstance(loss, nn.Module) and any(isinstance(part, (*BARE, CachedLoss)) for part in loss.modules())


def cached_in(loss: Any) -> CachedLoss | None:
    """The cached loss itself, or inside a wrapper such as `MatryoshkaLoss`."""
    return next((part for part in loss.modules() if isinstance(part, CachedLoss)), None)


def check_wrappers(loss: nn.Module) -> None:
    """Refuse what a loss of sentence-transformers round one of ours would compute wrongly, or not at all."""
    for wrapper in loss.modules():
        inner: Any = getattr(wrapper, "loss", None)
        if not type(wrapper).__module__.startswith("sentence_transformers.") or not is_ours(inner):
            continue
        kind, name = type(wrapper).__name__, type(getattr(inner, "loss", inner)).__name__
        if not hasattr(wrapper, "matryoshka_dims"):
            raise AnybatchError(
                f"Got {kind} round {name}. It calls parts of the encoder again in each step, which a cached step does "
                "not do. Expected a loss of sentence-transformers in it, such as MultipleNegativesRankingLoss."
            )
        if not isinstance(inner, CachedLoss):
            raise AnybatchError(
                f"Got {kind} round {name} itself; expected {kind}(model, CachedLoss(model, {name}(...)), ...), or "
                f"anybatch.losses.Matryoshka({name}(...), [...]) without {kind}."
            )
        dimensions: Any = wrapper.matryoshka_dims
        if inner.loss.state_dict():
            raise AnybatchError(
                f"Got {kind} round {name}, which is called for each width and would mix what it learns of all. Give "
                f"anybatch.losses.Matryoshka({name}(...), {[*dimensions]}), whose widths have a state "
                "each, as the loss."
            )
