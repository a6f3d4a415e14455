"""The tiled softmax that every loss shares: log-sums, any rule for the denominator, and the gradient in closed form.

Computes exactly, for each anchor i with its positive p(i), without ever holding the B x M scores:

    logit_ij          = s_ij / tau + b_ij
    log_sum_i         = logsumexp_{j != p(i)} logit_ij - s_ip(i) / tau
    log_denominator_i, objective_i = rule(log_sum_i, number of negatives)
    loss              = mean_i objective_i
    p_ij              = exp(logit_ij - s_ip(i) / tau - log_denominator_i)      pull of negative j; the positive's is -sum_j p_ij

`dense_softmax_loss` is its slow twin: the same by autograd on the whole matrix.

Cost: three matrix products of B x M x D for gradients when the rule works row by row or one tile holds everything, four
otherwise; `tile_bytes` of scores; nothing is kept for the backward pass but the two gradients. With W ranks: four gathers and
two sums in the forward pass, nothing in the backward pass.

Shapes: B rows (anchors of this rank), M columns (candidates), D dimensions; `_all` marks the rows of all ranks together.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from anybatch import distributed
from anybatch.losses.log_weights import LogWeight

TILE_BYTES = 32 * 2**20


class Rule(Protocol):
    """What a method believes of the denominator, given what this batch says.

    Attributes:
        row_wise: Whether a row's answer depends on that row alone, so that rows can be answered tile by tile.
    """

    @property
    def row_wise(self) -> bool:
        """See the class."""
        ...

    def __call__(self, log_sum: Tensor, num_negatives: Tensor, rows: slice) -> tuple[Tensor, Tensor]:
        """Answer for some rows.

        Args:
            log_sum: (b,) log-sum over the negatives, relative to the positive's logit; -inf without negatives.
            num_negatives: (b,) negatives that are not masked, in the dtype of `log_sum`.
            rows: Which of this rank's rows they are.

        Returns:
            `log_denominator` (b,), relative to the positive's logit, to which p_ij refers, and `objective` (b,).
        """
        ...


@dataclass(frozen=True, kw_only=True)
class SoftmaxStats:
    """What the loss did in its last call, for logs. All (B,), detached."""

    log_sum: Tensor
    log_denominator: Tensor
    num_negatives: Tensor


def softmax_loss(
    anchors: Tensor,
    candidates: Tensor,
    *,
    temperature: Tensor,
    rule: Rule,
    log_weight: LogWeight | None = None,
    tile_bytes: int = TILE_BYTES,
) -> tuple[Tensor, SoftmaxStats]:
    """The loss of this batch over all ranks.

    Args:
        anchors: (B, D), this rank's. Row i's positive is candidate i.
        candidates: (M, D), M >= B, this rank's: positives, then explicit negatives.
        temperature: Scalar tensor; receives a gradient if it requires one.
        rule: The method.
        log_weight: b_ij for this rank's rows and columns; None for 0.
        tile_bytes: Memory for scores; the height of a tile follows from it.

    Returns:
        The mean objective over the rows of all ranks, a scalar, and figures for logs. Each rank's embeddings receive
        world_size times the gradient of that mean, so that the averaging of DDP gives the gradient of one process; the temperature
        receives the whole gradient on every rank.
    """
    dtype = torch.float64 if anchors.dtype == torch.float64 else torch.float32
    problem = _Problem(rule=rule, log_weight=log_weight, tile_bytes=tile_bytes)
    with torch.autocast(anchors.device.type, enabled=False):
        loss = _SoftmaxLoss.apply(anchors.to(dtype), candidates.to(dtype), temperature.to(dtype), problem)
    assert problem.stats is not None
    return loss, problem.stats


def dense_softmax_loss(
    anchors: Tensor, candidates: Tensor, *, temperature: Tensor, rule: Rule, log_weight: LogWeight | None = None
) -> Tensor:
    """The slow twin of `softmax_loss` on one rank: the whole matrix, plain autograd. For tests and for reading.

    The rule's answer is treated as a constant, and the surrogate `sum_j stop_grad(p_ij) (logit_ij - positive_i)` is added
    with value zero: its derivative is the gradient that the engine has in closed form.
    """
    everything = slice(0, len(anchors))
    logits = anchors @ candidates.T / temperature
    positive = logits.diagonal()
    if log_weight is not None:
        logits = logits + log_weight.tile(everything, slice(0, len(candidates)))
    own = torch.eye(*logits.shape, dtype=torch.bool, device=logits.device)
    relative = (logits - positive[:, None]).masked_fill(own, -torch.inf)
    allowed = ~relative.isneginf()
    with torch.no_grad():
        log_denominator, objective = rule(relative.logsumexp(dim=1), allowed.sum(dim=1).to(logits.dtype), everything)
        pull = _pull(relative, log_denominator)
    surrogate = (pull * torch.where(allowed, relative, 0.0)).sum(dim=1)
    return (objective + surrogate - surrogate.detach()).mean()


@dataclass(kw_only=True)
class _Problem:
    """What does not take part in autograd."""

    rule: Rule
    log_weight: LogWeight | None
    tile_bytes: int
    stats: SoftmaxStats | None = None


class _SoftmaxLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, anchors: Tensor, candidates: Tensor, temperature: Tensor, problem: _Problem) -> Tensor:
        wanted = ctx.needs_input_grad[0] or ctx.needs_input_grad[1] or ctx.needs_input_grad[2]
        loss, gradients, problem.stats = _solve(anchors, candidates, temperature, problem, wanted)
        ctx.save_for_backward(*gradients)
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        scaled = [gradient * grad_output for gradient in ctx.saved_tensors]
        return *(
            gradient if needed else None for gradient, needed in zip(scaled, ctx.needs_input_grad, strict=False)
        ), None


def _solve(
    anchors: Tensor, candidates: Tensor, temperature: Tensor, problem: _Problem, wanted: bool
) -> tuple[Tensor, tuple[Tensor, ...], SoftmaxStats]:
    device, num_rows = anchors.device, len(anchors)
    inverse = 1.0 / temperature
    ranks = distributed.is_active()
    if ranks:
        row_sizes, column_sizes = (distributed.gather_sizes(len(side), device) for side in (anchors, candidates))
        first_column = sum(column_sizes[: distributed.rank()])
        first_row = sum(row_sizes[: distributed.rank()])
        candidates_all = distributed.gather_rows(candidates, column_sizes)
        log_weight = problem.log_weight.gathered(row_sizes, column_sizes) if problem.log_weight is not None else None
    else:
        row_sizes, first_column, first_row, candidates_all, log_weight = (
            [num_rows],
            0,
            0,
            candidates,
            problem.log_weight,
        )
    num_rows_all, num_columns = sum(row_sizes), len(candidates_all)
    positive = (anchors * candidates[:num_rows]).sum(dim=1) * inverse

    def relative_logits(rows: slice) -> Tensor:
        """This rank's rows against all columns, relative to the positive; -inf where there is no negative."""
        logits = (anchors[rows] @ candidates_all.T).mul_(inverse).sub_(positive[rows, None])
        if log_weight is not None:
            shifted = slice(first_row + rows.start, first_row + rows.stop)
            logits += log_weight.tile(shifted, slice(0, num_columns)).to(logits.dtype)
        local = torch.arange(rows.start, rows.stop, device=device)
        logits[local - rows.start, first_column + local] = -torch.inf
        return logits

    tiles = _tiles(num_rows, num_columns, anchors.element_size(), problem.tile_bytes)
    log_sum, num_negatives, log_denominator, objective = (positive.new_empty(num_rows) for _ in range(4))
    d_anchors, d_candidates, d_log_temperature = (
        torch.zeros_like(anchors),
        torch.zeros_like(candidates),
        positive.new_zeros(()),
    )

    def measure(rows: slice, logits: Tensor) -> None:
        log_sum[rows] = logits.logsumexp(dim=1)
        num_negatives[rows] = (~logits.isneginf()).sum(dim=1).to(logits.dtype)

    def answer(rows: slice) -> None:
        log_denominator[rows], objective[rows] = problem.rule(log_sum[rows], num_negatives[rows], rows)

    def add_gradient(rows: slice, logits: Tensor) -> None:
        nonlocal d_log_temperature
        pull = _pull(logits, log_denominator[rows])
        total = pull.sum(dim=1, keepdim=True)
        own = candidates[rows]
        d_anchors[rows] = pull @ candidates_all - total * own
        # d loss / d log tau = -sum_ij p_ij (s_ij - s_ip) / tau, and the part of logits that depends on tau is (s_ij - s_ip) / tau.
        scores = (d_anchors[rows] * anchors[rows]).sum() * inverse
        d_log_temperature = d_log_temperature - scores
        if not ranks:
            d_candidates.addmm_(pull.T, anchors[rows])
            d_candidates[rows] -= total * anchors[rows]

    if problem.rule.row_wise or len(tiles) == 1:
        for rows in tiles:
            logits = relative_logits(rows)
            measure(rows, logits)
            answer(rows)
            if wanted:
                add_gradient(rows, logits)
    else:
        for rows in tiles:
            measure(rows, relative_logits(rows))
        answer(slice(0, num_rows))
        if wanted:
            for rows in tiles:
                add_gradient(rows, relative_logits(rows))
    if ranks and wanted:
        reference_all = distributed.gather_rows(positive + _finite(log_denominator), row_sizes)
        anchors_all = distributed.gather_rows(anchors, row_sizes)
        columns = slice(first_column, first_column + len(candidates))
        for rows in _tiles(num_rows_all, len(candidates), anchors.element_size(), problem.tile_bytes):
            logits = (anchors_all[rows] @ candidates.T).mul_(inverse).sub_(reference_all[rows, None])
            if log_weight is not None:
                logits += log_weight.tile(rows, columns).to(logits.dtype)
            first_own = max(rows.start, first_row)
            own = torch.arange(first_own, max(first_own, min(rows.stop, first_row + num_rows)), device=device)
            logits[own - rows.start, own - first_row] = -torch.inf
            d_candidates.addmm_(logits.exp_().T, anchors_all[rows])
        totals = (log_sum - _finite(log_denominator)).exp()
        d_candidates[:num_rows] -= totals[:, None] * anchors
    loss = distributed.sum_over_ranks(objective.sum()) / num_rows_all
    scale = inverse * (distributed.world_size() / num_rows_all)
    d_temperature = (
        distributed.sum_over_ranks(d_log_temperature) * inverse / num_rows_all if wanted else d_log_temperature
    )
    stats = SoftmaxStats(log_sum=log_sum, log_denominator=log_denominator, num_negatives=num_negatives)
    return loss, (d_anchors * scale, d_candidates * scale, d_temperature), stats


def _pull(relative: Tensor, log_denominator: Tensor) -> Tensor:
    """exp(logit - denominator), 0 for removed pairs even where a row has no negative at all and its denominator is 0."""
    return (relative - _finite(log_denominator)[:, None]).exp()


def _finite(log_denominator: Tensor) -> Tensor:
    return torch.where(log_denominator.isneginf(), 0.0, log_denominator)


def _tiles(num_rows: int, num_columns: int, item_bytes: int, tile_bytes: int) -> list[slice]:
    height = max(1, tile_bytes // max(1, num_columns * item_bytes))
    return [slice(start, min(start + height, num_rows)) for start in range(0, num_rows, height)]
