"""NUCLR: a learned margin for each candidate, its popularity."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Unpack, final

import torch
from torch import Tensor

from anybatch.core import distributed
from anybatch.core.configuration import CountOrZero, Positive, Share
from anybatch.core.errors import AnybatchError
from anybatch.family.per_row import PerRowValues
from anybatch.losses.base import Scoring, SoftmaxLoss
from anybatch.losses.denominators import RunningDenominator, RunningRule
from anybatch.losses.engine import Answer, Side, SoftmaxStats
from anybatch.losses.gamma import Gamma
from anybatch.losses.log_weights import Values, plus
from anybatch.losses.parts import Batch, GlobalTemperature, Part


@final
class NUCLR(SoftmaxLoss):
    """SogCLR in which a candidate that is close to everything is discounted by a margin of its own.

        g_i   = mean over negatives j of exp((d_ij - zeta_j) / tau),       u_i the moving average of it
        loss  = mean_i log(u_i + exp(-max zeta / tau) / (n - 1))           the positive is in the denominator
        P_ij  = the share of candidate j in the denominator of anchor i, over all data (P_jj: of the positive, zeta_j)
        zeta_j <- zeta_j - lr * velocity_j,   derivative_j = 1 - sum over all anchors i of P_ij

    The margins are the dual variables that make every candidate chosen once in sum. The sum over all anchors is
    estimated by the batch's, times (n - 1) / (B - 1). The loss's value leaves out the mean of the margins over tau,
    which is the same for all embeddings.

    When: some candidates are close to everything. Evidence: one small run in docs/log.md, what training says.

    Args:
        num_rows: n, rows of the data set.
        gamma: Weight of the new batch, or a `GammaSchedule`.
        margin: The first margin of every row, and that of explicit negatives. Published: -.05.
        margin_lr: Published: 5e-6 for text, more for images.
        margin_momentum: Weight of the old velocity.
        learn_from: Steps before margins are learned. Published: those of 5 epochs.
        temperature: Fixed.
        scoring: See `Scoring`.

    Cost: 12 bytes a row and direction, and a maximum over the margins a call; "both" directions cost two runs of the
    engine. Reference: Wang et al. 2024, "On Discriminative Probabilistic Modeling for Self-Supervised Representation
    Learning", arXiv 2410.09156, section 5 and algorithm 1.

    Example:
        >>> import torch
        >>> loss = NUCLR(1000, margin_lr=0.01)
        >>> value = loss(torch.randn(8, 16, requires_grad=True), torch.randn(8, 16), index=torch.arange(8))
        >>> int((loss.others[0].margins.values != -0.05).sum())
        8
    """

    denominator: RunningDenominator

    def __init__(
        self,
        num_rows: int,
        *,
        gamma: Share | Gamma = 0.9,
        margin: float = -0.05,
        margin_lr: Positive = 5e-6,
        margin_momentum: float = 0.1,
        learn_from: CountOrZero = 0,
        temperature: Positive = 0.05,
        **scoring: Unpack[Scoring],
    ) -> None:
        directions = self.num_directions(scoring)
        margins = Margins(
            num_rows, directions, initial=margin, lr=margin_lr, momentum=margin_momentum, start=learn_from
        )
        running = RunningDenominator(num_rows, directions, gamma=gamma)
        super().__init__(GlobalTemperature(temperature), running, margins, **scoring)


class Margins(Part):
    """A margin per row as a candidate, beside a running denominator, at one fixed temperature; see `NUCLR`."""

    needs_index = True
    num_steps: Tensor

    def __init__(
        self, num_rows: int, directions: int, *, initial: float, lr: float, momentum: float, start: int
    ) -> None:
        super().__init__(num_rows)
        if start < 0:
            raise AnybatchError(f"learn_from is {start}; expected a number of steps, 0 or more.")
        self.margins = PerRowValues(num_rows, directions, initial=initial, limits=(-1.0, 1.0), lr=lr, momentum=momentum)
        self.initial, self.start = initial, start
        self.register_buffer("num_steps", torch.tensor(0))

    def ask(self, side: Side, batch: Batch, direction: int) -> Side:
        """See `Part.ask`."""
        rule, tau, dtype = side.rule, float(side.temperature), batch.anchors.dtype
        assert isinstance(rule, RunningRule)
        assert self.num_rows is not None
        # 1. The largest margin in the positive's place.
        log_others = math.log(self.num_rows - 1)
        highest = max(self.initial, self.margins.values[direction].max().item())
        own = -self.margins.of(batch.rows, direction=direction, dtype=self.margins.values.dtype) / tau - log_others
        empty = torch.zeros_like(own), torch.zeros_like(own)
        rule = replace(rule, log_eps=-highest / tau - log_others)
        margined = _MarginedRule(running=rule, log_own=own, factor=empty[0], positive=empty[1])
        # 2. Each candidate's margin off its logit; explicit negatives have the first margin.
        margins = self.margins.of(batch.rows, direction=direction, dtype=dtype)
        num_explicit = len(batch.others(direction)) - len(margins)
        margins = torch.cat([margins, margins.new_full((num_explicit,), self.initial)])
        off = Values("margin", "text" if direction == 0 else "anchor")  # of the candidates, in either direction
        weight = plus(side.log_weight, len(batch.anchors), off, back=direction == 1, margin=-margins / tau)
        asked = margined.weight if batch.updating else None
        return replace(side, rule=margined, log_weight=weight, column_weight=asked)

    def learn(self, batch: Batch, sides: tuple[Side, ...], stats: tuple[SoftmaxStats, ...], loss: Tensor) -> Tensor:
        """See `Part.learn`."""
        if not batch.updating:
            return loss
        if int(self.num_steps) >= self.start:
            # Of both directions before any margin moves.
            derivatives = [_derivative(side, figures) for side, figures in zip(sides, stats, strict=True)]
            for direction, derivative in enumerate(derivatives):
                heard = derivative.isfinite()
                self.margins.update(batch.rows[heard], derivative[heard], direction=direction)
        self.num_steps += 1
        return loss


def _derivative(side: Side, figures: SoftmaxStats) -> Tensor:
    """(B,) 1 - sum_i P_ij for the positives of this rank's rows; NaN where the batch says nothing."""
    assert figures.column_gradient is not None
    assert isinstance(side.rule, _MarginedRule)
    num_rows = len(figures.objective)
    num_rows_all = int(distributed.sum_over_ranks(figures.objective.new_tensor(num_rows)))
    if num_rows_all < 2:
        return torch.full_like(figures.objective, torch.nan)
    # With normalised log-weights the batch's sum stands for that over all the data already.
    others = figures.column_gradient[:num_rows] / (1 if side.rule.running.normalised else num_rows_all - 1)
    derivative = 1 - others - side.rule.positive.to(others.dtype)
    return torch.where(figures.num_negatives > 0, derivative, torch.nan)


@dataclass(frozen=True, kw_only=True)
class _MarginedRule:
    """A running log-mean with the largest margin in the positive's place; keeps the shares by each one's own margin."""

    running: RunningRule
    log_own: Tensor  # (B,) log of the positive's term with its own margin
    factor: Tensor  # (B,) filled in a call: p_ij times this is the share of j among the k candidates and the positive
    positive: Tensor  # (B,) filled in a call: the share of the positive
    row_wise: bool = False

    def __call__(self, log_sum: Tensor, num_drawn: Tensor, rows: slice) -> Answer:
        answer, log_mean = self.running.remember(log_sum, num_drawn)
        own = self.log_own[rows]
        exact = torch.logaddexp(log_mean.to(own.dtype), own)
        self.factor[rows] = (answer.log_denominator - exact).exp()
        self.positive[rows] = (own - exact).exp()
        return answer

    def weight(self, rows: slice) -> Tensor:
        """Weights of the rows in the gradient weights of the columns."""
        return self.factor[rows]
