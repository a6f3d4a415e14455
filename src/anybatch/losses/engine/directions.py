"""One direction of a loss: logits, log-sums, the rule's answer, what the positive and the temperature receive.

Shapes, as suffixes of names (`A` and `C`: of all ranks together):

    B anchors of this rank     b rows of a tile                          D dimensions
    M candidates of this rank  m candidates of a tile, p its positives
"""

from __future__ import annotations

import torch
from torch import Tensor

from anybatch.core import distributed
from anybatch.losses.engine.candidates import Layout
from anybatch.losses.engine.sides import Side, SoftmaxStats
from anybatch.losses.log_weights import LogWeights


class Direction:
    """What both directions have; `log_sum` to `positive_weight` are (B,)."""

    def __init__(self, side: Side, layout: Layout, positive_B: Tensor, column_sizes: list[int]) -> None:
        self.side, self.layout, self.positive = side, layout, positive_B
        self.num_rows = len(positive_B)
        self.log_weight = _gathered(side.log_weight, layout.row_sizes, column_sizes)
        self.removing = any(given is not None for given in (self.log_weight, side.mask_margin, side.adjust))
        self.temperature = side.temperature.detach().expand(self.num_rows)
        self.row_weight = torch.ones_like(positive_B) if side.row_weight is None else side.row_weight.detach()
        self.log_sum, self.num_negatives = torch.full_like(positive_B, -torch.inf), torch.zeros_like(positive_B)
        drawn = torch.full_like(positive_B, sum(column_sizes) - 1) if side.num_drawn is None else side.num_drawn
        self.num_drawn = drawn.to(positive_B.dtype)
        self.log_denominator, self.objective = torch.empty_like(positive_B), torch.empty_like(positive_B)
        self.positive_weight: Tensor | None = None
        self.log_hardness: Tensor | None = None  # (B,) log of the mean factor of the negatives, see `Side.hardness`
        self.d_temperature_rows = torch.zeros_like(positive_B)
        self.learning = side.temperature.requires_grad or side.temperature.ndim > 0

    def relative(
        self, scores: Tensor, positive: Tensor, temperature: Tensor, workspace: Tensor, kept: Tensor | None = None
    ) -> Tensor:
        """Logits relative to the positive, in the workspace; -inf above the margin but for those `kept`."""
        logits = torch.sub(scores, positive, out=workspace)
        if self.side.mask_margin is not None:
            above = logits > self.side.mask_margin
            logits.masked_fill_(above if kept is None else above & ~kept, -torch.inf)
        return logits.div_(temperature)

    def answer(self, rows: slice) -> None:
        """Ask the rule for some rows."""
        log_sum_b = self.log_sum[rows]
        if self.log_hardness is not None:
            log_sum_b = log_sum_b - self.log_hardness[rows]
        answer = self.side.rule(log_sum_b, self.num_drawn[rows], rows)
        self.log_denominator[rows], self.objective[rows] = answer.log_denominator, answer.objective
        if self.log_hardness is not None:
            self.log_denominator[rows] += self.log_hardness[rows]
        if answer.positive_weight is not None:
            if self.positive_weight is None:
                self.positive_weight = torch.empty_like(self.positive)
            self.positive_weight[rows] = answer.positive_weight

    def reference(self) -> Tensor:
        """(B,) exp(logit_ij - reference_i) = row_weight_i p_ij / tau_i, the derivative of the row's term in s_ij."""
        return finite(self.log_denominator) + self.temperature.log() - self.row_weight.log()

    def total(self) -> Tensor:
        """(B,) minus the derivative of the row's term in s_ip: what the rule says, or the sum of the negatives'."""
        if self.positive_weight is None:
            return (self.log_sum - self.reference()).exp()
        return -self.positive_weight / self.temperature * self.row_weight

    def d_temperature(self, scale: float, num_rows_all: int) -> Tensor | None:
        """The gradient of the temperature, (B,) or a scalar. One sum over ranks for a scalar that learns."""
        if self.side.temperature.ndim:
            return self.d_temperature_rows * scale
        if not self.learning:
            return None
        return distributed.sum_over_ranks(self.d_temperature_rows.sum()) / num_rows_all

    def column_gradient(self) -> Tensor | None:
        """See `SoftmaxStats`."""
        return None

    def stats(self, *, gradients: bool) -> SoftmaxStats:
        """The figures of the call."""
        log_sum, log_denominator = self.log_sum, self.log_denominator
        if self.log_hardness is not None:
            log_sum, log_denominator = log_sum - self.log_hardness, log_denominator - self.log_hardness
        return SoftmaxStats(
            log_sum=log_sum,
            log_denominator=log_denominator,
            objective=self.objective,
            num_negatives=self.num_negatives,
            log_hardness=self.log_hardness,
            temperature_gradient=self.d_temperature_rows if gradients and self.learning else None,
            column_gradient=self.column_gradient() if gradients else None,
        )


class AnchorDirection(Direction):
    """Anchors of this rank against the candidates of all, the rows of a tile. `alone`: there is no other direction."""

    def __init__(self, side: Side, layout: Layout, positive_B: Tensor, *, alone: bool) -> None:
        super().__init__(side, layout, positive_B, layout.column_sizes)
        self.alone, self.columns = alone, slice(0, sum(layout.column_sizes))
        self.difference = torch.zeros_like(positive_B)  # sum_j p_ij s_ij, where it cannot be read from d anchors
        self.column_gradient_C = positive_B.new_zeros(sum(layout.column_sizes)) if side.column_weight else None
        self.several = self.log_weight is not None and self.log_weight.positives_by is not None
        if self.several:  # over further positives: their number, and the sum of their logits
            self.num_further, self.sum_further = torch.zeros_like(positive_B), torch.zeros_like(positive_B)
        if side.hardness:  # over negatives: log-sums of their factors, and of ones
            self.factors = positive_B.new_full((2, self.num_rows), -torch.inf)
            self.log_hardness = torch.empty_like(positive_B)

    def logits(self, rows: slice, scores_bm: Tensor, workspace_bm: Tensor) -> Tensor:
        """(b, m) relative to the positive, -inf where there is no negative; in the workspace (perhaps the scores)."""
        positive_b1, temperature_b1 = self.positive[rows, None], self.temperature[rows, None]
        further_bm = self.further(rows) if self.several else None
        logits_bm = self.relative(scores_bm, positive_b1, temperature_b1, workspace_bm, further_bm)
        if self.log_weight is not None:
            logits_bm += self.log_weight.tile(self.layout.shifted(rows), self.columns).to(logits_bm.dtype)
        logits_bm[self.own(rows)] = -torch.inf
        if self.side.hardness:
            logits_bm += self.side.hardness * (scores_bm - positive_b1) / temperature_b1
        return logits_bm if self.side.adjust is None else self.side.adjust(rows, scores_bm, logits_bm)

    def own(self, rows: slice) -> tuple[Tensor, Tensor]:
        """Where the rows' own positives are in a tile."""
        local = torch.arange(rows.start, rows.stop, device=self.positive.device)
        return local - rows.start, self.layout.own_columns.start + local

    def further(self, rows: slice) -> Tensor:
        """(b, m) bool: candidates that are positives of the row beside its own."""
        assert self.log_weight is not None
        further_bm = self.log_weight.further_positives(self.layout.shifted(rows), self.columns)
        further_bm[self.own(rows)] = False
        return further_bm

    def measure(self, rows: slice, scores_bm: Tensor, workspace_bm: Tensor) -> tuple[Tensor, Tensor]:
        """The log-sums; returns exp (b, m) and peak (b,): exp(logit) = exp * exp(peak)."""
        logits_bm = self.logits(rows, scores_bm, workspace_bm)
        self.num_negatives[rows] += count(logits_bm, 1) if self.removing else logits_bm.shape[1] - 1
        if self.several:
            further_bm = self.further(rows)
            number_b = further_bm.sum(dim=1).to(logits_bm.dtype)
            self.num_further[rows] += number_b
            self.num_negatives[rows] -= number_b
            sum_b = (further_bm * scores_bm).sum(dim=1) - number_b * self.positive[rows]
            self.sum_further[rows] += sum_b / self.temperature[rows]
        if self.side.hardness:
            plain_bm = (scores_bm - self.positive[rows, None]) / self.temperature[rows, None]
            for sums, power in zip(self.factors, (1.0, 1.0 + self.side.hardness), strict=True):
                sums[rows] = torch.logaddexp(sums[rows], (logits_bm - power * plain_bm).logsumexp(dim=1))
        exp_bm, peak_b, log_sum_b = exp_of(logits_bm, 1)
        self.log_sum[rows] = torch.logaddexp(self.log_sum[rows], log_sum_b)
        return exp_bm, peak_b

    def answer(self, rows: slice) -> None:
        """See `Direction.answer`; the positives' mean logit off the objective, where there are several."""
        if self.log_hardness is not None:
            self.log_hardness[rows] = finite(self.factors[0, rows]) - finite(self.factors[1, rows])
        super().answer(rows)
        if self.several:
            self.objective[rows] -= self.sum_further[rows] / (1 + self.num_further[rows])

    def share(self) -> Tensor:
        """(B,) what each of several positives takes off its derivative in the score."""
        return 1 / (self.temperature * (1 + self.num_further)) * self.row_weight

    def total(self) -> Tensor:
        """See `Direction.total`; the objective's mean logit is relative to the own positive as well."""
        return super().total() - self.num_further * self.share() if self.several else super().total()

    def factor(self, rows: slice, peak_b: Tensor) -> Tensor:
        """(b,) what turns `exp` of `measure` into the derivative of the rows' terms in the scores."""
        return (peak_b - self.reference()[rows]).exp()

    def weights(self, rows: slice, scores_bm: Tensor, workspace_bm: Tensor) -> Tensor:
        """(b, m) derivative of the rows' terms in the scores, from the scores anew."""
        return self.logits(rows, scores_bm, workspace_bm).sub_(self.reference()[rows, None]).exp_()

    def add_sums(self, rows: slice, scores_bm: Tensor, exp_bm: Tensor, factor_b: Tensor | None) -> None:
        """What else is learned from the derivative in the scores, exp * factor."""
        if self.learning and not self.alone:
            difference_b = (exp_bm * scores_bm).sum(dim=1)
            self.difference[rows] += difference_b if factor_b is None else difference_b * factor_b
        if self.column_gradient_C is not None:
            assert self.side.column_weight is not None
            # p_ij, from row_weight_i p_ij / tau_i
            reference_b = self.reference()[rows]
            weight_b = self.side.column_weight(rows).to(exp_bm.dtype)
            weight_b = weight_b * (reference_b - finite(self.log_denominator[rows])).exp()
            self.column_gradient_C += (weight_b if factor_b is None else weight_b * factor_b) @ exp_bm

    def column_gradient(self) -> Tensor | None:
        """See `SoftmaxStats`. One sum over ranks."""
        if self.column_gradient_C is None:
            return None
        return distributed.sum_over_ranks(self.column_gradient_C)[self.layout.own_columns]


class PositiveDirection(Direction):
    """Positives of this rank against the anchors of all, read from the columns of the same scores.

    Each rank sees the part of every column that lies in its rows; the parts are exchanged once.
    """

    def __init__(self, side: Side, layout: Layout, positive_B: Tensor) -> None:
        super().__init__(side, layout, positive_B, layout.row_sizes)
        assert side.adjust is None
        assert side.column_weight is None
        both = distributed.gather_rows(torch.stack([positive_B, self.temperature], dim=1), layout.row_sizes)
        self.positive_A, self.temperature_A = both[:, 0], both[:, 1]
        self.parts = positive_B.new_empty(2, len(both))  # log-sum and number of negatives over this rank's rows
        self.parts[0], self.parts[1] = -torch.inf, 0
        self.difference_A = torch.zeros_like(self.positive_A)
        self.workspace: Workspace | None = None
        self.reference_A = self.positive_A

    def logits(self, rows: slice, scores_bm: Tensor) -> Tensor:
        """(b, p), transposed: entry (i, j) belongs to positive j."""
        scores_bp = scores_bm[:, self.layout.positive_columns]
        if self.workspace is None or self.workspace.size < scores_bp.numel():
            self.workspace = Workspace(scores_bp, scores_bp.numel())
        workspace_bp = self.workspace.view((scores_bp.shape[0], scores_bp.shape[1]))
        logits_bp = self.relative(scores_bp, self.positive_A, self.temperature_A, workspace_bp)
        if self.log_weight is not None:
            weight_pb = self.log_weight.tile(slice(0, len(self.positive_A)), self.layout.shifted(rows))
            logits_bp += weight_pb.to(logits_bp.dtype).T
        local = torch.arange(rows.start, rows.stop, device=logits_bp.device)
        logits_bp[local - rows.start, self.layout.own_rows.start + local] = -torch.inf
        return logits_bp

    def measure(self, rows: slice, scores_bm: Tensor) -> None:
        """Adds the tile to its columns' log-sums."""
        logits_bp = self.logits(rows, scores_bm)
        log_sums, counts = self.parts
        if not self.removing:
            counts += len(logits_bp)
            counts[self.layout.shifted(rows)] -= 1  # each row's own
        else:
            counts += count(logits_bp, 0)
        torch.logaddexp(log_sums, exp_of(logits_bp, 0)[2], out=log_sums)

    def answer(self, rows: slice | None = None) -> None:
        """Ask the rule for all rows, whose parts on other ranks are gathered, and gather what they are divided by."""
        sizes = [1] * distributed.world_size()
        parts = distributed.gather_rows(self.parts[None], sizes)  # (W, 2, A)
        own = self.layout.own_rows
        self.log_sum[:] = parts[:, 0, own].logsumexp(dim=0)
        self.num_negatives[:] = parts[:, 1, own].sum(dim=0)
        super().answer(slice(0, self.num_rows))
        self.reference_A = distributed.gather_rows(self.reference(), self.layout.row_sizes)

    def weights(self, rows: slice, scores_bm: Tensor) -> Tensor:
        """(b, p) derivative of the columns' terms in the scores."""
        weight_bp = self.logits(rows, scores_bm).sub_(self.reference_A).exp_()
        if self.learning:
            self.difference_A += (weight_bp * scores_bm[:, self.layout.positive_columns]).sum(dim=0)
        return weight_bp

    def total(self) -> Tensor:
        """See `Direction.total`. Called once, after the last tile: the moment to close the sums over rows as well."""
        total_B = super().total()
        if self.learning:
            difference_B = distributed.sum_over_ranks(self.difference_A)[self.layout.own_rows]
            self.d_temperature_rows = -(difference_B - total_B * self.positive) / self.temperature
        return total_B


def _gathered(log_weight: LogWeights | None, row_sizes: list[int], column_sizes: list[int]) -> LogWeights | None:
    if log_weight is None or log_weight.empty:
        return None
    if not distributed.is_active():  # one rank alone may have log-weights that cannot be exchanged
        return log_weight
    return log_weight.gathered(row_sizes, column_sizes)


def count(logits: Tensor, dim: int) -> Tensor:
    """Pairs that are not removed, in the dtype of the logits."""
    return (logits != -torch.inf).sum(dim=dim).to(logits.dtype)


def exp_of(logits: Tensor, dim: int) -> tuple[Tensor, Tensor, Tensor]:
    """exp(logits - peak), in place of the logits; peak, the greatest along `dim` (0 if all are removed); log-sum."""
    if logits.shape[dim] == 0:
        none = logits.new_full((logits.shape[1 - dim],), -torch.inf)
        return logits, torch.zeros_like(none), none
    peak = finite(logits.amax(dim=dim))
    exp = logits.sub_(peak.unsqueeze(dim)).exp_()
    return exp, peak, exp.sum(dim=dim).log_().add_(peak)


def finite(log_denominator: Tensor) -> Tensor:
    """0 in place of the -inf of rows without a negative, whose weights are 0 whatever they are divided by."""
    return torch.where(log_denominator.isneginf(), 0.0, log_denominator)


class Workspace:
    """Memory for a tile, made once: fresh pages for every tile cost more than what is computed in them."""

    def __init__(self, like: Tensor, size: int) -> None:
        self.size = size
        self._memory: Tensor | None = None
        self._like = like

    def view(self, shape: tuple[int, int]) -> Tensor:
        """(b, m) of it."""
        if self._memory is None:
            self._memory = self._like.new_empty(self.size)
        return self._memory[: shape[0] * shape[1]].view(shape)
