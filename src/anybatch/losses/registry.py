"""Losses by name. A method is one line of `METHODS`: its settings are its constructor's: types, defaults, checks."""

from __future__ import annotations

import dataclasses
import functools
import importlib
import inspect
import types
import typing
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from torch import nn

from anybatch.core.configuration import Configuration, Count, convert, unknown_key
from anybatch.core.errors import AnybatchError
from anybatch.losses.base import ContrastiveLoss
from anybatch.losses.gamma import GammaSchedule
from anybatch.losses.matryoshka import Matryoshka, check_prefixes

# The published relatives are named by import path only: the core does not import them before one is asked for.
METHODS: dict[str, str] = {
    "infonce": "anybatch.losses.methods.InfoNCE",
    "decoupled": "anybatch.losses.methods.DecoupledInfoNCE",
    "count_corrected": "anybatch.losses.methods.CountCorrectedInfoNCE",
    "cross_batch": "anybatch.losses.cross_batch.CrossBatchInfoNCE",
    "sogclr": "anybatch.losses.methods.SogCLR",
    "fastclip": "anybatch.family.robust.FastCLIP",
    "isogclr": "anybatch.family.robust.ISogCLR",
    "tempnet": "anybatch.family.robust.TempNet",
    "nuclr": "anybatch.family.nuclr.NUCLR",
    "glofnd": "anybatch.family.glofnd.GloFND",
    "emc2": "anybatch.family.emc2.EMC2",
    "scent": "anybatch.family.scent.SCENT",
    "siglip": "anybatch.family.pairwise.SigLIP",
    "auc_cl": "anybatch.family.pairwise.AUCCL",
    "debiased": "anybatch.family.debiased.DebiasedInfoNCE",
}
LARGEST_REMEMBERING = 256  # rows of a batch: larger ones change the model so much that what is remembered is old
LEAST_ROWS = 10  # times the rows of a batch and a memory: of fewer there is little that a memory could add
AUTO = "auto"  # a method by rule: the run, which knows its data, says which (`LossConfig.named`)
# Options of every method that the rule may choose: given beside "auto" they hold for it.
AUTO_OPTIONS = ("temperature", "learnable_temperature", "direction", "mask_margin")
# Parameters that no file sets: the run knows them, or no other value than the default won in a benchmark (docs/log.md).
IN_PYTHON_ONLY = (
    *("num_rows", "normalize", "tile_bytes", "min_temperature", "seed", "hidden"),
    *("centred", "mean_rows"),
    *("temperature_momentum", "temperature_clip", "margin_momentum", "threshold_lr", "burn_in", "bias"),
)


class Option(typing.NamedTuple):
    """A parameter of a constructor: its annotation, and its default (`inspect.Parameter.empty` without)."""

    hint: Any
    default: Any


GAMMA_STEPS = Option(Count | None, None)  # of a `GammaSchedule`, where a gamma is asked for


@functools.cache
def method_of(name: str) -> type[ContrastiveLoss]:
    """The class of a method."""
    module, _, attribute = METHODS[name].rpartition(".")
    return getattr(importlib.import_module(module), attribute)


@functools.cache
def options_of(name: str) -> dict[str, Option]:
    """What a file can set of a method: its constructor's parameters that are numbers, words, truth values or lists."""
    if name == AUTO:
        shared = options_of("infonce")
        return {key: shared[key] for key in AUTO_OPTIONS}
    method = method_of(name)
    hints = typing.get_type_hints(method.__init__, include_extras=True)
    parameters = {
        key: Option(hints.get(key), parameter.default)
        for key, parameter in inspect.signature(method).parameters.items()
        if parameter.kind is not parameter.VAR_KEYWORD
    }
    (shared,) = typing.get_args(hints["scoring"])  # `Unpack[OneTemperature]`, or `Unpack[Scoring]`
    for key, hint in typing.get_type_hints(shared, include_extras=True).items():
        if key not in method.lacks:
            parameters[key] = Option(hint, method.scoring({})[key])
    options = {
        key: option._replace(hint=hint)
        for key, option in parameters.items()
        if key not in IN_PYTHON_ONLY and (hint := _plain(option.hint)) is not None
    }
    return options | {"gamma_steps": GAMMA_STEPS} if "gamma" in options else options


def _plain(hint: Any) -> Any:
    """The alternatives of an annotation that a file can say; None if there are none."""
    choices = typing.get_args(hint) if typing.get_origin(hint) in (typing.Union, types.UnionType) else (hint,)
    kinds = (typing.Annotated, typing.Literal, tuple)
    plain = [choice for choice in choices if choice in (bool, int, float, str) or typing.get_origin(choice) in kinds]
    if not plain:
        return None
    return typing.Union[tuple(plain + [choice for choice in choices if choice is type(None)])]  # noqa: UP007


def recommended(batch_size: int, num_rows: int, *, pretrained: bool, mined: bool = False) -> tuple[str, str]:
    """The method for "auto" at a batch over all ranks and rows of data, and why; the evidence is in docs/recipe.md.

    >>> recommended(64, 10_000, pretrained=False)
    ('cross_batch', 'recent pairs serve as further negatives')
    """
    if pretrained and mined:
        return "infonce", "a transformer on mined batches, whose negatives are hard already"
    if pretrained:
        return "count_corrected", "a transformer: the batch's negatives stand for all rows, none is remembered"
    if batch_size > LARGEST_REMEMBERING:
        return "count_corrected", "its negatives stand for all rows"
    if num_rows < LEAST_ROWS * (batch_size + options_of("cross_batch")["memory_size"].default):
        return "count_corrected", f"with {num_rows:,} rows its negatives stand for all, and a memory adds little"
    return "cross_batch", "recent pairs serve as further negatives"


@dataclasses.dataclass(frozen=True, kw_only=True, init=False)
class LossConfig(Configuration):
    """A loss by name, with the options of its method beside those that all methods share.

    `LossConfig(name="sogclr", gamma=0.8)` is of a class that is made from the method's constructor, and holds all of
    its options.

    Attributes:
        name: The method, see docs/methods.md; "auto": the recommended one, see docs/recipe.md.
        weights: "inclusion" corrects for mined batches not being a uniform sample; "none" leaves them as they are.
            "auto": inclusion on mined batches, for a method that defines it.
        mask_suspects: Pairs that the plan suspects of being false negatives are no negatives. "auto": on mined
            batches.
        matryoshka: Widths of prefixes of the embeddings that must be good embeddings themselves: the loss is the sum
            over them, each with a memory and a learned temperature of its own. The full width is among them only if
            given. None for the embeddings as they are.

    Raises:
        AnybatchError: A value out of range, an option of another method, options that exclude each other.

    >>> LossConfig(name="sogclr", gamma=0.8).eps is None
    True
    """

    name: str = AUTO
    weights: Literal["auto", "none", "inclusion"] = AUTO
    mask_suspects: Literal["auto"] | bool = AUTO
    matryoshka: tuple[Count, ...] | None = None

    section: ClassVar[str] = "loss"

    if TYPE_CHECKING:

        def __init__(self, *, name: str = AUTO, **options: Any) -> None: ...

        def __getattr__(self, name: str) -> Any: ...

    def __new__(cls, **given: Any) -> LossConfig:
        """An object of the class that is made from the method's constructor."""
        return object.__new__(cls.class_for(given) if cls is LossConfig else cls)

    def __reduce__(self) -> tuple[Any, ...]:
        return _remade, ({field.name: getattr(self, field.name) for field in dataclasses.fields(self)},)

    @classmethod
    def class_for(cls, given: Mapping[str, Any]) -> type[LossConfig]:
        """The class of the method that `given` names.

        Raises:
            AnybatchError: No such method, or a setting of another one.
        """
        name = convert(Literal[(AUTO, *METHODS)], given.get("name", AUTO), "loss.name")
        kind = _class_of(name)
        known = {field.name for field in dataclasses.fields(kind)}
        for key in sorted(key for key in given if key not in known):
            knowing = ", ".join(sorted(other for other in METHODS if key in options_of(other)))
            if name != AUTO and key in method_of(name).lacks:
                raise AnybatchError(f"loss.{key} is given, and '{name}' {method_of(name).lacks[key]}. Remove it.")
            if knowing and name == AUTO:
                raise AnybatchError(
                    f"loss.{key} is given, which the recommended loss ('auto') does not have: it is for {knowing}. Say "
                    "which of them with loss.name, or remove it."
                )
            if knowing:
                raise AnybatchError(
                    f"loss.{key} is given, which '{name}' does not know: it is for {knowing}. "
                    "Remove it, or change loss.name."
                )
            raise unknown_key("loss." + key, key, sorted(known))
        return kind

    def named(self, name: str) -> LossConfig:
        """The method that a rule chose for "auto", with what was given beside it."""
        given = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return LossConfig(**{**given, "name": name})

    @property
    def method(self) -> type[ContrastiveLoss]:
        """The class of the method; of "auto" plain InfoNCE, which shares its options."""
        return method_of("infonce" if self.name == AUTO else self.name)

    @property
    def options(self) -> dict[str, Any]:
        """The method's own settings."""
        return {key: getattr(self, key) for key in options_of(self.name)}

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.matryoshka is not None:
            check_prefixes(self.matryoshka, None, "loss.matryoshka is")
        self._check_options()
        try:
            example = self.example()  # the constructor has the last word on what goes together
        except AnybatchError as error:
            first = str(error).split(maxsplit=1)[0]
            raise AnybatchError(f"loss{'.' if first in self.options else ': '}{error}") from error
        if self.weights == "inclusion" and self.name != AUTO and not example.over_data:
            raise AnybatchError(
                f"loss.weights is 'inclusion', which '{self.name}' does not define: its denominator is the batch's own."
                " Use loss.name=count_corrected (no memory) or sogclr."
            )

    def example(self) -> ContrastiveLoss:
        """The loss for a data set of two rows (the first of several prefixes'), of which it can be asked what it is."""
        with torch.random.fork_rng(devices=[]):
            return _build(self, 2, None if self.matryoshka is None else self.matryoshka[0])

    def _check_options(self) -> None:
        """What the method would not use as it is set."""
        for name, option in options_of(self.name).items():
            if option.default is inspect.Parameter.empty and getattr(self, name) is None and self.matryoshka is None:
                raise AnybatchError(f"loss.{name} is missing; {self.name} needs it, such as {name}: 384.")
        options = self.options
        for chooser, unused in self.method.unused.items():
            for name in unused[options[chooser]]:
                if options[name] != options_of(self.name)[name].default:
                    using = ", ".join(choice for choice, names in unused.items() if name not in names)
                    raise AnybatchError(
                        f"loss.{name} is given, which {self.name}'s {options[chooser]} does not use: it is for "
                        f"{using}. Remove it, or change loss.{chooser}."
                    )


@functools.cache
def _class_of(name: str) -> type[LossConfig]:
    """`LossConfig` with the options of one method as fields."""
    fields = []
    for key, (hint, default) in options_of(name).items():
        if default is inspect.Parameter.empty:
            hint, default = hint | None, None
        fields.append((key, hint, dataclasses.field(default=default)))
    named = ("name", Literal[name], dataclasses.field(default=name))
    return dataclasses.make_dataclass("LossConfig", [named, *fields], bases=(LossConfig,), frozen=True, kw_only=True)


def _remade(values: dict[str, Any]) -> LossConfig:
    return LossConfig(**values)


def first_temperature(config: LossConfig) -> float:
    """The temperature that training begins with; 0.05 for a loss without one, to look at data with."""
    return 0.05 if "temperature" not in config.options else config.example().temperature


def build_loss(config: LossConfig, *, num_rows: int) -> nn.Module:
    """The Module that `config` names, for a data set of `num_rows` rows.

    Raises:
        AnybatchError: It names "auto", which only a run can settle.
    """
    if config.name == AUTO:
        raise AnybatchError("loss.name is 'auto', which a run settles when it has read its data. Name a method here.")
    if config.matryoshka is not None:
        losses = [_build(config, num_rows, width) for width in config.matryoshka]
        return Matryoshka(losses, config.matryoshka)
    return _build(config, num_rows, None)


def make_loss(name: str, num_rows: int, **arguments: Any) -> ContrastiveLoss:
    """A method by name, with any arguments of its constructor, and `num_rows` if it wants to know it."""
    method = method_of(name)
    if "num_rows" in inspect.signature(method.__init__).parameters:
        arguments["num_rows"] = num_rows
    return method(**arguments)


def _build(config: LossConfig, num_rows: int, width: int | None) -> ContrastiveLoss:
    """One loss; `width` is that of the prefix which it is for, None for whole embeddings."""
    arguments = config.options
    for name, option in options_of(config.name).items():
        if option.default is inspect.Parameter.empty and width is not None:  # it needs that of its embeddings
            if arguments[name] is not None:
                raise AnybatchError(
                    f"{name} is {arguments[name]} and loss.matryoshka {list(config.matryoshka or ())}, which says the "
                    f"widths already. Leave out loss.{name}."
                )
            arguments[name] = width
    steps = arguments.pop("gamma_steps", None)
    if steps is not None:
        arguments["gamma"] = GammaSchedule(arguments["gamma"], num_steps=steps)
    return make_loss("infonce" if config.name == AUTO else config.name, num_rows, **arguments)
