"""A plan as sentence-transformers' `batch_sampler`, and row numbers as its `label` column."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from torch.utils.data import BatchSampler, RandomSampler

from anybatch import distributed
from anybatch.data import text_digest
from anybatch.errors import AnybatchError
from anybatch.pictures import Column, PictureColumn, holds_pictures
from anybatch.plan import BatchPlan, PlanSampler

if TYPE_CHECKING:
    from datasets import Dataset


def with_index(dataset: Dataset) -> Dataset:
    """`dataset` with a column `label` that holds each row's number, which is how the row index reaches the loss.

    Raises:
        AnybatchError: The data set already has a label or score column, which these losses would never read.
    """
    from sentence_transformers.util.dataset import DEFAULT_LABEL_COLUMNS

    taken = [name for name in DEFAULT_LABEL_COLUMNS if name in dataset.column_names]
    if taken:
        raise AnybatchError(
            f"The data set has the column '{taken[0]}', which contrastive losses do not use. Remove or rename it."
        )
    return dataset.add_column("label", np.arange(len(dataset)), new_fingerprint=f"{dataset._fingerprint}-indexed")


class PlanBatches:
    """`batch_sampler=PlanBatches(plan)`: batches of the plan for the training set, plain ones for anything else.

    The Trainer sends its evaluation sets through the same argument; they are told from the training set by the row
    numbers that `with_index` put into it, not by trust. `LossStateCallback` checks that the training set did get the plan.

    Args:
        plan: Its rows are those of the training set.

    Raises:
        AnybatchError: A training set with other texts or pictures than the plan was made for, where the plan knows them
            (`data_digest`) and the columns are texts or pictures; shares that do not add up to the plan's batch.

    Cost: one pass over the texts (about 2 seconds a million short ones) and pictures (1 GB a second) of each data set, once.
    """

    def __init__(self, plan: BatchPlan) -> None:
        self.plan = plan
        self._checked = ""  # fingerprint of the data set whose texts were compared

    def __call__(self, dataset: Dataset, *, batch_size: int, drop_last: bool, **settings: Any) -> BatchSampler:
        """The protocol's factory; `settings` are the generator, seed and label columns that a plan does not need."""
        if not self._is_training_set(dataset):
            return BatchSampler(
                RandomSampler(dataset, generator=settings.get("generator")), batch_size=batch_size, drop_last=drop_last
            )
        self.check(dataset)
        world_size = distributed.world_size()
        if batch_size * world_size != self.plan.batch_size:
            raise AnybatchError(
                f"The plan has batches of {self.plan.batch_size}; the Trainer asks for {batch_size} rows on each of {world_size} process(es). "
                f"Set per_device_train_batch_size to {self.plan.batch_size // world_size}."
            )
        return PlanSampler(self.plan, world_size=world_size)

    def check(self, dataset: Dataset) -> None:
        """Refuse a training set that the plan was not made for: another number of rows, or other texts."""
        if self._checked == dataset._fingerprint:
            return
        self.plan.check(num_rows=len(dataset), data_digest=_data_digest(dataset, self.plan.data_digest))
        self._checked = dataset._fingerprint

    def _is_training_set(self, dataset: Dataset) -> bool:
        if "label" not in dataset.column_names or len(dataset) != self.plan.num_rows:
            return False
        return bool(np.array_equal(np.asarray(dataset.with_format("numpy")["label"]), np.arange(len(dataset))))


def _data_digest(dataset: Dataset, expected: str) -> str:
    """The digest of the rows of `dataset`; `expected` itself where nothing can be compared (no digest, columns of neither texts nor pictures).

    Columns may have been added after mining, such as mined negatives: the first two or more of them decide.
    """
    names = [name for name in dataset.column_names if name != "label"]
    texts = [name for name in names if getattr(dataset.features[name], "dtype", None) in ("string", "large_string")]
    if not expected or len(names) < 2 or not all(name in texts or holds_pictures(dataset, name) for name in names):
        return expected
    columns: list[Column] = [
        [text or "" for text in dataset.with_format(None)[name][:]]
        if name in texts
        else PictureColumn.of(dataset, name, "the training set")
        for name in names
    ]
    digests = (text_digest(columns[:count]) for count in range(len(columns), 1, -1))
    first = next(digests)
    return expected if expected == first or expected in digests else first
