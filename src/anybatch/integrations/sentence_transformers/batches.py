"""A plan as sentence-transformers' `batch_sampler`, and row numbers as its `label` column."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import BatchSampler, RandomSampler

from anybatch.core import distributed
from anybatch.core.errors import AnybatchError
from anybatch.data.images import ImageColumn
from anybatch.data.inputs import Column
from anybatch.data.pairs import text_digest
from anybatch.data.records import is_image
from anybatch.losses.rows import RowTable
from anybatch.plans.plan import BatchPlan, PlanSampler

if TYPE_CHECKING:
    from datasets import Dataset

REPEATS = 100  # rows with a number that another row has: so many are compared with it
NUMBERS = (
    "The column of labels must hold row numbers, one for each row of all training sets together. Remove or rename it, "
    "and call with_index on the data set; on several, once on the dictionary of them."
)
Sets = TypeVar("Sets", bound="Dataset | dict[str, Dataset]")


def with_index(dataset: Sets, *, first: int = 0) -> Sets:
    """`dataset` with a column `label` that holds each row's number, which is how the row index reaches the loss.

    Of several, a `DatasetDict` or a dictionary, the numbers run through all, from `first`, so that each row has its
    own: one loss is for all of them. Select, shuffle, split or filter after it as you like: a row keeps its number.

    Raises:
        AnybatchError: A label or score column, which these losses would never read; a stream, whose rows have no fixed
            numbers; no data set.

    Example:
        >>> from datasets import Dataset
        >>> with_index(Dataset.from_dict({"anchor": ["a", "b"], "positive": ["A", "B"]}))["label"][:]
        [0, 1]
    """
    from datasets import Dataset
    from sentence_transformers.util.dataset import DEFAULT_LABEL_COLUMNS

    if isinstance(dataset, dict):
        numbered = {}
        for name, part in dataset.items():
            if isinstance(part, dict):
                raise AnybatchError(f"'{name}' is a dictionary of data sets itself. Give the splits to train on.")
            numbered[name] = with_index(part, first=first)
            first += len(part)
        return type(dataset)(numbered)  # pyright: ignore[reportReturnType] - DatasetDict and dict alike
    if not isinstance(dataset, Dataset):
        raise AnybatchError(
            f"Got a {type(dataset).__name__}; expected a Dataset of the package datasets, or a dictionary of them. "
            "Rows of a stream have no fixed numbers: read it into a Dataset first, or let it yield a column 'label', "
            "the row's own number from 0 to the loss's num_rows - 1."
        )
    taken = [name for name in DEFAULT_LABEL_COLUMNS if name in dataset.column_names]
    if taken:
        raise AnybatchError(
            f"The data set has the column '{taken[0]}', which contrastive losses do not use. Remove or rename it."
        )
    numbers = np.arange(first, first + len(dataset))
    return dataset.add_column(  # pyright: ignore[reportReturnType]
        "label", numbers, new_fingerprint=f"{dataset._fingerprint}-indexed-{first}"
    )


def check_numbers(sets: Sequence[Dataset], num_rows: int | None) -> None:
    """Refuse, before training, a column of labels, scores or classes in the place of row numbers: of the data sets that
    one loss is for, which has `num_rows` (None: any). Rows are read where numbers repeat, 100 of them.
    """
    from sentence_transformers.util.dataset import DEFAULT_LABEL_COLUMNS

    # 1. The numbers of all rows.
    columns = []
    for part in sets:
        for name in [name for name in DEFAULT_LABEL_COLUMNS if name in part.column_names][:1]:
            column = np.asarray(part.with_format("numpy")[name])
            if column.dtype.kind not in "iu" or column.ndim != 1:
                raise AnybatchError(f"The column '{name}' holds {column.dtype}. {NUMBERS}")
            columns.append((part, name, column))
    numbers = np.concatenate([column for _, _, column in columns]) if columns else np.zeros(0, np.int64)
    if not len(numbers):
        return
    _check_range(int(numbers.min()), int(numbers.max()), num_rows)

    # 2. Rows with one number must be the same row.
    order = np.argsort(numbers, kind="stable")
    again = np.flatnonzero(numbers[order][1:] == numbers[order][:-1])[:REPEATS]
    ends = np.cumsum([len(column) for _, _, column in columns])

    def content(place: int) -> dict[str, Any]:
        part, name, _ = columns[int(np.searchsorted(ends, place, side="right"))]
        row = part.with_format(None)[int(place - ends[ends <= place].max(initial=0))]
        return {key: value for key, value in row.items() if key not in (name, "dataset_name")}

    for first, second in zip(order[again], order[again + 1], strict=True):
        if content(first) != content(second):
            raise AnybatchError(f"Two different rows have the number {numbers[first]}. {NUMBERS}")


def _check_range(low: int, high: int, num_rows: int | None) -> None:
    if low < 0 or (num_rows is not None and high >= num_rows):
        expected = "0 or more" if num_rows is None else f"0 to {num_rows - 1}, the rows of the loss or its row table"
        raise AnybatchError(
            f"Row numbers run from {low} to {high}; expected {expected}. Make the loss for all rows of the training "
            "sets, and number these with with_index."
        )


def num_rows_of(loss: nn.Module, rows: RowTable | None) -> int | None:
    """The rows that a loss and its row table are for; None where they take any."""
    sizes = [getattr(module, "num_rows", None) for module in loss.modules()]
    sizes.append(None if rows is None else len(rows.anchor_id))
    return min((size for size in sizes if isinstance(size, int)), default=None)


def row_numbers(labels: Tensor, features: Sequence[dict[str, Any]], num_rows: int | None) -> Tensor:
    """The labels of a batch as row numbers: whole numbers in range, and rows with the same number have the same texts.

    A column of scores or classes would train to nothing without a word. A sort of B numbers, one wait for the device.
    """
    if labels.is_floating_point() or labels.dtype == torch.bool or labels.ndim != 1:
        raise AnybatchError(f"The labels are {labels.dtype} of shape {tuple(labels.shape)}. {NUMBERS}")
    numbers, order = labels.long().sort(stable=True)
    same = numbers[1:] == numbers[:-1]
    low, high, repeats = torch.stack([numbers[0], numbers[-1], same.sum()]).tolist() if len(numbers) else (0, 0, 0)
    _check_range(low, high, num_rows)
    for column in features if repeats else ():
        tokens = column.get("input_ids")
        if tokens is not None and len(tokens) == len(labels):
            first, second = order[:-1][same].to(tokens.device), order[1:][same].to(tokens.device)
            if not torch.equal(tokens[first], tokens[second]):
                raise AnybatchError(
                    f"Different rows of a batch have one number, such as {int(numbers[1:][same][0])}. {NUMBERS}"
                )
    return labels.long()


class PlanBatches:
    """`batch_sampler=PlanBatches(plan)`: batches of the plan for the training set, plain ones for anything else.

    The Trainer sends its evaluation sets through the same argument; they are told from the training set by the row
    numbers that `with_index` put into it. `LossStateCallback` checks that the training set did get the plan.

    Args:
        plan, more_plans: A plan's rows are those of the training set. Several training sets, numbered by one call of
            `with_index`, have a plan each, in their order.

    Raises:
        AnybatchError: A training set with other texts or images than the plan was made for (`data_digest`), shares that
            do not add up to the plan's batch.

    Example:
        >>> from datasets import Dataset
        >>> numbered = with_index(Dataset.from_dict({"anchor": list("abcd"), "positive": list("ABCD")}))
        >>> batches = PlanBatches(BatchPlan.random(4, 2, seed=0))
        >>> [sorted(rows) for rows in batches(numbered, batch_size=2, drop_last=True)]
        [[1, 3], [0, 2]]
    """

    def __init__(self, plan: BatchPlan, *more_plans: BatchPlan) -> None:
        self.plans = (plan, *more_plans)
        self._checked: set[str] = set()  # fingerprints of the data sets whose texts were compared

    def __call__(self, dataset: Dataset, *, batch_size: int, drop_last: bool, **settings: Any) -> BatchSampler:
        """The protocol's factory; `settings` are the generator, seed and label columns that a plan does not need."""
        plan = self._plan_of(dataset)
        if plan is None:
            shuffled = RandomSampler(dataset, generator=settings.get("generator"))
            return BatchSampler(shuffled, batch_size=batch_size, drop_last=drop_last)
        self.check(dataset, plan)
        world_size = distributed.world_size()
        if batch_size * world_size != plan.batch_size:
            raise AnybatchError(
                f"The plan has batches of {plan.batch_size}; the Trainer asks for {batch_size} rows on each of "
                f"{world_size} process(es). Set per_device_train_batch_size to {plan.batch_size // world_size}."
            )
        return PlanSampler(plan, world_size=world_size)

    def check(self, dataset: Dataset, plan: BatchPlan) -> None:
        """Refuse a training set that the plan was not made for: another number of rows, or other texts."""
        if dataset._fingerprint not in self._checked:
            plan.check(num_rows=len(dataset), data_digest=_data_digest(dataset, plan.data_digest))
            self._checked.add(dataset._fingerprint)

    def _plan_of(self, dataset: Dataset) -> BatchPlan | None:
        """The plan whose row numbers the data set has, each in its place."""
        if "label" not in dataset.column_names:
            return None
        numbers, first = np.asarray(dataset.with_format("numpy")["label"]), 0
        for plan in self.plans:
            if np.array_equal(numbers, np.arange(first, first + plan.num_rows)):
                return plan
            first += plan.num_rows
        return None


def _data_digest(dataset: Dataset, expected: str) -> str:
    """The digest of the rows; `expected` itself where nothing can be compared.

    Columns may have been added after mining, such as mined negatives: the first two or more of them decide.
    """
    names = [name for name in dataset.column_names if name != "label"]
    texts = [name for name in names if getattr(dataset.features[name], "dtype", None) in ("string", "large_string")]
    if not expected or len(names) < 2 or not all(name in texts or is_image(dataset.features[name]) for name in names):
        return expected
    columns: list[Column] = [
        dataset.with_format(None)[name][:]  # None is a negative that a row lacks
        if name in texts
        else ImageColumn.of(dataset, name, "the training set")
        for name in names
    ]
    digests = (text_digest(columns[:count]) for count in range(len(columns), 1, -1))
    first = next(digests)
    return expected if expected == first or expected in digests else first
