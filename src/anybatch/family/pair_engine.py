"""The tiled sum over pairs that pairwise losses share: no denominator, each pair is judged on its own.

Computes exactly, without ever holding the B x M scores, for scores s_ij = <anchor_i, candidate_j> and weights w_ij = exp(b_ij)
(0 for the anchor's own positive and for removed pairs):

    positive sums  P = sum_i f(s_ip(i))
    negative sums  N = sum_ij w_ij g(s_ij; P / B),   and W = sum_ij w_ij
    loss           = h(P, N, W, B)

and the gradient in closed form. A method is f, g and h.

Cost: three matrix products of B x M x D; `tile_bytes` of scores at a time and a few tensors of that size; nothing is kept for the
backward pass but the gradients. With W ranks: two gathers of embeddings, two of sizes, those of the log-weight, and two sums in the forward
pass; nothing in the backward pass.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from anybatch.core import distributed
from anybatch.losses.engine import TILE_BYTES, refuse_twice
from anybatch.losses.engine.candidates import check_rows
from anybatch.losses.log_weights import LogWeights


@dataclass(frozen=True, kw_only=True)
class PairOutcome:
    """What a method makes of the sums over all ranks.

    Attributes:
        loss: Scalar.
        d_positive: (B,) derivative of the loss by this rank's positive scores.
        negative_scale: Scalar by which the derivatives that `of_negatives` gave are multiplied.
        d_parameters: (P,) derivative of the loss by the method's parameters.
    """

    loss: Tensor
    d_positive: Tensor
    negative_scale: Tensor
    d_parameters: Tensor


class PairMethod(Protocol):
    """f, g and h of a pairwise loss."""

    def of_positives(self, scores: Tensor) -> Tensor:
        """The sums (J,) over the positives' scores (B,)."""
        ...

    def of_negatives(self, scores: Tensor, weight: Tensor, positive_means: Tensor) -> tuple[Tensor, Tensor]:
        """The weighted sums (K,) over a tile of negatives, and the unscaled derivative by each score, weight included."""
        ...

    def finish(
        self, scores: Tensor, positive_sums: Tensor, negative_sums: Tensor, total_weight: Tensor, num_rows: int
    ) -> PairOutcome:
        """The loss and its derivatives; `scores` are this rank's positives, the sums and `num_rows` those of all ranks."""
        ...


def pair_loss(
    anchors: Tensor,
    candidates: Tensor,
    *,
    parameters: Tensor,
    method: PairMethod,
    log_weight: LogWeights | None = None,
    tile_bytes: int = TILE_BYTES,
) -> tuple[Tensor, float]:
    """The pairwise loss of this batch over all ranks.

    Args:
        anchors: (B, D), this rank's. Row i's positive is candidate i.
        candidates: (M, D), M >= B, this rank's: positives, then explicit negatives.
        parameters: (P,) the method's parameters, for autograd; the method holds their values.
        method: The loss.
        log_weight: b_ij for this rank's rows and columns; None for 0.
        tile_bytes: Memory for scores; the height of a tile follows from it.

    Returns:
        The loss, and the mean number of negatives an anchor of this rank (pairs of weight 0 left out). Each rank's embeddings receive
        world_size times the gradient of the global loss, the parameters the whole gradient on every rank.
    """
    problem = _Problem(method=method, log_weight=log_weight, tile_bytes=tile_bytes)
    with torch.autocast(anchors.device.type, enabled=False):
        loss = _PairLoss.apply(anchors, candidates, parameters, problem)
    return loss, problem.num_negatives


@dataclass(kw_only=True)
class _Problem:
    method: PairMethod
    log_weight: LogWeights | None
    tile_bytes: int
    num_negatives: float = 0.0


class _PairLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, anchors: Tensor, candidates: Tensor, parameters: Tensor, problem: _Problem) -> Tensor:
        loss, gradients = _solve(anchors, candidates, problem, any(ctx.needs_input_grad))
        ctx.save_for_backward(*gradients)
        return loss

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        refuse_twice()
        pairs = zip(ctx.saved_tensors, ctx.needs_input_grad, strict=False)
        return *(gradient * grad_output if needed else None for gradient, needed in pairs), None


def _solve(anchors: Tensor, candidates: Tensor, problem: _Problem, wanted: bool) -> tuple[Tensor, tuple[Tensor, ...]]:
    method, log_weight, num_rows, device = problem.method, problem.log_weight, len(anchors), anchors.device
    row_sizes, column_sizes = (distributed.gather_sizes(len(side), device) for side in (anchors, candidates))
    check_rows(row_sizes)
    first_row, first_column = (sum(sizes[: distributed.rank()]) for sizes in (row_sizes, column_sizes))
    ranks = distributed.is_active()
    candidates_all = distributed.gather_rows(candidates, column_sizes)
    if ranks and log_weight is not None:
        log_weight = log_weight.gathered(row_sizes, column_sizes)
    num_rows_all, num_columns_all = sum(row_sizes), len(candidates_all)

    def weights(rows: slice, columns: slice, own: Tensor, own_column: Tensor) -> Tensor:
        """(rows, columns) of all ranks' pairs; 0 at the own positives, given by their place in the tile."""
        weight = anchors.new_ones((rows.stop - rows.start, columns.stop - columns.start))
        if log_weight is not None:
            weight = weight * log_weight.tile(rows, columns).to(weight.dtype).exp()
        weight[own, own_column] = 0.0
        return weight

    own_positive = candidates[:num_rows]
    positive = (anchors * own_positive).sum(dim=1)
    positive_sums = distributed.sum_over_ranks(method.of_positives(positive))
    positive_means = positive_sums / num_rows_all
    d_anchors, d_candidates = torch.zeros_like(anchors), torch.zeros_like(candidates)
    negative_sums: Tensor | None = None
    total_weight, num_negatives = anchors.new_zeros(()), 0
    for rows in _tiles(num_rows, num_columns_all, anchors.element_size(), problem.tile_bytes):
        local = torch.arange(rows.start, rows.stop, device=device)
        shifted = slice(first_row + rows.start, first_row + rows.stop)
        weight = weights(shifted, slice(0, num_columns_all), local - rows.start, first_column + local)
        sums, pull = method.of_negatives(anchors[rows] @ candidates_all.T, weight, positive_means)
        negative_sums = sums if negative_sums is None else negative_sums + sums
        total_weight = total_weight + weight.sum()
        num_negatives += int((weight > 0).sum())
        if wanted:
            d_anchors[rows] = pull @ candidates_all
            if not ranks:
                d_candidates.addmm_(pull.T, anchors[rows])
    if ranks and wanted:
        anchors_all = distributed.gather_rows(anchors, row_sizes)
        columns = slice(first_column, first_column + len(candidates))
        for rows in _tiles(num_rows_all, len(candidates), anchors.element_size(), problem.tile_bytes):
            first_own = max(rows.start, first_row)
            own = torch.arange(first_own, max(first_own, min(rows.stop, first_row + num_rows)), device=device)
            weight = weights(rows, columns, own - rows.start, own - first_row)
            _, pull = method.of_negatives(anchors_all[rows] @ candidates.T, weight, positive_means)
            d_candidates.addmm_(pull.T, anchors_all[rows])
    assert negative_sums is not None
    totals = distributed.sum_over_ranks(torch.cat([negative_sums, total_weight[None]]))
    outcome = method.finish(positive, positive_sums, totals[:-1], totals[-1], num_rows_all)
    problem.num_negatives = num_negatives / max(1, num_rows)
    d_anchors.mul_(outcome.negative_scale).add_(outcome.d_positive[:, None] * own_positive)
    d_candidates.mul_(outcome.negative_scale)
    d_candidates[:num_rows] += outcome.d_positive[:, None] * anchors
    world_size = distributed.world_size()
    return outcome.loss, (d_anchors * world_size, d_candidates * world_size, outcome.d_parameters)


def _tiles(num_rows: int, num_columns: int, item_bytes: int, tile_bytes: int) -> list[slice]:
    """At least one tile, so that a rank without rows still takes part in the sums."""
    height = max(1, tile_bytes // max(1, num_columns * item_bytes))
    return [slice(start, min(start + height, num_rows)) for start in range(0, max(1, num_rows), height)]
