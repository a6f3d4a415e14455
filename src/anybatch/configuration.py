"""Configuration files: YAML to frozen dataclasses, strictly. Unknown keys and wrong types are refused with the nearest valid key."""

from __future__ import annotations

import dataclasses
import difflib
import types
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import yaml

from anybatch.errors import AnybatchError

T = TypeVar("T")


def load_config(kind: type[T], path: Path | None, overrides: Sequence[str] = ()) -> T:
    """Read `path`, apply `overrides` and build the dataclass `kind`.

    Args:
        kind: A dataclass whose fields are plain values or further dataclasses.
        path: A YAML file, or None for the defaults.
        overrides: `"section.key=value"`; the value is read as YAML.

    Raises:
        AnybatchError: No such file, not a mapping, unknown key (names the nearest valid one), wrong type, missing value.
    """
    tree: dict[str, Any] = {}
    if path is not None:
        try:
            tree = yaml.load(path.read_text(encoding="utf-8"), _Loader) or {}
        except OSError as error:
            raise AnybatchError(
                f"Cannot read the configuration {path}: {error.strerror}. Check the path given to --config."
            ) from error
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise AnybatchError(f"{path} is not valid YAML: {error}") from error
        if not isinstance(tree, dict):
            raise AnybatchError(
                f"{path} holds a {type(tree).__name__}; expected sections such as 'data:' and 'model:'."
            )
    for override in overrides:
        _apply(tree, override)
    return from_mapping(kind, tree)


def from_mapping(kind: type[T], tree: Mapping[str, Any], where: str = "") -> T:
    """Build the dataclass `kind` from nested mappings; `where` is the dotted path used in messages."""
    hints = typing.get_type_hints(kind)
    fields = {field.name: field for field in dataclasses.fields(kind) if field.init}  # pyright: ignore[reportArgumentType]
    values = {}
    for key, value in tree.items():
        name = f"{where}.{key}" if where else str(key)
        if key not in fields:
            close = difflib.get_close_matches(str(key), fields, n=1, cutoff=0.5)
            hint = f"did you mean '{close[0]}'?" if close else f"valid keys here: {', '.join(fields)}."
            raise AnybatchError(f"Unknown configuration key '{name}': {hint}")
        values[key] = _convert(hints[key], value, name)
    for name, field in fields.items():
        if name not in values and dataclasses.is_dataclass(hints[name]) and field.default is dataclasses.MISSING:
            values[name] = from_mapping(typing.cast(type, hints[name]), {}, f"{where}.{name}" if where else name)
    missing = [
        name
        for name, field in fields.items()
        if name not in values and field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
    ]
    if missing:
        names = ", ".join(f"{where}.{name}" if where else name for name in missing)
        raise AnybatchError(f"Missing configuration value: {names}. Give it in the file or with --set.")
    return kind(**values)


def to_yaml(config: Any) -> str:
    """The resolved configuration, every default written out."""
    return yaml.safe_dump(_plain(dataclasses.asdict(config)), sort_keys=False, allow_unicode=True)


def differences(old: Any, new: Any) -> list[str]:
    """The dotted keys in which two configurations of one kind differ, with both values."""
    flat_old, flat_new = (_flatten(_plain(dataclasses.asdict(config))) for config in (old, new))
    return [
        f"{key}: {flat_old.get(key)!r} -> {flat_new.get(key)!r}"
        for key in flat_new
        if flat_old.get(key) != flat_new[key]
    ]


class _Loader(yaml.SafeLoader):
    """Plain YAML values only, and every key once: YAML itself would let the last of two sections replace the first."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if isinstance(key, str) and key in seen:
                line = key_node.start_mark.line + 1
                raise yaml.YAMLError(
                    f"line {line} has the key '{key}' a second time; keep one, with all that belongs to it."
                )
            if isinstance(key, str):
                seen.add(key)
        return super().construct_mapping(node, deep=deep)


def _apply(tree: dict[str, Any], override: str) -> None:
    key, separator, text = override.partition("=")
    if not separator or not key.strip():
        raise AnybatchError(f"Cannot read --set {override!r}: expected section.key=value.")
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise AnybatchError(f"Cannot read the value of --set {override!r} as YAML: {error}") from error
    *parents, last = key.strip().split(".")
    for depth, parent in enumerate(parents):
        child = tree.setdefault(parent, {})
        if child is None:
            child = tree[parent] = {}
        if not isinstance(child, dict):
            raise AnybatchError(
                f"Cannot apply --set {override!r}: '{'.'.join(parents[: depth + 1])}' is a value, not a section."
            )
        tree = child
    tree[last] = value


def _convert(hint: Any, value: Any, name: str) -> Any:
    if dataclasses.is_dataclass(hint) and isinstance(hint, type):
        if value is None:
            value = {}
        if not isinstance(value, Mapping):
            raise AnybatchError(f"'{name}' is a section; got the value {value!r}.")
        return from_mapping(hint, value, name)
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        if value is None and type(None) in arguments:
            return None
        errors = []
        for argument in (argument for argument in arguments if argument is not type(None)):
            try:
                return _convert(argument, value, name)
            except AnybatchError as error:
                errors.append(error)
        raise errors[0]
    if origin is typing.Literal:
        if value in arguments:
            return value
        close = difflib.get_close_matches(str(value), [str(argument) for argument in arguments], n=1, cutoff=0.5)
        hint_text = f" Did you mean '{close[0]}'?" if close else ""
        raise AnybatchError(f"'{name}' is {value!r}; expected one of {', '.join(map(str, arguments))}.{hint_text}")
    if origin is tuple:
        items = [value] if isinstance(value, (str, int, float)) else value
        if not isinstance(items, (list, tuple)):
            raise AnybatchError(f"'{name}' is {value!r}; expected a list.")
        return tuple(_convert(arguments[0], item, f"{name}[{position}]") for position, item in enumerate(items))
    if origin is dict:
        if not isinstance(value, Mapping):
            raise AnybatchError(f"'{name}' is {value!r}; expected a mapping.")
        return {str(key): _convert(arguments[1], item, f"{name}.{key}") for key, item in value.items()}
    if hint is float and isinstance(value, (int, str)) and not isinstance(value, bool):
        try:  # YAML reads 1e-4 as a string
            return float(value)
        except ValueError:
            pass
    if hint is Any or (
        isinstance(value, typing.cast(type, hint)) and not (isinstance(value, bool) and hint is not bool)
    ):
        return value
    raise AnybatchError(f"'{name}' is {value!r} ({type(value).__name__}); expected {getattr(hint, '__name__', hint)}.")


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return str(value) if isinstance(value, Path) else value


def _flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, Mapping) and value:
            flat.update(_flatten(value, f"{prefix}{key}."))
        else:
            flat[f"{prefix}{key}"] = value
    return flat
