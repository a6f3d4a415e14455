"""The arithmetic of the engine: tiles of scores, log-sums of rows and columns, gradients in closed form.

A rank computes the block of its own rows against the candidates of all ranks, for both directions of a loss at once:

    pass A   scores tile = anchors[rows] @ candidates.T          1 product; log-sums of rows, running log-sums of columns
    rules    log-denominators of rows and of columns
    pass B   the tile again, then d anchors and d candidates     3 products

Pass A and B are one when a single tile holds everything, or when there is one direction whose rule works row by row: 3 products in
place of 4. With W ranks the candidates are gathered first and the gradient of all candidates is summed over the ranks last, or both travel
in a ring (`candidates`); no row's temperature, threshold or weight has to travel, because no block is computed on two ranks.

What is not a product is kept cheap: tiles live in buffers that are made once, a pair has one exponential, exp(logit - peak of its row),
and what turns that into its pull is a number a row, which is put on the (rows, D) side of the products. The derivative of a temperature of
one direction is read from d anchors: scores are linear in the anchor, so  d / d tau_i = -(anchor_i . d / d anchor_i) / tau_i.

Shapes: B rows (anchors of this rank), M columns (candidates of this rank), D dimensions; `_all` marks those of all ranks together.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from anybatch.core import distributed
from anybatch.core.errors import AnybatchError
from anybatch.losses.candidates import Block, Gathered, Layout, Ring
from anybatch.losses.log_weights import LogWeight
from anybatch.losses.sides import Answer, Side, SoftmaxStats


@dataclass(frozen=True, kw_only=True, eq=False)
class Solution:
    """Gradients of the mean objective of all ranks, and figures.

    Attributes:
        loss: Scalar, the same on every rank.
        d_anchors: (B, D), world_size times the gradient; None when not wanted. `d_candidates` (M, D) likewise.
        d_temperatures: One a side: scalar (the whole gradient) or (B,) (world_size times it).
        stats: One a side.
    """

    loss: Tensor
    d_anchors: Tensor | None
    d_candidates: Tensor | None
    d_temperatures: tuple[Tensor | None, ...]
    stats: tuple[SoftmaxStats, ...]


def solve(
    anchors: Tensor,
    candidates: Tensor,
    sides: tuple[Side, ...],
    *,
    tile_bytes: int,
    gradients: bool,
    ring: bool = False,
) -> Solution:
    """Loss and gradients of one direction (`sides` of length 1) or of the mean of both (2: anchors to candidates, positives to anchors).

    With `ring` and several ranks the candidates are not gathered; four products, because no rank sees whole rows at once.
    """
    layout = Layout.of(len(anchors), len(candidates), anchors.device)
    travelling = ring and distributed.is_active()
    if travelling and any(side.adjust is not None for side in sides):
        raise AnybatchError(
            "ring=True with a loss that looks at whole rows of scores (hardness, GloFND, EMC2): the ring has the candidates of one rank at a time. "
            "Use ring=False, which gathers the candidates, or another loss."
        )
    source = Ring(candidates, layout) if travelling else Gathered(candidates, layout)
    positive = (anchors * candidates[: len(anchors)]).sum(dim=1)
    forward = _Rows(sides[0], layout, positive, alone=len(sides) == 1)
    back = _Columns(sides[1], layout, positive) if len(sides) == 2 else None
    directions = (forward,) if back is None else (forward, back)
    d_anchors = torch.zeros_like(anchors)
    tiles = _tiles(len(anchors), source.widest, anchors.element_size(), tile_bytes)
    height = tiles[0].stop if tiles else 0
    scores_buffer, logits_buffer = (_Buffer(anchors, height * source.widest) for _ in range(2))

    def score(rows: slice, block: Block) -> tuple[Tensor, Tensor]:
        """The scores of a tile, and where its logits may be put: over them if nobody needs the scores any more."""
        shape = (rows.stop - rows.start, len(block.candidates))
        scores = scores_buffer.view(shape)
        torch.mm(anchors[rows], block.candidates.T, out=scores)
        keeping = back is not None or sides[0].adjust is not None
        return scores, logits_buffer.view(shape) if keeping else scores

    def add_gradient(rows: slice, block: Block, scores: Tensor, powers: Tensor, factor: Tensor | None) -> None:
        """From powers * factor, the pulls of the rows' terms; the powers are consumed."""
        assert block.gradient is not None
        forward.note(rows, block, scores, powers, factor)
        if back is not None:
            if factor is not None:
                powers.mul_(factor[:, None])
            powers[:, block.positives] += back.pull(rows, block, scores)
            factor = None
        if factor is None:
            d_anchors[rows].addmm_(powers, block.candidates)
            block.gradient.addmm_(powers.T, anchors[rows])
        else:
            d_anchors[rows] += (powers @ block.candidates).mul_(factor[:, None])
            block.gradient.addmm_(powers.T, anchors[rows] * factor[:, None])

    if source.num_blocks == 1 and (len(tiles) == 1 or (back is None and sides[0].rule.row_wise)):
        for block in source.tour(gradients=gradients):
            for rows in tiles:
                scores, room = score(rows, block)
                powers, peak = forward.measure(rows, block, scores, room)
                if back is not None:
                    back.measure(rows, block, scores)
                forward.answer(rows)
                if back is not None:
                    back.answer()
                if gradients:
                    add_gradient(rows, block, scores, powers, forward.factor(rows, peak))
            if not tiles:  # a rank without rows still takes part in the rule's collectives
                forward.answer(slice(0, 0))
    else:
        for block in source.tour(gradients=False):
            for rows in tiles:
                scores, room = score(rows, block)
                if back is not None:
                    back.measure(rows, block, scores)
                forward.measure(rows, block, scores, room)
        forward.answer(slice(0, len(anchors)))
        if back is not None:
            back.answer()
        for block in source.tour(gradients=True) if gradients else ():
            for rows in tiles:
                scores, room = score(rows, block)
                add_gradient(rows, block, scores, forward.pull(rows, block, scores, room), None)

    num_rows_all = sum(layout.row_sizes) * len(sides)
    loss = distributed.sum_over_ranks(torch.stack([side.objective_sum() for side in directions]).sum()) / num_rows_all
    if not gradients:
        return Solution(
            loss=loss,
            d_anchors=None,
            d_candidates=None,
            d_temperatures=(None,) * len(sides),
            stats=tuple(side.stats(gradients=False) for side in directions),
        )
    own = candidates[: len(anchors)]
    d_candidates = source.gradient()
    for side in directions:
        total = side.total()[:, None]
        d_anchors -= total * own
        d_candidates[: len(anchors)] -= total * anchors
    if back is None:
        forward.d_temperature_rows = -(anchors * d_anchors).sum(dim=1) / forward.temperature
    else:
        forward.d_temperature_rows = -(forward.gap - forward.total() * positive) / forward.temperature
    scale = distributed.world_size() / num_rows_all
    return Solution(
        loss=loss,
        d_anchors=d_anchors.mul_(scale),
        d_candidates=d_candidates.mul_(scale),
        d_temperatures=tuple(side.d_temperature(scale, num_rows_all) for side in directions),
        stats=tuple(side.stats(gradients=True) for side in directions),
    )


class _Direction:
    """State of one direction: what was measured, what the rule answered, what the temperature receives. All (B,)."""

    def __init__(self, side: Side, layout: Layout, positive: Tensor, *, num_columns: int) -> None:
        self.side, self.layout, self.positive = side, layout, positive
        self.num_rows = len(positive)
        self.temperature = side.temperature.detach().expand(self.num_rows)
        self.log_sum, self.num_negatives = torch.full_like(positive, -torch.inf), torch.zeros_like(positive)
        drawn = torch.full_like(positive, num_columns - 1) if side.num_drawn is None else side.num_drawn
        self.num_drawn = drawn.to(positive.dtype)
        self.log_denominator, self.objective = torch.empty_like(positive), torch.empty_like(positive)
        self.positive_weight: Tensor | None = None
        self.d_temperature_rows = torch.zeros_like(positive)
        self.learning = side.temperature.requires_grad or side.temperature.ndim > 0

    def answer(self, rows: slice) -> None:
        answer = Answer(*self.side.rule(self.log_sum[rows], self.num_drawn[rows], rows))
        self.log_denominator[rows], self.objective[rows] = answer.log_denominator, answer.objective
        if answer.positive_weight is not None:
            if self.positive_weight is None:
                self.positive_weight = torch.empty_like(self.positive)
            self.positive_weight[rows] = answer.positive_weight

    def reference(self) -> Tensor:
        """(B,) exp(logit_ij - reference_i) = row_weight_i p_ij / tau_i, the derivative of the row's term in s_ij."""
        reference = finite(self.log_denominator) + self.temperature.log()
        return reference if self.side.row_weight is None else reference - self.side.row_weight.detach().log()

    def total(self) -> Tensor:
        """(B,) minus the derivative of the row's term in s_ip: what the rule says, or the sum of the negatives'."""
        if self.positive_weight is None:
            return (self.log_sum - self.reference()).exp()
        total = -self.positive_weight / self.temperature
        return total if self.side.row_weight is None else total * self.side.row_weight.detach()

    def objective_sum(self) -> Tensor:
        return (self.objective if self.side.row_weight is None else self.objective * self.side.row_weight).sum()

    def d_temperature(self, scale: float, num_rows_all: int) -> Tensor | None:
        if self.side.temperature.ndim:
            return self.d_temperature_rows * scale
        if not self.learning:
            return None
        return distributed.sum_over_ranks(self.d_temperature_rows.sum()) / num_rows_all

    def column_pull(self) -> Tensor | None:
        return None

    def stats(self, *, gradients: bool) -> SoftmaxStats:
        return SoftmaxStats(
            log_sum=self.log_sum,
            log_denominator=self.log_denominator,
            objective=self.objective,
            num_negatives=self.num_negatives,
            temperature_gradient=self.d_temperature_rows if gradients and self.learning else None,
            column_pull=self.column_pull() if gradients else None,
        )


class _Rows(_Direction):
    """Anchors of this rank against the candidates of all. `alone`: there is no other direction."""

    def __init__(self, side: Side, layout: Layout, positive: Tensor, *, alone: bool) -> None:
        super().__init__(side, layout, positive, num_columns=sum(layout.column_sizes))
        self.alone = alone
        self.gap = torch.zeros_like(positive)  # sum_j pull_ij s_ij, where it cannot be read from d anchors
        self.log_weight = _gathered(side.log_weight, layout.row_sizes, layout.column_sizes)
        self.removing = self.log_weight is not None or side.adjust is not None
        self.column_pull_all = positive.new_zeros(sum(layout.column_sizes)) if side.column_weight else None

    def logits(self, rows: slice, block: Block, scores: Tensor, room: Tensor) -> Tensor:
        """(b, m) relative to the positive; -inf where there is no negative. Written to `room`, which may be the scores themselves."""
        logits = torch.sub(scores, self.positive[rows, None], out=room).div_(self.temperature[rows, None])
        if self.log_weight is not None:
            logits += self.log_weight.tile(self.layout.shifted(rows), block.columns).to(logits.dtype)
        if block.own:
            local = torch.arange(rows.start, rows.stop, device=logits.device)
            logits[local - rows.start, self.layout.first_column - block.columns.start + local] = -torch.inf
        return logits if self.side.adjust is None else self.side.adjust(rows, scores, logits)

    def measure(self, rows: slice, block: Block, scores: Tensor, room: Tensor) -> tuple[Tensor, Tensor]:
        """Adds the block to the log-sums; returns powers (b, m) and peak (b,), exp(logit) = powers * exp(peak)."""
        logits = self.logits(rows, block, scores, room)
        self.num_negatives[rows] += count(logits, 1) if self.removing else logits.shape[1] - block.own
        powers, peak, log_sum = powers_of(logits, 1)
        self.log_sum[rows] = torch.logaddexp(self.log_sum[rows], log_sum)
        return powers, peak

    def factor(self, rows: slice, peak: Tensor) -> Tensor:
        """(b,) what the powers have to be multiplied by to be the derivative of the rows' terms in the scores."""
        return (peak - self.reference()[rows]).exp()

    def pull(self, rows: slice, block: Block, scores: Tensor, room: Tensor) -> Tensor:
        """(b, m) derivative of the rows' terms in the scores, from the scores anew."""
        return self.logits(rows, block, scores, room).sub_(self.reference()[rows, None]).exp_()

    def note(self, rows: slice, block: Block, scores: Tensor, powers: Tensor, factor: Tensor | None) -> None:
        """What else is learned from the pulls, powers * factor."""
        if self.learning and not self.alone:
            gap = (powers * scores).sum(dim=1)
            self.gap[rows] += gap if factor is None else gap * factor
        if self.column_pull_all is not None:
            assert self.side.column_weight is not None
            # a pull is p_ij * row_weight_i / tau_i
            reference = self.reference()[rows]
            weight = (
                self.side.column_weight(rows).to(powers.dtype) * (reference - finite(self.log_denominator[rows])).exp()
            )
            self.column_pull_all[block.columns] += (weight if factor is None else weight * factor) @ powers

    def column_pull(self) -> Tensor | None:
        if self.column_pull_all is None:
            return None
        return distributed.sum_over_ranks(self.column_pull_all)[self.layout.own_columns]


class _Columns(_Direction):
    """Positives of this rank against the anchors of all, read from the columns of the same scores.

    Each rank sees the part of every column that lies in its rows; the parts are exchanged once.
    """

    def __init__(self, side: Side, layout: Layout, positive: Tensor) -> None:
        super().__init__(side, layout, positive, num_columns=sum(layout.row_sizes))
        assert side.adjust is None
        assert side.column_weight is None
        sizes = layout.row_sizes
        self.log_weight = _gathered(side.log_weight, sizes, sizes)
        both = distributed.gather_rows(torch.stack([positive, self.temperature], dim=1), sizes)
        self.positive_all, self.temperature_all = both[:, 0], both[:, 1]
        self.parts = positive.new_empty(2, sum(sizes))  # log-sum and number of negatives over this rank's rows
        self.parts[0], self.parts[1] = -torch.inf, 0
        self.gap_all = torch.zeros_like(self.positive_all)
        self.room: _Buffer | None = None
        self.reference_all = self.positive_all

    def logits(self, rows: slice, block: Block, scores: Tensor) -> Tensor:
        """(b, p), transposed: entry (i, j) belongs to the block's positive j."""
        scores = scores[:, block.positives]
        if self.room is None or self.room.size < scores.numel():
            self.room = _Buffer(scores, scores.numel())
        logits = torch.sub(
            scores, self.positive_all[block.rows], out=self.room.view((scores.shape[0], scores.shape[1]))
        )
        logits.div_(self.temperature_all[block.rows])
        if self.log_weight is not None:
            logits += self.log_weight.tile(block.rows, self.layout.shifted(rows)).to(logits.dtype).T
        if block.own:
            local = torch.arange(rows.start, rows.stop, device=logits.device)
            logits[local - rows.start, self.layout.first_row - block.rows.start + local] = -torch.inf
        return logits

    def measure(self, rows: slice, block: Block, scores: Tensor) -> None:
        logits = self.logits(rows, block, scores)
        log_sums, counts = self.parts[:, block.rows]
        if self.log_weight is None:
            counts += len(logits)
            if block.own:
                self.parts[1, self.layout.shifted(rows)] -= 1  # each row's own
        else:
            counts += count(logits, 0)
        torch.logaddexp(log_sums, powers_of(logits, 0)[2], out=log_sums)

    def answer(self, rows: slice | None = None) -> None:
        sizes = [1] * distributed.world_size()
        parts = distributed.gather_rows(self.parts[None], sizes)  # (W, 2, B_all)
        own = self.layout.own_rows
        self.log_sum[:] = parts[:, 0, own].logsumexp(dim=0)
        self.num_negatives[:] = parts[:, 1, own].sum(dim=0)
        super().answer(slice(0, self.num_rows))
        self.reference_all = distributed.gather_rows(self.reference(), self.layout.row_sizes)

    def pull(self, rows: slice, block: Block, scores: Tensor) -> Tensor:
        """(b, p) derivative of the columns' terms in the scores."""
        pull = self.logits(rows, block, scores).sub_(self.reference_all[block.rows]).exp_()
        if self.learning:
            self.gap_all[block.rows] += (pull * scores[:, block.positives]).sum(dim=0)
        return pull

    def total(self) -> Tensor:
        # Called once, after the last tile: the moment to close the sums over rows as well.
        total = super().total()
        if self.learning:
            gap = distributed.sum_over_ranks(self.gap_all)[self.layout.own_rows] - total * self.positive
            self.d_temperature_rows = -gap / self.temperature
        return total


def _gathered(log_weight: LogWeight | None, row_sizes: list[int], column_sizes: list[int]) -> LogWeight | None:
    if (
        log_weight is None or not distributed.is_active()
    ):  # one rank alone may have log-weights that cannot be exchanged
        return log_weight
    return log_weight.gathered(row_sizes, column_sizes)


def count(logits: Tensor, dim: int) -> Tensor:
    """Pairs that are not removed, in the dtype of the logits."""
    return (logits != -torch.inf).sum(dim=dim).to(logits.dtype)


def powers_of(logits: Tensor, dim: int) -> tuple[Tensor, Tensor, Tensor]:
    """exp(logits - peak), in place of the logits; peak, the greatest along `dim` (0 where all are removed); and the log-sum, -inf there."""
    if logits.shape[dim] == 0:
        none = logits.new_full((logits.shape[1 - dim],), -torch.inf)
        return logits, torch.zeros_like(none), none
    peak = finite(logits.amax(dim=dim))
    powers = logits.sub_(peak.unsqueeze(dim)).exp_()
    return powers, peak, powers.sum(dim=dim).log_().add_(peak)


class _Buffer:
    """Memory for a tile, made once: fresh pages for every tile cost more than what is computed in them."""

    def __init__(self, like: Tensor, size: int) -> None:
        self.size = size
        self._memory: Tensor | None = None
        self._like = like

    def view(self, shape: tuple[int, int]) -> Tensor:
        if self._memory is None:
            self._memory = self._like.new_empty(self.size)
        return self._memory[: shape[0] * shape[1]].view(shape)


def finite(log_denominator: Tensor) -> Tensor:
    """0 in place of the -inf of rows without a negative, whose pulls are 0 whatever they are divided by."""
    return torch.where(log_denominator.isneginf(), 0.0, log_denominator)


def _tiles(num_rows: int, num_columns: int, item_bytes: int, tile_bytes: int) -> list[slice]:
    height = max(1, tile_bytes // max(1, num_columns * item_bytes))
    return [slice(start, min(start + height, num_rows)) for start in range(0, num_rows, height)]
