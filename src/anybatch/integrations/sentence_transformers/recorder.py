"""What a run does while it trains, beside training: its log, progress, evaluations, and how it is stopped."""

from __future__ import annotations

import json
import logging
import os
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from accelerate.utils import broadcast_object_list
from transformers import TrainerCallback
from transformers.trainer_callback import ExportableState

from anybatch.core import distributed
from anybatch.core.files import write_text
from anybatch.integrations.sentence_transformers.trainer import Trainer

logger = logging.getLogger("anybatch")


class Recorder(TrainerCallback, ExportableState):
    """Writes the log, reports progress. The log's lines go into the checkpoints, and come back.

    Example:
        >>> callbacks = [Recorder(Path("log.jsonl"))]  # the last one, so that the log has the figures of the others
    """

    def __init__(self, path: Path, progress: Callable[[int, int, dict[str, float]], None] | None = None) -> None:
        self.path, self.progress = path, progress
        self.trainer: Any = None  # whose sum of losses since the last line goes into the checkpoints as well
        self.lines: list[dict[str, Any]] = []
        self.latest: dict[str, float] = {}

    def state(self) -> dict[str, Any]:
        """What the checkpoints keep."""
        loss, logged = (getattr(self.trainer, name, 0) for name in ("_tr_loss", "_globalstep_last_logged"))
        lines = [json.dumps(line) for line in self.lines]
        return {"args": {}, "attributes": {"lines": lines, "loss": float(loss), "logged": logged}}

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Begin the log, with the lines of the checkpoint where a run goes on."""
        kept = state.stateful_callbacks["Recorder"]["attributes"] if state.global_step else {"lines": []}
        if state.global_step and hasattr(self.trainer, "_tr_loss"):  # the next line is a mean over both sessions
            self.trainer._tr_loss += kept["loss"]
            self.trainer._total_loss_scalar -= kept["loss"]  # the sum of this session
            self.trainer._globalstep_last_logged = kept["logged"]
        if not state.is_world_process_zero:
            return
        if state.global_step:
            logger.info("Going on after step %s of %s.", state.global_step, state.max_steps)
        self.lines = [json.loads(line) for line in kept["lines"]]
        write_text(self.path, "".join(json.dumps(line) + "\n" for line in self.lines))

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        """A line of the training loss, or of an evaluation."""
        told = any(name == "loss" or name.startswith("eval_") for name in logs or ())
        if not state.is_world_process_zero or not told:
            return
        figures = {name: value for name, value in (logs or {}).items() if isinstance(value, (int, float))}
        self.latest = {**self.latest, **figures}
        self.lines.append({"step": state.global_step, **figures, "epoch": state.epoch})
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(self.lines[-1]) + "\n")

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Report progress; a short run leaves a line as well."""
        if self.progress is not None:
            self.progress(state.global_step, state.max_steps, self.latest)
        # The line of an epoch is written here, before a checkpoint of its last step, which else would lack it.
        ended = args.logging_strategy == "epoch" and float(state.epoch).is_integer()
        control.should_log |= ended or state.global_step >= state.max_steps


class StopAfterStep(TrainerCallback):
    """Around training: Ctrl-C and SIGTERM let a step end and its checkpoint be written, and then do what they did
    before; a second one does so at once. Several processes would end at different steps, and are left as they are.

    Example:
        >>> with StopAfterStep() as stop:
        ...     callbacks = [stop]  # trainer.train() in here
    """

    def __init__(self) -> None:
        self.asked: int | None = None
        self.handlers: dict[int, Any] = {}
        self.process = os.getpid()

    def __enter__(self) -> StopAfterStep:
        if distributed.world_size() == 1 and threading.current_thread() is threading.main_thread():
            found = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
            self.handlers = {number: handler for number, handler in found.items() if callable(handler)}
        for number in self.handlers:
            signal.signal(number, self._ask)
        return self

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        self._restore()
        # SIGTERM to a whole group of processes ends a data loader's workers at once, and whoever misses them fails.
        if self.asked is not None and (kind is None or "DataLoader worker" in str(error)):
            self.handlers[self.asked](self.asked, None)

    def _restore(self) -> None:
        for number, handler in self.handlers.items():
            signal.signal(number, handler)

    def _ask(self, number: int, frame: Any) -> None:
        if os.getpid() != self.process:
            return  # a data loader's worker, which has this handler from its parent: the step needs it
        self.asked = number
        self._restore()
        again = "Ctrl-C" if number == signal.SIGINT else signal.Signals(number).name
        logger.warning("Stopping after this step, with a checkpoint. %s once more stops at once.", again)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Ask the Trainer for a checkpoint and its end."""
        if self.asked is not None:
            control.should_save = control.should_training_stop = True

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """At its end the Trainer loads the best model and, with save_total_limit=1, deletes what was saved after it."""
        if self.asked is not None and control.should_training_stop and state.global_step < state.max_steps:
            state.best_model_checkpoint = None  # of this process; the checkpoint knows it


class EvaluatedTrainer(Trainer):
    """The Trainer of a run: evaluations are the run's own `figures` of the model (None to evaluate nothing), and
    training stops after `patience` of them without a better figure (`args.metric_for_best_model`).
    """

    def __init__(
        self,
        *arguments: Any,
        figures: Callable[[Any], dict[str, float]] | None = None,
        patience: int | None = None,
        **options: Any,
    ) -> None:
        self.figures, self.patience, self.evaluation_seconds = figures, patience, 0.0
        super().__init__(*arguments, evaluator=[] if figures is not None else None, **options)

    def evaluate(self, *arguments: Any, **options: Any) -> dict[str, float]:
        """The figures, measured by the first rank, logged as eval_..., the same on every rank."""
        assert self.figures is not None
        assert self.model is not None
        started, shared = time.perf_counter(), [{}]
        with distributed.alone() as chosen:
            if chosen:
                self.model.eval()
                shared = [{f"eval_{name}": value for name, value in self.figures(self.model).items()}]
        [figures] = broadcast_object_list(shared)
        self.log(dict(figures))
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, figures)
        self.evaluation_seconds += time.perf_counter() - started
        return figures

    def _determine_best_metric(self, metrics: dict[str, float], trial: Any) -> bool:
        is_best = super()._determine_best_metric(metrics, trial)
        self.control.should_training_stop |= self._has_ended()
        return is_best

    def _has_ended(self) -> bool:
        """Also known of a run that is resumed from where it stopped."""
        best, now = self.state.best_global_step, self.state.global_step
        patient = self.patience is None or not best or now - best < self.patience * self.state.eval_steps
        return super()._has_ended() or not patient
