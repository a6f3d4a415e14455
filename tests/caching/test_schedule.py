"""Plans: every row once, limits kept, longest first."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from anybatch.caching import plan_mini_batches
from anybatch.caching.schedule import count_kept
from anybatch.core.errors import AnybatchError
from tests.caching.helpers import padded


@given(
    lengths=st.lists(st.integers(0, 20), min_size=1, max_size=40),
    mini_batch_size=st.none() | st.integers(1, 9),
    max_tokens=st.integers(1, 60),
    sort=st.booleans(),
)
@settings(max_examples=80, deadline=None)
def test_limits_hold(lengths, mini_batch_size, max_tokens, sort):
    plan = plan_mini_batches(
        padded(lengths, 20), mini_batch_size=mini_batch_size, max_tokens=max_tokens, sort_by_length=sort
    )
    assert sorted(torch.cat(plan).tolist()) == list(range(len(lengths)))
    for rows in plan:
        tokens = len(rows) * max(lengths[row] for row in rows.tolist())
        assert len(rows) == 1 or tokens <= max_tokens
        assert mini_batch_size is None or len(rows) <= mini_batch_size
    # Greedy: the next row would not have fitted.
    for rows, following in itertools.pairwise(plan):
        joined = [*rows.tolist(), int(following[0])]
        full = mini_batch_size is not None and len(rows) == mini_batch_size
        assert full or len(joined) * max(lengths[row] for row in joined) > max_tokens
    order = [lengths[row] for row in torch.cat(plan).tolist()]
    if sort:
        assert order == sorted(lengths, reverse=True)
    else:
        assert torch.cat(plan).tolist() == list(range(len(lengths)))


def test_sorting_saves_padding():
    generator = torch.Generator().manual_seed(0)
    lengths = (torch.randn(512, generator=generator).exp() * 20).clamp(1, 200).long().tolist()

    def padded_tokens(sort):
        plan = plan_mini_batches(padded(lengths, 200), mini_batch_size=32, sort_by_length=sort)
        return sum(len(rows) * max(lengths[row] for row in rows.tolist()) for rows in plan)

    assert padded_tokens(False) > 2 * sum(lengths)
    assert padded_tokens(True) < 1.25 * sum(lengths)


def test_token_budget_counts_padded_tokens():
    """sentence-transformers counts real tokens: rows of 1 and 9 tokens would share a budget of 10."""
    plan = plan_mini_batches(padded([1, 9], 9), mini_batch_size=None, max_tokens=10, sort_by_length=False)
    assert [rows.tolist() for rows in plan] == [[0], [1]]


def test_without_lengths_rows_keep_their_order():
    plan = plan_mini_batches(torch.zeros(7, 2), mini_batch_size=3)
    assert [rows.tolist() for rows in plan] == [[0, 1, 2], [3, 4, 5], [6]]
    with pytest.raises(AnybatchError, match="attention_mask"):
        plan_mini_batches(torch.zeros(7, 2), mini_batch_size=3, max_tokens=10)


@pytest.mark.parametrize("limits", [{"mini_batch_size": None}, {"mini_batch_size": 0}, {"max_tokens": 0}])
def test_bad_limits(limits):
    with pytest.raises(AnybatchError):
        plan_mini_batches(padded([1, 2], 3), **limits)


def test_count_kept():
    assert [count_kept(keep, 8) for keep in (0, 1, 99, 0.0, 0.25, 0.5, 1.0)] == [0, 1, 8, 0, 2, 4, 8]
    assert [count_kept(0.5, number) for number in (1, 3, 5, 6)] == [1, 2, 3, 3]  # the nearest, halves upwards
    assert [count_kept(share, 7) for share in (0.2, 0.3, 0.4, 0.95)] == [1, 2, 3, 7]
    for wrong in (-1, 1.5, -0.1, True, None):
        with pytest.raises(AnybatchError, match="keep_graphs"):
            count_kept(wrong, 8)
