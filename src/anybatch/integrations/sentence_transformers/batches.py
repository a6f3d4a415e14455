"""A plan as sentence-transformers' `batch_sampler`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from torch.utils.data import BatchSampler, RandomSampler

from anybatch.core import distributed
from anybatch.core.errors import AnybatchError
from anybatch.data.pairs import text_digest
from anybatch.integrations.sentence_transformers.sets import cells_of, input_columns
from anybatch.plans.plan import BatchPlan, PlanSampler

if TYPE_CHECKING:
    from datasets import Dataset


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
        >>> from anybatch.integrations.sentence_transformers import with_index
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
    """The digest of the rows; `expected` itself where nothing can be compared. Columns may have been added after
    mining, such as mined negatives: the first two or more of them decide.
    """
    names = input_columns(dataset) if expected else []
    columns = [cells for name in names if (cells := cells_of(dataset, name)) is not None]
    if len(columns) < max(2, len(names)):
        return expected
    digests = (text_digest(columns[:count]) for count in range(len(columns), 1, -1))
    first = next(digests)
    return expected if expected == first or expected in digests else first
