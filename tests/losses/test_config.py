"""Losses by name: every method is built with what it knows, and refuses what it does not."""

from __future__ import annotations

import pytest
import torch

from anybatch import family
from anybatch.core.configuration import from_mapping
from anybatch.core.errors import AnybatchError
from anybatch.losses.config import KNOWN, WITH_MEMORY, LossConfig, build_loss, first_temperature


@pytest.mark.parametrize("name", KNOWN)
def test_every_name_builds_and_runs(name):
    extra = {"dimensions": 4} if name == "tempnet" else {}
    loss = build_loss(LossConfig(name=name, **extra), num_rows=10)
    config = LossConfig(name=name, **extra)
    if name != "auc_cl":  # it has none
        assert loss.temperature == pytest.approx({"fastclip": 0.07, "siglip": 0.1}.get(name, 0.05))
        assert first_temperature(config) == pytest.approx(loss.temperature)
        assert first_temperature(LossConfig(name=name, temperature=0.06, **extra)) == pytest.approx(0.06)
    assert getattr(loss, "direction", "one_way") == ("both" if name == "fastclip" else "one_way")
    value = loss(torch.randn(3, 4, requires_grad=True), torch.randn(5, 4), index=torch.arange(3))
    value.backward()
    assert value.isfinite()


def test_settings_reach_their_method():
    loss = build_loss(
        from_mapping(LossConfig, {"name": "fastclip", "version": "v2", "gamma": 0.3, "gamma_steps": 8, "rho": 7, "temperature_range": [0.01, 0.2]}),
        num_rows=10,
    )  # fmt: skip
    assert isinstance(loss, family.FastCLIP)
    assert (loss.temperatures.rho, loss.temperatures.limits) == (7.0, (0.01, 0.2))
    assert (loss.denominator.gamma.gamma, loss.denominator.gamma.num_steps) == (0.3, 8)
    assert build_loss(LossConfig(name="sogclr", gamma=0.3), num_rows=10).denominator.gamma == 0.3
    assert build_loss(LossConfig(name="sogclr"), num_rows=11).denominator.eps == pytest.approx(0.1)


@pytest.mark.parametrize(
    ("given", "match"),
    [
        ({"name": "infonce", "gamma": 0.5}, "loss.gamma is given, which 'infonce' does not know: it is for fastclip"),
        ({"name": "sogclr", "rho": 7.0}, "loss.rho is given"),
        ({"name": "fastclip", "learnable_temperature": True}, "loss.learnable_temperature is given"),
        ({"name": "nuclr", "eps": 0.0}, "loss.eps is given"),
        ({"name": "tempnet"}, "loss.dimensions is missing"),
        ({"name": "isogclr", "temperature_range": (0.1,)}, "expected two numbers"),
        ({"name": "sogclr", "gamma_steps_per_epoch": 3}, "needs loss.gamma_steps"),
        ({"name": "sogclr", "gamma": 1.5}, "loss.gamma is 1.5"),
        ({"name": "infonce", "weights": "inclusion"}, "does not define"),
        ({"temperature": 0.0}, "loss.temperature"),
        (
            {"name": "fastclip", "temperature_lr": 0.1},
            "loss.temperature_lr is given, which fastclip's v3 does not use: it is for v2. Remove it",
        ),
        ({"name": "fastclip", "version": "v0", "rho": 7.0}, "fastclip's v0 does not use: it is for v2, v3"),
        ({"name": "fastclip", "version": "v1", "rho": 7.0}, "loss.rho is given"),
        ({"name": "fastclip", "version": "v1", "temperature_range": (0.1, 0.2)}, "it is for v0, v2, v3"),
        ({"name": "infonce", "memory_sharded": True}, "loss.memory_sharded is given"),
        ({"name": "fastclip", "version": "v9"}, "loss.version is 'v9'; expected one of v0, v1, v2, v3"),
        ({"name": "fastclip", "version": ""}, "loss.version is ''"),
        ({"name": "clip"}, "loss.name is 'clip'; expected one of infonce, "),
    ],
)
def test_mistakes(given, match):
    with pytest.raises(AnybatchError, match=match):
        LossConfig(**given)


@pytest.mark.parametrize("name", WITH_MEMORY)
def test_memory_is_stored_as_asked(name):
    extra = {"dimensions": 4} if name == "tempnet" else {}
    plain = build_loss(LossConfig(name=name, direction="both", **extra), num_rows=10)
    loss = build_loss(LossConfig(name=name, direction="both", memory_sharded=True, **extra), num_rows=10)
    assert (plain.denominator.sharded, loss.denominator.sharded, len(loss.denominator.log_mean)) == (False, True, 2)
    if name == "tempnet":  # its networks begin at random
        plain.temperatures.load_state_dict(loss.temperatures.state_dict())
    sides = torch.randn(2, 5, 4, generator=torch.Generator().manual_seed(0))
    for each in (plain, loss):
        each(sides[0].clone().requires_grad_(), sides[1], index=torch.arange(5))
    assert loss.denominator.visited.sum() == 10
    assert torch.equal(loss.denominator.log_mean[:, :5], plain.denominator.log_mean[:, :5])


def test_a_temperature_that_is_not_to_be_learned_is_not():
    assert build_loss(LossConfig(name="siglip"), num_rows=9).temperatures.log_temperature is not None
    assert (
        build_loss(LossConfig(name="siglip", learnable_temperature=False), num_rows=9).temperatures.log_temperature
        is None
    )


@pytest.mark.parametrize("version", ["v0", "v1", "v2", "v3"])
def test_a_name_alone_is_the_class_alone(version):
    """Every setting of the class that the configuration leaves out keeps the class's default."""
    built = build_loss(LossConfig(name="fastclip", version=version), num_rows=10)
    alone = family.FastCLIP(10, version=version)
    assert (built.temperature, built.direction) == (alone.temperature, alone.direction)
    for part, names in (("temperatures", ("rho", "limits")), ("denominator", ("eps", "gamma"))):
        for name in names:
            assert getattr(getattr(built, part), name) == getattr(getattr(alone, part), name), name
    assert first_temperature(LossConfig(name="fastclip", version=version)) == pytest.approx(alone.temperature)


def test_first_temperature_of_prefixes():
    assert first_temperature(LossConfig(name="tempnet", matryoshka=(4, 2))) == pytest.approx(0.05)
    assert first_temperature(LossConfig(name="auc_cl")) == 0.05
