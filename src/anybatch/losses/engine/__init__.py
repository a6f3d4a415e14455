"""The tiled softmax that every loss shares: log-sums, any rule for the denominator, and the gradient in closed form.

Computes exactly, for each anchor i with its positive p(i), without ever holding the B x M scores:

    logit_ij          = (s_ij - s_ip(i)) / tau_i + b_ij                        relative to the positive
    log_sum_i         = logsumexp_{j != p(i)} logit_ij
    log_denominator_i, objective_i, positive_weight_i = rule(log_sum_i, number of negatives)
    loss              = mean_i row_weight_i objective_i
    p_ij              = exp(logit_ij - log_denominator_i)      gradient weight of negative j, in s_ij / tau_i
    positive_weight_i                                          that of the positive; -sum_j p_ij if the rule gives none

`tests/reference.py` has its slow reference: the same by autograd on the whole matrix.

Cost: three matrix products of B x M x D for loss and gradients, of one direction or both, when the rule works row by
row in one direction or one tile holds everything, four otherwise; `tile_bytes` of scores, times a small number; nothing
is kept for the backward pass but the two gradients.

Collectives, all in the forward pass: two gathers of sizes, a gather of the candidates (M x D numbers a rank), a sum of
their gradient (all M x D), a sum of one number for the loss, and one for a scalar temperature that learns. Both
directions: three gathers of (B,) numbers more, and with temperatures that learn a sum. Log-weights have two gathers a
direction; the rule's are its own.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from anybatch.core.errors import AnybatchError
from anybatch.losses.engine.sides import TILE_BYTES, Adjust, Answer, Rule, Side, SoftmaxStats
from anybatch.losses.engine.solver import solve

__all__ = [
    "TILE_BYTES",
    "Adjust",
    "Answer",
    "Rule",
    "Side",
    "SoftmaxStats",
    "Twice",
    "differentiable_once",
    "refuse_twice",
    "softmax_loss",
    "with_gradients",
]


def softmax_loss(
    anchors: Tensor, candidates: Tensor, *sides: Side, tile_bytes: int = TILE_BYTES
) -> tuple[Tensor, tuple[SoftmaxStats, ...]]:
    """The loss of this batch over all ranks, in one direction, or the mean of both from the same scores.

    Explicit negatives take part in the first only. A second side that needs rows of its own (`Side.needs_rows`) takes a
    second run.

    Args:
        anchors: (B, D), this rank's. Row i's positive is candidate i.
        candidates: (M, D), M >= B, this rank's: positives, then explicit negatives.
        sides: Anchors against candidates; and, for the mean of both directions, positives against anchors.
        tile_bytes: Memory for scores; the height of a tile follows from it.

    Returns:
        The mean objective over the rows of all ranks, a scalar, and figures of each direction. Each rank's
        embeddings, and temperatures of its rows, receive world_size times the gradient of that mean, so that the
        averaging of DDP gives the gradient of one process; a scalar temperature receives the whole gradient on every
        rank.
    """
    if len(sides) == 2 and sides[1].needs_rows:
        loss, stats = softmax_loss(anchors, candidates, sides[0], tile_bytes=tile_bytes)
        positives = candidates[: len(anchors)]
        loss_back, stats_back = softmax_loss(positives, anchors, sides[1], tile_bytes=tile_bytes)
        return (loss + loss_back) / 2, (*stats, *stats_back)
    # 1. In float32 or better, still attached to autograd.
    dtype = torch.float64 if anchors.dtype == torch.float64 else torch.float32
    anchors, candidates = anchors.to(dtype), candidates.to(dtype)
    sides = tuple(replace(side, temperature=side.temperature.to(dtype)) for side in sides)
    # 2. The value and its gradients, outside it.
    wanted = torch.is_grad_enabled()
    with torch.no_grad(), torch.autocast(anchors.device.type, enabled=False):
        solution = solve(anchors, candidates, sides, tile_bytes=tile_bytes, gradients=wanted)
    # 3. The one as a function with the others.
    leaves = (anchors, candidates, *(side.temperature for side in sides))
    return with_gradients(solution.loss, leaves, solution.gradients), solution.stats


class Twice(AnybatchError, RuntimeError):
    """A second derivative was asked for; a RuntimeError as well, which is what autograd raises for that."""


def refuse_twice() -> None:
    """In a backward pass: refuse one with `create_graph=True`, to which what is in closed form is a constant."""
    if torch.is_grad_enabled():
        raise Twice(
            "A loss of anybatch can be differentiated once, and create_graph=True asks for more: its gradient is "
            "computed in closed form, and has no derivative of its own. Leave the loss out of gradient penalties and "
            "other second derivatives, or call backward without create_graph."
        )


def differentiable_once(loss: Tensor) -> Tensor:
    """The same loss, whatever it is made of, with `refuse_twice` at the start of its backward pass."""
    return with_gradients(loss.detach(), (loss,), (torch.ones_like(loss),))


def with_gradients(value: Tensor, leaves: tuple[Tensor, ...], gradients: tuple[Tensor | None, ...]) -> Tensor:
    """`value`, computed without autograd, as a function of `leaves` whose gradients are these (None for none)."""
    return _WithGradients.apply(value, gradients, *leaves)


class _WithGradients(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, value: Tensor, gradients: tuple[Tensor | None, ...], *leaves: Tensor) -> Tensor:
        ctx.save_for_backward(*gradients)
        return value.clone()

    @staticmethod
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, grad_output: Tensor
    ) -> tuple[Tensor | None, ...]:
        refuse_twice()
        pairs = zip(ctx.saved_tensors, ctx.needs_input_grad[2:], strict=True)
        return (
            None,
            None,
            *(gradient * grad_output if needed and gradient is not None else None for gradient, needed in pairs),
        )
