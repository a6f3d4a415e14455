"""Write docs/settings.md, every name that a user can set with its type and default, from the configuration classes.

    python tools/settings.py [--check]

With `--check` nothing is written; exit code 1 if the page is not what would be written.
"""

from __future__ import annotations

import dataclasses
import inspect
import re
import sys
import textwrap
import typing
from collections.abc import Iterator
from itertools import groupby
from pathlib import Path
from typing import Any

from anybatch.core.configuration import _expected as expected
from anybatch.losses.base import ContrastiveLoss
from anybatch.losses.registry import METHODS, LossConfig, Option, method_of, options_of
from anybatch.run.config import RunConfig, SetConfig

PAGE = Path(__file__).parents[1] / "docs" / "settings.md"
ELSEWHERE = {
    "gamma_steps": "Let gamma fall from 1 along a cosine of so many steps (`GammaSchedule`); none: it is constant."
}
OF_THE_RUN = ("mining.batch_size", "mining.seed")  # refused where they differ from the run's own


class Setting(typing.NamedTuple):
    """One name: its dotted key, what it may be, its default, what it does."""

    key: str
    kind: str
    default: str
    meaning: str


def meanings(kind: type, title: str = "Attributes") -> dict[str, str]:
    """What a section of the docstring of a class says of each of its fields."""
    section = (kind.__doc__ or "").partition(f"{title}:\n")[2].partition("\n\n")[0]
    entries = re.findall(r"^ {8}(\w[\w, ]*): (.*(?:\n {12}.*)*)", section, re.MULTILINE)
    return {name: " ".join(text.split()) for names, text in entries for name in names.split(", ")}


def settings_of(kind: type, section: str = "") -> Iterator[Setting]:
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
            yield Setting(key, expected(hint), default, said[field.name])
    if kind is LossConfig:
        yield from settings_of_methods(section)
    for name, kind_of_section in sections.items():
        yield from settings_of(kind_of_section, name)


def settings_of_methods(section: str) -> Iterator[Setting]:
    """The settings that one method or several have in their constructors, each once, with the methods that have it."""
    shared = meanings(method_of("infonce"), "Args") | meanings(ContrastiveLoss, "Args") | ELSEWHERE
    for key in dict.fromkeys(key for name in METHODS for key in options_of(name)):
        owners = {name: options_of(name)[key] for name in METHODS if key in options_of(name)}
        said = {name: meanings(method_of(name), "Args").get(key, "See") for name in owners}
        own = {text: name for name, text in reversed(said.items()) if not text.startswith("See")}
        texts = list(own) if len(own) == 1 else [f"{own[text]}: {text}" for text in reversed(own)]
        kinds, defaults = (
            {str(value) for value in values} for values in zip(*map(described, owners.values()), strict=True)
        )
        yield Setting(
            section + key,
            max(kinds, key=len),
            "default " + " or ".join(sorted(defaults)),
            f"Of {', '.join(owners)}. {' '.join(texts) or shared[key]}",
        )


def described(option: Option) -> tuple[str, str]:
    """What an option may be, and its default."""
    required = option.default is inspect.Parameter.empty
    return expected(option.hint), "none, has to be given" if required else shown(option.default)


def shown(value: Any) -> str:
    """A default as YAML has it."""
    names = {"None": "none", "True": "true", "False": "false", "()": "none", "": '""'}
    return names.get(str(value), str(value))


def page() -> str:
    """The page as text."""
    settings = list(settings_of(RunConfig))
    lines = [
        "# Every setting",
        "",
        "Written by `python tools/settings.py` from the configuration classes; `anybatch train --show-config` prints",
        f"their values. {len(settings)} settings, of which single losses and data sets have their own.",
    ]
    for section, group in groupby(settings, lambda setting: setting.key.rpartition(".")[0]):
        lines += ["", f"## {section or 'The run'}", ""]
        for setting in group:
            text = f"* `{setting.key}` ({setting.kind}; {setting.default}): {setting.meaning}"
            lines += textwrap.wrap(text, 120, subsequent_indent="  ", break_long_words=False, break_on_hyphens=False)
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    if "--check" in sys.argv:
        sys.exit(PAGE.read_text(encoding="utf-8") != page())
    PAGE.write_text(page(), encoding="utf-8")
