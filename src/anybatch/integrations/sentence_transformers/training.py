"""Train a model on pairs with a plan and a loss: the Trainer, set up so that a killed run resumes exactly."""

from __future__ import annotations

import errno
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from anybatch.caching.device_memory import parse_memory
from anybatch.core import distributed
from anybatch.core.configuration import Configuration, Count, Fraction, Positive
from anybatch.core.errors import AnybatchError

if TYPE_CHECKING:
    from datasets import Dataset
    from sentence_transformers import SentenceTransformer
    from transformers import TrainerCallback

    from anybatch.data.inputs import Column
    from anybatch.integrations.sentence_transformers.loss import CachedLoss
    from anybatch.plans.plan import BatchPlan


@dataclass(frozen=True, kw_only=True)
class TrainConfig(Configuration):
    """How long and how fast.

    Attributes:
        epochs: Passes over the data.
        optimizer: "adamw", or "lars" (momentum .9), whose steps follow the norms of the weights: published for SimCLR
            and SogCLR on images, at rates of .1 to 5.
        learning_rate: Peak learning rate. Tune it for each batch size.
        mini_batch_size: Rows per encoder forward pass; "auto" finds the padded tokens that `memory` has room for.
        keep_graphs: Fraction of the mini-batches whose graph is kept, so that they need no second forward pass; "auto"
            keeps what `memory` has room for. The gradient is the same to the last bit.
        memory: The most memory in use on the device, such as "8GiB" or "80%".
        gradient_checkpointing: Of the transformer: a graph keeps the inputs of its layers alone, and its backward pass
            computes the layers again.
        save_steps: Steps between checkpoints (the two newest whole ones are kept).
        eval_steps: Steps between evaluations on the held-out pairs; None for the end only.
        args: Further arguments of sentence-transformers' Trainer, such as {bf16: true, max_steps: 1000, weight_decay:
            .01, max_grad_norm: .5, report_to: tensorboard}. Ours, unless given: warmup_steps .1 (a fraction of the
            steps, over which the learning rate rises), lr_scheduler_type linear (cosine for `data.views`),
            logging_steps 10. With `eval_steps`: load_best_model_at_end (a checkpoint at each evaluation then),
            metric_for_best_model (ndcg@10), and early_stopping_patience, evaluations without a better figure after
            which training stops.

    Example:
        >>> TrainConfig(epochs=2, learning_rate=2e-5).save_steps
        200
    """

    epochs: Count = 1
    optimizer: Literal["adamw", "lars"] = "adamw"
    learning_rate: Positive = 5e-5
    mini_batch_size: Count | Literal["auto"] = 32
    keep_graphs: Fraction | Literal["auto"] = "auto"
    memory: str | int = "80%"
    gradient_checkpointing: bool = False
    save_steps: Count = 200
    eval_steps: Count | None = None
    args: dict[str, Any] = field(default_factory=dict)

    section: ClassVar[str] = "train"

    def __post_init__(self) -> None:
        super().__post_init__()
        parse_memory(self.memory, 2**40)  # a wrong form is reported before anything is read


@dataclass(frozen=True, kw_only=True)
class TrainResult:
    """What `train_model` did: the lines of `log.jsonl` (the first rank's), wall time of the last session without
    evaluations, peak resident memory meanwhile.

    Example:
        >>> log = [{"step": 1, "loss": 2.1}]
        >>> TrainResult(log=log, num_steps=1, train_seconds=4.0, train_peak_bytes=2**30).log[-1]["loss"]
        2.1
    """

    log: list[dict[str, Any]]
    num_steps: int
    train_seconds: float
    train_peak_bytes: int


def train_model(
    model: SentenceTransformer,
    loss: CachedLoss,
    dataset: Dataset,
    plan: BatchPlan,
    config: TrainConfig,
    *,
    output: str | Path,
    seed: int = 0,
    resume: bool = False,
    evaluate: Callable[[SentenceTransformer], dict[str, float]] | None = None,
    progress: Callable[[int, int, dict[str, float]], None] | None = None,
    callbacks: Sequence[TrainerCallback] = (),
    run: str = "",
    columns: Mapping[str, Column] | None = None,
) -> TrainResult:
    """Train `model` in place; checkpoints under `output/checkpoints`, log lines in `output/log.jsonl`.

    On the CPU a killed and resumed run ends with the weights of the uninterrupted one, bit for bit. Ctrl-C ends the
    step and writes a checkpoint first.

    Args:
        model, loss: The encoder, and the loss around it. The first column is a query, the others documents, with the
            model's own prompts and routes.
        dataset: Columns anchor, positive, negatives..., in the plan's row order; row numbers are added here. Images
            are decoded mini-batch by mini-batch.
        output: Folder of the run; must exist, without checkpoints or a log of another.
        seed: Of dropout and the like. The batches follow the plan's own seed.
        resume: Go on from the last whole checkpoint; with none, start from the beginning.
        evaluate: Called with the model every `eval_steps`; its figures go into the log.
        progress: Called with (steps done, steps in all, latest figures).
        callbacks: Further callbacks, which run before the loss is restored or saved and before the log is written.
        run: Tells the checkpoints of this run from those of others, which are not resumed.
        columns: By name, the columns of `dataset` that hold row numbers instead of texts, and what is in those rows.
    """
    from transformers import PrinterCallback, ProgressCallback

    from anybatch.integrations.sentence_transformers.arguments import PATIENCE, optimizer_of, training_arguments
    from anybatch.integrations.sentence_transformers.batches import PlanBatches
    from anybatch.integrations.sentence_transformers.callback import LossStateCallback
    from anybatch.integrations.sentence_transformers.model import checkpoint_layers
    from anybatch.integrations.sentence_transformers.recorder import EvaluatedTrainer, Recorder, StopAfterStep
    from anybatch.integrations.sentence_transformers.sets import with_index

    # 1. What can be refused before anything is written.
    output = Path(output)
    if config.eval_steps is not None and evaluate is None:
        raise AnybatchError(f"train.eval_steps is {config.eval_steps}; give something to evaluate, or leave it out.")
    check_shared_equally(plan.batch_size)
    if config.gradient_checkpointing:
        checkpoint_layers(model)
    indexed, batches = with_index(dataset), PlanBatches(plan)
    batches.check(indexed, plan)
    optimizer = optimizer_of(config)
    checkpoint = _checkpoint_to_resume(output, resume, run)

    # 2. The Trainer.
    recorder, stop, on_cpu = Recorder(output / "log.jsonl", progress), StopAfterStep(), model.device.type == "cpu"
    trainer = EvaluatedTrainer(
        model=model,
        args=training_arguments(config, output / "checkpoints", batches=batches, seed=seed, on_cpu=on_cpu),
        train_dataset=indexed,
        loss=loss,
        optimizer_cls_and_kwargs=optimizer,
        columns=columns,
        figures=evaluate,
        patience=config.args.get(PATIENCE),
        callbacks=[*callbacks, LossStateCallback(loss, run=run, checked=checkpoint), recorder, stop],
    )
    recorder.trainer = trainer
    for callback in (PrinterCallback, ProgressCallback):  # progress is shown by ours
        trainer.remove_callback(callback)

    # 3. Training.
    try:
        with stop:
            trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint is not None else None)
    except AnybatchError:
        raise
    except Exception as error:
        if not _is_write_failure(error):
            raise
        raise AnybatchError(
            f"Writing under {output} failed: {error}. Older whole checkpoints are unchanged: free some space, then go "
            "on with --resume."
        ) from error
    return TrainResult(
        log=recorder.lines,
        num_steps=trainer.state.global_step,
        train_seconds=trainer.measure.seconds - trainer.evaluation_seconds,
        train_peak_bytes=trainer.measure.peak_bytes,
    )


def _checkpoint_to_resume(output: Path, resume: bool, run: str) -> Path | None:
    """The last whole checkpoint of the run, for whoever resumes; what a kill left unfinished after it is deleted."""
    from anybatch.integrations.sentence_transformers.callback import checkpoint_steps, last_whole_checkpoint

    checkpoints = output / "checkpoints"
    steps = checkpoint_steps(checkpoints)
    if not resume and (steps or (output / "log.jsonl").exists()):
        raise AnybatchError(
            f"{output} already holds checkpoints or a log. Go on with it (resume=True), or choose another folder."
        )
    checkpoint = last_whole_checkpoint(checkpoints, run=run) if resume else None
    if distributed.rank() == 0:
        newest = steps[checkpoint] if checkpoint is not None else -1
        for path in (path for path, step in steps.items() if step > newest):
            shutil.rmtree(path)
    distributed.barrier()  # nobody trains, or writes, before all have looked
    return checkpoint


def check_shared_equally(batch_size: int) -> None:
    """Refuse a batch that the processes cannot share."""
    world_size = distributed.world_size()
    if batch_size % world_size:
        raise AnybatchError(
            f"{world_size} processes cannot share a batch of {batch_size} equally. Use a multiple of {world_size}."
        )


def _is_write_failure(error: Exception) -> bool:
    """Disk full and the like, in the forms that the writers of a checkpoint give it."""
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO):
        return True
    # A file that cannot be read is another matter: "Error while deserializing".
    forms = ("Error while serializing", "PytorchStreamWriter", "unexpected pos", "iostream error", "No space left")
    return any(words in str(error) for words in forms)
