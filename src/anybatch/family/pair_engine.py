"""The tiled sum over pairs that pairwise losses share: no denominator, each pair is judged on its own.

Computes exactly, without ever holding the B x M scores, for scores s_ij = <anchor_i, candidate_j> and weights w_ij =
exp(b_ij) (0 for the anchor's own positive and for removed pairs):

    positive sums  P = sum_i f(s_ip(i))
    negative sums  N = sum_ij w_ij g(s_ij; P / B),   and W = sum_ij w_ij
    loss           = h(P, N, W, B)

and the gradient in closed form. A method is f, g and h.

Cost: three matrix products of B x M x D; `tile_bytes` of scores at a time and a few tensors of that size; nothing is
kept for the backward pass but the gradients. With W ranks, in the forward pass: the collectives of
`candidates.Gathered`, those of the log-weights, and two sums of a few numbers; nothing in the backward pass.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from anybatch.core import distributed
from anybatch.losses.engine import TILE_BYTES, with_gradients
from anybatch.losses.engine.candidates import Gathered, Layout
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
        """The weighted sums (K,) over a tile of negatives; the unscaled derivative by each score, weight included."""
        ...

    def finish(
        self, scores: Tensor, positive_sums: Tensor, negative_sums: Tensor, total_weight: Tensor, num_rows: int
    ) -> PairOutcome:
        """Loss and derivatives; `scores` are this rank's positives, the sums and `num_rows` those of all ranks."""
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
        The loss, and the mean number of negatives per anchor of this rank (pairs of weight 0 left out). Each rank's
        embeddings receive world_size times the gradient of the global loss, the parameters the whole gradient on every
        rank.
    """
    wanted = torch.is_grad_enabled()
    with torch.no_grad(), torch.autocast(anchors.device.type, enabled=False):
        loss, gradients, num_negatives = _solve(anchors, candidates, method, log_weight, tile_bytes, wanted)
    return with_gradients(loss, (anchors, candidates, parameters), gradients), num_negatives


def _solve(
    anchors: Tensor,
    candidates: Tensor,
    method: PairMethod,
    log_weight: LogWeights | None,
    tile_bytes: int,
    wanted: bool,
) -> tuple[Tensor, tuple[Tensor, ...], float]:
    # 1. The candidates of all ranks, and the sums over positives, on which a negative's term may depend.
    layout = Layout.of(len(anchors), len(candidates), anchors.device)
    source = Gathered(candidates, layout)
    (block,) = source.blocks(gradients=True)
    candidates_all, d_candidates_all = block.candidates, block.gradient
    assert d_candidates_all is not None
    if distributed.is_active() and log_weight is not None:
        log_weight = log_weight.gathered(layout.row_sizes, layout.column_sizes)
    num_rows, num_rows_all, num_columns = len(anchors), sum(layout.row_sizes), len(candidates_all)
    own_positive = candidates[:num_rows]
    positive = (anchors * own_positive).sum(dim=1)
    positive_sums = distributed.sum_over_ranks(method.of_positives(positive))
    positive_means = positive_sums / num_rows_all
    # 2. A tile of negatives at a time; at least one tile, so that a rank without rows takes part in the sums.
    d_anchors = torch.zeros_like(anchors)
    negative_sums: Tensor | float = 0.0
    total_weight, num_negatives = anchors.new_zeros(()), 0
    height = max(1, tile_bytes // max(1, num_columns * anchors.element_size()))
    for start in range(0, max(1, num_rows), height):
        rows = slice(start, min(start + height, num_rows))
        local = torch.arange(rows.start, rows.stop, device=anchors.device)
        weight = anchors.new_ones((len(local), num_columns))
        if log_weight is not None:
            weight = weight * log_weight.tile(layout.shifted(rows), slice(0, num_columns)).to(weight.dtype).exp()
        weight[local - start, layout.first_column + local] = 0.0
        sums, slope = method.of_negatives(anchors[rows] @ candidates_all.T, weight, positive_means)
        negative_sums = negative_sums + sums
        total_weight = total_weight + weight.sum()
        num_negatives += int((weight > 0).sum())
        if wanted:
            d_anchors[rows] = slope @ candidates_all
            d_candidates_all.addmm_(slope.T, anchors[rows])
    # 3. The loss of all ranks, and with it what the derivatives are multiplied by.
    assert isinstance(negative_sums, Tensor)
    totals = distributed.sum_over_ranks(torch.cat([negative_sums, total_weight[None]]))
    outcome = method.finish(positive, positive_sums, totals[:-1], totals[-1], num_rows_all)
    d_candidates = source.gradient() if wanted else torch.zeros_like(candidates)
    d_anchors.mul_(outcome.negative_scale).add_(outcome.d_positive[:, None] * own_positive)
    d_candidates.mul_(outcome.negative_scale)
    d_candidates[:num_rows] += outcome.d_positive[:, None] * anchors
    world_size = distributed.world_size()
    gradients = (d_anchors * world_size, d_candidates * world_size, outcome.d_parameters)
    return outcome.loss, gradients, num_negatives / max(1, num_rows)
