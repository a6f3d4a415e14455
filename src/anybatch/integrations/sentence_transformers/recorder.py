"""What a run writes while it trains: its log, its evaluations, its progress."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from transformers import TrainerCallback
from transformers.trainer_callback import ExportableState

from anybatch.core.files import write_text


class Recorder(TrainerCallback, ExportableState):
    """Writes the log, runs the evaluations, reports progress. The log's lines go into the checkpoints, and come back.

    Example:
        >>> callbacks = [Recorder(Path("log.jsonl"))]  # the last one, so that the log has the figures of the others
    """

    def __init__(
        self,
        path: Path,
        eval_steps: int | None = None,
        evaluate: Callable[[Any], dict[str, float]] | None = None,
        progress: Callable[[int, int, dict[str, float]], None] | None = None,
    ) -> None:
        self.path, self.eval_steps, self.evaluate, self.progress = path, eval_steps, evaluate, progress
        self.lines: list[dict[str, Any]] = []
        self.latest: dict[str, float] = {}
        self.evaluation_seconds = 0.0

    def state(self) -> dict[str, Any]:
        """What the checkpoints keep."""
        return {"args": {}, "attributes": {"lines": [json.dumps(line) for line in self.lines]}}

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Begin the log, with the lines of the checkpoint where a run goes on."""
        if not state.is_world_process_zero:
            return
        if state.global_step:
            self.lines = [json.loads(line) for line in state.stateful_callbacks["Recorder"]["attributes"]["lines"]]
        write_text(self.path, "".join(json.dumps(line) + "\n" for line in self.lines))

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        """A line of the training loss."""
        if logs and "loss" in logs:
            self._write(state, {name: value for name, value in logs.items() if isinstance(value, (int, float))})

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        """Evaluate if it is time; report progress; a short run leaves a line as well."""
        if self.eval_steps and state.global_step % self.eval_steps == 0 and state.is_world_process_zero:
            assert self.evaluate is not None
            training, started = model.training, time.perf_counter()
            model.eval()
            self._write(state, {f"eval_{name}": value for name, value in self.evaluate(model).items()})
            model.train(training)
            self.evaluation_seconds += time.perf_counter() - started
        if self.progress is not None:
            self.progress(state.global_step, state.max_steps, self.latest)
        control.should_log |= state.global_step >= state.max_steps

    def _write(self, state: Any, figures: dict[str, Any]) -> None:
        if not state.is_world_process_zero:
            return
        self.latest = {**self.latest, **figures}
        self.lines.append({"step": state.global_step, "epoch": state.epoch, **figures})
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(self.lines[-1]) + "\n")
