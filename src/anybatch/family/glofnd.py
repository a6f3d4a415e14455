"""GloFND: negatives that are closer than a learned threshold of the anchor are taken for positives, and dropped."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from anybatch.core.errors import AnybatchError
from anybatch.losses.base import MIN_TEMPERATURE, Batch, Direction
from anybatch.losses.engine import TILE_BYTES, Side, SoftmaxStats
from anybatch.losses.example_values import ExampleValues
from anybatch.losses.per_example import Keys
from anybatch.losses.schedule import GammaSchedule
from anybatch.losses.sogclr import Remembering, SogCLR


class GloFND(SogCLR):
    """SogCLR without the negatives that lie in the anchor's closest share alpha of the data.

        b_ij     = -inf where s_ij > lambda_i
        lambda_i <- lambda_i - lr (alpha - share of the batch's negatives with s_ij > lambda_i)        pinball loss

    and the mean is over the others: k_i in `SogCLR` is less what is dropped, as in the paper, so that the data set is that without them.

    lambda_i follows the (1 - alpha) quantile of the similarities of anchor i over all the data, of which a batch alone
    shows too little. Its first value is the batch's quantile. Negatives removed by masks count for no share, and add nothing to the mean, as everywhere.

    Args:
        num_rows: n, rows of the data set.
        alpha: Share of the data that is dropped, in (0, 1). Published: .01 (100,000 images), .001 (3 million pairs).
        threshold_lr: Step, in units of similarity.
        threshold_start: Steps before thresholds are learned and used. Published: a third of all.
        gamma, eps: See `SogCLR`.
        temperature, learnable_temperature, min_temperature, direction, normalize, tile_bytes: See `ContrastiveLoss`.

    Thresholds and the number of steps are buffers, updated once a call in training mode with gradients enabled.

    Raises:
        AnybatchError: Numbers out of range; in a call as `SogCLR`.

    Cost: 12 bytes a row and direction; a comparison a score; "both" directions cost two runs of the engine. Reference: Balmaseda et
    al. 2025, "Discovering Global False Negatives On the Fly for Self-supervised Contrastive Learning", arXiv 2502.20612, algorithm 1.
    """

    fillable = False  # it remembers another mean than that over all negatives

    def __init__(
        self,
        num_rows: int,
        *,
        alpha: float = 0.01,
        threshold_lr: float = 0.05,
        threshold_start: int = 0,
        gamma: float | GammaSchedule = 0.9,
        eps: float | None = None,
        temperature: float = 0.05,
        learnable_temperature: bool = False,
        min_temperature: float = MIN_TEMPERATURE,
        direction: Direction = "one_way",
        normalize: bool = True,
        tile_bytes: int = TILE_BYTES,
    ) -> None:
        super().__init__(
            num_rows,
            gamma=gamma,
            eps=eps,
            temperature=temperature,
            learnable_temperature=learnable_temperature,
            min_temperature=min_temperature,
            direction=direction,
            normalize=normalize,
            tile_bytes=tile_bytes,
        )
        if not 0 < alpha < 1:
            raise AnybatchError(f"alpha is {alpha}; expected the share of negatives to drop, between 0 and 1.")
        if threshold_start < 0:
            raise AnybatchError(f"threshold_start is {threshold_start}; expected a number of steps, 0 or more.")
        self.alpha, self.threshold_start = alpha, threshold_start
        self.thresholds = ExampleValues(
            num_rows,
            2 if direction == "both" else 1,
            initial=torch.nan,
            limits=(-torch.inf, torch.inf),
            lr=threshold_lr,
        )
        self.num_steps: Tensor
        self.register_buffer("num_steps", torch.tensor(0))

    def grow(self, num_rows: int, *, keys: Keys | None = None) -> None:
        """See `ContrastiveLoss.grow`."""
        super().grow(num_rows, keys=keys)
        self.thresholds.grow_buffers(num_rows)

    def _side(self, batch: Batch, *, direction: int) -> Side:
        side = super()._side(batch, direction=direction)
        if int(self.num_steps) < self.threshold_start:
            return side
        assert batch.index is not None
        threshold = self.thresholds.of(batch.index, direction=direction, dtype=batch.anchors.dtype)
        adjust = _Dropping(threshold=threshold, alpha=self.alpha)
        assert isinstance(side.rule, Remembering)
        return replace(side, rule=replace(side.rule, dropped=adjust.dropped), adjust=adjust)

    def _finish(self, batch: Batch, sides: tuple[Side, ...], stats: tuple[SoftmaxStats, ...], loss: Tensor) -> Tensor:
        loss = super()._finish(batch, sides, stats, loss)
        if not self._updating:
            return loss
        self.num_steps += 1
        assert batch.index is not None
        for direction, side in enumerate(sides):
            if not isinstance(side.adjust, _Dropping):
                continue
            new = side.adjust.threshold.isnan() & ~side.adjust.first.isneginf()
            self.thresholds.start(batch.index[new], side.adjust.first[new], direction=direction)
            old = ~side.adjust.threshold.isnan() & ~side.adjust.share.isnan()
            self.thresholds.update(batch.index[old], self.alpha - side.adjust.share[old], direction=direction)
        return loss


class _Dropping:
    """Drops the negatives above the threshold of each row, and counts them.

    Attributes:
        threshold: (B,) NaN for a row without one, which takes the quantile of the batch.
        first: (B,) that quantile; -inf for a row without negatives, or with scores that are no numbers: a step that has diverged.
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
