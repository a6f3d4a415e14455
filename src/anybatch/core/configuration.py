"""Configuration: frozen dataclasses that check themselves, whether made in Python or from a file (`yaml_files`)."""

from __future__ import annotations

import dataclasses
import difflib
import functools
import math
import operator
import os
import types
import typing
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, ClassVar, TypeVar

from anybatch.core.errors import AnybatchError

T = TypeVar("T")
LARGEST = {int: 2**62, float: 3.4e38}  # a sum of two whole numbers fits into 64 bits, a number into float32
WORDS = {int: "a whole number", float: "a finite number", str: "text in UTF-8", bool: "true or false"}


@dataclasses.dataclass(frozen=True)
class Range:
    """The values that an annotated number may have: `least` to `most`, without `least` itself if `above`.

    >>> print(Range(0, 1, above=True))
    above 0 and at most 1
    """

    least: float = -math.inf
    most: float = math.inf
    above: bool = False

    def check(self, value: float) -> None:
        """Raise ValueError outside."""
        if not self.least <= value <= self.most or (self.above and value == self.least):
            raise ValueError

    def __str__(self) -> str:
        if self.most == math.inf:
            return f"{'above' if self.above else 'of at least'} {self.least}"
        return f"above {self.least} and at most {self.most}" if self.above else f"from {self.least} to {self.most}"


Count = Annotated[int, Range(1)]
CountOrZero = Annotated[int, Range(0)]
Positive = Annotated[float, Range(0, above=True)]
NotNegative = Annotated[float, Range(0)]
Fraction = Annotated[float, Range(0, 1)]
Share = Annotated[float, Range(0, 1, above=True)]
Seed = Annotated[int, Range(0, 2**32 - 1)]


class Configuration:
    """Base of the configuration classes. What a field may be is its annotation: `Literal` choices, `Annotated` ranges.

    A class that checks more calls `super().__post_init__()` first. `section` is what messages put before the names.

    A field `rate: Positive` refuses a value in these words (a class made here would count as one of the library's):

    >>> convert(Positive, -1, "train.rate")
    Traceback (most recent call last):
    anybatch.core.errors.AnybatchError: train.rate is -1; expected a finite number above 0.
    """

    section: ClassVar[str] = ""

    @classmethod
    def class_for(cls, given: Mapping[str, Any]) -> type[Configuration]:
        """The class to make of `given`, names with their values."""
        return cls

    def __post_init__(self) -> None:
        for name, hint in _hints(type(self)).items():
            object.__setattr__(self, name, convert(hint, getattr(self, name), _dotted(self.section, name)))


@functools.cache
def _hints(kind: Any) -> dict[str, Any]:
    hints = typing.get_type_hints(kind, include_extras=True)
    return {field.name: hints[field.name] for field in dataclasses.fields(kind) if field.init}


def _dotted(section: str, name: object) -> str:
    return f"{section}.{name}" if section else str(name)


def from_mapping(kind: type[T], tree: Mapping[str, Any], where: str = "") -> T:
    """Build the dataclass `kind` from nested mappings; `where` is the dotted path used in messages."""
    if issubclass(kind, Configuration):
        kind = typing.cast(type[T], kind.class_for(tree))
    hints = _hints(kind)
    values = {}
    for key, value in tree.items():
        if key not in hints:
            raise unknown_key(_dotted(where, key), str(key), list(hints))
        values[key] = convert(hints[key], value, _dotted(where, key), text=True)
    missing = []
    for field in dataclasses.fields(kind):  # pyright: ignore[reportArgumentType]
        if field.name in values or not field.init or field.default is not dataclasses.MISSING:
            continue
        if dataclasses.is_dataclass(hints[field.name]):  # a section that was left out may do with its defaults
            section = typing.cast(type, hints[field.name])
            values[field.name] = from_mapping(section, {}, _dotted(where, field.name))
        elif field.default_factory is dataclasses.MISSING:
            missing.append(_dotted(where, field.name))
    if missing:
        raise AnybatchError(f"Missing configuration value: {', '.join(missing)}. Give it in the file or with --set.")
    return kind(**values)


def choices_of(kind: type, key: str) -> tuple[Any, ...]:
    """The alternatives of the annotation of a dotted key; (None,) where `kind` has none of that name."""
    hint: Any = kind
    for name in key.split("."):
        hint = _hints(hint).get(name) if dataclasses.is_dataclass(hint) else None
    return _choices(hint)


def unknown_key(name: str, key: str, known: Sequence[str]) -> AnybatchError:
    """The refusal of a key that is none of `known`, with the nearest of them; `name` is its dotted name."""
    close = difflib.get_close_matches(key, known, n=1, cutoff=0.5)
    hint = f"did you mean '{close[0]}'?" if close else f"valid keys here: {', '.join(known)}."
    return AnybatchError(f"Unknown configuration key '{name}': {hint}")


def differences(old: Any, new: Any) -> list[str]:
    """The dotted keys in which two configurations of one kind differ, with both values."""
    before, after = (_flatten(dataclasses.asdict(config)) for config in (old, new))
    keys = {**after, **before}  # a mapping may have lost some
    return [f"{key}: {before.get(key)!r} -> {after.get(key)!r}" for key in keys if before.get(key) != after.get(key)]


def convert(hint: Any, value: Any, name: str, *, text: bool = False) -> Any:
    """`value` as the annotation `hint` wants it; `text` also reads numbers from text, as YAML hands over 1e-4."""
    for choice in _choices(hint):
        try:
            return _converted(choice, value, name, text)
        except (TypeError, ValueError, OverflowError) as error:
            if isinstance(error, AnybatchError):  # of a section, or of one of several values: says more
                raise
    words = [word for choice in _choices(hint) for word in typing.get_args(choice) if isinstance(word, str)]
    close = difflib.get_close_matches(str(value), words, n=1, cutoff=0.5)
    ending = f" Did you mean '{close[0]}'?" if close else ""
    raise AnybatchError(f"{name} is {value!r}; expected {expected(hint)}.{ending}")


def _converted(choice: Any, value: Any, name: str, text: bool) -> Any:
    """`value` as one alternative of an annotation. Raises TypeError, ValueError or OverflowError where it is none."""
    origin, arguments = typing.get_origin(choice), typing.get_args(choice)
    if origin is Annotated:
        number = _converted(arguments[0], value, name, text)
        arguments[1].check(number)
        return number
    if isinstance(choice, type) and dataclasses.is_dataclass(choice):
        if isinstance(value, choice):
            return value
        if value is not None and not isinstance(value, Mapping):
            raise AnybatchError(f"'{name}' is a section; got the value {value!r}.")
        return from_mapping(choice, value or {}, name)
    if origin is dict:  # a free mapping, checked by the library that it is for
        if not isinstance(value, Mapping):
            raise TypeError
        return {_converted(str, key, name, text): _plain(item) for key, item in value.items()}
    if origin is tuple:
        items = [value] if text and isinstance(value, (str, int, float)) else value
        if not isinstance(items, (list, tuple)) or (arguments[-1] is not ... and len(items) != len(arguments)):
            raise TypeError
        return tuple(convert(arguments[0], item, f"{name}[{place}]", text=text) for place, item in enumerate(items))
    if origin is typing.Literal or choice in (bool, type(None)):
        allowed = type(value) in (str, int) and value in arguments if origin else isinstance(value, choice)
        if not allowed:
            raise TypeError
        return value
    if choice is str:
        written = os.fspath(value)  # a path is text as well
        if not isinstance(written, str) or "\0" in written:
            raise TypeError
        written.encode()  # a name that is no UTF-8 could not be written into config.yaml
        return written
    if isinstance(value, (bool, bytes, str)) and not (text and choice is float and isinstance(value, str)):
        raise TypeError
    number: float = operator.index(typing.cast(int, value)) if choice is int else float(value)
    if not abs(number) <= LARGEST[choice]:  # nan is neither
        raise ValueError
    return number


def _plain(value: Any) -> Any:
    """A value of a free mapping as YAML writes it. Raises TypeError for what YAML cannot say."""
    if isinstance(value, Mapping):
        return {_plain(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if value is not None and type(value) not in (bool, int, float, str):
        raise TypeError
    return value


def _choices(hint: Any) -> tuple[Any, ...]:
    return typing.get_args(hint) if typing.get_origin(hint) in (typing.Union, types.UnionType) else (hint,)


def expected(hint: Any) -> str:
    """An annotation in words: "a whole number of at least 1, or nothing"."""
    words = []
    for choice in _choices(hint):
        origin, arguments = typing.get_origin(choice), typing.get_args(choice)
        if origin is Annotated:
            words.append(f"{expected(arguments[0])} {arguments[1]}")
        elif origin is typing.Literal:
            words.append(("one of " if len(arguments) > 1 else "") + ", ".join(map(str, arguments)))
        elif origin is dict:
            words.append("a mapping such as {key: value}")
        elif origin is tuple and arguments[-1] is not ...:
            number = {2: "two", 3: "three"}.get(len(arguments), len(arguments))
            words.append(f"{number} {'texts' if arguments[0] is str else 'numbers'}")
        elif origin is tuple:
            words.append(f"a list, each of it {expected(arguments[0])}")
        else:
            words.append(WORDS.get(choice, "nothing"))
    return ", or ".join(words)


def _flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, Mapping) and value:
            flat.update(_flatten(value, f"{prefix}{key}."))
        else:
            flat[f"{prefix}{key}"] = list(value) if isinstance(value, tuple) else value
    return flat
