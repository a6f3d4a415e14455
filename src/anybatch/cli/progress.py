"""What the command prints: lines and tables, and one bar a stage (plain lines where the output is no terminal)."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Mapping
from contextlib import AbstractContextManager
from datetime import timedelta
from types import TracebackType

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table

console = Console(stderr=True)
SHOWN = ("loss", "eval_ndcg@10")
EVERY = 20.0  # seconds between the plain lines of a stage


def say(text: str) -> None:
    """Print one line as it is: a folder may be called runs/[a], and a long path is one line, to be copied."""
    console.print(text, highlight=False, markup=False, soft_wrap=True)


def show(table: Table, *, whole: bool = False) -> None:
    """Print a table, in a file or if `whole` as wide as it is: a cell that is wrapped or cut cannot be copied."""
    narrow = console.width
    if whole or not console.is_terminal:
        console.width = max(narrow, console.measure(table, options=console.options.update(width=1000)).maximum)
    console.print(table)
    console.width = narrow


def show_metrics(results: Mapping[str, Mapping[str, float]]) -> None:
    """Print figures of several models, one line each, and how far chance may have moved them."""
    from anybatch.insight.tables import metrics_table, what_is_open

    show(metrics_table(results))
    if doubt := what_is_open(results):
        say(doubt)


class Messages(logging.Handler):
    """Prints what the library says, each message once; of several ranks only the first informs, all warn."""

    def __init__(self) -> None:
        super().__init__(logging.INFO)
        self._said: set[str] = set()

    @classmethod
    def show(cls) -> None:
        """Begin: of the logger `anybatch`, warnings and information."""
        logger = logging.getLogger("anybatch")
        if not any(isinstance(handler, cls) for handler in logger.handlers):
            logger.addHandler(cls())
            logger.setLevel(logging.INFO)

    def emit(self, record: logging.LogRecord) -> None:
        """Print one message."""
        text = record.getMessage()
        silent = record.levelno < logging.WARNING and int(os.environ.get("RANK", "0")) > 0
        if text not in self._said and not silent:
            self._said.add(text)
            say(text)


class Bars(AbstractContextManager["Bars"]):
    """A `Progress` of a run: call it with (stage, done, total, figures). `quiet` shows nothing: one rank speaks."""

    def __init__(self, prefix: str = "", *, quiet: bool = False) -> None:
        self.prefix = prefix
        self.quiet = quiet
        self._tasks: dict[str, TaskID] = {}
        self._printed: dict[str, float] = {}
        self._begun: dict[str, tuple[float, int]] = {}
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=28),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[figures]}"),
            console=console,
            disable=quiet or not console.is_terminal,
        )

    def __enter__(self) -> Bars:
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._progress.stop()

    def __call__(self, stage: str, done: int, total: int, figures: dict[str, float] | None = None) -> None:
        """Move the stage's bar to `done` of `total`."""
        if self.quiet:
            return
        text = "  ".join(f"{name} {figures[name]:.3f}" for name in SHOWN if figures and name in figures)
        name = self.prefix + stage
        if console.is_terminal:
            if name not in self._tasks:
                self._tasks[name] = self._progress.add_task(name, total=total, figures="")
            self._progress.update(self._tasks[name], completed=done, total=total, figures=text)
            return
        now = time.monotonic()
        begun, first = self._begun.setdefault(name, (now, done))
        if done >= total or now - self._printed.get(name, -EVERY) >= EVERY:
            self._printed[name] = now
            left = (now - begun) / (done - first) * (total - done) if first < done < total else 0
            say(
                f"{name}: {done}/{total} {text}".rstrip()
                + (f"  about {timedelta(seconds=round(left))} left" if left else "")
            )
