"""A saved state loads whole or is refused; learned temperatures have a floor, and come back from it."""

from __future__ import annotations

import copy
import math
from functools import partial

import pytest
import torch
from torch import nn

from anybatch.core.errors import AnybatchError
from anybatch.family import AUCCL, NUCLR, FastCLIP, ISogCLR, SigLIP, TempNet
from anybatch.losses import CrossBatchInfoNCE, GammaSchedule, InfoNCE, Matryoshka, SogCLR
from anybatch.losses.registry import METHODS, LossConfig, build_loss, make_loss, options_of
from anybatch.losses.state import grown_state

from . import methods
from .methods import ROWS

WIDTH = 6
STATEFUL = {name: partial(methods.make, name, width=WIDTH) for name in methods.STATEFUL}
STATEFUL["matryoshka"] = lambda n: Matryoshka(SogCLR(n), [WIDTH, 3])


def used(loss, width=WIDTH, steps=2):
    """The loss after some steps."""
    generator = torch.Generator().manual_seed(3)
    for step in range(steps):
        anchors = torch.randn(8, width, generator=generator)
        candidates = anchors + 0.1 * torch.randn(8, width, generator=generator)
        loss(anchors, candidates, index=torch.arange(8) + 8 * step)
    return loss


def entries(module):
    return {
        name: (value.dtype, value.shape, value.double().nan_to_num(-99.0).tolist())
        for name, value in module.state_dict().items()
    }


def refuses(loss, state, match):
    """By itself or as a part of a model, strict or not, and is afterwards what it was."""
    for strict in (True, False):
        for inside in (False, True):
            model = nn.Sequential(nn.Linear(2, 2), loss) if inside else loss
            given = {**model[0].state_dict(prefix="0."), **{f"1.{k}": v for k, v in state.items()}} if inside else state
            before = entries(loss)
            with pytest.raises(AnybatchError, match=match):
                model.load_state_dict(copy.deepcopy(given), strict=strict)
            assert entries(loss) == before


@pytest.mark.parametrize("name", STATEFUL)
class TestEveryStatefulLoss:
    def test_takes_its_own_state(self, name):
        saved = used(STATEFUL[name](ROWS))
        for fresh in (STATEFUL[name](ROWS), used(STATEFUL[name](ROWS), steps=1)):
            fresh.load_state_dict(saved.state_dict())
            assert entries(fresh) == entries(saved)
            model = nn.ModuleList([fresh])
            model.load_state_dict({f"0.{key}": value for key, value in saved.state_dict().items()})
        begun = STATEFUL[name](ROWS).state_dict()
        saved.load_state_dict(begun)  # back to the beginning
        assert entries(saved) == entries(STATEFUL[name](ROWS)) or name == "tempnet"

    @pytest.mark.parametrize("other", [30, 50])
    def test_refuses_another_number_of_rows(self, name, other):
        saved = used(STATEFUL[name](ROWS)).state_dict()
        for loss in (STATEFUL[name](other), used(STATEFUL[name](other), steps=1)):
            refuses(loss, saved, rf"{ROWS}\b.*\b{other}\b")
        if other > ROWS:
            loss = STATEFUL[name](other)
            loss.load_state_dict(grown_state(saved, loss))  # the explicit request

    def test_refuses_other_versions_and_other_names(self, name):
        loss, saved = STATEFUL[name](ROWS), used(STATEFUL[name](ROWS)).state_dict()
        version = next(key for key in saved if key.endswith("version"))
        for number in (0, int(saved[version]) + 1):
            refuses(
                loss,
                {**saved, version: torch.tensor(number)},
                f"version {number} .* reads version {int(saved[version])}",
            )
        for key in saved:
            refuses(
                loss,
                {other: value for other, value in saved.items() if other != key},
                "missing are|other loss",
            )
        refuses(loss, {**saved, "unheard_of": torch.ones(1)}, "unknown here are unheard_of")
        with pytest.raises(AnybatchError, match="missing are"):
            loss.load_state_dict({}, strict=False)
        nn.ModuleList([loss]).load_state_dict({}, strict=False)  # a model's file, the loss's state being elsewhere

    def test_refuses_the_state_of_every_other_loss(self, name):
        loss = STATEFUL[name](ROWS)
        for make in STATEFUL.values():
            if entries(make(ROWS)).keys() != entries(loss).keys():
                refuses(loss, used(make(ROWS)).state_dict(), "saved")

    def test_casts_leave_it_alone(self, name):
        for cast in (
            lambda m: m.half(),
            lambda m: m.bfloat16(),
            lambda m: m.to(torch.float16),
            lambda m: m.to(dtype=torch.bfloat16),
        ):
            loss = used(STATEFUL[name](ROWS))
            before = entries(loss)
            cast(loss)
            cast(nn.Sequential(nn.Linear(2, 2), loss))
            assert entries(loss) == before
            cast(loss.losses[0].denominator if name == "matryoshka" else loss.denominator)
            assert entries(loss) == before
        loss.double()
        assert {kind for kind, *_ in entries(loss).values()} <= {torch.float64, torch.int64}
        loss.float()
        assert used(loss).training


@pytest.mark.parametrize(
    ("saved", "loss", "match"),
    [
        (
            lambda: CrossBatchInfoNCE(40, memory_size=8),
            lambda: CrossBatchInfoNCE(40, memory_size=10),
            r"\(2, 8, 6\).*\(2, 10, 0\)",
        ),
        (lambda: TempNet(40, 6), lambda: TempNet(40, 5), r"\(64, 6\).*\(64, 5\)"),
        (
            lambda: SogCLR(40, learnable_temperature=True),
            lambda: SogCLR(40),
            "unknown here are .*temperatures.log_temperature",
        ),
        (
            lambda: SogCLR(40),
            lambda: SogCLR(40, learnable_temperature=True),
            "missing are .*temperatures.log_temperature",
        ),
        (lambda: FastCLIP(40, version="v2"), lambda: FastCLIP(40), "missing are .*temperatures.log_temperature"),
        (lambda: ISogCLR(40), lambda: TempNet(40, 6), "other loss"),
        (lambda: SogCLR(40, state="relative"), lambda: SogCLR(40), "state is relative .*, this loss's absolute"),
        (lambda: SogCLR(40), lambda: SogCLR(40, state="relative"), "state is absolute .*, this loss's relative"),
        (lambda: Matryoshka(SogCLR(40, state="relative"), [6]), lambda: Matryoshka(SogCLR(40), [6]), "is relative"),
        (lambda: SogCLR(40), lambda: SogCLR(40, direction="both"), r"\(1, 40\).*\(2, 40\)"),
        (
            lambda: SogCLR(40, gamma=GammaSchedule(0.2, num_steps=4)),
            lambda: SogCLR(40),
            "unknown here are denominator.gamma.position",
        ),
        (lambda: Matryoshka(SogCLR(40), [6, 3]), lambda: Matryoshka(SogCLR(40), [6, 3, 2]), "missing are losses.2"),
        (lambda: SogCLR(40), lambda: used(SogCLR(40), width=4), "of 6 dimensions, this one of 4"),
        (
            lambda: CrossBatchInfoNCE(40, memory_size=8),
            lambda: used(CrossBatchInfoNCE(40, memory_size=8), width=4),
            r"\(2, 6\).*\(2, 4\)",
        ),
        (lambda: SogCLR(40), lambda: InfoNCE(), "unknown here are denominator"),
        (lambda: SogCLR(40), lambda: AUCCL(), "unknown here are denominator"),
    ],
)
def test_other_settings_are_refused(saved, loss, match):
    refuses(loss(), used(saved()).state_dict(), match)


def test_a_relative_state_that_is_grown_is_no_absolute_one():
    saved = used(SogCLR(ROWS, state="relative")).state_dict()
    larger = SogCLR(ROWS + 9)
    refuses(larger, grown_state(saved, larger), "state is relative")
    grown = SogCLR(ROWS, state="relative")
    grown.grow(ROWS + 9)
    refuses(larger, grown.state_dict(), "state is relative")


def test_numbers_of_another_kind_are_refused():
    saved = used(NUCLR(ROWS)).state_dict()
    refuses(
        NUCLR(ROWS),
        {**saved, "others.0.num_steps": torch.tensor(2.0)},
        r"num_steps of shape \(\) \(torch.float32\), this loss \(\) \(torch.int64\)",
    )


ONE_TEMPERATURE = [name for name in METHODS if "learnable_temperature" in options_of(name)]
LEARNED = {
    name: (lambda name=name: build_loss(LossConfig(name=name, learnable_temperature=True), num_rows=64))
    for name in ONE_TEMPERATURE
}
LEARNED |= {f"fastclip {v}": (lambda v=v: FastCLIP(64, version=v)) for v in ("v0", "v2", "v3")}
LEARNED |= {"isogclr": lambda: ISogCLR(64), "tempnet": lambda: TempNet(64, 16)}
PUBLISHED = {"isogclr": 0.005, "tempnet": 0.005}


@pytest.mark.parametrize("name", LEARNED)
def test_a_learned_temperature_has_a_floor_and_comes_back_from_it(name):
    torch.manual_seed(0)
    unit = nn.functional.normalize
    anchors = unit(torch.randn(64, 16), dim=1)
    positives = unit(anchors + 0.1 * torch.randn(64, 16), dim=1)
    loss, floor = LEARNED[name](), PUBLISHED.get(name, 0.01)
    parameters = list(loss.parameters())
    optimizer = torch.optim.AdamW(parameters, lr=0.05, weight_decay=0) if parameters else None

    def train(steps, positives):
        for _ in range(steps):
            index = torch.randperm(64)[:16]
            loss.zero_grad()
            value = loss(anchors[index], positives[index], index=index)
            assert value.isfinite()
            if optimizer is not None:
                value.backward()
                optimizer.step()
            assert all(parameter.isfinite().all() for parameter in parameters)
            assert loss.temperature >= floor - 1e-9

    train(600, positives)
    if getattr(loss.temperatures, "log_temperature", None) is None:
        return
    with torch.no_grad():
        loss.temperatures.log_temperature.fill_(-30.0)  # wherever an optimizer or a file has taken it
    assert loss.temperature == pytest.approx(floor, rel=1e-6)
    loss.eval()
    assert loss(anchors[:9], positives[:9], index=torch.arange(9)).isfinite()
    assert loss.temperatures.log_temperature.item() == -30.0  # only training changes it
    loss.train()
    train(40, positives.roll(1, 0))  # positives that do not fit want a high one
    assert loss.temperature > 1.2 * floor


def test_the_gradient_at_the_floor_is_that_of_the_loss():
    """Projected, not clamped in the forward pass: at the floor, and from below it, the derivative is that of a
    temperature of .01.
    """
    anchors, candidates = torch.randn(8, 5), torch.randn(8, 5)
    gradients = []
    for start, mode in ((math.log(0.01), True), (-30.0, True), (-30.0, False)):
        loss = InfoNCE(learnable_temperature=True).train(mode)
        with torch.no_grad():
            loss.temperatures.log_temperature.fill_(start)
        loss(anchors, candidates).backward()
        gradients.append(loss.temperatures.log_temperature.grad.item())
        assert loss.temperatures.log_temperature.item() == pytest.approx(math.log(0.01) if mode else -30.0)
    assert abs(gradients[0]) > 1e-3
    assert gradients == pytest.approx([gradients[0]] * 3, rel=1e-5)


def test_the_floor_is_one_setting():
    for name in ONE_TEMPERATURE:
        loss = make_loss(name, 9, temperature=0.05, learnable_temperature=True, min_temperature=0.03)
        with torch.no_grad():
            loss.temperatures.log_temperature.fill_(-9.0)
        assert loss.temperature == 0.03
        assert build_loss(LossConfig(name=name, learnable_temperature=True), num_rows=9).temperatures.limits[0] == 0.01
    assert FastCLIP(9).temperatures.limits[0] == 0.01
    for wrong in (
        {"temperature": 0.005},
        {"min_temperature": 0.0},
        {"min_temperature": math.nan},
        {"min_temperature": 0.06},
    ):
        with pytest.raises(AnybatchError, match="min_temperature is"):
            InfoNCE(learnable_temperature=True, **wrong)
    assert InfoNCE(temperature=0.005).temperature == 0.005  # what is not learned is the user's
    assert SigLIP().temperatures.limits[0] == 0.01
