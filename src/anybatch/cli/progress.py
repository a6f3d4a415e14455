"""Progress on the terminal: one bar a stage; plain lines where the output is no terminal."""

from __future__ import annotations

import logging
import os
import time
from contextlib import AbstractContextManager
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

console = Console(stderr=True)
SHOWN = ("loss", "eval_ndcg@10")


class Messages(logging.Handler):
    """Prints what the library says (warnings, and which columns and prompts are used) as plain lines, each once; of several ranks only the first informs."""

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
            console.print(text, highlight=False, markup=False, soft_wrap=True)


class Bars(AbstractContextManager["Bars"]):
    """A `Progress` of the pipeline: call it with (stage, done, total, figures). `quiet` shows nothing: one of several ranks speaks."""

    def __init__(self, prefix: str = "", *, quiet: bool = False) -> None:
        self.prefix = prefix
        self.quiet = quiet
        self._tasks: dict[str, TaskID] = {}
        self._printed: dict[str, float] = {}
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
        if not console.is_terminal:
            self._print(name, done, total, text)
            return
        if name not in self._tasks:
            self._tasks[name] = self._progress.add_task(name, total=total, figures="")
        self._progress.update(self._tasks[name], completed=done, total=total, figures=text)

    def _print(self, name: str, done: int, total: int, text: str) -> None:
        now = time.monotonic()
        if done >= total or now - self._printed.get(name, -60.0) >= 20.0:
            self._printed[name] = now
            console.print(f"{name}: {done}/{total} {text}".rstrip(), highlight=False, markup=False)
