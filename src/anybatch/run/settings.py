"""Every setting of a run with its type, default and meaning, from the configuration classes and their docstrings."""

from __future__ import annotations

import dataclasses
import inspect
import re
import sys
import textwrap
import typing
from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import Any

from anybatch.core.configuration import expected
from anybatch.losses.base import OneTemperature, Scoring
from anybatch.losses.registry import METHODS, LossConfig, method_of, options_of
from anybatch.run.config import RunConfig, SetConfig

ELSEWHERE = {
    "gamma_steps": "Let gamma fall from 1 along a cosine of so many steps (`GammaSchedule`); none: it is constant."
}
CLASSES: dict[str, type] = {kind.__name__: kind for kind in map(method_of, METHODS)}
OF_THE_RUN = ("mining.batch_size", "mining.seed")  # refused where they differ from the run's own


class Setting(typing.NamedTuple):
    """One name: its dotted key, what it may be, its default, what it does."""

    key: str
    kind: str
    default: str
    meaning: str


def listing(settings: Sequence[Setting]) -> str:
    """One item for each setting, under its section."""
    lines = []
    for section, group in groupby(settings, lambda setting: setting.key.rpartition(".")[0]):
        lines += ["", f"## {section or 'The run'}", ""]
        for setting in group:
            text = f"* `{setting.key}` ({setting.kind}; {setting.default}): {setting.meaning}"
            lines += textwrap.wrap(text, 120, subsequent_indent="  ", break_long_words=False, break_on_hyphens=False)
    return "\n".join(lines) + "\n"


def meanings(kind: type, title: str = "Attributes") -> dict[str, str]:
    """What a section of the docstring of a class says of each of its fields."""
    section = (kind.__doc__ or "").partition(f"{title}:\n")[2].partition("\n\n")[0]
    entries = re.findall(r"^ {8}(\w[\w, ]*): (.*(?:\n {12}.*)*)", section, re.MULTILINE)
    return {name: " ".join(text.split()) for names, text in entries for name in names.split(", ")}


def settings_of(kind: type = RunConfig, section: str = "") -> Iterator[Setting]:
    """The settings of a configuration class, then those of the sections in it."""
    hints, said = typing.get_type_hints(kind, include_extras=True), meanings(kind)
    sections: dict[str, type] = {}
    for field in dataclasses.fields(kind):
        key, hint = f"{section}{field.name}", hints[field.name]
        if dataclasses.is_dataclass(hint):
            sections[f"{key}."] = typing.cast(type, hint)
        elif hint == tuple[SetConfig, ...]:
            sections[f"{key}[]."] = SetConfig
            yield Setting(key, "a list of sections", "none", said[field.name])
        elif key not in OF_THE_RUN:
            default = "has to be given" if field.default is dataclasses.MISSING else f"default {shown(field.default)}"
            hint = typing.Literal[tuple(METHODS)] if key == "loss.name" else hint
            yield Setting(key, expected(hint), default, said[field.name])
    if kind is LossConfig:
        yield from settings_of_methods(section)
    for name, kind_of_section in sections.items():
        yield from settings_of(kind_of_section, name)


def settings_of_methods(section: str) -> Iterator[Setting]:
    """The options of single losses, from their constructors: a name once, whichever losses have it."""
    owners: dict[str, list[str]] = {}
    for method in METHODS:
        for name in options_of(method):
            owners.setdefault(name, []).append(method)
    for name, methods in owners.items():
        # Losses for which a value, or what it does, is the same stand together.
        kinds, defaults, said = {}, {}, {}
        for method in methods:
            hint, default = options_of(method)[name]
            missing = default is inspect.Parameter.empty
            kinds.setdefault(expected(hint), []).append(method)
            defaults.setdefault("has to be given" if missing else f"default {shown(default)}", []).append(method)
            said.setdefault(meaning_of(method_of(method), name), []).append(method)
        kind, default = (" / ".join(joined(values)) for values in (kinds, defaults))
        yield Setting(section + name, kind, default, f"{', '.join(methods)}: {' '.join(joined(said))}")


def joined(values: dict[str, list[str]]) -> list[str]:
    """Texts: that of most losses first, the others' with their names."""
    first, *others = sorted(values.items(), key=lambda item: -len(item[1]))
    return [first[0], *(f"{', '.join(owners)}: {text}" for text, owners in others)]


def meaning_of(kind: type, name: str) -> str:
    """What the Args of a class say of a parameter, or those of the class that they name for it."""
    text = (meanings(Scoring) | meanings(OneTemperature) | meanings(kind, "Args") | ELSEWHERE)[name]
    if other := re.match(r"See `(\w+)`", text):
        return meaning_of(getattr(sys.modules[kind.__module__], other[1], None) or CLASSES[other[1]], name)
    return text


def shown(value: Any) -> str:
    """A default as YAML has it."""
    names = {"None": "none", "True": "true", "False": "false", "()": "none", "": '""'}
    return names.get(str(value), str(value))
