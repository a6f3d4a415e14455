"""GloFND: negatives that are closer than a learned threshold of the anchor are taken for positives, and dropped."""

from __future__ import annotations

from dataclasses import replace
from typing import ClassVar, Unpack, final

import torch
from torch import Tensor

from anybatch.core.configuration import CountOrZero, NotNegative, Positive, Share
from anybatch.core.errors import AnybatchError
from anybatch.family.per_row import PerRowValues
from anybatch.losses.base import OneTemperature, SoftmaxLoss
from anybatch.losses.denominators import RunningDenominator, RunningRule
from anybatch.losses.engine import Side, SoftmaxStats
from anybatch.losses.gamma import Gamma
from anybatch.losses.parts import Batch, Part


@final
class GloFND(SoftmaxLoss):
    """SogCLR without the negatives that lie in the anchor's closest share alpha of the data.

        b_ij     = -inf where s_ij > lambda_i
        lambda_i <- lambda_i - lr (alpha - share of the batch's negatives with s_ij > lambda_i)        pinball loss

    and the mean is over the others: k_i in `SogCLR` is less what is dropped, as in the paper. lambda_i follows the
    (1 - alpha) quantile of the similarities of anchor i over all the data, of which a batch alone shows too little. Its
    first value is the batch's quantile. Negatives removed by masks count for no share.

    When: false negatives are likely and no ids tell them. When not: ids are known; use them. Evidence: one small run in
    docs/log.md, what training says.

    Args:
        num_rows: n, rows of the data set.
        alpha: Share of the data that is dropped, in (0, 1). Published: .01 (100,000 images), .001 (3 million pairs).
        threshold_lr: Step, in units of similarity.
        learn_from: Steps before thresholds are learned and used. Published: a third of all.
        gamma, eps: See `SogCLR`.
        scoring: See `OneTemperature`.

    Cost: 12 bytes a row and direction; a comparison a score; "both" directions cost two runs of the engine. Reference:
    Balmaseda et al. 2025, "Discovering Global False Negatives On the Fly for Self-supervised Contrastive Learning",
    arXiv 2502.20612, algorithm 1.

    Example:
        >>> import torch
        >>> loss = GloFND(1000, alpha=0.1)
        >>> value = loss(torch.randn(8, 16, requires_grad=True), torch.randn(8, 16), index=torch.arange(8))
        >>> int((~loss.others[0].thresholds.values.isnan()).sum())
        8
    """

    lacks: ClassVar = {
        "joint": "looks at whole rows of scores",
        "positives_by": "takes every candidate but one for a negative",
        "hardness": "drops negatives by their scores already",
    }
    denominator: RunningDenominator

    def __init__(
        self,
        num_rows: int,
        *,
        alpha: Positive = 0.01,
        threshold_lr: Positive = 0.05,
        learn_from: CountOrZero = 0,
        gamma: Share | Gamma = 0.9,
        eps: NotNegative | None = None,
        **scoring: Unpack[OneTemperature],
    ) -> None:
        directions = self.num_directions(scoring)
        moving = self.scoring(scoring)["learnable_temperature"]
        running = RunningDenominator(num_rows, directions, gamma=gamma, eps=eps, moving=moving)
        thresholds = Thresholds(num_rows, directions, alpha=alpha, lr=threshold_lr, start=learn_from)
        super().__init__(None, running, thresholds, **scoring)


class Thresholds(Part):
    """A threshold per row as an anchor, beside a running denominator; see `GloFND`."""

    needs_index = True
    num_steps: Tensor

    def __init__(self, num_rows: int, directions: int, *, alpha: float, lr: float, start: int) -> None:
        super().__init__(num_rows)
        if not 0 < alpha < 1:
            raise AnybatchError(f"alpha is {alpha}; expected the share of negatives to drop, between 0 and 1.")
        if start < 0:
            raise AnybatchError(f"learn_from is {start}; expected a number of steps, 0 or more.")
        self.alpha, self.start = alpha, start
        everything = (-torch.inf, torch.inf)
        self.thresholds = PerRowValues(num_rows, directions, initial=torch.nan, limits=everything, lr=lr)
        self.register_buffer("num_steps", torch.tensor(0))

    def ask(self, side: Side, batch: Batch, direction: int) -> Side:
        """See `Part.ask`."""
        if int(self.num_steps) < self.start:
            return side
        threshold = self.thresholds.of(batch.rows, direction=direction, dtype=batch.anchors.dtype)
        adjust = _Dropping(threshold=threshold, alpha=self.alpha)
        assert isinstance(side.rule, RunningRule)
        return replace(side, rule=replace(side.rule, dropped=adjust.dropped), adjust=adjust)

    def learn(self, batch: Batch, sides: tuple[Side, ...], stats: tuple[SoftmaxStats, ...], loss: Tensor) -> Tensor:
        """See `Part.learn`."""
        if not batch.updating:
            return loss
        self.num_steps += 1
        for direction, side in enumerate(sides):
            if not isinstance(side.adjust, _Dropping):
                continue
            threshold, first, share = side.adjust.threshold, side.adjust.first, side.adjust.share
            new, old = threshold.isnan() & ~first.isneginf(), ~threshold.isnan() & ~share.isnan()
            self.thresholds.start(batch.rows[new], first[new], direction=direction)
            self.thresholds.update(batch.rows[old], self.alpha - share[old], direction=direction)
        return loss


class _Dropping:
    """Drops the negatives above the threshold of each row, and counts them.

    Attributes:
        threshold: (B,) NaN for a row without one, which takes the quantile of the batch.
        first: (B,) that quantile; -inf for a row without negatives, or with scores that are no numbers.
        share: (B,) of the negatives above the threshold; NaN for such rows.
        dropped: (B,) how many those are.
    """

    def __init__(self, *, threshold: Tensor, alpha: float) -> None:
        self.threshold, self.alpha = threshold, alpha
        self.first, self.share = torch.full_like(threshold, -torch.inf), torch.full_like(threshold, torch.nan)
        self.dropped = torch.zeros_like(threshold)

    def __call__(self, rows: slice, scores: Tensor, logits: Tensor) -> Tensor:
        negative = ~logits.isneginf()
        count = negative.sum(dim=1)
        threshold, fine = self.threshold[rows], scores.sum(dim=1).isfinite()
        if bool(threshold.isnan().any()):
            # The value with alpha * count negatives above it, rounded down.
            above = (self.alpha * count).long().clamp(max=scores.shape[1] - 1)
            allowed = scores.masked_fill(~negative, -torch.inf)
            highest = allowed.topk(int(above.max()) + 1, dim=1).values
            first = highest.gather(1, above[:, None])[:, 0]
            self.first[rows] = torch.where(fine, first, -torch.inf)
            threshold = torch.where(threshold.isnan(), first, threshold)
        dropped = (scores > threshold[:, None]) & negative
        self.dropped[rows] = dropped.sum(dim=1).to(scores.dtype)
        self.share[rows] = torch.where(fine, self.dropped[rows] / count, torch.nan)
        return logits.masked_fill_(dropped, -torch.inf)
