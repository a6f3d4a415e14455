"""New plans while training: the student itself, which knows by now what it confuses, takes the teacher's place."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback

from anybatch.core import distributed
from anybatch.core.errors import AnybatchError
from anybatch.integrations.sentence_transformers.callback import innermost_sampler
from anybatch.integrations.sentence_transformers.loss import CachedLoss
from anybatch.plans.plan import BatchPlan, PlanSampler


class RefreshPlan(TrainerCallback):
    """Before every `every`-th epoch, make a new plan.

    The plan of epoch e is kept as `plan_epoch_e.safetensors`, so that a resumed run has the batches of the
    uninterrupted one. Give it to the Trainer before `LossStateCallback`, which checks the plan on resume.

    Args:
        loss: The loss given to the Trainer; its row table follows the plan.
        make: Called with the current plan on rank 0; gives the new one, of the same rows and sizes. The others wait.
        every: Epochs that a plan lasts.
        folder: Where plans are kept.
        restart: This is a run begun before, which got no further than its first checkpoint: plans in the folder are its
            own, and are made anew. Otherwise a run that begins where plans are is refused, and nothing is lost.

    Raises:
        AnybatchError: A run that begins in a folder with the plans of another; a new plan of other sizes; resuming in
            an epoch whose plan is gone.

    Cost: what `make` costs, every `every` epochs.

    Example:
        >>> from anybatch.losses import InfoNCE
        >>> loss = CachedLoss(torch.nn.Linear(3, 2), InfoNCE())  # the model: a SentenceTransformer
        >>> shuffled = lambda plan: BatchPlan.random(plan.num_rows, plan.batch_size, seed=plan.seed + 1)
        >>> callbacks = [RefreshPlan(loss, shuffled, every=2, folder="run")]
    """

    def __init__(
        self,
        loss: CachedLoss,
        make: Callable[[BatchPlan], BatchPlan],
        *,
        every: int,
        folder: str | Path,
        restart: bool = False,
    ) -> None:
        self.loss, self.make, self.every, self.folder, self.restart = loss, make, every, Path(folder), restart
        self._begun_plan = 0  # the epoch whose plan is in use

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """On resume, take up the plan of the last step."""
        sampler = innermost_sampler(kwargs.get("train_dataloader"))
        if not isinstance(sampler, PlanSampler):
            raise AnybatchError("RefreshPlan needs a plan to begin with: batch_sampler=PlanBatches(plan).")
        if not state.global_step:
            self._clear()
        elif begun := self._begun(max(0, math.ceil(state.epoch or 0) - 1)):
            if not self._path(begun).exists():
                raise AnybatchError(
                    f"{self._path(begun)} is gone, the plan of the epoch that the run was in. Start a new run, or put "
                    "the file back."
                )
            self._use(sampler, begun)

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Make the plan if it is due."""
        sampler = innermost_sampler(kwargs.get("train_dataloader"))
        begun = self._begun(int(state.epoch or 0))
        if begun == self._begun_plan:
            return
        with distributed.alone() as chosen, torch.random.fork_rng():  # training draws what it would draw without this
            if chosen:  # also where a killed run left a file: it is made of the same weights again
                self.make(sampler.plan).save(self._path(begun))
        self._use(sampler, begun)

    def _begun(self, epoch: int) -> int:
        return epoch // self.every * self.every

    def _path(self, epoch: int) -> Path:
        return self.folder / f"plan_epoch_{epoch}.safetensors"

    def _clear(self) -> None:
        """Remove what the same run, begun before, has left; refuse what another has left."""
        stale = sorted(self.folder.glob("plan_epoch_*.safetensors"))
        with distributed.alone() as chosen:
            if chosen and stale and not self.restart:
                raise AnybatchError(
                    f"{self.folder} holds plans that an earlier run made while training: "
                    f"{', '.join(path.name for path in stale)}. Resume that run from its checkpoint, choose another "
                    "folder, move these files away, or say restart=True if this is the same run begun again."
                )
            for path in stale if chosen else ():
                path.unlink()

    def _use(self, sampler: PlanSampler, begun: int) -> None:
        old, plan = sampler.plan, BatchPlan.load(self._path(begun))
        if plan.data_digest != old.data_digest:
            raise AnybatchError("The new plan is of other data than the run's. Start in another folder.")
        if (plan.num_rows, plan.batch_size, plan.num_batches) != (old.num_rows, old.batch_size, old.num_batches):
            raise AnybatchError(
                f"The new plan has {plan.num_batches} batches of {plan.batch_size} over {plan.num_rows} rows; the run "
                f"has {old.num_batches} of {old.batch_size} over {old.num_rows}. Mine with the same sizes."
            )
        sampler.plan = plan
        if self.loss.rows is not None:
            self.loss.rows.use_plan(plan)
        self._begun_plan = begun
