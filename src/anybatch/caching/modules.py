"""The modules and generators behind an encoder: found, and checked for what caching cannot reproduce."""

from __future__ import annotations

import functools
import inspect
import random
import types
from collections import OrderedDict
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import torch
from torch import nn

from anybatch.caching.state import Generator
from anybatch.core.errors import AnybatchError

# These draw from torch's global generators, and their classes are many.
_LIBRARIES = ("torch", "transformers", "sentence_transformers", "peft", "timm")


def modules_of(encode: Callable[..., Any]) -> list[nn.Module]:
    """The modules that a callable is or visibly holds, each once.

    Looks at the callable itself, the object of a bound method and its attributes, the arguments of a
    `functools.partial`, and the variables and defaults of a function. What hides deeper is not found; name it
    with `modules=`.
    """
    found: dict[nn.Module, None] = {}

    def add(value: Any, depth: int) -> None:
        if isinstance(value, nn.Module):
            found[value] = None
        elif isinstance(value, functools.partial):
            for item in (value.func, *value.args, *value.keywords.values()):
                add(item, depth)
        elif inspect.ismethod(value):
            add(value.__self__, depth)
            add(value.__func__, depth)
        elif inspect.isfunction(value) and depth > 0:
            names = inspect.getclosurevars(value)
            defaults = (*(value.__defaults__ or ()), *(value.__kwdefaults__ or {}).values())
            for item in (*names.nonlocals.values(), *names.globals.values(), *defaults):
                add(item, depth - 1)
        elif isinstance(value, (list, tuple)) and depth > 0:
            for item in value:
                add(item, depth - 1)
        elif isinstance(value, dict) and depth > 0:
            for item in value.values():
                add(item, depth - 1)
        elif depth > 0 and hasattr(value, "__dict__") and not inspect.ismodule(value) and not inspect.isclass(value):
            for item in vars(value).values():
                add(item, depth - 1)

    add(encode, 2)
    return list(found)


def generators_of(encode: Callable[..., Any], modules: Iterable[nn.Module]) -> list[Generator]:
    """The generator objects of torch, NumPy and Python that an encoder and its modules visibly hold, each once.

    Looks where `modules_of` looks, in the attributes of every submodule (hooks included), and at what the methods of their classes name.

    Cost: a few attributes of every submodule; no more than a millisecond for a usual transformer.
    """
    found: dict[int, Generator] = {}
    seen: set[int] = set()

    def add(value: Any, depth: int) -> None:
        kind = type(value)
        if depth < 0 or id(value) in seen or isinstance(value, (nn.Module, torch.Tensor, type, types.ModuleType)):
            return
        if isinstance(value, dict):
            for item in _telling(value.values()):
                add(item, depth - 1)
        elif kind in (list, tuple, set):
            for item in _telling(value):
                add(item, depth - 1)
        elif isinstance(value, (torch.Generator, np.random.Generator, np.random.RandomState, random.Random)):
            if not isinstance(value, random.SystemRandom):  # it has no state
                found[id(value)] = value
        elif isinstance(value, functools.partial):
            for item in (value.func, *value.args, *value.keywords.values()):
                add(item, depth)
        elif kind is types.MethodType:
            add(value.__func__, depth)
            add(value.__self__, depth - 1)
        elif kind is types.BuiltinMethodType:  # the `random` of a generator
            add(value.__self__, depth)
        elif kind is types.FunctionType and (value.__module__ or "").partition(".")[0] not in _LIBRARIES:
            seen.add(id(value))
            for item in _named_by(value):
                add(item, depth - 1)
        elif hasattr(value, "__dict__"):
            seen.add(id(value))
            for item in _telling((*vars(value).values(), *_methods(kind))):
                add(item, depth - 1)

    add(encode, 3)
    for module in modules:
        for child in module.modules():
            for item in _telling((*vars(child).values(), *_methods(type(child)))):
                add(item, 3)
    return list(found.values())


_PLAIN = frozenset((int, float, bool, str, type(None), torch.Tensor, nn.Parameter, torch.dtype, torch.device))
_CONTAINERS = frozenset((dict, OrderedDict, list, tuple, set))


def _telling(values: Iterable[Any]) -> list[Any]:
    """What can lead to a generator: nearly all attributes of a module are plain or empty, and told at once."""
    return [value for value in values if type(value) not in _PLAIN and (type(value) not in _CONTAINERS or value)]


@functools.lru_cache(maxsize=4096)
def _methods(kind: type) -> list[Any]:
    """The functions of a class and its bases, libraries left out."""
    bases = [base for base in kind.__mro__ if base.__module__.partition(".")[0] not in (*_LIBRARIES, "builtins")]
    return [value for base in bases for value in vars(base).values() if isinstance(value, types.FunctionType)]


def _named_by(function: types.FunctionType) -> list[Any]:
    """What a function can reach by a name: variables around it, globals, defaults."""
    cells = []
    for cell in function.__closure__ or ():
        try:
            cells.append(cell.cell_contents)
        except ValueError:  # not assigned yet
            continue
    names = [function.__globals__[name] for name in function.__code__.co_names if name in function.__globals__]
    return [*cells, *names, *(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).values()]


def parameters_of(modules: Iterable[nn.Module]) -> list[nn.Parameter]:
    """The parameters that train, each once."""
    return list(dict.fromkeys(p for module in modules for p in module.parameters() if p.requires_grad))


def refuse_optimizer_in_backward(modules: Iterable[nn.Module]) -> None:
    """Refuse hooks that act on a gradient as soon as it is there: under caching that is after every micro-batch.

    Raises:
        AnybatchError: A parameter with a `register_post_accumulate_grad_hook` or an optimizer in its backward pass, by name.
    """
    for module in modules:
        for name, parameter in module.named_parameters():
            if getattr(parameter, "_post_accumulate_grad_hooks", None) or hasattr(parameter, "_in_backward_optimizers"):
                raise AnybatchError(
                    f"{name} has a hook that runs whenever a gradient is accumulated (register_post_accumulate_grad_hook, an optimizer in the backward "
                    "pass). Under caching that is once a micro-batch, with a part of the gradient. Remove the hook and step after the cached step, or train "
                    "without caching."
                )


def refuse_batch_statistics(modules: Iterable[nn.Module]) -> None:
    """Refuse modules whose output for a row depends on the other rows of its micro-batch.

    Raises:
        AnybatchError: A BatchNorm in training mode (or without running statistics), with its name and the remedies.
    """
    for module in modules:
        for name, child in module.named_modules():
            if not isinstance(child, nn.modules.batchnorm._BatchNorm):
                continue
            if child.training or child.running_mean is None:
                raise AnybatchError(
                    f"{name or type(child).__name__} is a {type(child).__name__} that normalises with the statistics "
                    "of its batch. Under caching it sees micro-batches, so the gradient cannot equal that of the "
                    "whole batch, and its running statistics would be updated twice. Put it in evaluation mode "
                    f"(module.{name or 'bn'}.eval(), after every model.train()), or replace it by LayerNorm or "
                    "GroupNorm, or train without caching."
                )
