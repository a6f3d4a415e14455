"""Compiled loops, and a cache of them on disk that may be missing."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import numba
from numba.core.caching import FunctionCache


class _Cache(FunctionCache):
    """numba's cache, but what cannot be read or written is compiled again: a full disk costs seconds, not the run."""

    def load_overload(self, sig: Any, target_context: Any) -> Any:
        """None where there is nothing that can be used."""
        with contextlib.suppress(Exception):
            return super().load_overload(sig, target_context)
        return None

    def save_overload(self, sig: Any, data: Any) -> None:
        """Keep it if that is possible."""
        with contextlib.suppress(Exception):
            super().save_overload(sig, data)


def compiled(function: Callable[..., Any] | None = None, **options: Any) -> Any:
    """`numba.njit`, with the machine code kept where numba finds a place: beside this file, or in the user's cache.

    With `cache=True` numba refuses to define the function where it finds none: a read-only installation without a home.
    """
    if function is None:
        return lambda given: compiled(given, **options)
    dispatcher: Any = numba.njit(**options)(function)
    with contextlib.suppress(RuntimeError, OSError):  # no place at all
        dispatcher._cache = _Cache(function)
    return dispatcher
