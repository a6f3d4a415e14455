"""Negatives weighed by their scores: Robinson et al. 2021 written for one row, the weights constants."""

from __future__ import annotations

import math
from functools import partial

import pytest
import torch

from anybatch.core.errors import AnybatchError
from anybatch.losses import CountCorrectedInfoNCE, InfoNCE, SogCLR

from .. import reference, twin
from .methods import cluster_weights

TAU, BETA, N = 0.4, 0.7, 50


def draw(rows=7, extra=2, seed=0):
    generator = torch.Generator().manual_seed(seed)
    sides = [torch.randn(n, 5, generator=generator, dtype=torch.float64) for n in (rows, rows + extra)]
    return [side.requires_grad_() for side in sides]


def sums(queries, others, allowed, log_weight=None):
    """Of each row the sum over negatives of weight * exp(x) relative to the positive, the weights' mean being 1."""
    scores = reference.unit(queries) @ reference.unit(others).T / TAU
    for i in range(len(queries)):
        x = (scores[i] - scores[i, i])[allowed[i]]
        chance = torch.ones_like(x) if log_weight is None else log_weight[i][allowed[i]].exp()
        factor = (BETA * x).exp().detach()
        yield (chance * factor * x.exp()).sum() / ((chance * factor).sum() / chance.sum()) if len(x) else x.sum()


def assert_equal(ours, theirs, leaves):
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
    for mine, other in zip(*(torch.autograd.grad(value, leaves) for value in (ours, theirs)), strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("tile_bytes", [1, 200, 10**7])
@pytest.mark.parametrize("direction", ["one_way", "both"])
@pytest.mark.parametrize("corrected", [False, True])
def test_equals_the_formula(corrected, direction, tile_bytes):
    leaves, ids = draw(), {"anchor_id": torch.arange(7) % 5, "candidate_id": torch.arange(9) % 8}
    options = {"temperature": TAU, "hardness": BETA, "direction": direction, "tile_bytes": tile_bytes}
    loss = CountCorrectedInfoNCE(N, **options) if corrected else InfoNCE(**options)

    def mean(queries, others, *ids):
        allowed = reference.pairs_allowed(len(queries), len(others), *ids)
        scale = (N - 1) / (len(others) - 1) if corrected else 1.0
        return torch.stack([(1 + scale * total).log() for total in sums(queries, others, allowed)]).mean()

    expected = mean(*leaves, ids["anchor_id"], ids["candidate_id"])
    if direction == "both":
        back = mean(leaves[1][:7], leaves[0], ids["candidate_id"][:7], ids["anchor_id"])
        expected = (expected + back) / 2
    assert_equal(loss(*leaves, **ids), expected, leaves)


def test_weights_of_mined_batches_and_a_running_denominator():
    leaves, cluster = draw(8, 0), torch.arange(8) // 4
    same, other = math.log(2 / (N - 1)), math.log(9 / (N - 1))
    weight = cluster_weights(cluster, 8, same=same, other=other)
    allowed = reference.pairs_allowed(8, 8)
    values = torch.tensor([other, same], dtype=torch.float64)
    known = values[(cluster[:, None] == cluster).long()]
    rows = sums(*leaves, allowed, known)
    expected = torch.stack([(1 + (N - 1) * total).log() for total in rows]).mean()
    assert_equal(CountCorrectedInfoNCE(N, temperature=TAU, hardness=BETA)(*leaves, log_weight=weight), expected, leaves)
    # The first visit is that of the batch.
    running = SogCLR(N, temperature=TAU, hardness=BETA).double()
    losses = running, CountCorrectedInfoNCE(N, temperature=TAU, hardness=BETA)
    pairs = [torch.autograd.grad(loss(*leaves, index=torch.arange(8)), leaves) for loss in losses]
    for mine, wanted in zip(*pairs, strict=True):
        torch.testing.assert_close(mine, wanted, rtol=1e-6, atol=1e-8)  # the state is float32


def test_figures_are_those_of_the_weighed_sum():
    leaves = draw()
    loss = InfoNCE(temperature=TAU, hardness=BETA)
    value = loss(*leaves)
    assert loss.last_stats["log_denominator"] == pytest.approx(value.item())


@pytest.mark.distributed
def test_ranks_equal_one_process():
    twin.check_ranks(partial(CountCorrectedInfoNCE, N), temperature=TAU, hardness=BETA)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: InfoNCE(hardness=-1.0), "hardness is -1.0; expected a number of 0 or more"),
        (lambda: InfoNCE(hardness=1.0, positives_by="label"), "positives_by='label' and hardness=1.0 are given"),
    ],
)
def test_mistakes(make, words):
    with pytest.raises(AnybatchError, match=words):
        make()
