"""Losses by name: every method is built with what it knows, and refuses what it does not."""

from __future__ import annotations

import copy
import inspect
import pickle
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
import yaml

from anybatch import family
from anybatch.core.configuration import from_mapping
from anybatch.core.errors import AnybatchError
from anybatch.core.yaml_files import to_yaml
from anybatch.losses import InfoNCE, SogCLR
from anybatch.losses.registry import METHODS, LossConfig, build_loss, first_temperature, method_of, options_of


@pytest.mark.parametrize("name", METHODS)
def test_every_name_builds_and_runs(name):
    extra = {"dimensions": 4} if name == "tempnet" else {}
    loss = build_loss(LossConfig(name=name, **extra), num_rows=10)
    config = LossConfig(name=name, **extra)
    if name != "auc_cl":  # it has none
        assert loss.temperature == pytest.approx({"fastclip": 0.07, "siglip": 0.1, "debiased": 0.5}.get(name, 0.05))
        assert first_temperature(config) == pytest.approx(loss.temperature)
        assert first_temperature(LossConfig(name=name, temperature=0.06, **extra)) == pytest.approx(0.06)
    assert getattr(loss, "direction", "one_way") == ("both" if name == "fastclip" else "one_way")
    value = loss(torch.randn(3, 4, requires_grad=True), torch.randn(5, 4), index=torch.arange(3))
    value.backward()
    assert value.isfinite()


def test_settings_reach_their_method():
    loss = build_loss(
        from_mapping(
            LossConfig,
            {"name": "fastclip", "version": "v2", "gamma": 0.3, "gamma_steps": 8, "rho": 7}
            | {"temperature_range": [0.01, 0.2]},
        ),
        num_rows=10,
    )
    assert isinstance(loss, family.FastCLIP)
    assert (loss.temperatures.per_row, loss.temperatures.rho, loss.temperatures.limits) == (True, 7.0, (0.01, 0.2))
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
        ({"name": "sogclr", "gama": 0.5}, "Unknown configuration key 'loss.gama': did you mean 'gamma'"),
        ({"name": "tempnet", "dimensions": 4, "temperature": 2.0}, "loss.temperature_range is"),
        ({"name": "tempnet"}, "loss.dimensions is missing"),
        ({"name": "isogclr", "temperature_range": (0.1,)}, "expected two numbers"),
        ({"name": "sogclr", "gamma": 1.5}, "loss.gamma is 1.5"),
        ({"name": "infonce", "weights": "inclusion"}, "does not define"),
        ({"temperature": 0.0}, "loss.temperature"),
        (
            {"name": "fastclip", "version": "v1", "temperature_lr": 0.1},
            "loss.temperature_lr is given, which fastclip's v1 does not use: it is for v0, v2, v3. Remove it",
        ),
        ({"name": "fastclip", "version": "v0", "rho": 7.0}, "fastclip's v0 does not use: it is for v2, v3"),
        ({"name": "fastclip", "version": "v1", "rho": 7.0}, "loss.rho is given"),
        ({"name": "fastclip", "version": "v1", "temperature_range": (0.1, 0.2)}, "it is for v0, v2, v3"),
        ({"name": "infonce", "gamma": 0.5}, "loss.gamma is given"),
        ({"name": "fastclip", "version": "v9"}, "loss.version is 'v9'; expected one of v0, v1, v2, v3"),
        ({"name": "fastclip", "version": ""}, "loss.version is ''"),
        ({"name": "clip"}, "loss.name is 'clip'; expected one of auto, infonce, "),
        ({"name": "tempnet", "dimensions": 8, "matryoshka": (8, 4)}, "Leave out loss.dimensions"),
        ({"name": "isogclr", "temperature_lr": 0.0}, "loss.temperature_lr is 0.0; expected"),
        ({"name": "sogclr", "learnable_temperature": True, "temperature": 0.005}, "Begin higher"),
    ],
)
def test_mistakes(given, match):
    """In Python and from a file."""
    for make in (lambda: LossConfig(**given), lambda: from_mapping(LossConfig, given, "loss")):
        with pytest.raises(AnybatchError, match=match):
            make()


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: SogCLR(9, gama=0.5), "'SogCLR.gama': did you mean 'gamma'"),
        (lambda: InfoNCE(directions="both"), "'InfoNCE.directions': did you mean 'direction'"),
        (lambda: family.FastCLIP(9, min_temperature=0.1), "'FastCLIP.min_temperature': did you mean 'temperature"),
        (lambda: family.GloFND(9, hardness=1.0), "hardness is given, and GloFND drops negatives"),
        (lambda: family.SigLIP(direction="both"), "direction is given, and SigLIP judges pairs"),
        (lambda: InfoNCE(direction="sideways"), "direction is 'sideways'"),
    ],
)
def test_keywords_that_a_constructor_does_not_have(make, match):
    with pytest.raises(AnybatchError, match=match):
        make()


@pytest.mark.parametrize("name", METHODS)
def test_a_configuration_is_its_constructor(name):
    """Names, defaults and order; written, read, copied and pickled whole; no random number is drawn."""
    generator = torch.get_rng_state()
    config = LossConfig(name=name, **({"dimensions": 4} if name == "tempnet" else {}))
    assert torch.equal(torch.get_rng_state(), generator)
    for key, option in options_of(name).items():
        if option.default is not inspect.Parameter.empty:
            assert getattr(config, key) == option.default
            parameter = inspect.signature(method_of(name)).parameters.get(key)
            assert parameter is None or parameter.default == option.default
    text = to_yaml(config)
    assert yaml.safe_load(text) == {**yaml.safe_load(text), "name": name}
    assert from_mapping(LossConfig, yaml.safe_load(text)) == config
    for again in (copy.deepcopy(config), pickle.loads(pickle.dumps(config)), replace(config)):
        assert again == config
        assert type(again) is type(config)


def test_the_core_does_not_import_a_method_of_the_family_before_it_is_asked_for():
    source = "import sys, anybatch.losses.registry as r; r.LossConfig(); "
    source += "print([m for m in sys.modules if m.startswith('anybatch.family')])"
    done = subprocess.run([sys.executable, "-c", source], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


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
