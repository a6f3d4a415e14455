"""Configuration as YAML: files and `section.key=value` become the classes of `configuration`, and are written again."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import yaml

from anybatch.core.configuration import choices_of, from_mapping
from anybatch.core.errors import AnybatchError

T = TypeVar("T")
NOT_AS_WRITTEN = re.compile(r'\s*(null|~)\s*|"([^"\\]|\\.)*"|\'[^\']*\'')  # what YAML reads of a text as well


def load_config(
    kind: type[T],
    path: Path | None,
    overrides: Sequence[str | tuple[str, Any]] = (),
    complete: Callable[[dict[str, Any]], dict[str, Any]] = dict,
) -> T:
    """Build the dataclass `kind` from a YAML file (None: the defaults) and overrides, which win.

    An override is `"section.key=value"`, as the command line has it, or the key with the value itself. In the first a
    text is taken as it is written, final spaces and colons as well; only null, ~, what stands in quotes, and a list in
    brackets are read as YAML, as all other values are. `complete` is given all together, as nested dictionaries, and
    may add what is left open.
    """
    tree = {} if path is None else read_yaml(path)
    for override in overrides:
        if isinstance(override, tuple):
            _set(tree, *override, f"{override[0]}={override[1]}")
        else:
            _set(tree, *_parsed(kind, override), override)
    return from_mapping(kind, complete(tree))


def read_yaml(path: Path) -> dict[str, Any]:
    """The mapping that a YAML file holds."""
    try:
        tree = yaml.load(path.read_text(encoding="utf-8"), _Loader) or {}
    except OSError as error:
        raise AnybatchError(
            f"Cannot read the configuration {path}: {error.strerror}. Check the path given to --config."
        ) from error
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # not UTF-8, no such date, nested too deeply
        raise AnybatchError(f"{path} is not valid YAML: {error}") from error
    if not isinstance(tree, dict):
        raise AnybatchError(f"{path} holds a {type(tree).__name__}; expected sections such as 'data:' and 'model:'.")
    return tree


def to_yaml(config: Any) -> str:
    """The resolved configuration, every default written out."""
    return yaml.safe_dump(dataclasses.asdict(config), sort_keys=False, allow_unicode=True)


class _Loader(yaml.SafeLoader):
    """Plain YAML values only, and every key once: YAML itself would let the last of two sections replace the first."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if not isinstance(key, str):
                continue
            if key in seen:
                where = f"line {key_node.start_mark.line + 1} has the key '{key}' a second time"
                raise yaml.YAMLError(f"{where}; keep one, with all that belongs to it.")
            seen.add(key)
        return super().construct_mapping(node, deep=deep)


def _parsed(kind: type, override: str) -> tuple[str, Any]:
    """Key and value of `"section.key=value"`."""
    key, separator, text = override.partition("=")
    if not separator or not key.strip():
        raise AnybatchError(f"Cannot read --set {override!r}: expected section.key=value.")
    key = key.strip()
    choices = choices_of(kind, key)
    lists = tuple[str, ...] in choices
    as_yaml = NOT_AS_WRITTEN.fullmatch(text) or (lists and text.lstrip().startswith("["))
    if (lists or str in choices) and int not in choices and not as_yaml:
        return key, text
    try:
        return key, yaml.safe_load(text)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise AnybatchError(f"Cannot read the value of --set {override!r} as YAML: {error}") from error


def _set(tree: dict[str, Any], key: str, value: Any, override: str) -> None:
    *parents, last = key.split(".")
    for depth, parent in enumerate(parents, start=1):
        if tree.get(parent) is None:
            tree[parent] = {}
        tree = tree[parent]
        if not isinstance(tree, dict):
            section = ".".join(parents[:depth])
            raise AnybatchError(f"Cannot apply --set {override!r}: '{section}' is a value, not a section.")
    tree[last] = value
