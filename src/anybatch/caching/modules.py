"""The modules behind an encoder: found, and checked for what caching cannot reproduce."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterable
from typing import Any

from torch import nn

from anybatch.errors import AnybatchError


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
