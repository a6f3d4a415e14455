"""Losses are put together from parts: a new denominator says what the positive receives too; no class overrides
another's method.
"""

from __future__ import annotations

import inspect
import math
import pickle
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn

from anybatch import family, losses
from anybatch.family.per_row import PerRowValues
from anybatch.losses import InfoNCE, SoftmaxLoss
from anybatch.losses.base import ContrastiveLoss
from anybatch.losses.denominators import WithPositive
from anybatch.losses.engine import Answer
from anybatch.losses.gamma import Gamma
from anybatch.losses.parts import Denominator, GlobalTemperature, Part, Temperature
from anybatch.losses.state import State

from .. import reference
from .methods import ALL, ROWS, WIDTH


@dataclass
class HeldRule:
    """The mean over all negatives is known, u_i: then the positive's gradient weight is -u_i / (eps + u_i), whatever
    the batch holds.
    """

    u: Tensor
    eps: float
    row_wise: bool = True

    def __call__(self, log_sum, num_drawn, rows):
        total = self.eps + self.u[rows]
        return Answer(total.log() + num_drawn.log(), total.log(), -self.u[rows] / total)


class Held(Denominator):
    def __init__(self, u, eps):
        super().__init__()
        self.u, self.eps = u, eps

    def rule(self, batch, direction, *, normalised):
        return HeldRule(self.u[direction], self.eps)


@pytest.mark.parametrize("tile_bytes", [100, 10**7])
@pytest.mark.parametrize("direction", ["one_way", "both"])
def test_a_toy_denominator_says_what_the_positive_receives(direction, tile_bytes):
    generator = torch.Generator().manual_seed(0)
    anchors, candidates = (torch.randn(n, 5, generator=generator, dtype=torch.float64) for n in (6, 8))
    u, eps = torch.rand(2, 6, generator=generator, dtype=torch.float64), 0.1
    tau = GlobalTemperature(0.4, learnable=True)
    loss = SoftmaxLoss(tau, Held(u, eps), direction=direction, tile_bytes=tile_bytes).double()
    leaves = [anchors.requires_grad_(), candidates.requires_grad_(), tau.log_temperature]
    value = loss(anchors, candidates)
    ours = torch.autograd.grad(value, leaves)
    # The same by autograd: the weights are constants, the scores are not.
    scores, total = reference.unit(anchors) @ reference.unit(candidates).T / tau.log_temperature.exp(), 0.0
    sides = [scores, scores[:, :6].T][: 1 if direction == "one_way" else 2]
    for side, known in zip(sides, u, strict=False):
        for i in range(6):
            others = [j for j in range(side.shape[1]) if j != i]
            for j in others:
                weight = (side[i, j] - side[i, i]).detach().exp() / (len(others) * (eps + known[i]))
                total = total + weight * side[i, j]
            total = total - known[i] / (eps + known[i]) * side[i, i]
    theirs = torch.autograd.grad(total / (6 * len(sides)), leaves)
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-12, atol=1e-14)
    expected = sum((eps + known).log().mean() for known in u[: len(sides)]) / len(sides)
    torch.testing.assert_close(value, expected, rtol=1e-12, atol=0)


def test_a_composition_by_hand_is_the_method():
    anchors, candidates = torch.randn(6, 5), torch.randn(8, 5)
    by_hand = SoftmaxLoss(GlobalTemperature(0.2), WithPositive(), direction="both")
    assert torch.equal(by_hand(anchors, candidates), InfoNCE(temperature=0.2, direction="both")(anchors, candidates))


@pytest.mark.parametrize("name", ALL)
def test_it_pickles(name):
    """With its state, and goes on as the original does."""
    torch.manual_seed(0)
    loss = ALL[name](temperature=0.3, direction="both")
    sides = [torch.randn(5, WIDTH) for _ in range(2)]
    loss(*sides, index=torch.arange(5))
    again = pickle.loads(pickle.dumps(loss))
    index = torch.arange(5) + ROWS - 5
    assert torch.equal(loss(*sides, index=index), again(*sides, index=index))


CLASSES = [
    *{
        cls
        for room in (losses, family)
        for cls in vars(room).values()
        if inspect.isclass(cls) and issubclass(cls, ContrastiveLoss)
    },
    *(State, Part, Temperature, Denominator, Gamma, PerRowValues),
    *{type(part) for make in ALL.values() for part in make(temperature=0.3).modules() if isinstance(part, State)},
]


def is_open(method):
    """Abstract, or a hook that does nothing."""
    if isinstance(method, property):
        method = method.fget
    lines = [line.strip() for line in inspect.getsource(method).splitlines()]
    return getattr(method, "__isabstractmethod__", False) or (
        len(lines) < 8 and (lines[-1] in ("return side", "return loss") or lines[-1].endswith('"""'))
    )


@pytest.mark.parametrize("cls", sorted(CLASSES, key=lambda cls: cls.__name__), ids=lambda cls: cls.__name__)
def test_no_class_overrides_a_concrete_method(cls):
    """What torch itself asks to be overridden aside: construction, casts, saving and loading."""
    hooks_of_torch = {name for base in nn.Module.__mro__ for name in vars(base)} - {"forward"}
    for name, method in vars(cls).items():
        if name in hooks_of_torch or not (inspect.isfunction(method) or isinstance(method, property)):
            continue
        above = [vars(base)[name] for base in cls.__mro__[1:] if name in vars(base) and base not in nn.Module.__mro__]
        assert all(is_open(other) for other in above), f"{cls.__name__}.{name}"


def test_a_learned_temperature_that_diverged_is_still_a_number():
    loss = losses.SogCLR(8, learnable_temperature=True)
    with torch.no_grad():
        loss.temperatures.log_temperature.fill_(1e4)
    assert math.isfinite(loss.temperature)
