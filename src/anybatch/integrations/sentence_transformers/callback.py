"""What the Trainer's checkpoints leave out: the loss's state, the sampler's epoch, whether the checkpoint is whole."""

from __future__ import annotations

import logging
import traceback
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from safetensors import safe_open
from safetensors.torch import load_file, save
from torch import nn
from transformers import Trainer, TrainerCallback

from anybatch.core import distributed
from anybatch.core.errors import AnybatchError
from anybatch.core.files import CONTENTS, flaw_of, read_json, seal_folder, write_bytes
from anybatch.integrations.sentence_transformers.batches import PlanBatches
from anybatch.integrations.sentence_transformers.loss import CachedLoss
from anybatch.integrations.sentence_transformers.sets import check_numbers, num_rows_of
from anybatch.losses.parts import GlobalTemperature
from anybatch.losses.state import grown_state
from anybatch.plans.plan import BatchPlan, PlanSampler

logger = logging.getLogger("anybatch")
LOSS_STATE = "anybatch_loss.safetensors"
Losses = CachedLoss | Mapping[str, CachedLoss]


class LossStateCallback(TrainerCallback):
    """Saves and restores the state of the loss, sets the epoch of loss and plan, adds the loss's figures to the log.

    Args:
        loss: The loss given to the Trainer; of several data sets with a loss each, the same dictionary.
        resume_from: The checkpoint given to `trainer.train(resume_from_checkpoint=...)` when it is not in the Trainer's
            output folder.
        run: Tells the checkpoints of one run from those of others.
        checked: A checkpoint that was found whole just now (`last_whole_checkpoint`), which is not read a second time.

    Raises:
        AnybatchError: Resuming from a checkpoint that was cut short or damaged, without a loss state, or of a run with
            another plan; the plan given as `batch_sampler` did not reach the training set; an optimiser without the
            parameters of the loss, or with a temperature that has its own rate in a group with others.

    Example:
        >>> from anybatch.integrations.sentence_transformers import CachedLoss
        >>> from anybatch.losses import SogCLR
        >>> loss = CachedLoss(nn.Linear(3, 2), SogCLR(num_rows=1000))  # the model: a SentenceTransformer
        >>> callbacks = [LossStateCallback(loss)]  # SentenceTransformerTrainer(loss=loss, callbacks=callbacks, ...)
    """

    def __init__(
        self, loss: Losses, resume_from: str | Path | None = None, *, run: str = "", checked: Path | None = None
    ) -> None:
        self.losses = dict(loss) if isinstance(loss, Mapping) else {"": loss}
        self.resume_from, self.run, self.checked = resume_from, run, checked
        self.folder: str | None = None  # where the checkpoints are, if not in the Trainer's output folder

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Check the plan and the optimiser; restore the loss."""
        loader = kwargs.get("train_dataloader")
        sets = training_sets(loader)
        if isinstance(getattr(args, "batch_sampler", None), PlanBatches):
            unplanned = max(1, len(sets)) - sum(isinstance(sampler, PlanSampler) for sampler in samplers(loader))
            if unplanned > 0:
                of_sets = f" for {unplanned} of {len(sets)} training sets" if len(sets) > 1 else ""
                raise AnybatchError(
                    f"The plan was not used{of_sets}: a training set is not the one it was made for, or has no row "
                    "numbers. Give the Trainer with_index(dataset), with the rows in the plan's order; of several data "
                    "sets, with_index(dictionary) and PlanBatches(plan, another plan, ...), a plan each."
                )
        for name, loss in self.losses.items():  # of several data sets, those that the loss is for
            own = [part for part in sets if not name or part[0].get("dataset_name") == name]
            check_numbers(own, num_rows_of(loss.loss, loss.rows))
        _check_optimized(self.losses, kwargs.get("optimizer"))
        if state.global_step:
            folder = Path(self.resume_from or Path(str(args.output_dir)) / f"checkpoint-{state.global_step}")
            self._restore(folder, plans=plan_digests(loader))
            if state.is_world_process_zero:
                _warn_of_changes(folder)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Where the Trainer went back to its best checkpoint, the loss goes with it: a model and a loss of one step."""
        if args.load_best_model_at_end and state.best_model_checkpoint:
            self._restore(Path(state.best_model_checkpoint))

    def _restore(self, folder: Path, *, plans: str = "") -> None:
        """Load the loss from a checkpoint, which must be of a run with these plans."""
        if folder != self.checked:
            _check_checkpoint(folder)
        if not (folder / LOSS_STATE).exists():
            raise AnybatchError(
                f"{folder} has no {LOSS_STATE}: it was cut short or saved without LossStateCallback, and the memory of "
                "the loss would start from nothing. Resume from an older checkpoint."
            )
        with safe_open(folder / LOSS_STATE, framework="pt") as file:
            saved = (file.metadata() or {}).get("plan")
        if plans and saved != plans:
            was = f"with the plan {saved[:12]}" if saved else "without a plan"
            raise AnybatchError(
                f"{folder} was trained {was}; the plan given now is {plans[:12]} (digests). "
                "Resume with the plan that the run was started with, or start a new run."
            )
        _state_of(self.losses).load_state_dict(load_file(folder / LOSS_STATE))

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Tell the plan and the loss which epoch this is; after a resume in mid-epoch nobody else does."""
        epoch, loader = int(state.epoch or 0), kwargs.get("train_dataloader")
        told = [innermost_sampler(loader)] if plan_digests(loader) else []
        for part in (*told, *(loss.loss for loss in self.losses.values())):
            set_epoch = getattr(part, "set_epoch", None)
            if callable(set_epoch):
                set_epoch(epoch)

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Tell the loss which step this is: random views are drawn by it."""
        for loss in self.losses.values():
            loss.step = state.global_step

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Give learned temperatures the rate of their own, in place of the schedule's."""
        rates = {id(part.log_temperature): part.current_lr for _, part in own_rates(_state_of(self.losses))}
        for group in kwargs["optimizer"].param_groups if rates else ():
            found = {rates.get(id(parameter)) for parameter in group["params"]}
            if len(found) == 1 and None not in found:
                group["lr"] = found.pop()

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Add the loss to the checkpoint, and last the list of contents."""
        folder = Path(self.folder or str(args.output_dir)) / f"checkpoint-{state.global_step}"
        entries = _state_of(self.losses).state_dict()
        distributed.barrier()
        if state.is_world_process_zero:
            tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in entries.items()}
            digests = plan_digests(kwargs.get("train_dataloader"))
            write_bytes(folder / LOSS_STATE, save(tensors, {"plan": digests} if digests else None))
            seal_folder(folder, run=self.run, threads=torch.get_num_threads())

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        """Add the loss's own figures to the trainer's log."""
        for name, loss in self.losses.items() if logs and "loss" in logs else ():
            figures = getattr(loss.loss, "last_stats", None) or {}
            named = {f"{name}_{key}" if name else key: value for key, value in figures.items()}
            for line in (logs or {}, *state.log_history[-1:]):
                line.update(named)


def own_rates(losses: nn.Module) -> list[tuple[str, GlobalTemperature]]:
    """The learned temperatures with a rate of their own, and the names of their parameters."""
    return [
        (f"{name}.log_temperature", part)
        for name, part in losses.named_modules()
        if isinstance(part, GlobalTemperature) and part.log_temperature is not None and part.lr is not None
    ]


def _check_optimized(losses: Losses, optimizer: Any) -> None:
    """Refuse an optimiser that would leave a parameter of a loss as it is, or give a temperature another's rate."""
    module = _state_of(losses)
    groups = [{id(one) for one in group["params"]} for group in getattr(optimizer, "param_groups", ())]
    own = {id(part.log_temperature) for _, part in own_rates(module)}
    for name, parameter in module.named_parameters() if groups else ():
        found = [group for group in groups if id(parameter) in group]
        if parameter.requires_grad and not found:
            raise AnybatchError(
                f"The optimiser does not have the loss's parameter {name!r}, which would stay as it is. Make the "
                "optimiser of loss.parameters(): they are the model's and the loss's."
            )
        if id(parameter) in own and not found[0] <= own:
            raise AnybatchError(
                f"{name!r} has a learning rate of its own (temperature_lr), and the optimiser has it in a group with "
                "other parameters. Give it a group of its own, or train with anybatch.Trainer and the arguments' optim."
            )


def load_grown_loss(loss: Losses, checkpoint: str | Path) -> None:
    """Give the loss of a new run what the loss of an older run's checkpoint knew, where rows were appended in between.

    Make the loss for the new number of rows, start from the old model, and call this before `trainer.train()`, on every
    rank: it is not a resume, the new run counts its steps from 0. The old rows get their states back, the new ones
    begin fresh.
    """
    folder, module = Path(checkpoint), _state_of(loss)
    if not (folder / LOSS_STATE).exists():
        raise AnybatchError(f"{folder} has no {LOSS_STATE}. Give a checkpoint that was saved with LossStateCallback.")
    if (folder / CONTENTS).exists():  # a file that was brought here by hand has none
        _check_checkpoint(folder)
    try:
        module.load_state_dict(grown_state(load_file(folder / LOSS_STATE), module))
    except RuntimeError as error:
        raise AnybatchError(
            f"The state in {folder} does not fit {type(module).__name__}: {error} Make the loss that was saved."
        ) from error


def checkpoint_steps(folder: str | Path) -> dict[Path, int]:
    """The checkpoints under `folder`, whole or not, and their steps; not `checkpoint-best` and the like."""
    names = {path: path.name.removeprefix("checkpoint-") for path in Path(folder).glob("checkpoint-*") if path.is_dir()}
    return {path: int(number) for path, number in names.items() if number.isdecimal()}


def last_whole_checkpoint(folder: str | Path, *, run: str | None = None) -> Path | None:
    """The newest checkpoint, of this `run` or any, whose every file is as it was written; None if there is none or all
    were cut short. Newer ones that are not whole are named in the log; where all are damaged, an AnybatchError names
    them.
    """
    steps = checkpoint_steps(folder)
    flaws: dict[Path, str] = {}
    for path in sorted(steps, key=lambda path: steps[path], reverse=True):
        flaw = flaw_of(path) if run is None else flaw_of(path, run=run)
        if flaw is None:
            for other, its_flaw in flaws.items():
                logger.warning("%s %s. Training goes on from %s, the last whole one.", other, its_flaw, path.name)
            return path
        flaws[path] = flaw
    if len(flaws) > 1 or any((path / CONTENTS).exists() for path in flaws):  # a kill cuts one short
        told = "; ".join(f"{path.name} {flaw}" for path, flaw in flaws.items())
        raise AnybatchError(
            f"No checkpoint in {folder} is whole: {told}. Bring back its files, or delete it to train from the start."
        )
    for path, flaw in flaws.items():
        logger.warning("%s %s. Training begins anew.", path, flaw)
    return None


def _check_checkpoint(folder: Path) -> None:
    flaw = flaw_of(folder)
    if flaw is not None:
        raise AnybatchError(
            f"{folder} {flaw}. It cannot be trusted (LossStateCallback leaves that list); give an older checkpoint."
        )


def _warn_of_changes(folder: Path) -> None:
    """Say what keeps the resumed run from being the uninterrupted one, bit for bit."""
    ranks, world_size = len(list(folder.glob("rng_state_*.pth"))) or 1, distributed.world_size()
    threads, now = read_json(folder / CONTENTS, "").get("threads"), torch.get_num_threads()
    if ranks != world_size:
        logger.warning(
            "%s was saved by %d processes, and %d go on: random numbers (dropout) are others than they would be.",
            *(folder.name, ranks, world_size),
        )
    if threads not in (None, now):
        logger.warning(
            "%s was saved with %s threads, and %d go on: sums are rounded otherwise. Set OMP_NUM_THREADS=%s for the "
            "same bits.",
            *(folder.name, threads, now, threads),
        )


def _state_of(losses: Losses) -> nn.Module:
    losses = losses if isinstance(losses, Mapping) else {"": losses}
    modules = {name: loss.loss for name, loss in losses.items()}
    return modules[""] if list(modules) == [""] else nn.ModuleDict(modules)


def innermost_sampler(dataloader: Any) -> Any:
    """Walk down through Accelerate's and the Trainer's wrappers to the sampler that makes the batches."""
    sampler: Any = getattr(dataloader, "batch_sampler", None)
    while hasattr(sampler, "batch_sampler"):
        sampler = sampler.batch_sampler
    return sampler


def samplers(dataloader: Any) -> list[Any]:
    """The samplers of the training sets, one each."""
    sampler = innermost_sampler(dataloader)
    return list(getattr(sampler, "batch_samplers", [sampler]))


def plan_digests(dataloader: Any) -> str:
    """What identifies the plans of the training sets; "" without a plan."""
    return " ".join(sampler.plan.digest for sampler in samplers(dataloader) if isinstance(sampler, PlanSampler))


def training_sets(dataloader: Any) -> list[Dataset]:
    """The data sets behind a data loader; none for a stream, whose rows can be looked at only as they come."""
    dataset = getattr(dataloader, "dataset", None)
    return [part for part in getattr(dataset, "datasets", [dataset]) if isinstance(part, Dataset)]


def check_first_step(loss: CachedLoss) -> None:
    """Warn of a Trainer that does not save the loss, and of mined batches taken for a uniform sample."""
    frames = (frame for frame, _ in traceback.walk_stack(None) if frame.f_code.co_name == "compute_loss")
    owners = (frame.f_locals.get("self") for frame in frames)  # to look at a frame's variables keeps them alive
    trainer = next((owner for owner in owners if isinstance(owner, Trainer)), None)
    if trainer is not None:
        _check_is_saved(loss, trainer)
    plans: tuple[BatchPlan | None, ...] = () if loss.rows is None else (loss.rows.plan,)
    if trainer is not None and isinstance(batches := getattr(trainer.args, "batch_sampler", None), PlanBatches):
        plans += batches.plans
    mined = any(plan is not None and plan.cluster_size > 1 for plan in plans)
    weighted = loss.rows is not None and loss.rows.weights == "inclusion"
    if mined and not weighted and getattr(loss.loss, "over_data", False) and distributed.rank() == 0:
        logger.warning(
            "%s takes the batch's negatives for a uniform sample of the data, and the plan's batches are mined. Give "
            "it rows=RowTable(..., plan=plan, weights='inclusion'), or use random batches or InfoNCE.",
            type(loss.loss).__name__,
        )


def _check_is_saved(loss: CachedLoss, trainer: Trainer) -> None:
    saving = [callback for callback in trainer.callback_handler.callbacks if isinstance(callback, LossStateCallback)]
    if len(saving) > 1:
        raise AnybatchError(
            f"The Trainer has {len(saving)} LossStateCallbacks; expected one, as all write {LOSS_STATE}. Of several "
            "losses give it the dictionary that the Trainer has: LossStateCallback(losses)."
        )
    saves = trainer.args.save_strategy != "no" or trainer.args.load_best_model_at_end
    saved = any(known is loss for callback in saving for known in callback.losses.values())
    if saves and loss.loss.state_dict() and not saved:
        warnings.warn(
            f"The Trainer's checkpoints leave out the state of {type(loss.loss).__name__}, which would begin anew "
            "after a resume. Give it callbacks=[LossStateCallback(loss)].",
            stacklevel=3,
        )
