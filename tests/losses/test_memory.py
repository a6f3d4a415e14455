"""The running denominator and its state: visits, versions, ranks."""

from __future__ import annotations

import math

import pytest
import torch

from anybatch.core.errors import AnybatchError
from anybatch.losses import RunningDenominator as Running
from anybatch.losses.denominators import RunningRule, Visits
from anybatch.losses.state import VERSION
from tests.ranks import on_ranks


def blend(running, index, values, *, direction=0, update=True):
    rule = RunningRule(
        denominator=running, visits=Visits.of(index), direction=direction, log_eps=0.0, normalised=False, update=update
    )
    return rule.blend(values, torch.ones_like(values))


def visit(running, index, values):
    return blend(running, torch.tensor(index), torch.tensor(values))


def same(first, second):
    return first.dtype == second.dtype and torch.equal(first.nan_to_num(-99.0), second.nan_to_num(-99.0))


def test_each_occurrence_uses_its_own_average_and_their_mean_is_stored():
    running = Running(4, gamma=0.25)
    new = visit(running, [0, 1, 1], [math.log(2.0), math.log(4.0), math.log(8.0)])
    assert new.exp().tolist() == pytest.approx([2.0, 4.0, 8.0])
    assert visit(running, [1, 0, 1], [math.log(2.0), math.log(4.0), 0.0]).exp().tolist() == pytest.approx(
        [5.0, 2.5, 4.75]
    )
    assert running.log_mean.exp().nan_to_num(-1).tolist() == [pytest.approx([2.5, 4.875, -1.0, -1.0])]


def test_a_state_without_its_number_of_rows_or_of_another_version_is_refused():
    state = {
        "log_mean": torch.tensor([[0.5, math.nan, 2.0]]),
        "relative": Running(3).relative,
        "version": torch.tensor(VERSION),
        "embedding_width": torch.tensor(4),
        "data_rows": torch.tensor(3),
    }
    running = Running(3)
    running.load_state_dict(dict(state))
    assert same(running.log_mean, state["log_mean"])
    assert int(running.state_dict()["embedding_width"]) == 4
    with pytest.raises(AnybatchError, match=f"version 1 .version.; this anybatch reads version {VERSION}"):
        running.load_state_dict({**state, "version": torch.tensor(1)})
    with pytest.raises(AnybatchError, match="missing are data_rows, unknown here are nothing"):
        running.load_state_dict({name: value for name, value in state.items() if name != "data_rows"})
    with pytest.raises(AnybatchError, match="of embeddings of 5 dimensions, this one of 4"):
        running.load_state_dict({**state, "embedding_width": torch.tensor(5)})
    assert same(running.log_mean, state["log_mean"])
    with pytest.raises(AnybatchError, match=r"for 3 rows, this loss for 4"):
        Running(4).load_state_dict(dict(state))


def run(running, shares, rank):
    """Some steps on this rank's share of each batch, and what each call gave; it grows on the way."""
    results = []
    generator = torch.Generator().manual_seed(7)
    part = slice(sum(shares[:rank]), sum(shares[: rank + 1]))
    for step in range(8):
        if step == 5:
            running.grow(26)
        index = torch.randint(26 if step >= 5 else 23, (sum(shares),), generator=generator)
        values = 3 * torch.randn(sum(shares), generator=generator)
        values[3] = -torch.inf
        results.append(blend(running, index[part], values[part], direction=step % 2, update=step != 6))
    return results


SHARES = {1: [9], 2: [5, 4], 3: [4, 0, 5]}


def worker(rank, world_size):
    running = Running(23, 2, gamma=0.3)
    return run(running, SHARES[world_size], rank), running.log_mean


@pytest.mark.distributed
@pytest.mark.parametrize("world_size", [2, 3])
def test_every_rank_has_the_state_of_one_process_bit_for_bit(world_size):
    alone = Running(23, 2, gamma=0.3)
    wanted = run(alone, SHARES[1], 0)
    ranks = on_ranks(worker, world_size)
    assert all(same(state, alone.log_mean) for _, state in ranks)
    for step, whole in enumerate(wanted):
        assert torch.equal(torch.cat([results[step] for results, _ in ranks]), whole)
