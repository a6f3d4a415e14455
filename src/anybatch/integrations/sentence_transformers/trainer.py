"""`Trainer`: sentence-transformers' Trainer, with a loss of ours, mined batches and all that belongs to them."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from datasets import Dataset, IterableDataset
from sentence_transformers import SentenceTransformerTrainer
from sentence_transformers.util.dataset import DEFAULT_LABEL_COLUMNS
from torch import nn

from anybatch.core import distributed
from anybatch.core.errors import AnybatchError
from anybatch.data.images import ImageColumn, holds_images
from anybatch.data.inputs import Column
from anybatch.data.pairs import PairData, PairSet, join_pairs
from anybatch.integrations.sentence_transformers.batches import PlanBatches, with_index
from anybatch.integrations.sentence_transformers.callback import (
    LossStateCallback,
    checkpoint_steps,
    last_whole_checkpoint,
)
from anybatch.integrations.sentence_transformers.collating import ImageCollator, undecoded
from anybatch.integrations.sentence_transformers.loss import CachedLoss, CachedTrainerLoss
from anybatch.integrations.sentence_transformers.model import Side, side_prompt, side_task
from anybatch.losses import InfoNCE
from anybatch.losses.base import ContrastiveLoss
from anybatch.losses.registry import LossConfig, build_loss, recommended
from anybatch.losses.rows import RowTable
from anybatch.plans.plan import BatchPlan

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer, SentenceTransformerTrainingArguments

logger = logging.getLogger("anybatch")
GUEST_BATCH = 8  # rows of a process where the guest's arguments say nothing


class Trainer(SentenceTransformerTrainer):
    """sentence-transformers' Trainer for contrastive training at any batch size: same arguments, one line changed.

    What a loss of ours needs beside the Trainer is added here: row numbers; which rows have equal inputs and are no
    negatives of each other; the cached step, which decodes images micro-batch by micro-batch; the state of the loss, in
    checkpoints and in the best one; the prompts and routes that the model has for queries and documents.

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
            without an anchor or a positive (a negative may be missing, None).

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
        given = [] if plan is None else [plan] if isinstance(plan, (BatchPlan, str, Path)) else plan
        self.plans = [one if isinstance(one, BatchPlan) else BatchPlan.load(one) for one in given]
        sets = _sets_of(train_dataset)
        if self.plans:
            _take_plans(args, self.plans, sets)
        parts = train_dataset if isinstance(train_dataset, dict) else {"": train_dataset}
        self._column_names = {name: _columns_of(one) for name, one in parts.items()}

        # 2. For losses of ours, row numbers, what is known of the rows, and images as they are stored.
        self.mini_batch_size: int | Literal["auto"] = mini_batch_size
        self.memory, self._columns = memory, columns
        self._ids: dict[str, Any] | None = None
        self._fresh: list[tuple[CachedTrainerLoss, nn.Module]] = []
        if model is not None:
            loss = (
                {name: _made(one, model) for name, one in loss.items()}
                if isinstance(loss, dict)
                else _made(loss, model)
            )
        losses = list(loss.values()) if isinstance(loss, dict) else [loss]
        ours = [one is None or _is_ours(one) for one in losses]
        self._undecoded = all(ours) and options.get("data_collator", more[1] if len(more) > 1 else None) is None
        if sets and any(one is None or isinstance(one, ContrastiveLoss) for one in losses):
            self._ids = _ids_of(sets)
        if sets and (self.plans or any(ours)):
            if not all("label" in one.column_names for one in sets.values()):
                train_dataset = with_index(train_dataset)
            if self._undecoded:
                train_dataset = _mapped(undecoded, train_dataset)
        super().__init__(model, args, train_dataset, eval_dataset, loss, *more, **options)

        # 3. Checkpoints keep the state of the losses.
        named = self.loss if isinstance(self.loss, dict) else {"": self.loss}
        kept = {name: cached for name, one in named.items() if (cached := _cached_in(one)) is not None}
        states = [one for one in self.callback_handler.callbacks if isinstance(one, LossStateCallback)]
        self._keeper = states[0] if states else LossStateCallback(kept) if kept else None
        if self._keeper is not None and not states:
            self.add_callback(self._keeper)
        if kept:
            self.model.model_card_data.add_tags("anybatch")
        if self.model_init is not None:
            self._fresh = [(cached, copy.deepcopy(cached.loss)) for cached in kept.values()]

    def call_model_init(self, *arguments: Any, **options: Any) -> Any:
        """A new model, for a new run; the losses begin anew with it: what they remember was embedded by the old one."""
        for cached, fresh in self._fresh:
            cached.loss = copy.deepcopy(fresh)
        return super().call_model_init(*arguments, **options)

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
        return super().train(resume_from_checkpoint, *arguments, **options)

    def get_default_loss(self, model: Any) -> nn.Module:
        """The recommended loss for the batch size, and for the plan."""
        if self._ids is None or len(self.plans) > 1:
            why = "a stream has no row numbers" if self._ids is None else "each data set has its own plan"
            _say("Recommended: InfoNCE, temperature 0.05 (%s). See docs/recipe.md.", why)
            return InfoNCE(temperature=0.05)
        batch = self.args.per_device_train_batch_size * distributed.world_size()
        name, why = recommended(batch)
        _say("Recommended: %s, temperature 0.05 (batches of %d: %s). See docs/recipe.md.", name, batch, why)
        return build_loss(LossConfig(name=name), num_rows=len(self._ids["anchor_id"]))

    def prepare_loss(self, loss: Any, model: Any) -> nn.Module:
        """A loss of ours is put behind the cached step."""
        function = not isinstance(loss, nn.Module)
        loss = _made(loss, model)
        if function and _is_ours(loss):  # only with model_init: it was not known when the rows were numbered
            raise AnybatchError(
                f"With model_init, got a function that makes {type(loss).__name__}; expected the loss itself, such as "
                "loss=InfoNCE(temperature=0.05). It begins anew with each model."
            )
        if isinstance(loss, ContrastiveLoss):
            if _has_no_numbers(self.train_dataset) and any(
                getattr(part, "needs_index", False) for part in loss.modules()
            ):
                raise AnybatchError(
                    f"{type(loss).__name__} remembers rows by their numbers, and a stream has none. Give a Dataset, a "
                    "loss without a memory, such as InfoNCE(temperature=0.05), or a stream that yields each row's "
                    "number as a column 'label'."
                )
            rows = None if self._ids is None else self._rows_for(loss).to(model.device)
            loss = CachedLoss(model, loss, rows=rows, micro_batch=self.mini_batch_size, memory=self.memory)
        return super().prepare_loss(loss, model)

    def _rows_for(self, loss: ContrastiveLoss) -> RowTable:
        """What is known of the rows; of one mined plan also its weights and what it suspects."""
        assert self._ids is not None
        plan = self.plans[0] if len(self.plans) == 1 and self.plans[0].cluster_size > 1 else None
        if plan is None:
            return RowTable(**self._ids)
        weights = "inclusion" if loss.inclusion else "none"
        return RowTable(**self._ids, plan=plan, weights=weights, mask_suspects=plan.suspects is not None)

    def get_data_collator(self, model: Any, args: Any, *arguments: Any, **options: Any) -> Any:
        """With the model's own prompts and routes. For losses of ours images are left to the cached step."""
        _take_sides(args, model, self._column_names)
        collator = super().get_data_collator(model, args, *arguments, **options)
        return ImageCollator(collator, self._columns) if self._undecoded else collator

    def add_model_card_callback(self, default_args_dict: dict[str, Any]) -> None:
        """The card reads every cell as a text; to it a negative that a row lacks is an empty one."""
        sets = self.train_dataset, self.eval_dataset
        self.train_dataset, self.eval_dataset = (one and _mapped(_without_gaps, one) for one in sets)
        super().add_model_card_callback(default_args_dict)
        self.train_dataset, self.eval_dataset = sets

    def get_decay_parameter_names(self, model: Any) -> list[str]:
        """Decay would pull a learned log-temperature to 0, the temperature to 1."""
        losses = self.loss.values() if isinstance(self.loss, dict) else [self.loss]
        cached = [one for one in map(_cached_in, losses) if one is not None]
        free = {id(parameter) for one in cached for parameter in one.loss.parameters()}
        names = {name for name, parameter in model.named_parameters() if id(parameter) in free}
        return [name for name in super().get_decay_parameter_names(model) if name not in names]

    def get_batch_samples(self, *arguments: Any, **options: Any) -> Any:
        """None after a resume from the last step in mid-epoch, where the base class would train one more."""
        return ([], None) if self._has_ended() else super().get_batch_samples(*arguments, **options)

    def _has_ended(self) -> bool:
        return self.state.global_step >= self.state.max_steps


def _sets_of(dataset: Any) -> dict[str, Dataset]:
    """The training sets that have rows with numbers, by name; none for a stream."""
    sets = dataset if isinstance(dataset, dict) else {"": dataset}
    return dict(sets) if sets and all(isinstance(one, Dataset) for one in sets.values()) else {}


def _mapped(change: Callable[[Dataset], Dataset], dataset: Any) -> Any:
    if isinstance(dataset, dict):
        return type(dataset)({name: change(one) for name, one in dataset.items()})
    return change(dataset)


def _without_gaps(dataset: Any) -> Any:
    """With "" for None where columns of texts have any; a stream and a data set that has a transform stay."""
    if not isinstance(dataset, Dataset) or dataset.format["type"] == "custom":
        return dataset
    if not any(_holds_texts(dataset, name) and dataset.data.column(name).null_count for name in dataset.column_names):
        return dataset
    return dataset.with_transform(
        lambda cells: {name: ["" if cell is None else cell for cell in column] for name, column in cells.items()}
    )


def _holds_texts(dataset: Dataset, column: str) -> bool:
    return getattr(dataset.features[column], "dtype", None) in ("string", "large_string")


def _say(line: str, *values: Any) -> None:
    """To whoever set no level of logging as well."""
    if distributed.rank() == 0:
        logger.warning(line, *values)


def _made(loss: Any, model: Any) -> Any:
    """The loss itself, where the guest takes a function of the model that makes it."""
    return loss if loss is None or isinstance(loss, nn.Module) else loss(model)


def _has_no_numbers(dataset: Any) -> bool:
    return isinstance(dataset, IterableDataset) and "label" not in (dataset.column_names or ())


def _columns_of(dataset: Any) -> list[str]:
    names = getattr(dataset, "column_names", None) or ()
    return [name for name in names if name not in (*DEFAULT_LABEL_COLUMNS, "dataset_name")]


def _take_plans(args: Any, plans: Sequence[BatchPlan], sets: dict[str, Dataset]) -> None:
    """The plans as batch sampler, and their batch size where none was given."""
    if len(plans) != len(sets):
        what = f"{len(sets)} data set{'s' if len(sets) > 1 else ''}" if sets else "a stream, whose rows have no numbers"
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


def _ids_of(sets: dict[str, Dataset]) -> dict[str, Any]:
    """Ids of the inputs of all data sets together: equal ones are no negatives of each other."""
    parts = [_pairs_of(name, one) for name, one in sets.items()]
    width = max(len(part.negatives) for part in parts)
    # Of a set with fewer negatives the others are never asked for: any ids will do.
    parts = [
        replace(part, negatives=(*part.negatives, *[part.positives] * (width - len(part.negatives)))) for part in parts
    ]
    named = [PairSet(name=f"set {number}", num_rows=len(part)) for number, part in enumerate(parts)]
    pairs = parts[0] if len(parts) == 1 else join_pairs(parts, named)
    return {"anchor_id": pairs.anchor_id, "positive_id": pairs.positive_id, "negative_id": pairs.negative_id}


def _pairs_of(name: str, dataset: Dataset) -> PairData:
    """The columns of a data set; what is neither text nor image counts as different in every row."""
    names = _columns_of(dataset)
    if len(names) < 2:
        raise AnybatchError(
            f"The data set {name or 'to train on'} has the columns {', '.join(dataset.column_names)}; expected an "
            "anchor, a positive and optionally negatives, in this order, besides labels."
        )
    anchors, positives, *negatives = (_column(name, dataset, column) for column in names)
    for column, cells in zip(names, (anchors, positives), strict=False):
        if isinstance(cells, list) and None in cells:
            raise AnybatchError(
                f"The data set {name or 'to train on'} has nothing in column '{column}' in row {cells.index(None) + 1}"
                "; expected an anchor and a positive in every row. Leave such rows out (Dataset.filter)."
            )
    return PairData(anchors=anchors, positives=positives, negatives=tuple(negatives))


def _column(name: str, dataset: Dataset, column: str) -> Any:
    if holds_images(dataset, column):
        return ImageColumn.of(dataset, column, "the training set")
    if _holds_texts(dataset, column):
        return dataset.with_format(None)[column][:]
    return [f"{name} {column} {row}" for row in range(len(dataset))]


def _is_ours(loss: Any) -> bool:
    ours = (ContrastiveLoss, CachedTrainerLoss)
    return isinstance(loss, nn.Module) and any(isinstance(part, ours) for part in loss.modules())


def _cached_in(loss: nn.Module) -> CachedTrainerLoss | None:
    """The cached loss itself, or inside a wrapper such as `MatryoshkaLoss`."""
    return next((part for part in loss.modules() if isinstance(part, CachedTrainerLoss)), None)
