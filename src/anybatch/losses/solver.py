"""The arithmetic of the engine: tiles of scores, log-sums of rows and columns, gradients in closed form.

A rank computes the block of its own rows against the candidates of all ranks, for both directions of a loss at once:

    pass A   scores tile = anchors[rows] @ candidates.T          1 product; log-sums of rows, running log-sums of columns
    rules    log-denominators of rows and of columns
    pass B   the tile again, then d anchors and d candidates     3 products

Pass A and B are one when a single tile holds everything, or when there is one direction whose rule works row by row: 3 products in
place of 4. With W ranks the candidates are gathered first and the gradient of all candidates is summed over the ranks last; no
row's temperature, threshold or weight has to travel, because no block is computed on two ranks.

Shapes: B rows (anchors of this rank), M columns (candidates of this rank), D dimensions; `_all` marks those of all ranks together.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from anybatch import distributed
from anybatch.losses.log_weights import LogWeight
from anybatch.losses.sides import Side, SoftmaxStats


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
    anchors: Tensor, candidates: Tensor, sides: tuple[Side, ...], *, tile_bytes: int, gradients: bool
) -> Solution:
    """Loss and gradients of one direction (`sides` of length 1) or of the mean of both (2: anchors to candidates, positives to anchors)."""
    layout = Layout.of(len(anchors), len(candidates), anchors.device)
    candidates_all = distributed.gather_rows(candidates, layout.column_sizes)
    positive = (anchors * candidates[: len(anchors)]).sum(dim=1)
    forward = _Rows(sides[0], layout, positive)
    back = _Columns(sides[1], layout, positive) if len(sides) == 2 else None
    directions = (forward,) if back is None else (forward, back)
    d_anchors, d_candidates_all = torch.zeros_like(anchors), torch.zeros_like(candidates_all)

    def score(rows: slice) -> Tensor:
        return anchors[rows] @ candidates_all.T

    def add_gradient(rows: slice, scores: Tensor, logits: Tensor) -> None:
        pull = forward.pull(rows, scores, logits)
        if back is not None:
            pull[:, layout.positive_columns] += back.pull(rows, scores)
        d_anchors[rows] = pull @ candidates_all
        d_candidates_all.addmm_(pull.T, anchors[rows])

    tiles = _tiles(len(anchors), len(candidates_all), anchors.element_size(), tile_bytes)
    if back is None and (sides[0].rule.row_wise or len(tiles) == 1):
        for rows in tiles:
            scores = score(rows)
            logits = forward.measure(rows, scores)
            forward.answer(rows)
            if gradients:
                add_gradient(rows, scores, logits)
        if not tiles:  # a rank without rows still takes part in the rule's collectives
            forward.answer(slice(0, 0))
    else:
        kept = None
        for rows in tiles:
            scores = score(rows)
            logits = forward.measure(rows, scores)
            if back is not None:
                back.measure(rows, scores)
            kept = (scores, logits) if len(tiles) == 1 else None
        forward.answer(slice(0, len(anchors)))
        if back is not None:
            back.answer()
        for rows in tiles if gradients else []:
            scores, logits = kept if kept is not None else (score(rows), None)
            add_gradient(rows, scores, forward.logits(rows, scores) if logits is None else logits)

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
    d_candidates = distributed.sum_over_ranks(d_candidates_all)[layout.own_columns]
    for side in directions:
        total = side.total()[:, None]  # the positive's pull is minus the sum of the negatives'
        d_anchors -= total * own
        d_candidates[: len(anchors)] -= total * anchors
    scale = distributed.world_size() / num_rows_all
    return Solution(
        loss=loss,
        d_anchors=d_anchors.mul_(scale),
        d_candidates=d_candidates.mul_(scale),
        d_temperatures=tuple(side.d_temperature(scale, num_rows_all) for side in directions),
        stats=tuple(side.stats(gradients=True) for side in directions),
    )


@dataclass(frozen=True, kw_only=True)
class Layout:
    """Where this rank's rows and columns are among those of all ranks."""

    row_sizes: list[int]
    column_sizes: list[int]
    first_row: int
    first_column: int
    positive_columns: Tensor | slice  # (B_all,) the columns that are positives, in the order of the rows

    @classmethod
    def of(cls, num_rows: int, num_columns: int, device: torch.device) -> Layout:
        """One collective a side under several ranks, none otherwise."""
        row_sizes = distributed.gather_sizes(num_rows, device)
        column_sizes = distributed.gather_sizes(num_columns, device)
        starts = [sum(column_sizes[:number]) for number in range(len(column_sizes))]
        positive_columns: Tensor | slice = slice(0, num_rows)
        if len(row_sizes) > 1:
            parts = [torch.arange(start, start + size) for start, size in zip(starts, row_sizes, strict=True)]
            positive_columns = torch.cat(parts).to(device)
        rank = distributed.rank()
        return cls(
            row_sizes=row_sizes,
            column_sizes=column_sizes,
            first_row=sum(row_sizes[:rank]),
            first_column=starts[rank],
            positive_columns=positive_columns,
        )

    @property
    def own_rows(self) -> slice:
        """This rank's rows among all."""
        return slice(self.first_row, self.first_row + self.row_sizes[distributed.rank()])

    @property
    def own_columns(self) -> slice:
        """This rank's columns among all."""
        return slice(self.first_column, self.first_column + self.column_sizes[distributed.rank()])

    def shifted(self, rows: slice) -> slice:
        """Rows of this rank, numbered among all."""
        return slice(self.first_row + rows.start, self.first_row + rows.stop)


class _Direction:
    """State of one direction: what was measured, what the rule answered, what the temperature receives. All (B,)."""

    def __init__(self, side: Side, layout: Layout, positive: Tensor) -> None:
        self.side, self.layout, self.positive = side, layout, positive
        self.num_rows = len(positive)
        self.temperature = side.temperature.detach().expand(self.num_rows)
        self.log_sum, self.num_negatives, self.log_denominator, self.objective = (
            torch.empty_like(positive) for _ in range(4)
        )
        self.d_temperature_rows = torch.zeros_like(positive)
        self.learning = side.temperature.requires_grad or side.temperature.ndim > 0

    def answer(self, rows: slice) -> None:
        self.log_denominator[rows], self.objective[rows] = self.side.rule(
            self.log_sum[rows], self.num_negatives[rows], rows
        )

    def reference(self) -> Tensor:
        """(B,) exp(logit_ij - reference_i) = row_weight_i p_ij / tau_i, the derivative of the row's term in s_ij."""
        reference = finite(self.log_denominator) + self.temperature.log()
        return reference if self.side.row_weight is None else reference - self.side.row_weight.detach().log()

    def total(self) -> Tensor:
        return (self.log_sum - self.reference()).exp()

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
    """Anchors of this rank against the candidates of all."""

    def __init__(self, side: Side, layout: Layout, positive: Tensor) -> None:
        super().__init__(side, layout, positive)
        self.log_weight = _gathered(side.log_weight, layout.row_sizes, layout.column_sizes)
        self.removing = self.log_weight is not None or side.adjust is not None
        self.column_pull_all = positive.new_zeros(sum(layout.column_sizes)) if side.column_weight else None

    def logits(self, rows: slice, scores: Tensor) -> Tensor:
        """(b, M_all) relative to the positive; -inf where there is no negative."""
        logits = (scores - self.positive[rows, None]).div_(self.temperature[rows, None])
        if self.log_weight is not None:
            logits += self.log_weight.tile(self.layout.shifted(rows), slice(0, scores.shape[1])).to(logits.dtype)
        local = torch.arange(rows.start, rows.stop, device=logits.device)
        logits[local - rows.start, self.layout.first_column + local] = -torch.inf
        return logits if self.side.adjust is None else self.side.adjust(rows, scores, logits)

    def measure(self, rows: slice, scores: Tensor) -> Tensor:
        logits = self.logits(rows, scores)
        self.log_sum[rows] = logits.logsumexp(dim=1)
        self.num_negatives[rows] = count(logits, 1) if self.removing else logits.shape[1] - 1
        return logits

    def pull(self, rows: slice, scores: Tensor, logits: Tensor) -> Tensor:
        """(b, M_all) derivative of the rows' terms in the scores; consumes the logits."""
        reference = self.reference()[rows]
        pull = logits.sub_(reference[:, None]).exp_()
        total = (self.log_sum[rows] - reference).exp()
        if self.learning:
            gap = (pull * scores).sum(dim=1) - total * self.positive[rows]
            self.d_temperature_rows[rows] = -gap / self.temperature[rows]
        if self.column_pull_all is not None:
            assert self.side.column_weight is not None
            # pull is p_ij * row_weight_i / tau_i
            weight = (
                self.side.column_weight(rows).to(pull.dtype) * (reference - finite(self.log_denominator[rows])).exp()
            )
            self.column_pull_all += weight @ pull
        return pull

    def column_pull(self) -> Tensor | None:
        if self.column_pull_all is None:
            return None
        return distributed.sum_over_ranks(self.column_pull_all)[self.layout.own_columns]


class _Columns(_Direction):
    """Positives of this rank against the anchors of all, read from the columns of the same scores.

    Each rank sees the part of every column that lies in its rows; the parts are exchanged once.
    """

    def __init__(self, side: Side, layout: Layout, positive: Tensor) -> None:
        super().__init__(side, layout, positive)
        assert side.adjust is None
        assert side.column_weight is None
        sizes = layout.row_sizes
        self.log_weight = _gathered(side.log_weight, sizes, sizes)
        both = distributed.gather_rows(torch.stack([positive, self.temperature], dim=1), sizes)
        self.positive_all, self.temperature_all = both[:, 0], both[:, 1]
        self.parts = positive.new_empty(2, sum(sizes))  # log-sum and number of negatives over this rank's rows
        self.parts[0], self.parts[1] = -torch.inf, 0
        self.gap_all = torch.zeros_like(self.positive_all)
        self.reference_all = self.positive_all

    def logits(self, rows: slice, scores: Tensor) -> Tensor:
        """(b, B_all), transposed: entry (i, j) belongs to positive j."""
        logits = (scores[:, self.layout.positive_columns] - self.positive_all).div_(self.temperature_all)
        if self.log_weight is not None:
            everything = slice(0, len(self.positive_all))
            logits += self.log_weight.tile(everything, self.layout.shifted(rows)).to(logits.dtype).T
        local = torch.arange(rows.start, rows.stop, device=logits.device)
        logits[local - rows.start, self.layout.first_row + local] = -torch.inf
        return logits

    def measure(self, rows: slice, scores: Tensor) -> None:
        logits = self.logits(rows, scores)
        self.parts[0] = torch.logaddexp(self.parts[0], logits.logsumexp(dim=0))
        if self.log_weight is None:
            self.parts[1] += len(logits)
            self.parts[1, self.layout.shifted(rows)] -= 1  # each row's own
        else:
            self.parts[1] += count(logits, 0)

    def answer(self, rows: slice | None = None) -> None:
        sizes = [1] * distributed.world_size()
        parts = distributed.gather_rows(self.parts[None], sizes)  # (W, 2, B_all)
        own = self.layout.own_rows
        self.log_sum[:] = parts[:, 0, own].logsumexp(dim=0)
        self.num_negatives[:] = parts[:, 1, own].sum(dim=0)
        super().answer(slice(0, self.num_rows))
        self.reference_all = distributed.gather_rows(self.reference(), self.layout.row_sizes)

    def pull(self, rows: slice, scores: Tensor) -> Tensor:
        """(b, B_all) derivative of the columns' terms in the scores."""
        pull = self.logits(rows, scores).sub_(self.reference_all).exp_()
        if self.learning:
            self.gap_all += (pull * scores[:, self.layout.positive_columns]).sum(dim=0)
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
    return (~logits.isneginf()).sum(dim=dim).to(logits.dtype)


def finite(log_denominator: Tensor) -> Tensor:
    """0 in place of the -inf of rows without a negative, whose pulls are 0 whatever they are divided by."""
    return torch.where(log_denominator.isneginf(), 0.0, log_denominator)


def _tiles(num_rows: int, num_columns: int, item_bytes: int, tile_bytes: int) -> list[slice]:
    height = max(1, tile_bytes // max(1, num_columns * item_bytes))
    return [slice(start, min(start + height, num_rows)) for start in range(0, num_rows, height)]
