"""Every kind of log-weight against a loop over pairs, in tiles of ragged sizes, and its reverse against the loop over the reversed pairs."""

from __future__ import annotations

import math

import pytest
import torch

from anybatch.core.errors import AnybatchError
from anybatch.losses.log_weights import (
    ClusterLogWeight,
    IdMask,
    PairMask,
    SumLogWeight,
    TaskMask,
    TensorLogWeight,
    as_log_weight,
    inclusion_log_weights,
)

ROWS, COLUMNS = 7, 12  # five explicit negatives behind the positives
MINUS = -math.inf


def whole(log_weight, rows=ROWS, columns=COLUMNS):
    return log_weight.tile(slice(0, rows), slice(0, columns)).expand(rows, columns).double()


def assert_is(log_weight, value, rows=ROWS, columns=COLUMNS):
    """`value(i, j)` for every pair, whole and tile by tile."""
    wanted = torch.tensor([[value(i, j) for j in range(columns)] for i in range(rows)], dtype=torch.float64)
    torch.testing.assert_close(whole(log_weight, rows, columns), wanted, rtol=1e-12, atol=1e-12)
    for start in range(0, rows, 3):
        for first in range(0, columns, 5):
            part = slice(start, min(rows, start + 3)), slice(first, min(columns, first + 5))
            tile = log_weight.tile(*part).double()
            torch.testing.assert_close(tile.expand_as(wanted[part]), wanted[part], rtol=1e-12, atol=1e-12)


def integers(high, *shape, seed):
    return torch.randint(high, shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("seed", range(4))
def test_ids(seed):
    anchor, column = integers(5, ROWS, seed=seed), integers(9, COLUMNS, seed=seed + 50)
    column_anchor = torch.cat([anchor, torch.full((COLUMNS - ROWS,), -1)])
    mask = IdMask(row_positive=column[:ROWS], row_anchor=anchor, column_id=column, column_anchor=column_anchor)
    assert not mask.normalised

    def removed(i, j):
        same = column[i] == column[j] or (j < ROWS and anchor[i] == anchor[j])
        return MINUS if same else 0.0

    assert_is(mask, removed)
    assert_is(mask.gathered([ROWS], [COLUMNS]), removed)

    def back(j, i):  # from positive j to anchor i
        return MINUS if anchor[i] == anchor[j] or column[i] == column[j] else 0.0

    assert_is(mask.reversed(ROWS), back, columns=ROWS)
    # What an anchor's text and a positive's text are called are two spaces: equal numbers mean nothing.
    apart = IdMask(
        row_positive=torch.tensor([0, 1]),
        row_anchor=torch.tensor([1, 0]),
        column_id=torch.tensor([0, 1]),
        column_anchor=torch.tensor([1, 0]),
    )
    assert whole(apart.reversed(2), 2, 2).tolist() == [[MINUS, 0.0], [0.0, MINUS]]


def test_the_reverse_of_ids_has_the_positives_as_rows():
    mask = IdMask(
        row_positive=torch.tensor([10, 11, 12]),
        row_anchor=torch.tensor([0, 1, 2]),
        column_id=torch.tensor([10, 11, 12, 13]),
        column_anchor=torch.tensor([0, 1, 2, -1]),
    ).reversed(3)
    assert mask.row_anchor.tolist() == mask.column_anchor.tolist() == [10, 11, 12]
    assert mask.row_positive.tolist() == mask.column_id.tolist() == [0, 1, 2]


@pytest.mark.parametrize("number", [0, 1, 9])
def test_listed_pairs(number):
    row, column = integers(6, ROWS, seed=1), integers(8, COLUMNS, seed=2)
    listed = {(int(i), int(j)) for i, j in zip(integers(6, number, seed=3), integers(8, number, seed=4))}
    keys = torch.tensor(sorted(i * 8 + j for i, j in listed), dtype=torch.int64)
    mask = PairMask(row_key=row * 8, column_key=column, keys=keys)

    def removed(i, j):
        return MINUS if (int(row[i]), int(column[j])) in listed else 0.0

    assert number < 9 or any(removed(i, j) for i in range(ROWS) for j in range(COLUMNS))
    assert_is(mask, removed)
    assert_is(mask.gathered([ROWS], [COLUMNS]), removed)
    assert_is(mask.reversed(ROWS), lambda j, i: removed(i, j), columns=ROWS)


@pytest.mark.parametrize("tasks", [False, True])
@pytest.mark.parametrize("factors", [False, True])
@pytest.mark.parametrize("by_row", [False, True])
def test_clusters(tasks, factors, by_row):
    generator = torch.Generator().manual_seed(7)
    # -1 belongs to nobody, not to another -1; -5 is a remainder row, the same as itself.
    row = torch.tensor([0, 0, 1, 2, -1, -1, -5])
    column = torch.cat([row, torch.tensor([0, 1, -1, -5, 3])])
    values = [torch.randn(ROWS, generator=generator, dtype=torch.float64) for _ in range(3)]
    if not by_row:
        values = [float(value[0]) for value in values]
    same, other, remainder = (value if by_row else [value] * ROWS for value in values)
    factor = torch.randn(COLUMNS, generator=generator, dtype=torch.float64) if factors else None
    row_task = integers(2, ROWS, seed=8) if tasks else None
    column_task = torch.cat([row_task, integers(2, COLUMNS - ROWS, seed=9)]) if row_task is not None else None
    weight = ClusterLogWeight(
        row_cluster=row,
        column_cluster=column,
        same=values[0],
        other=values[1],
        remainder=values[2],
        column_factor=factor,
        row_task=row_task,
        column_task=column_task,
    )
    assert weight.normalised

    def value(i, j, ways=factor):
        if row_task is not None and column_task is not None and row_task[i] != column_task[j]:
            return MINUS
        own = row[i] == column[j] and row[i] != -1
        kind = same if own else remainder if column[j] < 0 else other
        return float(kind[i]) + (0.0 if ways is None else float(ways[j]))

    assert_is(weight, value)
    assert_is(weight.gathered([ROWS], [COLUMNS]), value)
    # On the way back the columns are anchors, which have one way into the batch.
    assert_is(weight.reversed(ROWS), lambda i, j: value(i, j, None), columns=ROWS)


def test_clusters_beside_a_memory():
    """1 / (chance + share of the memory) for rows of other clusters, at most 1, at most the cap; rows of the own cluster removed on request."""
    row, column = torch.tensor([0, 1, -5]), torch.tensor([0, 1, -5, 2, 0])
    exact, exact_remainder, among = (
        torch.tensor([-0.5, -1.5, -2.5]).double(),
        torch.tensor([-0.7, -1.7, -2.7]).double(),
        0.3,
    )
    for cap, without_own in ((None, False), (1.25, False), (None, True)):
        weight = ClusterLogWeight(
            row_cluster=row,
            column_cluster=column,
            same=-3.0,
            other=-9.0,
            exact_other=exact,
            exact_remainder=exact_remainder,
            among=among,
            cap=cap,
            without_own=without_own,
        )

        def value(i, j, cap=cap, without_own=without_own):
            if row[i] == column[j]:
                return MINUS if without_own else -3.0
            chance = math.exp(-float((exact_remainder if column[j] < 0 else exact)[i]))
            log_weight = -max(0.0, math.log(chance + among))
            return log_weight if cap is None else min(log_weight, -3.0 + math.log(cap))

        assert_is(weight, value, 3, 5)


def test_tasks_of_remembered_columns():
    task, remembered = integers(2, COLUMNS, seed=3), torch.arange(COLUMNS) >= 9
    mask = TaskMask(row_task=task[:ROWS], column_task=task, column_remembered=remembered)
    assert_is(mask, lambda i, j: MINUS if remembered[j] and task[i] != task[j] else 0.0)
    assert_is(TaskMask(row_task=task[:ROWS], column_task=task), lambda i, j: 0.0)
    assert_is(mask.reversed(ROWS), lambda i, j: 0.0, columns=ROWS)


@pytest.mark.parametrize("shape", [(ROWS, COLUMNS), (1, COLUMNS), (ROWS, 1), (1, 1)])
def test_tensors(shape):
    values = torch.randn(*shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    weight = as_log_weight(values, ROWS, COLUMNS)
    assert weight.normalised
    spread = values.expand(ROWS, COLUMNS)
    assert_is(weight, lambda i, j: float(spread[i, j]))
    assert_is(weight.reversed(ROWS), lambda j, i: float(spread[i, j]), columns=ROWS)


def test_a_tensor_of_zeros_and_minus_infinity_is_a_mask():
    values = torch.zeros(ROWS, COLUMNS)
    values[2, 5] = MINUS
    assert not as_log_weight(values, ROWS, COLUMNS).normalised
    for bad in (math.nan, math.inf):
        values[0, 1] = bad
        with pytest.raises(AnybatchError, match="NaN or"):
            as_log_weight(values, ROWS, COLUMNS)


def test_sums():
    mask = PairMask(row_key=torch.arange(ROWS) * 20, column_key=torch.arange(COLUMNS), keys=torch.tensor([3, 47]))
    values = torch.randn(ROWS, COLUMNS, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    both = SumLogWeight(terms=(mask, TensorLogWeight(values=values, normalised=True)))
    assert both.normalised, "masks only remove pairs"
    assert not SumLogWeight(terms=(mask, mask)).normalised

    def value(i, j):
        return MINUS if (i, j) in ((0, 3), (2, 7)) else float(values[i, j])

    assert_is(both, value)
    assert_is(both.reversed(ROWS), lambda j, i: value(i, j), columns=ROWS)


@pytest.mark.parametrize(("num_rows", "beside", "same"), [(2, 1.0, 1.0), (50, 0.02, 1.0), (50, 0.02, 0.8)])
def test_inclusion_weights_are_one_over_the_chance(num_rows, beside, same):
    log_same, log_other = inclusion_log_weights(num_rows, beside, chance_same=same)
    assert math.exp(log_same) == pytest.approx(1 / (same * (num_rows - 1)), rel=1e-12)
    assert math.exp(log_other) == pytest.approx(1 / (beside * (num_rows - 1)), rel=1e-12)
    for cap in (1.0, 3.0, 1000.0):
        capped_same, capped_other = inclusion_log_weights(num_rows, beside, chance_same=same, cap=cap)
        assert capped_same == log_same
        assert capped_other == pytest.approx(min(log_other, log_same + math.log(cap)), rel=1e-12)
