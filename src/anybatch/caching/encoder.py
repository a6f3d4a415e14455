"""An encoder: one call of it on some rows, and the modules and generators behind it, found by one walk over them."""

from __future__ import annotations

import contextlib
import functools
import random
import types
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.nn.parallel import DistributedDataParallel

from anybatch.caching.ranks import Wrapped, broadcast_buffers, refuse_wrapper
from anybatch.caching.rows import Rows, rows_of
from anybatch.caching.state import Generator, Place, RandomState, WrittenState
from anybatch.core import distributed
from anybatch.core.errors import AnybatchError

Encoder = Callable[[Any], Tensor | tuple[Tensor, ...]]
# These draw from torch's global generators, and their classes are many.
_LIBRARIES = ("torch", "transformers", "sentence_transformers", "peft", "timm")
_PLAIN = frozenset((int, float, bool, str, type(None), Tensor, nn.Parameter, torch.dtype, torch.device))
_CONTAINERS = (dict, OrderedDict, list, tuple, set)
_GENERATORS = (torch.Generator, np.random.Generator, np.random.RandomState, random.Random)
_OF_TORCH = frozenset(("_parameters", "_buffers", "_modules", "training"))


def modules_of(function: Callable[..., Any]) -> list[nn.Module]:
    """The modules that a callable is or visibly holds, each once: attributes, arguments of a `functools.partial`,
    variables and defaults of a function. What hides deeper is not found; name it with `modules=`.
    """
    return list(dict.fromkeys(found for found in _reach(function, 3, set()) if isinstance(found, nn.Module)))


def parameters_of(modules: Iterable[nn.Module]) -> list[nn.Parameter]:
    """The parameters that train, each once."""
    return list(dict.fromkeys(p for module in modules for p in module.parameters() if p.requires_grad))


def _reach(value: Any, depth: int, seen: set[int]) -> Iterator[nn.Module | Generator]:
    """Modules and generator objects that a value is or holds; modules one level less deep."""
    if type(value) in _PLAIN or depth < 0 or id(value) in seen or isinstance(value, (Tensor, type, types.ModuleType)):
        return
    if isinstance(value, nn.Module):
        if depth > 0:
            yield value
    elif isinstance(value, _GENERATORS):
        if not isinstance(value, random.SystemRandom):  # it has no state
            yield value
    elif called := _called_by(value):
        for item in called:
            yield from _reach(item, depth, seen)
    else:
        inner: Iterable[Any] = ()
        if isinstance(value, (dict, list, tuple, set)):
            inner = value.values() if isinstance(value, dict) else value
        elif isinstance(value, types.FunctionType):
            seen.add(id(value))
            inner = _named_by(value)
        elif hasattr(value, "__dict__"):
            seen.add(id(value))
            inner = vars(value).values()
            for method in _methods(type(value)):  # what they name need not be run
                yield from (found for found in _reach(method, depth - 1, seen) if not isinstance(found, nn.Module))
        for item in inner:
            if type(item) not in _PLAIN:  # told at once: nearly all attributes are
                yield from _reach(item, depth - 1, seen)


def _called_by(value: Any) -> tuple[Any, ...]:
    """What a partial function or a bound method stands for; a built-in one may be the `random` of a generator."""
    if isinstance(value, functools.partial):
        return (value.func, *value.args, *value.keywords.values())
    if isinstance(value, types.MethodType):
        return (value.__func__, value.__self__)
    return (value.__self__,) if isinstance(value, types.BuiltinMethodType) else ()


@functools.lru_cache(maxsize=4096)
def _methods(kind: type) -> list[Any]:
    """The functions of a class and its bases, libraries left out."""
    bases = [base for base in kind.__mro__ if base.__module__.partition(".")[0] not in (*_LIBRARIES, "builtins")]
    return [value for base in bases for value in vars(base).values() if isinstance(value, types.FunctionType)]


def _named_by(function: types.FunctionType) -> list[Any]:
    """What a function of the user's can reach by a name: variables around it, globals, defaults."""
    if (function.__module__ or "").partition(".")[0] in _LIBRARIES:
        return []
    cells = []
    for cell in function.__closure__ or ():
        with contextlib.suppress(ValueError):  # not assigned yet
            cells.append(cell.cell_contents)
    names = [function.__globals__[name] for name in function.__code__.co_names if name in function.__globals__]
    return [*cells, *names, *(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).values()]


class ModuleFacts:
    """What a step must know of the modules behind its encoders, from one walk over all of them. Refused are batch
    statistics, hooks that act on a gradient before it is whole, and what `refuse_wrapper` refuses.
    """

    def __init__(self, encoders: Sequence[Encoder], modules: Sequence[nn.Module] | None) -> None:
        self.given = modules is not None
        self.flags: dict[nn.Module, bool] = {}  # the training flag of every module at or below the encoders' own
        self.visible: dict[int, tuple[nn.Module, ...]] = {}  # what `modules_of` finds in each encoder, by its id
        self.image_tokens: set[int] = set()  # ids that stand for images, as the models' configurations name them
        self._places: list[Place] = []
        self._frozen: list[Place] = []
        self._generators: dict[int, Generator] = {}
        self._seen: set[int] = set()
        for encode in encoders:
            if id(encode) not in self.visible:
                found = list(_reach(encode, 3, set()))
                self._add_generators(found)
                self.visible[id(encode)] = tuple(dict.fromkeys(m for m in found if isinstance(m, nn.Module)))
        visible = (module for held in self.visible.values() for module in held)
        self.modules = tuple(dict.fromkeys(visible if modules is None else modules))
        waiting = [("", module) for module in reversed(self.modules)]
        while waiting:
            path, module = waiting.pop()
            if module not in self.flags:
                self.flags[module] = module.training
                _refuse_batch_statistics(module, path)
                refuse_wrapper(module)
                config = getattr(module, "config", None)
                ids = (getattr(config, key, None) for key in ("image_token_id", "image_token_index"))
                self.image_tokens.update(number for number in ids if isinstance(number, int))
                self._add_state(module, path)
                parts = reversed(module._modules.items())
                waiting += [(f"{path}.{name}".lstrip("."), part) for name, part in parts if part is not None]
        reducing = [module for module in self.flags if isinstance(module, (DistributedDataParallel, FSDPModule))]
        sharded = [module for module in reducing if isinstance(module, FSDPModule)]
        inside = {part for module in sharded for part in module.modules() if part is not module}
        # Every DistributedDataParallel, and every outermost `fully_shard`ed module.
        self.wrapped: list[Wrapped] = [module for module in reducing if module not in inside]
        held = (parameter for module in self.flags for parameter in module._parameters.values())
        self.trained = list(dict.fromkeys(p for p in held if p is not None and p.requires_grad))
        self.generators = tuple(self._generators.values())  # visibly held, or named by methods
        broadcast_buffers(self.wrapped)
        # What forward passes may write to; nothing is watched where gradients are off.
        self.written = WrittenState(self._places, self._frozen) if torch.is_grad_enabled() else WrittenState()

    def _add_state(self, module: nn.Module, path: str) -> None:
        """What one module itself holds, and its parts do not."""
        holder = vars(module)
        for key, value in holder.items():
            kind = type(value)
            if kind is int or kind is float:
                self._places.append(Place(holder, key, path))
            elif kind not in _PLAIN and key not in _OF_TORCH and (kind not in _CONTAINERS or value):
                self._add_generators(_reach(value, 3, self._seen))
        for method in _methods(type(module)):
            self._add_generators(_reach(method, 3, self._seen))
        self._places += [Place(module._buffers, key, path) for key in module._buffers]
        for key, parameter in module._parameters.items():
            if parameter is not None and not parameter.requires_grad:
                self._frozen.append(Place(module._parameters, key, path))
            acting = getattr(parameter, "_post_accumulate_grad_hooks", None)
            if torch.is_grad_enabled() and (acting or hasattr(parameter, "_in_backward_optimizers")):
                raise AnybatchError(
                    f"{f'{path}.{key}'.lstrip('.')} has a hook that runs whenever a gradient is accumulated "
                    "(register_post_accumulate_grad_hook, an optimizer in the backward pass), under caching once per "
                    "mini-batch, with a part of the gradient. Remove the hook and step after the cached step."
                )

    def _add_generators(self, found: Iterable[nn.Module | Generator]) -> None:
        self._generators.update((id(part), part) for part in found if not isinstance(part, nn.Module))


@dataclass
class Tower:
    """An encoder, its batch, and what the step knows of the modules behind all encoders."""

    encode: Encoder
    slicer: Rows
    facts: ModuleFacts

    @property
    def visible(self) -> tuple[nn.Module, ...]:
        """The encoder's modules, or what holds them, found by looking."""
        return self.facts.visible[id(self.encode)]

    @property
    def modules(self) -> tuple[nn.Module, ...]:
        """The modules that the encoder runs: those given for all encoders, or the visible ones."""
        return self.facts.modules if self.facts.given else self.visible

    @property
    def wrapped(self) -> list[Wrapped]:
        """Those of `facts.wrapped` that are at or below its modules."""
        below = {part for module in self.modules for part in module.modules()} if self.facts.wrapped else ()
        return [module for module in self.facts.wrapped if module in below]

    @functools.cached_property
    def sharded(self) -> bool:
        """Whether the encoder is sharded over ranks, which then must run equally many passes."""
        return distributed.is_active() and any(isinstance(module, FSDPModule) for module in self.wrapped)

    def random_state(self) -> RandomState:
        """Of all generators that the encoders may draw from."""
        return RandomState(self.facts.generators)

    def embed(self, rows: Tensor, context: contextlib.AbstractContextManager[None] | None = None) -> tuple[Tensor, ...]:
        """The encoder's tensors `(b, ...)` for `rows` `(b,)`, computed inside `context`; other outputs are refused."""
        with context or contextlib.nullcontext():
            outputs = self.encode(self.slicer.take(rows))
        tensors = (outputs,) if isinstance(outputs, Tensor) else outputs
        if not isinstance(tensors, (tuple, list)) or not all(isinstance(output, Tensor) for output in tensors):
            raise AnybatchError(
                f"The encoder returned {type(outputs).__name__}; expected a Tensor (b, D) or a tuple of Tensors, for "
                'instance by lambda batch: model(batch)["sentence_embedding"].'
            )
        for output in tensors:
            if output.ndim == 0 or output.shape[0] != len(rows) or not output.is_floating_point():
                raise AnybatchError(
                    f"The encoder returned a {output.dtype} tensor of shape {tuple(output.shape)} for {len(rows)} "
                    "rows; expected a floating tensor with one embedding per row."
                )
        return tuple(tensors)

    @contextlib.contextmanager
    def leaving_no_trace(self, random: RandomState) -> Iterator[None]:
        """Whatever passes inside draw and write is put back: to `random`, and to what is there now."""
        written = self.facts.written
        there = written.snapshot()
        try:
            yield
        finally:
            random.restore()
            written.update()
            written.restore(there)
            written.update()


def towers_of(
    encoders: Sequence[Encoder], inputs: Sequence[Any], modules: Sequence[nn.Module] | None = None
) -> list[Tower]:
    """The towers of one step."""
    facts = ModuleFacts(encoders, modules)
    rows = [rows_of(batch, image_tokens=facts.image_tokens) for batch in inputs]
    return [Tower(encode, slicer, facts) for encode, slicer in zip(encoders, rows, strict=True)]


def _refuse_batch_statistics(module: nn.Module, path: str) -> None:
    if isinstance(module, nn.modules.batchnorm._BatchNorm) and (module.training or module.running_mean is None):
        kind = type(module).__name__
        raise AnybatchError(
            f"{path or kind} is a {kind} that normalises with the statistics of its batch, under caching those of a "
            f"mini-batch. Put it in evaluation mode (module.{path or 'bn'}.eval(), after every model.train()), use "
            "LayerNorm or GroupNorm, or train without caching."
        )
