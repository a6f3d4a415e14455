"""The tiled softmax that every loss shares: log-sums, any rule for the denominator, and the gradient in closed form.

Computes exactly, for each anchor i with its positive p(i), without ever holding the B x M scores:

    logit_ij          = (s_ij - s_ip(i)) / tau_i + b_ij                        relative to the positive
    log_sum_i         = logsumexp_{j != p(i)} logit_ij
    log_denominator_i, objective_i, positive_weight_i = rule(log_sum_i, number of negatives)
    loss              = mean_i row_weight_i objective_i
    p_ij              = exp(logit_ij - log_denominator_i)      gradient weight of negative j, in s_ij / tau_i
    positive_weight_i                                          that of the positive; -sum_j p_ij if the rule gives none

`dense_softmax_loss` is its slow twin: the same by autograd on the whole matrix.

Cost: one direction, three matrix products of B x M x D for loss and gradients when the rule works row by row or one tile holds
everything, four otherwise; both directions the same three or four; `tile_bytes` of scores, times a small number; nothing is kept for
the backward pass but the two gradients.

Collectives, all in the forward pass: two gathers of sizes, a gather of the candidates (M x D numbers a rank), a sum of their gradient (all
M x D), a sum of one number for the loss, and one for a scalar temperature that learns. Both directions: three gathers of (B,) numbers
more, and with temperatures that learn a sum of them. In a ring W - 1 sends of a block of candidates and again, with W of their gradient, take the
place of the gather and the sum of candidates, always with four products. The rule's and the log-weights' are theirs.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from anybatch.core.errors import AnybatchError
from anybatch.losses.log_weights import LogWeight
from anybatch.losses.sides import TILE_BYTES, Adjust, Answer, Rule, Side, SoftmaxStats
from anybatch.losses.solver import Solution, finite, solve

__all__ = [
    "TILE_BYTES",
    "Adjust",
    "Answer",
    "Rule",
    "Side",
    "SoftmaxStats",
    "Twice",
    "dense_softmax_loss",
    "differentiable_once",
    "refuse_twice",
    "softmax_loss",
    "symmetric_softmax_loss",
    "with_gradients",
]


def softmax_loss(
    anchors: Tensor,
    candidates: Tensor,
    *,
    temperature: Tensor,
    rule: Rule,
    log_weight: LogWeight | None = None,
    row_weight: Tensor | None = None,
    adjust: Adjust | None = None,
    column_weight: Callable[[slice], Tensor] | None = None,
    num_drawn: Tensor | None = None,
    tile_bytes: int = TILE_BYTES,
    ring: bool = False,
) -> tuple[Tensor, SoftmaxStats]:
    """The loss of this batch over all ranks.

    Args:
        anchors: (B, D), this rank's. Row i's positive is candidate i.
        candidates: (M, D), M >= B, this rank's: positives, then explicit negatives.
        temperature: Scalar, or (B,) one a row; receives a gradient if it requires one.
        rule: The method.
        log_weight: b_ij for this rank's rows and columns; None for 0.
        row_weight: (B,) factor of each row's objective, a constant; None for 1.
        adjust: Rewrites the logits of whole rows; None to leave them.
        column_weight: Also measure `SoftmaxStats.column_pull`, with these weights of the rows; see `Side`.
        num_drawn: (B,) candidates but for the positive, where not all columns are; see `Rule`.
        tile_bytes: Memory for scores; the height of a tile follows from it.
        ring: Under several ranks let the candidates travel from rank to rank, where all of them would not fit on one. The same loss.

    Returns:
        The mean objective over the rows of all ranks, a scalar, and figures. Each rank's embeddings, and temperatures of its
        rows, receive world_size times the gradient of that mean, so that the averaging of DDP gives the gradient of one process; a
        scalar temperature receives the whole gradient on every rank.
    """
    side = Side(
        rule=rule,
        temperature=temperature,
        log_weight=log_weight,
        row_weight=row_weight,
        adjust=adjust,
        column_weight=column_weight,
        num_drawn=num_drawn,
    )
    loss, stats = _run(anchors, candidates, (side,), tile_bytes, ring)
    return loss, stats[0]


def symmetric_softmax_loss(
    anchors: Tensor, candidates: Tensor, *, forward: Side, back: Side, tile_bytes: int = TILE_BYTES, ring: bool = False
) -> tuple[Tensor, tuple[SoftmaxStats, SoftmaxStats]]:
    """The mean of both directions, from the same scores: anchors against candidates, and positives against anchors.

    Equal to the mean of two runs of `softmax_loss`, in 4 matrix products instead of 6 to 8 (3 when one tile holds everything).
    Explicit negatives take part in the first direction only. A side that adjusts logits or wants the pull of the
    columns needs whole rows in its own direction, so then the two runs are what is done.

    Args:
        anchors: (B, D). candidates: (M, D), M >= B.
        forward: Anchors against candidates.
        back: Positives against anchors; its log-weights have the positives as rows.
        tile_bytes, ring: See `softmax_loss`.

    Returns:
        As `softmax_loss`; figures of both.
    """
    if back.adjust is not None or back.column_weight is not None:
        one, stats_one = _run(anchors, candidates, (forward,), tile_bytes, ring)
        other, stats_other = _run(candidates[: len(anchors)], anchors, (back,), tile_bytes, ring)
        return (one + other) / 2, (stats_one[0], stats_other[0])
    loss, (stats_forward, stats_back) = _run(anchors, candidates, (forward, back), tile_bytes, ring)
    return loss, (stats_forward, stats_back)


def dense_softmax_loss(
    anchors: Tensor,
    candidates: Tensor,
    *,
    temperature: Tensor,
    rule: Rule,
    log_weight: LogWeight | None = None,
    row_weight: Tensor | None = None,
    adjust: Adjust | None = None,
) -> Tensor:
    """The slow twin of `softmax_loss` on one rank: the whole matrix, plain autograd. For tests and for reading.

    The rule's answer is treated as a constant, and the surrogate `sum_j stop_grad(weight_ij) s_ij / tau_i`, the positive
    included, is added with value zero: its derivative is the gradient that the engine has in closed form.
    """
    everything = slice(0, len(anchors))
    scores = anchors @ candidates.T
    relative = (scores - scores.diagonal()[:, None]) / temperature.expand(len(anchors))[:, None]
    with torch.no_grad():
        logits = relative.detach().clone()
        if log_weight is not None:
            logits = logits + log_weight.tile(everything, slice(0, len(candidates)))
        logits.fill_diagonal_(-torch.inf)
        if adjust is not None:
            logits = adjust(everything, scores.detach(), logits)
        num_drawn = logits.new_full((len(anchors),), len(candidates) - 1)
        answer = Answer(*rule(logits.logsumexp(dim=1), num_drawn, everything))
        negative_weight = (logits - finite(answer.log_denominator)[:, None]).exp()
        surplus = None if answer.positive_weight is None else answer.positive_weight + negative_weight.sum(dim=1)
    objective, surrogate = answer.objective, (negative_weight * relative).sum(dim=1)
    if surplus is not None:  # beyond minus the sum of the negatives'
        surrogate = surrogate + surplus * scores.diagonal() / temperature
    weight = torch.ones_like(objective) if row_weight is None else row_weight.detach()
    return (weight * (objective + surrogate - surrogate.detach())).mean()


@dataclass(kw_only=True)
class _Problem:
    """What does not take part in autograd."""

    sides: tuple[Side, ...]
    tile_bytes: int
    ring: bool
    gradients: bool
    solution: Solution | None = None


def _run(
    anchors: Tensor, candidates: Tensor, sides: tuple[Side, ...], tile_bytes: int, ring: bool
) -> tuple[Tensor, tuple[SoftmaxStats, ...]]:
    dtype = torch.float64 if anchors.dtype == torch.float64 else torch.float32
    sides = tuple(replace(side, temperature=side.temperature.to(dtype)) for side in sides)
    problem = _Problem(sides=sides, tile_bytes=tile_bytes, ring=ring, gradients=torch.is_grad_enabled())
    with torch.autocast(anchors.device.type, enabled=False):
        loss = _SoftmaxLoss.apply(
            anchors.to(dtype), candidates.to(dtype), problem, *(side.temperature for side in sides)
        )
    assert problem.solution is not None
    return loss, problem.solution.stats


class _SoftmaxLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, anchors: Tensor, candidates: Tensor, problem: _Problem, *temperatures: Tensor) -> Tensor:
        solution = solve(
            anchors,
            candidates,
            problem.sides,
            tile_bytes=problem.tile_bytes,
            gradients=problem.gradients,
            ring=problem.ring,
        )
        problem.solution = solution
        ctx.save_for_backward(solution.d_anchors, solution.d_candidates, *solution.d_temperatures)
        return solution.loss

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        refuse_twice()
        d_anchors, d_candidates, *d_temperatures = ctx.saved_tensors
        saved = (d_anchors, d_candidates, None, *d_temperatures)
        return tuple(
            gradient * grad_output if needed and gradient is not None else None
            for gradient, needed in zip(saved, ctx.needs_input_grad, strict=True)
        )


class Twice(AnybatchError, RuntimeError):
    """A second derivative was asked for; a RuntimeError as well, which is what autograd raises for that."""


def refuse_twice() -> None:
    """In a backward pass: refuse one that is recorded to be differentiated itself. What is in closed form, or held fixed, is a constant to autograd.

    Raises:
        Twice: It is (`create_graph=True`).
    """
    if torch.is_grad_enabled():
        raise Twice(
            "A loss of anybatch can be differentiated once, and create_graph=True asks for more: its gradient is computed in closed form, and has no "
            "derivative of its own. Leave the loss out of gradient penalties and other second derivatives, or call backward without create_graph."
        )


def differentiable_once(loss: Tensor) -> Tensor:
    """The same loss, whatever it is made of, with `refuse_twice` at the start of its backward pass."""
    return _Once.apply(loss)


class _Once(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, loss: Tensor) -> Tensor:
        return loss.clone()

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        refuse_twice()
        return grad_output


def with_gradients(value: Tensor, leaves: tuple[Tensor, ...], gradients: tuple[Tensor, ...]) -> Tensor:
    """`value`, computed without autograd, as a function of `leaves` whose gradients are these."""
    return _WithGradients.apply(value, gradients, *leaves)


class _WithGradients(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, value: Tensor, gradients: tuple[Tensor, ...], *leaves: Tensor) -> Tensor:
        ctx.save_for_backward(*gradients)
        return value.clone()

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        refuse_twice()
        pairs = zip(ctx.saved_tensors, ctx.needs_input_grad[2:], strict=True)
        return None, None, *(gradient * grad_output if needed else None for gradient, needed in pairs)
