"""How long work tells where it is."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol


class Progress(Protocol):
    """How long work tells where it is: `progress(stage, done, total, figures)`; None figures when there are none."""

    def __call__(self, stage: str, done: int, total: int, figures: dict[str, float] | None = None) -> None:
        """Work in `stage` is at `done` of `total`."""


def no_progress(stage: str, done: int, total: int, figures: dict[str, float] | None = None) -> None:
    """Say nothing."""


def counter(progress: Callable[[str, int, int], object], stage: str, total: int) -> Callable[[int], None]:
    """For work that tells how much it did since it told last."""
    done = 0

    def add(count: int) -> None:
        nonlocal done
        done += count
        progress(stage, done, total)

    return add
