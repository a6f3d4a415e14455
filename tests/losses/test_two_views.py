"""SogCLR and SimCLR for images without labels against the formulas of their released codes, in float64."""

from __future__ import annotations

import pytest
import torch

from anybatch.losses import InfoNCE, SogCLR
from anybatch.vision.views import both_ways

from .. import reference

ROWS, BATCH, WIDTH, TAU, GAMMA = 24, 8, 6, 0.1, 0.9


def released(first, second, u, index):
    """The loss over tau, its weights held fixed: 2B x 2B scores, negatives of both views, one state an image that both
    share, and for each view its own moving average at use. `u` maps an image to its state.
    """
    views = reference.unit(first), reference.unit(second)
    own = torch.eye(BATCH, dtype=torch.bool)
    negative = ~torch.cat([own, own], dim=1)
    losses, averages = [], []
    for this, other in (views, views[::-1]):
        logits = torch.cat([this @ other.T, this @ this.T], dim=1) / TAU
        terms = (logits.exp() * negative).detach()
        mean = terms.sum(dim=1) / (2 * (BATCH - 1))
        average = torch.stack(
            [g if i not in u else (1 - GAMMA) * u[i] + GAMMA * g for i, g in zip(index.tolist(), mean, strict=True)]
        )
        weights = terms / average[:, None] / (2 * (BATCH - 1))
        losses.append((weights * logits.masked_fill(~negative, 0)).sum(dim=1) - logits.diagonal())
        averages.append(average)
    u.update(zip(index.tolist(), (averages[0] + averages[1]) / 2, strict=True))
    return (losses[0] + losses[1]).mean() / 2


@pytest.mark.parametrize("tile_bytes", [200, 10**7])
def test_equals_the_released_code(tile_bytes):
    loss = SogCLR(ROWS, gamma=GAMMA, eps=0.0, positive="exact", temperature=TAU, tile_bytes=tile_bytes)
    loss.denominator.double()
    u = {}
    generator = torch.Generator().manual_seed(3)
    for _ in range(6):
        index = torch.randperm(ROWS, generator=generator)[:BATCH]
        first = torch.randn(BATCH, WIDTH, generator=generator, dtype=torch.float64)
        second = 0.7 * first + torch.randn(BATCH, WIDTH, generator=generator, dtype=torch.float64)
        sides = [first.requires_grad_(), second.requires_grad_()]
        value = loss(*both_ways(first, second), index=index.repeat(2))
        expected = released(first, second, u, index)
        for mine, theirs in zip(torch.autograd.grad(value, sides), torch.autograd.grad(expected, sides), strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-12, atol=1e-12)
        for image, state in u.items():
            assert loss.denominator.log_mean[0, image].exp().item() == pytest.approx(state.item(), rel=1e-12)
    assert int(loss.denominator.visited.sum()) == len(u)


def nt_xent(first, second):
    """SimCLR's objective.py: a cross entropy for each view, over the other view's rows and its own without itself."""
    views = reference.unit(first), reference.unit(second)
    own = 1e9 * torch.eye(len(first), dtype=first.dtype)
    return sum(
        torch.nn.functional.cross_entropy(
            torch.cat([this @ other.T, this @ this.T - own], dim=1) / TAU, torch.arange(len(first))
        )
        for this, other in (views, views[::-1])
    )


@pytest.mark.parametrize("num_rows", [2, 7, 40])
def test_infonce_is_nt_xent(num_rows):
    """The released loss is the sum of the two views' means; ours is the mean over both, half of it."""
    generator = torch.Generator().manual_seed(num_rows)
    sides = [torch.randn(num_rows, WIDTH, generator=generator, dtype=torch.float64).requires_grad_() for _ in range(2)]
    value = InfoNCE(temperature=TAU, tile_bytes=500)(*both_ways(*sides), index=torch.arange(num_rows).repeat(2))
    expected = nt_xent(*sides) / 2
    torch.testing.assert_close(value, expected, rtol=1e-12, atol=1e-12)
    for mine, theirs in zip(torch.autograd.grad(value, sides), torch.autograd.grad(expected, sides), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-12, atol=1e-12)
