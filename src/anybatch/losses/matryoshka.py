"""Matryoshka prefixes: embeddings that stay good when they are cut, trained with any loss and one gradient."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from typing import Unpack

import torch
from torch import Tensor, nn

from anybatch.core.errors import AnybatchError
from anybatch.losses.base import ContrastiveLoss, Known, check_embeddings
from anybatch.losses.state import State


class Matryoshka(State):
    """The weighted sum of a loss over prefixes of the embeddings.

        loss = sum_k weight_k loss_k(anchors[:, :d_k], candidates[:, :d_k])

    The loss normalises each prefix anew, unless it was made with `normalize=False`. Every prefix has a loss of its own,
    because a denominator of one width says nothing of another.

    When: shortened embeddings must be good too. Evidence: the formula is tested; no training of ours.

    Args:
        loss: A loss of `anybatch.losses`, copied once a dimension as it stands; or one loss a dimension, for those that
            are made for a width (`TempNet`, `EMC2` with states).
        dimensions: Widths of the prefixes, all different; the full width is among them only if given.
        weights: One a dimension, 0 or more; None for 1 each. The sum is not divided by them.

    The embeddings are one leaf and receive one gradient, so that a cached step replays the encoder once.

    Cost: that of the losses; four prefixes of 384 dimensions cost about two plain losses. Reference: Kusupati et al.
    2022, "Matryoshka Representation Learning", arXiv 2205.13147, equation 1.

    Example:
        >>> import torch
        >>> from anybatch.losses import InfoNCE
        >>> loss = Matryoshka(InfoNCE(), [16, 8])
        >>> loss(torch.randn(4, 16), torch.randn(4, 16)).ndim
        0
    """

    def __init__(
        self,
        loss: ContrastiveLoss | Sequence[ContrastiveLoss],
        dimensions: Sequence[int],
        *,
        weights: Sequence[float] | None = None,
    ) -> None:
        super().__init__()
        check_prefixes(dimensions, weights, "dimensions are")
        self.dimensions = tuple(dimensions)
        self.weights = (1.0,) * len(self.dimensions) if weights is None else tuple(weights)
        losses = list(loss) if isinstance(loss, Sequence) else [copy.deepcopy(loss) for _ in self.dimensions]
        if len(losses) != len(self.dimensions) or len(set(map(id, losses))) < len(losses):
            raise AnybatchError(
                f"{len(losses)} losses for {len(self.dimensions)} dimensions; give one loss, which is copied, or a "
                "different one for each dimension."
            )
        self.losses = nn.ModuleList(losses)

    @property
    def widest(self) -> ContrastiveLoss:
        """The loss of the longest prefix."""
        chosen = self.losses[self.dimensions.index(max(self.dimensions))]
        assert isinstance(chosen, ContrastiveLoss)
        return chosen

    @property
    def temperature(self) -> float:
        """The temperature of the longest prefix at this moment."""
        return self.widest.temperature

    @property
    def last_stats(self) -> dict[str, float]:
        """Figures of the longest prefix, and every prefix's objective as `objective_64` and so on."""
        figures = dict(self.widest.last_stats)
        for dimension, loss in zip(self.dimensions, self.losses, strict=True):
            assert isinstance(loss, ContrastiveLoss)
            if loss.last_stats:
                figures[f"objective_{dimension}"] = loss.last_stats["objective"]
        return figures

    def forward(self, anchors: Tensor, candidates: Tensor, **known: Unpack[Known]) -> Tensor:
        """The weighted sum over the prefixes; see `ContrastiveLoss.forward`. D is at least the widest prefix."""
        check_embeddings(anchors, candidates)
        if anchors.shape[-1] < max(self.dimensions):
            raise AnybatchError(
                f"The embeddings have {anchors.shape[-1]} dimensions; the prefixes go up to {max(self.dimensions)}. "
                "Leave out the dimensions that the model does not have."
            )
        terms = [
            weight * loss(anchors[..., :dimension], candidates[..., :dimension], **known)
            for dimension, weight, loss in zip(self.dimensions, self.weights, self.losses, strict=True)
        ]
        return torch.stack(terms).sum()


def check_prefixes(dimensions: Sequence[int], weights: Sequence[float] | None, name: str) -> None:
    """Refuse prefixes that are none, equal or empty, and other weights than theirs; `name` is theirs, with its verb."""
    if not dimensions or len(set(dimensions)) < len(dimensions) or min(dimensions) < 1:
        raise AnybatchError(f"{name} {list(dimensions)}; expected different positive widths such as [384, 128, 64].")
    if weights is not None and not (len(weights) == len(dimensions) and all(0 <= w < math.inf for w in weights)):
        raise AnybatchError(
            f"weights are {list(weights)} for dimensions {list(dimensions)}; expected one number a dimension, "
            "0 or more."
        )
