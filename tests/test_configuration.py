from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import pytest

from anybatch.configuration import differences, from_mapping, load_config, to_yaml
from anybatch.errors import AnybatchError


@dataclass(frozen=True, kw_only=True)
class Inner:
    rate: float = 0.1
    kind: Literal["one", "two"] = "one"
    names: tuple[str, ...] = ()
    limit: int | None = None
    flag: bool = False


@dataclass(frozen=True, kw_only=True)
class Outer:
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
        ("inner.limit=many", "'inner.limit' is 'many'"),
        ("inner.flag=3", "'inner.flag' is 3"),
        ("size=true", "'size' is True"),
        ("size=2.5", "'size' is 2.5"),
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


def test_differences_name_the_keys():
    old, new = Outer(path="x"), Outer(path="x", size=9, inner=Inner(kind="two"))
    assert differences(old, new) == ["size: 8 -> 9", "inner.kind: 'one' -> 'two'"]
    assert differences(old, old) == []


def test_words_beside_numbers():
    """Keys that take a number or "auto", and a memory budget in its own words."""
    from anybatch.integrations.sentence_transformers.training import TrainConfig

    auto = from_mapping(TrainConfig, {"micro_batch": "auto", "keep_graphs": "auto", "memory": "8GiB"})
    assert (auto.micro_batch, auto.keep_graphs, auto.memory) == ("auto", "auto", "8GiB")
    assert from_mapping(TrainConfig, {"micro_batch": 8, "keep_graphs": 1}).keep_graphs == 1.0
    for wrong in ({"memory": "lots"}, {"keep_graphs": 1.5}, {"micro_batch": "many"}, {"micro_batch": 0}):
        with pytest.raises(AnybatchError):
            from_mapping(TrainConfig, wrong)
