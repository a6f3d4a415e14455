from __future__ import annotations

import math
import types
from dataclasses import dataclass, field, is_dataclass
from typing import Annotated, Any, ClassVar, Literal, Union, get_args, get_origin, get_type_hints

import numpy as np
import pytest

from anybatch.core.configuration import Configuration, differences, from_mapping
from anybatch.core.errors import AnybatchError
from anybatch.core.yaml_files import load_config, to_yaml
from anybatch.integrations.sentence_transformers.model import ModelConfig
from anybatch.integrations.sentence_transformers.training import TrainConfig
from anybatch.losses.registry import LossConfig
from anybatch.mining import MiningConfig, MiningSet
from anybatch.run.config import DataConfig, EvaluationConfig, RunConfig, SetConfig, TeacherConfig


@dataclass(frozen=True, kw_only=True)
class Inner(Configuration):
    rate: float = 0.1
    kind: Literal["one", "two"] = "one"
    names: tuple[str, ...] = ()
    limit: int | None = None
    flag: bool = False
    free: dict[str, Any] | None = None


@dataclass(frozen=True, kw_only=True)
class Outer(Configuration):
    path: str
    size: int = 8
    inner: Inner = field(default_factory=Inner)


def test_file_and_overrides(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("path: here\ninner: {rate: 1e-4, names: [a, b]}\n")
    config = load_config(Outer, path, ["size=16", "inner.kind=two", "inner.limit=3"])
    assert config == Outer(path="here", size=16, inner=Inner(rate=1e-4, kind="two", names=("a", "b"), limit=3))


def test_round_trip(tmp_path):
    config = Outer(path="x", inner=Inner(names=("a",), rate=2e-5))
    path = tmp_path / "written.yaml"
    path.write_text(to_yaml(config))
    assert load_config(Outer, path) == config


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("inner.rat=1", "did you mean 'rate'"),
        ("iner.rate=1", "did you mean 'inner'"),
        ("inner.kind=too", "Did you mean 'two'"),
        ("inner.limit=many", "inner.limit is 'many'; expected a whole number, or nothing"),
        ("inner.flag=3", "inner.flag is 3; expected true or false"),
        ("size=true", "size is True; expected a whole number"),
        ("size=2.5", "size is 2.5"),
        ("inner=5", "'inner' is a section"),
        ("size.deep=5", "is a value, not a section"),
        ("size", "expected section.key=value"),
    ],
)
def test_mistakes_are_named(tmp_path, override, message):
    path = tmp_path / "run.yaml"
    path.write_text("path: here\nsize: 4\n")
    with pytest.raises(AnybatchError, match=message):
        load_config(Outer, path, [override])


def test_missing_value_and_bad_files(tmp_path):
    with pytest.raises(AnybatchError, match="Missing configuration value: path"):
        from_mapping(Outer, {})
    with pytest.raises(AnybatchError, match="Cannot read"):
        load_config(Outer, tmp_path / "absent.yaml")
    bad = tmp_path / "bad.yaml"
    bad.write_text("a: [")
    with pytest.raises(AnybatchError, match="not valid YAML"):
        load_config(Outer, bad)
    bad.write_text("- just\n- a list\n")
    with pytest.raises(AnybatchError, match="holds a list"):
        load_config(Outer, bad)


def test_a_key_given_twice_is_refused(tmp_path):
    """YAML would keep the last section alone, so path and rate would be lost without a word."""
    path = tmp_path / "run.yaml"
    path.write_text("path: here\ninner:\n  rate: 0.5\nsize: 4\ninner:\n  kind: two\n")
    with pytest.raises(AnybatchError, match="line 5 has the key 'inner' a second time"):
        load_config(Outer, path)
    path.write_text("path: here\ninner: {rate: 0.5, rate: 0.6}\n")
    with pytest.raises(AnybatchError, match="'rate' a second time"):
        load_config(Outer, path)
    path.write_text("path: &p here\ninner: &i {rate: 0.5}\nsize: 4\n")
    assert load_config(Outer, path).inner.rate == 0.5


RUN = {"output": "o", "data": {"path": "d"}, "model": {"name": "m"}}


@pytest.mark.parametrize(
    ("key", "value"),
    [
        *(("train.learning_rate", value) for value in ("nan", "inf", "0", "-1")),
        *(("loss.temperature", value) for value in ("nan", "0", "inf")),
        *(("loss.gamma", value) for value in ("nan", "0", "1.1")),
        *(("loss.eps", value) for value in ("nan", "-1")),
        *(("seed", value) for value in ("-1", str(2**32))),
    ],
)
def test_numbers_out_of_range_are_refused_before_anything_is_written(key, value):
    number = int(value) if key == "seed" else float(value)
    section, _, name = key.rpartition(".")
    owner = {"name": "sogclr"} if section == "loss" else {}
    tree = {**RUN, **({section: {name: number, **owner}} if section else {name: number})}
    with pytest.raises(AnybatchError, match=rf"{key} is .*expected"):
        from_mapping(RunConfig, tree)


CONFIGURATIONS = [
    SetConfig,
    DataConfig,
    EvaluationConfig,
    TeacherConfig,
    RunConfig,
    MiningConfig,
    MiningSet,
    LossConfig,
    ModelConfig,
    TrainConfig,
]
REQUIRED = {
    SetConfig: {"path": "p"},
    DataConfig: {"path": "d"},
    RunConfig: {"output": "o", "data": DataConfig(path="d")},
    MiningSet: {"name": "n", "num_rows": 5},
}
WRONG = [
    object(),
    math.nan,
    math.inf,
    -math.inf,
    True,
    "no such word",
    -1,
    -0.5,
    0,
    1.5,
    2**63,
    b"bytes",
    "",
    "3",
    [object()],
    {},
    "a\udcffb",
    "a\0b",
]


def fits(hint: Any, value: object) -> bool:
    """What an annotation allows, said a second time and in other words than `configuration` says it."""
    if get_origin(hint) in (Union, types.UnionType):
        return any(fits(choice, value) for choice in get_args(hint))
    if get_origin(hint) is Annotated:
        kind, limits = get_args(hint)
        low_enough = fits(kind, value) and value <= limits.most
        return low_enough and (value > limits.least if limits.above else value >= limits.least)
    if get_origin(hint) is Literal:
        return isinstance(value, str) and value in get_args(hint)
    if get_origin(hint) is tuple:
        return isinstance(value, (list, tuple)) and all(fits(get_args(hint)[0], item) for item in value)
    if is_dataclass(hint):
        return value == {}
    number = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    return {
        int: number and not isinstance(value, float) and abs(value) <= 2**62,
        float: number and abs(value) <= 3.4e38,
        bool: isinstance(value, bool),
        str: isinstance(value, str) and value.isprintable(),
        type(None): value is None,
        dict[str, Any]: value == {},
    }[hint]


@pytest.mark.parametrize("kind", CONFIGURATIONS, ids=lambda kind: kind.__name__)
def test_every_field_refuses_what_its_annotation_does_not_allow(kind):
    """In Python as from a file: the field, what was given and what was expected. The list of classes is complete."""
    assert set(Configuration.__subclasses__()) - {Inner, Outer} == set(CONFIGURATIONS)
    refused = 0
    for name, hint in get_type_hints(kind, include_extras=True).items():
        if get_origin(hint) is ClassVar:
            continue
        for value in WRONG:
            if fits(hint, value):
                continue
            with pytest.raises(AnybatchError, match=rf"{name}\S* is .*(expected|a section)"):
                kind(**{**REQUIRED.get(kind, {}), name: value})
            refused += 1
    assert refused > len(WRONG)


def test_values_arrive_as_their_annotation_says(tmp_path):
    config = MiningConfig(batch_size=np.int64(8), margin=np.float32(0.5))
    assert [type(value) for value in (config.batch_size, config.margin)] == [
        int,
        float,
    ]
    assert DataConfig(path=tmp_path).path == str(tmp_path)  # pyright: ignore[reportArgumentType]
    assert RunConfig(output="o", data={"path": "d"}).data == DataConfig(path="d")  # pyright: ignore[reportArgumentType]


def test_differences_name_the_keys():
    old, new = Outer(path="x"), Outer(path="x", size=9, inner=Inner(kind="two"))
    assert differences(old, new) == ["size: 8 -> 9", "inner.kind: 'one' -> 'two'"]
    assert differences(old, old) == []


def test_free_mappings(tmp_path):
    free = {"rank": 8, "parts": ("a", "b"), "deep": {"on": True, "rate": 0.5, "none": None}}
    config = Outer(path="x", inner=Inner(free=free))
    path = tmp_path / "written.yaml"
    path.write_text(to_yaml(config))
    assert load_config(Outer, path) == config
    assert config.inner.free == free | {"parts": ["a", "b"]}
    assert load_config(Outer, path, ["inner.free.rank=4"]).inner.free["rank"] == 4
    less = Outer(path="x", inner=Inner(free={"rank": 8, "parts": ["a"], "deep": {"on": True, "rate": 0.5}}))
    assert differences(config, less) == ["inner.free.parts: ['a', 'b'] -> ['a']"]
    assert differences(config, Outer(path="x"))[0] == "inner.free.rank: 8 -> None"
    for wrong in (8, ["rank"], {3: 1}, {"rank": np.float32(1)}, {"rank": {1, 2}}):
        with pytest.raises(AnybatchError, match=r"free is .*; expected a mapping such as {key: value}, or nothing"):
            Inner(free=wrong)  # pyright: ignore


def test_words_beside_numbers():
    """Keys that take a number or "auto", and a memory budget in its own words."""
    auto = from_mapping(TrainConfig, {"mini_batch_size": "auto", "keep_graphs": "auto", "memory": "8GiB"})
    assert (auto.mini_batch_size, auto.keep_graphs, auto.memory) == ("auto", "auto", "8GiB")
    assert from_mapping(TrainConfig, {"mini_batch_size": 8, "keep_graphs": 1}).keep_graphs == 1.0
    for wrong in ({"memory": "lots"}, {"keep_graphs": 1.5}, {"mini_batch_size": "many"}, {"mini_batch_size": 0}):
        with pytest.raises(AnybatchError):
            from_mapping(TrainConfig, wrong)
