"""Losses without memory: InfoNCE, decoupled InfoNCE, count-corrected InfoNCE."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from anybatch.core.errors import AnybatchError
from anybatch.losses.base import MIN_TEMPERATURE, Batch, ContrastiveLoss, Direction
from anybatch.losses.engine import TILE_BYTES, Rule, Side
from anybatch.losses.log_weights import Values, plus
from anybatch.losses.per_example import Keys, only_growing


class InfoNCE(ContrastiveLoss):
    """The batch's own softmax: cross-entropy of the positive among the candidates.

        log_denominator_i = logaddexp(log_sum_i, 0)
        loss = mean_i log(1 + sum_j exp((s_ij - s_ip) / tau + b_ij))

    Args:
        margin: Added to every negative's similarity, so that a positive must win by it: b_ij = margin / tau. Needs a fixed temperature.
        hardness: beta. Negatives are weighted by exp(beta s_ij), normalised to a mean of 1 over the anchor's negatives:
            b_ij = beta s_ij - log mean_j exp(beta s_ij), a constant in the derivative. 0 for equal weights.
        temperature, learnable_temperature, min_temperature, direction, normalize, tile_bytes, ring: See `ContrastiveLoss`.

    Log-weights are added to the logits as they are. Temperatures seen: .01 to .07 for text, .07 to .1 for images.

    Raises:
        AnybatchError: A margin with a learnable temperature, a negative hardness.

    Cost: no state. Reference: van den Oord et al. 2018, arXiv 1807.03748, equation 4; hardness: Robinson et al. 2021,
    "Contrastive Learning with Hard Negative Samples", arXiv 2010.04592, equation 4 with tau+ = 0 (its released code also differentiates
    the weights, we follow the importance weights of the paper).
    """

    def __init__(
        self,
        *,
        margin: float = 0.0,
        hardness: float = 0.0,
        temperature: float = 0.05,
        learnable_temperature: bool = False,
        min_temperature: float = MIN_TEMPERATURE,
        direction: Direction = "one_way",
        normalize: bool = True,
        tile_bytes: int = TILE_BYTES,
        ring: bool = False,
    ) -> None:
        super().__init__(
            temperature=temperature,
            learnable_temperature=learnable_temperature,
            min_temperature=min_temperature,
            direction=direction,
            normalize=normalize,
            tile_bytes=tile_bytes,
            ring=ring,
        )
        if margin and learnable_temperature:
            raise AnybatchError(
                f"margin is {margin} and the temperature learnable; a margin needs a fixed temperature. Drop one of the two."
            )
        if hardness and ring:
            raise AnybatchError(
                f"hardness is {hardness} and ring=True: weights of mean 1 over an anchor's negatives need all of them at once. Drop one of the two."
            )
        if hardness < 0:
            raise AnybatchError(f"hardness is {hardness}; expected 0 (all negatives alike) or more.")
        self.margin, self.hardness = margin, hardness

    def _side(self, batch: Batch, *, direction: int) -> Side:
        side = super()._side(batch, direction=direction)
        if self.margin:
            others = batch.anchors if direction else batch.candidates
            shift = others.new_full((len(others),), self.margin / self._temperature)
            weight = plus(
                side.log_weight, len(batch.anchors), Values("margin", "text"), back=direction == 1, margin=shift
            )
            side = replace(side, log_weight=weight)
        return replace(side, adjust=_Hardness(self.hardness)) if self.hardness else side

    def _rule(self, index: Tensor | None, *, direction: int, normalised: bool, dimensions: int) -> Rule:
        return WithPositive()


class DecoupledInfoNCE(ContrastiveLoss):
    """InfoNCE without the positive in the denominator, which takes away its weight on easy positives in small batches.

        log_denominator_i = log_sum_i

    Args:
        temperature, learnable_temperature, min_temperature, direction, normalize, tile_bytes, ring: See `ContrastiveLoss`.

    An anchor without any negative contributes 0.

    Cost: no state. Reference: Yeh et al. 2022, "Decoupled Contrastive Learning", arXiv 2110.06848, equation 6.
    """

    def _rule(self, index: Tensor | None, *, direction: int, normalised: bool, dimensions: int) -> Rule:
        return _WithoutPositive()


class CountCorrectedInfoNCE(ContrastiveLoss):
    """InfoNCE over the whole data set, estimated from the batch: each of its k candidates but the positive stands for (n - 1) / k rows.

        log_denominator_i = logaddexp(log_mean_i + log(n - 1), 0),   log_mean_i = log_sum_i - log k

    A masked candidate counts in k and adds nothing to the sum, as it adds nothing to that over the data set. With normalised log-weights (mined batches: `RowTable(weights="inclusion")`) log_mean_i is the weighted log-sum itself.
    It needs no memory, and is the baseline that every memory has to beat.

    Args:
        num_rows: n, rows of the data set.
        temperature, learnable_temperature, min_temperature, direction, normalize, tile_bytes, ring: See `ContrastiveLoss`.

    Cost: no state. Reference: SogCLR's estimator with gamma = 1, eps = 1 / (n - 1); Yuan et al. 2022, arXiv 2202.12387.
    """

    def __init__(
        self,
        num_rows: int,
        *,
        temperature: float = 0.05,
        learnable_temperature: bool = False,
        min_temperature: float = MIN_TEMPERATURE,
        direction: Direction = "one_way",
        normalize: bool = True,
        tile_bytes: int = TILE_BYTES,
        ring: bool = False,
    ) -> None:
        super().__init__(
            temperature=temperature,
            learnable_temperature=learnable_temperature,
            min_temperature=min_temperature,
            direction=direction,
            normalize=normalize,
            tile_bytes=tile_bytes,
            ring=ring,
        )
        if num_rows < 2:
            raise AnybatchError(f"num_rows is {num_rows}; expected the number of rows of the data set, at least 2.")
        self.num_rows = num_rows

    @property
    def _known_rows(self) -> int:
        return self.num_rows

    def grow(self, num_rows: int, *, keys: Keys | None = None) -> None:
        """See `ContrastiveLoss.grow`."""
        super().grow(num_rows, keys=keys)
        if num_rows < self.num_rows:
            raise only_growing(num_rows, self.num_rows)
        self.num_rows = num_rows

    def _rule(self, index: Tensor | None, *, direction: int, normalised: bool, dimensions: int) -> Rule:
        return _CountCorrected(log_num_others=math.log(self.num_rows - 1), normalised=normalised)


@dataclass(frozen=True)
class _Hardness:
    """Weights of mean 1 over the negatives of each row, in proportion to exp(beta s_ij)."""

    beta: float

    def __call__(self, rows: slice, scores: Tensor, logits: Tensor) -> Tensor:
        negative = ~logits.isneginf()
        tilted = (self.beta * scores).masked_fill_(~negative, -torch.inf)
        log_mean = tilted.logsumexp(dim=1) - negative.sum(dim=1).clamp(min=1).to(tilted.dtype).log()
        return torch.where(negative, logits + tilted - log_mean[:, None], -torch.inf)


class WithPositive:
    """The rule of InfoNCE: the softmax over what is there."""

    row_wise = True

    def __call__(self, log_sum: Tensor, num_drawn: Tensor, rows: slice) -> tuple[Tensor, Tensor]:
        """See `Rule`."""
        log_denominator = torch.logaddexp(log_sum, torch.zeros_like(log_sum))
        return log_denominator, log_denominator


class _WithoutPositive:
    row_wise = True

    def __call__(self, log_sum: Tensor, num_drawn: Tensor, rows: slice) -> tuple[Tensor, Tensor]:
        return log_sum, torch.where(log_sum.isneginf(), 0.0, log_sum)


@dataclass(frozen=True, kw_only=True)
class _CountCorrected:
    log_num_others: float
    normalised: bool
    row_wise: bool = True

    def __call__(self, log_sum: Tensor, num_drawn: Tensor, rows: slice) -> tuple[Tensor, Tensor]:
        if self.normalised:
            correction = torch.full_like(log_sum, self.log_num_others)
        else:
            correction = self.log_num_others - num_drawn.clamp(min=1).log()
        objective = torch.logaddexp(log_sum + correction, torch.zeros_like(log_sum))
        return objective - correction, objective
