"""Images without labels under sentence-transformers' Trainer: two random views of each row, and any anybatch loss."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from anybatch.core.errors import AnybatchError
from anybatch.integrations.sentence_transformers.collating import UndecodedRows
from anybatch.integrations.sentence_transformers.loss import CachedLoss
from anybatch.vision.views import KEYS, PIXELS, both_ways, view_keys, views_of

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

logger = logging.getLogger("anybatch")


class TwoViewLoss(CachedLoss):
    """A loss on two random views of each image: each view against all views of other rows (SimCLR, SogCLR for images).

    A view is a function of run, step and row (`anybatch.vision.views`): replays and resumed runs see the same pixels,
    and views are made mini-batch by mini-batch, on the device: of `mini_batch_size` rows two views each. A
    BatchNorm is frozen, as caching needs.

    Args:
        model, loss, options: See `CachedLoss`.
        seed: Of the views.

    Inputs:
        One column of images, then any of explicit negatives; the `label` column with the row number (`with_index`).
        `LossStateCallback` tells the step. Each negative gets two views as well.

    Raises:
        AnybatchError: A model whose processor does not make (B, 3, H, W) pixels; row numbers or the callback missing.

    Example:
        >>> from anybatch.losses import InfoNCE
        >>> class Model(nn.Module):  # or a SentenceTransformer
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.layer = nn.Linear(3 * 8 * 8, 2)
        ...     def forward(self, features):
        ...         return {"sentence_embedding": self.layer(features["pixel_values"].flatten(1))}
        >>> loss = TwoViewLoss(Model(), InfoNCE(temperature=0.1), mini_batch_size=2)
        >>> loss.step = 0  # which the callback does
        >>> loss([{"pixel_values": torch.rand(4, 3, 8, 8)}], torch.arange(4)).backward()
        >>> loss.model.layer.weight.grad.shape
        torch.Size([2, 192])
    """

    fewest_columns = 1

    def __init__(self, model: Any, loss: nn.Module, *, seed: int = 0, **options: Any) -> None:
        super().__init__(model, loss, **options)
        self.seed = seed
        self.mean, self.std = pixel_scale(model)
        self.frozen = [module for module in model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
        if self.frozen:
            logger.info("%d BatchNorm layers keep the statistics that they have, as caching needs.", len(self.frozen))

    def forward(self, sentence_features: Iterable[dict[str, Any]], labels: Tensor | None = None) -> Tensor:
        """See `CachedLoss.forward`."""
        return super().forward(self.prepared(list(sentence_features), labels), labels)

    def prepared(self, features: list[dict[str, Any]], labels: Tensor | None) -> list[dict[str, Any]]:
        """The columns with the keys of two views of each row, (B, 2); BatchNorm frozen."""
        for module in self.frozen:
            module.eval()  # the Trainer has just put the whole model into training mode
        if labels is None or self.step is None:
            missing = "row numbers (with_index)" if labels is None else "the step (LossStateCallback)"
            raise AnybatchError(f"Views are drawn for each row and step, and {missing} did not arrive.")
        if (unfit := next((column for column in features if PIXELS not in column), None)) is not None:
            raise AnybatchError(
                f"Views are made of images, and a column holds {', '.join(map(repr, unfit))}; expected '{PIXELS}'."
            )
        views = [view_keys(labels, seed=self.seed, step=self.step, view=view) for view in range(2 * len(features))]
        keys = [torch.stack(pair, dim=1) for pair in zip(views[::2], views[1::2])]
        prepared = []
        for column, of_rows in zip(features, keys):
            pixels = column[PIXELS]
            count = len(pixels.values if isinstance(pixels, UndecodedRows) else pixels)  # fewer negatives than rows
            prepared.append({**column, KEYS: of_rows[:count]})
        return prepared

    def calculate_loss(
        self, reps: list[list[Tensor]], labels: Tensor | None = None, *, with_backward: bool = False
    ) -> Tensor:
        """See `CachedLoss.calculate_loss`, with two columns for each of the data set: twice as many rows."""
        (first, second), *negatives = [tuple(map(torch.cat, pair)) for pair in zip(reps[::2], reps[1::2])]
        joined = [[column] for column in (*both_ways(first, second), *map(torch.cat, negatives))]
        labels = labels if labels is None else labels.repeat(2)
        return super().calculate_loss(joined, labels, with_backward=with_backward)

    def encode(self, features: dict[str, Any]) -> Any:
        """The embeddings of two views, (B, D) each."""
        rest = {name: value for name, value in features.items() if name != KEYS}
        return tuple(
            super(TwoViewLoss, self).encode(rest | {PIXELS: view})
            for view in views_of(features[PIXELS], features[KEYS], self.mean, self.std)
        )

    def _value(self, leaves: list[tuple[Tensor, ...]], labels: Tensor | None) -> Tensor:
        return self.calculate_loss([[view] for of_column in leaves for view in of_column], labels, with_backward=True)


def pixel_scale(model: nn.Module) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation (3,) by which a model's processor normalises pixels; 0 and 1 where it does not."""
    for module in model.modules():
        processor = getattr(module, "processor", None)
        processor = getattr(processor, "image_processor", processor)
        if processor is not None and getattr(processor, "do_normalize", False):
            return torch.tensor(processor.image_mean), torch.tensor(processor.image_std)
    return torch.zeros(3), torch.ones(3)


def add_head(model: SentenceTransformer, *, seed: int) -> None:
    """Put a projection head, drawn from `seed`, behind a model."""
    from anybatch.vision.encoders import ProjectionHead

    width = model.get_embedding_dimension()
    assert width is not None
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model.append(ProjectionHead(width).to(model.device))
