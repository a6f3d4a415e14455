"""NUCLR: a learned margin for each candidate, its popularity."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

from anybatch.core import distributed
from anybatch.core.errors import AnybatchError
from anybatch.losses.base import Batch, Direction
from anybatch.losses.engine import TILE_BYTES, Rule, Side, SoftmaxStats
from anybatch.losses.example_values import ExampleValues
from anybatch.losses.log_weights import Values, plus
from anybatch.losses.per_example import Keys
from anybatch.losses.schedule import GammaSchedule
from anybatch.losses.sogclr import Remembering, SogCLR


class NUCLR(SogCLR):
    """SogCLR in which a candidate that is close to everything is discounted by a margin of its own.

        g_i   = mean over negatives j of exp((d_ij - zeta_j) / tau),       u_i the moving average of it
        loss  = mean_i log(u_i + exp(-max zeta / tau) / (n - 1))           the positive is in the denominator
        P_ij  = the share of candidate j in the denominator of anchor i, over all the data (P_jj: of the positive, with zeta_j)
        zeta_j <- zeta_j - lr * velocity_j,   derivative_j = 1 - sum over all anchors i of P_ij

    The margins are the dual variables that make every candidate chosen once in sum, which is the density of candidates in the
    discriminative model. The sum over all anchors is estimated by the batch's, times (n - 1) / (B - 1). The loss's value leaves out
    the mean of the margins over tau, which is the same for all embeddings.

    Args:
        num_rows: n, rows of the data set.
        gamma: Weight of the new batch, or a `GammaSchedule`.
        margin: The first margin of every row, and that of explicit negatives. Published: -.05.
        margin_lr: Published: 5e-6 for text, more for images.
        margin_momentum: Weight of the old velocity.
        margin_start: Steps before margins are learned. Published: those of 5 epochs.
        temperature, direction, normalize, tile_bytes: See `ContrastiveLoss`.

    Margins, their momentum and the number of steps are buffers, updated once a call in training mode with gradients enabled.

    Raises:
        AnybatchError: Numbers out of range; in a call as `SogCLR`.

    Cost: 12 bytes a row and direction, and a maximum over the margins a call; "both" directions cost two runs of the engine.
    Reference: Wang et al. 2024, "On Discriminative Probabilistic Modeling for Self-Supervised Representation Learning", arXiv
    2410.09156, section 5 and algorithm 1.
    """

    def __init__(
        self,
        num_rows: int,
        *,
        gamma: float | GammaSchedule = 0.9,
        margin: float = -0.05,
        margin_lr: float = 5e-6,
        margin_momentum: float = 0.1,
        margin_start: int = 0,
        temperature: float = 0.05,
        direction: Direction = "one_way",
        normalize: bool = True,
        tile_bytes: int = TILE_BYTES,
    ) -> None:
        if margin_start < 0:
            raise AnybatchError(f"margin_start is {margin_start}; expected a number of steps, 0 or more.")
        super().__init__(
            num_rows,
            gamma=gamma,
            temperature=temperature,
            direction=direction,
            normalize=normalize,
            tile_bytes=tile_bytes,
        )
        self.margins = ExampleValues(
            num_rows,
            2 if direction == "both" else 1,
            initial=margin,
            limits=(-1.0, 1.0),
            lr=margin_lr,
            momentum=margin_momentum,
        )
        self.margin, self.margin_start, self.num_rows = margin, margin_start, num_rows
        self.num_steps: Tensor
        self.register_buffer("num_steps", torch.tensor(0))

    def grow(self, num_rows: int, *, keys: Keys | None = None) -> None:
        """See `ContrastiveLoss.grow`."""
        super().grow(num_rows, keys=keys)
        self.margins.grow_buffers(num_rows)
        self.num_rows = num_rows

    def _log_eps(self, direction: int) -> float:
        highest = max(self.margin, self.margins.values[direction].max().item())
        return -highest / self._temperature - math.log(self.num_rows - 1)

    def _rule(self, index: Tensor | None, *, direction: int, normalised: bool, dimensions: int) -> Rule:
        rule = super()._rule(index, direction=direction, normalised=normalised, dimensions=dimensions)
        assert isinstance(rule, Remembering)
        assert index is not None
        margins = self.margins.of(index, direction=direction, dtype=self.margins.values.dtype)
        known = {field.name: getattr(rule, field.name) for field in fields(rule)}
        own = -margins / self._temperature - math.log(self.num_rows - 1)
        return _Margined(
            **{**known, "log_eps": self._log_eps(direction)},
            log_own=own,
            factor=torch.zeros_like(own),
            positive=torch.zeros_like(own),
        )

    def _side(self, batch: Batch, *, direction: int) -> Side:
        side = super()._side(batch, direction=direction)
        assert batch.index is not None
        dtype = batch.anchors.dtype
        margins = self.margins.of(batch.index, direction=direction, dtype=dtype)
        num_explicit = len(batch.candidates) - len(batch.anchors) if direction == 0 else 0
        margins = torch.cat([margins, margins.new_full((num_explicit,), self.margin)])
        weight = plus(
            side.log_weight,
            len(batch.anchors),
            Values("margin", "text" if direction == 0 else "anchor"),  # of the candidates, in either direction
            back=direction == 1,
            margin=-margins / self._temperature,
        )
        assert isinstance(side.rule, _Margined)
        return replace(side, log_weight=weight, column_weight=side.rule.weight if self._updating else None)

    def _finish(self, batch: Batch, sides: tuple[Side, ...], stats: tuple[SoftmaxStats, ...], loss: Tensor) -> Tensor:
        loss = super()._finish(batch, sides, stats, loss)
        if not self._updating:
            return loss
        assert batch.index is not None
        if int(self.num_steps) >= self.margin_start:
            # Before any margin moves: the derivatives of both directions belong to the margins that the loss was made with.
            derivatives = [self._derivative(side, figures) for side, figures in zip(sides, stats, strict=True)]
            for direction, derivative in enumerate(derivatives):
                said = derivative.isfinite()
                self.margins.update(batch.index[said], derivative[said], direction=direction)
        self.num_steps += 1
        return loss

    def _derivative(self, side: Side, figures: SoftmaxStats) -> Tensor:
        """(B,) 1 - sum_i P_ij for the positives of this rank's rows; NaN where the batch says nothing."""
        assert figures.column_pull is not None
        assert isinstance(side.rule, _Margined)
        num_rows = len(figures.objective)
        num_rows_all = int(distributed.sum_over_ranks(figures.objective.new_tensor(num_rows)))
        if num_rows_all < 2:
            return torch.full_like(figures.objective, torch.nan)
        # With normalised log-weights the batch's sum stands for that over all the data already.
        others = figures.column_pull[:num_rows] / (1 if side.rule.normalised else num_rows_all - 1)
        derivative = 1 - others - side.rule.positive.to(others.dtype)
        return torch.where(figures.num_negatives > 0, derivative, torch.nan)


@dataclass(frozen=True, kw_only=True)
class _Margined(Remembering):
    """SogCLR's rule with the largest margin in the positive's place; notes the shares that each positive's own margin gives.

    Attributes:
        log_own: (B,) log of the positive's term with its own margin.
        factor: (B,) filled in a call: p_ij times this is the share of j among the k candidates and the positive.
        positive: (B,) filled in a call: the share of the positive.
    """

    log_own: Tensor
    factor: Tensor
    positive: Tensor

    def __call__(self, log_sum: Tensor, num_drawn: Tensor, rows: slice) -> tuple[Tensor, Tensor]:
        log_mean, correction = self.remember(log_sum, num_drawn, rows)
        objective = torch.logaddexp(log_mean, torch.full_like(log_mean, self.log_eps))
        own = self.log_own[rows]
        exact = torch.logaddexp(log_mean.to(own.dtype), own)
        self.factor[rows] = (objective - exact).exp() * (1 if self.normalised else num_drawn)
        self.positive[rows] = (own - exact).exp()
        return objective + correction, objective

    def weight(self, rows: slice) -> Tensor:
        """Weights of the rows in the pulls of the columns."""
        return self.factor[rows]
