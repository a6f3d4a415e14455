"""The engine against its dense twin and against finite differences: temperatures per row, weights of rows, both
directions at once.
"""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from anybatch.losses.engine import Answer, Side, softmax_loss
from anybatch.losses.log_weights import as_log_weights

from ..reference import dense_softmax_loss


class WithPositive:
    """InfoNCE, said to be row-wise or not: the second makes the engine pass over the tiles twice.

    With `others` the negatives' mean stands for so many rows.
    """

    def __init__(self, row_wise=True, others=None):
        self.row_wise, self.others = row_wise, others

    def __call__(self, log_sum, num_drawn, rows):
        correction = torch.zeros_like(log_sum)
        if self.others is not None:
            correction = math.log(self.others) - num_drawn.clamp(min=1).log()
        objective = torch.logaddexp(log_sum + correction, torch.zeros_like(log_sum))
        return Answer(objective - correction, objective)


def draw(seed, rows, extra, width=5):
    generator = torch.Generator().manual_seed(seed)
    make = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)  # noqa: E731
    weight = make(rows, rows + extra)
    weight[make(rows, rows + extra) > 1] = -torch.inf
    return make(rows, width), make(rows + extra, width), 0.2 + make(rows).abs(), 0.1 + make(rows).abs(), weight


def assert_all_close(ours, theirs, tolerance=1e-11):
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, other, rtol=tolerance, atol=tolerance)


shapes = st.tuples(st.integers(0, 9999), st.integers(1, 9), st.integers(0, 6))
tiles = st.sampled_from([1, 200, 10**7])
kinds = st.fixed_dictionaries({"others": st.sampled_from([None, 30]), "masked": st.booleans()})


@settings(deadline=None, max_examples=40)
@given(shape=shapes, tile=tiles, row_wise=st.booleans(), per_row=st.booleans(), weighted=st.booleans(), kind=kinds)
def test_one_way_equals_the_dense_twin(shape, tile, row_wise, per_row, weighted, kind):
    anchors, candidates, tau, row_weight, log_weight = draw(*shape)
    temperature = tau if per_row else tau[0].clone()
    known = {
        "rule": WithPositive(row_wise, kind["others"]),
        "log_weight": as_log_weights(log_weight, *log_weight.shape) if kind["masked"] else None,
        "row_weight": row_weight if weighted else None,
    }
    inputs = [side.requires_grad_() for side in (anchors, candidates, temperature)]
    side = Side(temperature=temperature, **known)
    ours, (stats,) = softmax_loss(anchors, candidates, side, tile_bytes=tile)
    theirs = dense_softmax_loss(anchors, candidates, side)
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
    present = ~log_weight.isneginf() if kind["masked"] else torch.ones_like(log_weight, dtype=torch.bool)
    assert stats.num_negatives.tolist() == present.fill_diagonal_(False).sum(1).tolist()
    mine = torch.autograd.grad(ours, inputs)
    assert_all_close(mine, torch.autograd.grad(theirs, inputs))
    torch.testing.assert_close(
        stats.temperature_gradient / len(anchors) if per_row else stats.temperature_gradient.mean(), mine[2]
    )


@pytest.mark.parametrize("tile", [1, 200, 10**7])
def test_temperatures_per_row_equal_finite_differences(tile):
    anchors, candidates, tau, row_weight, _ = draw(3, 6, 3)

    def function(anchors, candidates, tau):
        side = Side(temperature=tau, rule=WithPositive(), row_weight=row_weight)
        return softmax_loss(anchors, candidates, side, tile_bytes=tile)[0]

    inputs = [side.requires_grad_() for side in (anchors, candidates, tau)]
    assert torch.autograd.gradcheck(function, inputs)


@settings(deadline=None, max_examples=60)
@given(shape=shapes, tile=tiles, row_wise=st.booleans(), per_row=st.booleans(), weighted=st.booleans(), kind=kinds)
def test_both_at_once_equal_two_runs(shape, tile, row_wise, per_row, weighted, kind):
    anchors, candidates, tau, row_weight, log_weight = draw(*shape)
    rows = len(anchors)
    weight = as_log_weights(log_weight, *log_weight.shape)
    taus = [tau, tau.flip(0).contiguous()] if per_row else [tau[0].clone(), tau[-1].clone()]
    inputs = [side.requires_grad_() for side in (anchors, candidates, *taus)]
    row_weights = [row_weight, 1.5 * row_weight] if weighted else [None, None]
    log_weights = (weight, weight.reversed(rows)) if kind["masked"] else (None, None)
    sides = [
        Side(rule=WithPositive(row_wise, kind["others"]), temperature=t, log_weight=b, row_weight=w)
        for t, b, w in zip(taus, log_weights, row_weights, strict=True)
    ]
    ours, stats = softmax_loss(anchors, candidates, *sides, tile_bytes=tile)
    one, stats_one = softmax_loss(anchors, candidates, sides[0], tile_bytes=tile)
    other, stats_other = softmax_loss(candidates[:rows], anchors, sides[1], tile_bytes=tile)
    theirs = (one + other) / 2
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
    assert_all_close(torch.autograd.grad(ours, inputs), torch.autograd.grad(theirs, inputs), 1e-12)
    for mine, twin in zip(stats, (*stats_one, *stats_other), strict=True):
        for name in ("log_sum", "log_denominator", "objective", "num_negatives", "temperature_gradient"):
            torch.testing.assert_close(getattr(mine, name), getattr(twin, name), rtol=1e-11, atol=1e-11)


class OwnPositiveWeight:
    """logsumexp over the negatives minus c times the positive's logit: the positive receives -c, not minus the sum of
    1.
    """

    row_wise = True

    def __init__(self, share):
        self.share = share

    def __call__(self, log_sum, num_drawn, rows):
        return Answer(log_sum, log_sum, positive_weight=-self.share[rows])


@settings(deadline=None, max_examples=40)
@given(
    shape=shapes, tile=tiles, per_row=st.booleans(), weighted=st.booleans(), masked=st.booleans(), both=st.booleans()
)
def test_the_positive_receives_what_the_rule_says(shape, tile, per_row, weighted, masked, both):
    anchors, candidates, tau, row_weight, log_weight = draw(*shape)
    rows, weight = len(anchors), as_log_weights(log_weight, *log_weight.shape)
    share = 0.5 + torch.arange(rows, dtype=torch.float64)
    taus = [tau, 2 * tau] if per_row else [tau[0].clone(), 2 * tau[0]]
    inputs = [side.requires_grad_() for side in (anchors, candidates, *taus)]
    pairs = ((anchors, candidates), (candidates[:rows], anchors))[: 1 + both]
    weights = (weight, weight.reversed(rows))
    factor = row_weight if weighted else torch.ones_like(row_weight)
    sides = [
        Side(
            rule=OwnPositiveWeight(share),
            temperature=temperature,
            log_weight=term if masked else None,
            row_weight=row_weight if weighted else None,
        )
        for temperature, term in zip(taus, weights, strict=True)
    ]
    theirs = anchors.new_zeros(())
    for (queries, others), temperature, term in zip(pairs, taus, (log_weight, log_weight[:, :rows].T)):
        logits = queries @ others.T / temperature.expand(rows)[:, None]
        removed = torch.eye(rows, len(others), dtype=torch.bool)
        removed |= term.isneginf() if masked else False
        negatives = (logits + (term if masked else 0.0)).masked_fill(removed, -torch.inf)
        per_query = negatives.logsumexp(dim=1) - share * logits.diagonal()
        per_query = torch.where(removed.all(dim=1), -share * logits.diagonal(), per_query)
        theirs = theirs + (factor * per_query).sum() / (rows * len(pairs))
    if both:
        ours, _ = softmax_loss(anchors, candidates, *sides, tile_bytes=tile)
    else:
        ours, _ = softmax_loss(anchors, candidates, sides[0], tile_bytes=tile)
        dense = dense_softmax_loss(anchors, candidates, sides[0])
        assert_all_close(*(torch.autograd.grad(loss, inputs[:3]) for loss in (ours, dense)))
        ours, _ = softmax_loss(anchors, candidates, sides[0], tile_bytes=tile)
    mine, expected = (torch.autograd.grad(loss, inputs[: 3 + both]) for loss in (ours, theirs))
    assert_all_close(mine, expected)


class Tilted:
    """Depends on the scores of whole rows, as hardness does."""

    def __init__(self, beta):
        self.beta = beta

    def __call__(self, rows, scores, logits):
        mean = scores.masked_fill(logits.isneginf(), 0.0).mean(dim=1, keepdim=True)
        return logits + self.beta * (scores - mean)


@settings(deadline=None, max_examples=40)
@given(
    shape=shapes,
    tile=tiles,
    row_wise=st.booleans(),
    weighted=st.booleans(),
    which=st.sampled_from(["forward", "back", "both"]),
)
def test_both_ways_with_adjusted_logits_are_the_mean_of_both_dense_twins(shape, tile, row_wise, weighted, which):
    anchors, candidates, tau, row_weight, log_weight = draw(*shape)
    rows = len(anchors)
    weight = as_log_weights(log_weight, *log_weight.shape)
    taus = [tau, tau.flip(0).contiguous()]
    inputs = [side.requires_grad_() for side in (anchors, candidates, *taus)]
    sides = [
        Side(
            rule=WithPositive(row_wise),
            temperature=temperature,
            log_weight=term,
            row_weight=row_weight if weighted else None,
            adjust=Tilted(beta) if which in (name, "both") else None,
        )
        for name, temperature, term, beta in zip(
            ("forward", "back"), taus, (weight, weight.reversed(rows)), (1.5, -0.7), strict=True
        )
    ]
    ours, _ = softmax_loss(anchors, candidates, *sides, tile_bytes=tile)
    one, other = (
        dense_softmax_loss(*embeddings, side)
        for embeddings, side in zip(((anchors, candidates), (candidates[:rows], anchors)), sides, strict=True)
    )
    theirs = (one + other) / 2
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
    assert_all_close(torch.autograd.grad(3 * ours, inputs), torch.autograd.grad(3 * theirs, inputs))


@settings(deadline=None, max_examples=30)
@given(shape=shapes, tile=tiles, row_wise=st.booleans(), weighted=st.booleans(), both=st.booleans())
def test_the_pull_of_the_columns_is_the_sum_of_the_rows_shares(shape, tile, row_wise, weighted, both):
    anchors, candidates, tau, row_weight, log_weight = draw(*shape)
    rows, column_weight = len(anchors), torch.arange(1.0, 1 + len(anchors), dtype=torch.float64)
    logits = (anchors @ candidates.T - (anchors * candidates[:rows]).sum(1)[:, None]) / tau[:, None] + log_weight
    logits.fill_diagonal_(-torch.inf)
    shares = logits.exp() / (1 + logits.exp().sum(1, keepdim=True))
    weight = as_log_weights(log_weight, *log_weight.shape)
    side = Side(
        rule=WithPositive(row_wise),
        temperature=tau,
        log_weight=weight,
        row_weight=row_weight if weighted else None,
        column_weight=lambda rows: column_weight[rows],
    )
    anchors.requires_grad_()
    if both:
        back = Side(rule=WithPositive(row_wise), temperature=tau, log_weight=weight.reversed(rows))
        _, (stats, _) = softmax_loss(anchors, candidates, side, back, tile_bytes=tile)
    else:
        _, (stats,) = softmax_loss(anchors, candidates, side, tile_bytes=tile)
    torch.testing.assert_close(stats.column_gradient, column_weight @ shares, rtol=1e-11, atol=1e-12)


def test_nothing_is_computed_backwards_without_gradients():
    anchors, candidates, tau, *_ = draw(0, 5, 2)
    with torch.no_grad():
        side = Side(temperature=tau, rule=WithPositive(False))
        loss, (stats,) = softmax_loss(anchors, candidates, side, tile_bytes=1)
    assert loss.isfinite()
    assert stats.temperature_gradient is None


def test_products_of_matrices():
    """The claim on the cost: products of tiles with the whole, counted; 3 or 4 whether one direction or both."""
    from anybatch.losses.engine import solver

    anchors, candidates, tau, *_ = draw(1, 8, 4, width=16)
    products = []

    class Counting(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            if function.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.addmm_):
                shapes = [side.shape for side in args if isinstance(side, torch.Tensor)]
                products.append(shapes[-2][0] * shapes[-2][1] * shapes[-1][1])
            return function(*args, **(kwargs or {}))

    whole = 8 * 12 * 16
    for sides, tile, expected in ((1, 10**7, 3), (1, 200, 4), (2, 10**7, 3), (2, 200, 4)):
        products.clear()
        side = Side(rule=WithPositive(row_wise=False), temperature=tau)
        with Counting():
            solver.solve(anchors, candidates, (side,) * sides, tile_bytes=tile, gradients=True)
        assert sum(products) == expected * whole


def test_collectives_are_those_documented(monkeypatch):
    """Counted where they are called; in one process each is an identity."""
    from anybatch.core import distributed
    from anybatch.losses.engine import solver

    anchors, candidates, tau, *_ = draw(1, 8, 4)
    counts = {}

    def counting(name):
        original = getattr(distributed, name)

        def call(*arguments):
            counts[name] = counts.get(name, 0) + 1
            return original(*arguments)

        return call

    for name in ("gather_sizes", "gather_rows", "sum_over_ranks"):
        monkeypatch.setattr(distributed, name, counting(name))
    learned, fixed = tau[0].clone().requires_grad_(), tau[0].clone()
    for temperatures, expected in (
        ([fixed], (2, 1, 2)),
        ([learned], (2, 1, 3)),
        ([fixed, fixed], (2, 4, 2)),
        ([learned, learned], (2, 4, 5)),
    ):
        for tile in (200, 10**7):
            counts.clear()
            sides = tuple(Side(rule=WithPositive(), temperature=temperature) for temperature in temperatures)
            solver.solve(anchors, candidates, sides, tile_bytes=tile, gradients=True)
            assert tuple(counts.values()) == expected
