"""`Trainer`: sentence-transformers' Trainer, with a loss of ours, mined batches and all that belongs to them."""

from __future__ import annotations

import copy
import logging
import re
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from datasets import Dataset, IterableDataset
from sentence_transformers import SentenceTransformerTrainer
from torch import nn

from anybatch.core import distributed
from anybatch.core.errors import AnybatchError
from anybatch.core.resources import Measure
from anybatch.data.inputs import Column
from anybatch.integrations.sentence_transformers import card
from anybatch.integrations.sentence_transformers.batches import PlanBatches
from anybatch.integrations.sentence_transformers.callback import (
    LossStateCallback,
    checkpoint_steps,
    last_whole_checkpoint,
    own_rates,
)
from anybatch.integrations.sentence_transformers.collating import ImageCollator, undecoded
from anybatch.integrations.sentence_transformers.loss import BARE, CachedLoss, cached_in, check_wrappers, is_ours
from anybatch.integrations.sentence_transformers.model import Side, is_pretrained, side_prompt, side_task
from anybatch.integrations.sentence_transformers.sets import by_name, input_columns, row_ids, with_index
from anybatch.losses.registry import LossConfig, build_loss, recommended
from anybatch.losses.rows import RowTable
from anybatch.mining.mine import mine_plan
from anybatch.plans.plan import BatchPlan

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer, SentenceTransformerTrainingArguments

logger = logging.getLogger("anybatch")
GUEST_BATCH = 8  # rows of a process where the guest's arguments say nothing


class Trainer(SentenceTransformerTrainer):
    """sentence-transformers' Trainer for contrastive training at any batch size: same arguments, one line changed.

    What a loss of ours needs beside the Trainer is added here: row numbers; which rows have equal inputs and are no
    negatives of each other; the cached step, which decodes images mini-batch by mini-batch; the state of the loss, in
    checkpoints and in the best one; the prompts and routes that the model has for queries and documents; a model card
    that says how the model was trained.

    Args:
        model, args, train_dataset, eval_dataset: As for `SentenceTransformerTrainer`. Columns: anchor, positive and
            optionally negatives, in this order. `args.per_device_train_batch_size` is the contrastive batch of a
            process; memory is that of `mini_batch_size`.
        loss: A loss of anybatch, such as `InfoNCE(temperature=0.05)`; sentence-transformers' losses call its inverse
            `scale=20`. Or any of theirs, which is left as it is. None: the recommended one (docs/recipe.md), which is
            said. Several data sets, a dictionary, have one loss or a dictionary of losses; a stream has `InfoNCE`, or
            any other loss without a state. With `model_init` a loss of ours begins anew with each model.
        more, options: The further arguments of `SentenceTransformerTrainer`, by place or by name.
        plan: Batches of `anybatch mine` or `mine_plan`, an object or a file; of several data sets a list, one each.
        mini_batch_size: Rows that are encoded at once, for losses of ours; "auto" finds it under `memory`. The gradient
            is the same.
        memory: The most memory in use on the device, such as "8GiB" or "80%".
        columns: By name, columns of `train_dataset` that hold row numbers, and what is in those rows (`as_columns`).

    Raises:
        AnybatchError: A plan for a stream, for other data, or of another batch size; columns that cannot be used; a row
            without an anchor or a positive (a negative may be missing, None); a wrapper of sentence-transformers round
            a loss of ours that cannot be in it.

    Example:
        >>> from sentence_transformers import SentenceTransformer
        >>> from anybatch import sample
        >>> def train(folder: str) -> None:  # of a model that a sentence-transformers user has
        ...     trainer = Trainer(SentenceTransformer(folder), train_dataset=sample.load("train").to_dataset())
        ...     trainer.train()
    """

    def __init__(
        self,
        model: SentenceTransformer | None = None,
        args: SentenceTransformerTrainingArguments | None = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        loss: Any = None,
        *more: Any,
        plan: BatchPlan | str | Path | Sequence[BatchPlan | str | Path] | None = None,
        mini_batch_size: int | Literal["auto"] = 32,
        memory: str | int = "80%",
        columns: Mapping[str, Column] | None = None,
        **options: Any,
    ) -> None:
        # 1. The guest's arguments, completed in a copy.
        args = self.training_args_class(output_dir="tmp_trainer") if args is None else copy.copy(args)
        sets = by_name(train_dataset)
        given = [] if plan is None else [plan] if isinstance(plan, (BatchPlan, str, Path)) else plan
        self.plans = [one if isinstance(one, BatchPlan) else BatchPlan.load(one) for one in given]
        if self.plans:
            _take_plans(args, self.plans, sets)
        self.mini_batch_size: int | Literal["auto"] = mini_batch_size
        self.memory, self._columns = memory, columns
        self._inputs = {name: input_columns(part) for name, part in sets.items()}
        args.dataloader_pin_memory &= torch.accelerator.is_available()

        # 2. For losses of ours row numbers, and images as they are stored.
        if model is not None:  # the guest takes functions of the model as well
            made = {name: one(model) if _is_function(one) else one for name, one in by_name(loss).items()}
            loss = made if isinstance(loss, dict) else made[""]
        losses = by_name(loss)
        ours = [name for name in sets if (one := losses.get(name, losses.get(""))) is None or is_ours(one)]
        _say_roles({name: self._inputs[name] for name in ours})
        self._undecoded = len(ours) == len(sets) and options.get("data_collator", (*more, None, None)[1]) is None
        self._numbered: dict[str, Dataset] = {name: sets[name] for name in (sets if self.plans else ours)}
        if not all(isinstance(part, Dataset) for part in self._numbered.values()):
            self._numbered = {}
        if not all("label" in part.column_names for part in self._numbered.values()):
            self._numbered = with_index(self._numbered)
        changed = {**sets, **self._numbered}
        if self._undecoded:
            changed = {name: undecoded(part) if isinstance(part, Dataset) else part for name, part in changed.items()}
        train_dataset = type(train_dataset)(changed) if isinstance(train_dataset, dict) else changed[""]
        super().__init__(model, args, train_dataset, eval_dataset, loss, *more, **options)

        # 3. Checkpoints keep the state of the losses; a loss begins anew with each model of `model_init`.
        self._cached = {name: cached for name, one in by_name(self.loss).items() if (cached := cached_in(one))}
        states = [one for one in self.callback_handler.callbacks if isinstance(one, LossStateCallback)]
        self._keeper = states[0] if states else LossStateCallback(self._cached) if self._cached else None
        if self._keeper is not None and not states:
            self.add_callback(self._keeper)
        self._fresh = {name: copy.deepcopy(one.loss) for name, one in self._cached.items() if self.model_init}
        self._describe({})

    def call_model_init(self, *arguments: Any, **options: Any) -> Any:
        """A new model, for a new run; the losses begin anew with it: what they remember was embedded by the old one."""
        for name, fresh in getattr(self, "_fresh", {}).items():
            self._cached[name].loss = copy.deepcopy(fresh)
        old, model = getattr(self, "model", None), super().call_model_init(*arguments, **options)
        if old is not None and self._cached:  # the card knows the data, which the guest reads once
            model.model_card_data = copy.copy(old.model_card_data)
            model.model_card_data.training_logs = []
            model.model_card_data.register_model(model)
        return model

    def _get_output_dir(self, trial: Any) -> str:
        """The guest's; the trials of a search have a folder each, where the state of the losses goes too."""
        folder = super()._get_output_dir(trial)
        if self._keeper is not None:
            self._keeper.folder = folder
        return folder

    def train(self, resume_from_checkpoint: str | bool | None = None, *arguments: Any, **options: Any) -> Any:
        """As the guest's. `resume_from_checkpoint=True` goes on from the newest checkpoint that is whole."""
        if self._keeper is not None and resume_from_checkpoint is True and checkpoint_steps(str(self.args.output_dir)):
            checkpoint = last_whole_checkpoint(str(self.args.output_dir))
            resume_from_checkpoint = None if checkpoint is None else str(checkpoint)
        if self._keeper is not None and isinstance(resume_from_checkpoint, str):
            self._keeper.resume_from = resume_from_checkpoint
        with Measure() as self.measure:
            output = super().train(resume_from_checkpoint, *arguments, **options)
        steps, resumed = self.state.global_step, bool(resume_from_checkpoint)
        self._describe({"Cost": card.cost_line(steps, self.measure, self.args.device, resumed=resumed)})
        return output

    def _describe(self, further: Mapping[str, str]) -> None:
        """Tell the model's card what is known now, of losses of ours: a learned temperature changes."""
        if not self._cached or self.model is None:
            return
        lines = {}
        for name, cached in self._cached.items():
            lines[f"Loss of {name}" if name else "Loss"] = card.loss_line(cached) + self._recommended
        cached = next(iter(self._cached.values()))
        lines["Batch"] = card.batch_line(self.args.per_device_train_batch_size, cached)
        plan = self.plans[0] if self.plans else getattr(cached.rows, "plan", None)
        card.describe(self.model, {**lines, **card.plan_lines(plan, cached.rows), **further})
        if plan is not None and plan.cluster_size > 1:
            self.model.model_card_data.citations["Mined batches"] = card.bibtex(mine_plan)

    _recommended = ""

    def get_default_loss(self, model: Any) -> nn.Module:
        """The recommended loss for the batch size, and for the plan."""
        batch = self.args.per_device_train_batch_size * distributed.world_size()
        num_rows = len(self._ids["anchor_id"]) if self._numbered else 2
        mined = any(plan.cluster_size > 1 for plan in self.plans)
        name, why = recommended(batch, num_rows, pretrained=is_pretrained(model), mined=mined)
        why = f"batches of {batch}: {why}"
        if not self._numbered or len(self.plans) > 1:
            name = "InfoNCE"
            why = "each data set has its own plan" if self._numbered else "how many rows a stream has is not known"
        if distributed.rank() == 0:  # to whoever set no level of logging as well
            logger.warning("Recommended: %s, temperature 0.05 (%s). See docs/recipe.md.", name, why)
        self._recommended = f" (recommended: {why})"
        return build_loss(LossConfig(name=name.lower()), num_rows=num_rows)

    def prepare_loss(self, loss: Any, model: Any) -> nn.Module:
        """A loss of ours is put behind the cached step, and told what is known of the rows."""
        if _is_function(loss):
            loss = loss(model)
            if is_ours(loss):  # only with model_init: it was not known when the rows were numbered
                raise AnybatchError(
                    f"With model_init, got a function that makes {type(loss).__name__}; expected the loss itself, such "
                    "as loss=InfoNCE(temperature=0.05). It begins anew with each model."
                )
        if isinstance(loss, BARE):
            loss = CachedLoss(model, loss, mini_batch_size=self.mini_batch_size, memory=self.memory)
        check_wrappers(loss)
        cached = cached_in(loss)
        if cached is not None and not self._numbered:
            remembers = any(getattr(part, "needs_index", False) for part in cached.loss.modules())
            streams = [part for part in by_name(self.train_dataset).values() if isinstance(part, IterableDataset)]
            if remembers and not all("label" in (part.column_names or ()) for part in streams):
                raise AnybatchError(
                    f"{type(cached.loss).__name__} remembers rows by their numbers, and a stream has none. Give a "
                    "Dataset, a loss without a memory, such as InfoNCE(temperature=0.05), or a stream that yields each "
                    "row's number as a column 'label'."
                )
        elif cached is not None and cached.rows is None and cached.fewest_columns > 1:
            cached.rows = self._row_table(cached.loss)
        return super().prepare_loss(loss, model)

    @cached_property
    def _ids(self) -> dict[str, Any]:
        return row_ids(self._numbered)

    def _row_table(self, loss: Any) -> RowTable:
        """What is known of the rows; of one mined plan also its weights and what it suspects."""
        plan = self.plans[0] if len(self.plans) == 1 and self.plans[0].cluster_size > 1 else None
        if plan is None:
            return RowTable(**self._ids)
        weights = "inclusion" if getattr(loss, "over_data", False) else "none"
        return RowTable(**self._ids, plan=plan, weights=weights, mask_suspects=plan.suspects is not None)

    def get_data_collator(self, model: Any, args: Any, *arguments: Any, **options: Any) -> Any:
        """With the model's own prompts and routes. For losses of ours images are left to the cached step."""
        _take_sides(args, model, self._inputs)
        collator = super().get_data_collator(model, args, *arguments, **options)
        return ImageCollator(collator, self._columns) if self._undecoded else collator

    def add_model_card_callback(self, default_args_dict: dict[str, Any]) -> None:
        """The card reads the data here: without row numbers, and every cell as a text."""
        sets = self.train_dataset, self.eval_dataset
        self.train_dataset, self.eval_dataset = (card.shown(one, numbered=bool(self._numbered)) for one in sets)
        super().add_model_card_callback(default_args_dict)
        self.train_dataset, self.eval_dataset = sets

    def create_optimizer(self, model: Any = None) -> Any:
        """A class of optimiser that was given has the parameters of the loss and the groups of the Trainer's own."""
        kind, options = self.optimizer_cls_and_kwargs or (None, {})
        plain = isinstance(kind, type) and issubclass(kind, torch.optim.Optimizer)
        if plain and self._cached and not {"params", "model", "optimizer_dict"} & options.keys():
            args = copy.copy(self.args)
            args.optim = "adamw_torch"  # whose groups are taken
            _, made = self.get_optimizer_cls_and_kwargs(args, model)
            self.optimizer_cls_and_kwargs = kind, {**options, "optimizer_dict": made["optimizer_dict"]}
        return super().create_optimizer(model)

    def get_optimizer_cls_and_kwargs(self, args: Any, model: Any = None) -> tuple[Any, dict[str, Any]]:
        """A learned temperature with a rate of its own is a group of its own."""
        named = nn.ModuleDict(self.loss) if isinstance(self.loss, dict) else self.loss
        own = {f"^{re.escape(name)}$": part.lr for name, part in own_rates(named)}
        args = copy.copy(args)
        args.learning_rate_mapping = own | args.learning_rate_mapping
        return super().get_optimizer_cls_and_kwargs(args, model)

    def get_decay_parameter_names(self, model: Any) -> list[str]:
        """Decay would pull a learned log-temperature to 0, the temperature to 1."""
        free = {id(parameter) for one in self._cached.values() for parameter in one.loss.parameters()}
        names = {name for name, parameter in model.named_parameters() if id(parameter) in free}
        return [name for name in super().get_decay_parameter_names(model) if name not in names]

    def get_batch_samples(self, *arguments: Any, **options: Any) -> Any:
        """None after a resume from the last step in mid-epoch, where the base class would train one more."""
        return ([], None) if self._has_ended() else super().get_batch_samples(*arguments, **options)

    def _has_ended(self) -> bool:
        return self.state.global_step >= self.state.max_steps


def _is_function(loss: Any) -> bool:
    """Of the model, that makes the loss."""
    return loss is not None and not isinstance(loss, nn.Module)


def _say_roles(columns: Mapping[str, list[str]]) -> None:
    """Columns count by their order: one that is taken for negatives, and is not called so, is said."""
    for name, of_set in columns.items():
        others = [other for other in of_set[2:] if "neg" not in other.lower()]
        if others and distributed.rank() == 0:
            logger.warning(
                "Columns%s are taken in their order: %r is the anchor, %r the positive, and %s explicit negatives. "
                "Remove those that are none: dataset.remove_columns(...).",
                *(name and f" of {name}", *of_set[:2], " and ".join(map(repr, others))),
            )


def _take_plans(args: Any, plans: Sequence[BatchPlan], sets: Mapping[str, Any]) -> None:
    """The plans as batch sampler, and their batch size where none was given."""
    stream = not all(isinstance(part, Dataset) for part in sets.values())
    if stream or len(plans) != len(sets):
        what = "a stream, whose rows have no numbers" if stream else f"{len(sets)} data set{'s' * (len(sets) > 1)}"
        raise AnybatchError(f"Got {len(plans)} plans for {what}; expected one for each data set.")
    args.batch_sampler = PlanBatches(*plans)
    if args.per_device_train_batch_size == GUEST_BATCH:
        args.per_device_train_batch_size = plans[0].batch_size // distributed.world_size()


def _take_sides(args: Any, model: Any, columns: dict[str, list[str]]) -> None:
    """The model's own prompts and routes, the first column a query and the others documents, where none were given."""
    found: dict[str, dict[str, dict[str, str]]] = {"prompts": {}, "router_mapping": {}}
    for name, of_set in columns.items():
        sides: dict[str, Side] = {column: "document" if place else "query" for place, column in enumerate(of_set)}
        prompts, tasks = (
            {column: of(model, side) for column, side in sides.items()} for of in (side_prompt, side_task)
        )
        found["prompts"][name] = {column: prompt for column, prompt in prompts.items() if prompt}
        found["router_mapping"][name] = {column: task for column, task in tasks.items() if task is not None}
    for key, of_sets in found.items():
        if not getattr(args, key) and any(of_sets.values()):
            setattr(args, key, of_sets.get("", of_sets))
