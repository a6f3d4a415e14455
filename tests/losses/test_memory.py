"""The running denominator and its state: visits, growth, shards, versions."""

from __future__ import annotations

import copy
import math

import pytest
import torch

from anybatch.core import distributed
from anybatch.core.errors import AnybatchError
from anybatch.losses import RunningDenominator as Running
from anybatch.losses.denominators import Visits
from anybatch.losses.state import VERSION, join_shards
from tests.ranks import on_ranks


def visit(running, index, values, *, direction=0):
    return running.blend(
        Visits.of(torch.tensor(index)), torch.tensor(values), direction=direction, update=True, dimensions=4
    )


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


def test_a_state_without_its_share_of_entries_or_of_another_version_is_refused():
    state = {
        "log_mean": torch.tensor([[0.5, math.nan, 2.0]]),
        "relative": Running(3).relative,
        "version": torch.tensor(VERSION),
        "embedding_width": torch.tensor(4),
        "shard": torch.tensor([0, 1, 3]),
    }
    for running in (Running(3), Running(3, sharded=True)):
        running.load_state_dict(dict(state))
        assert same(running.log_mean, state["log_mean"])
        assert int(running.state_dict()["embedding_width"]) == 4
        with pytest.raises(AnybatchError, match=f"version 1 .version.; this anybatch reads version {VERSION}"):
            running.load_state_dict({**state, "version": torch.tensor(1)})
        with pytest.raises(AnybatchError, match="missing are shard, unknown here are nothing"):
            running.load_state_dict({name: value for name, value in state.items() if name != "shard"})
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
        results.append(
            running.blend(Visits.of(index[part]), values[part], direction=step % 2, update=step != 6, dimensions=4)
        )
    return results


SHARES = {1: [9], 2: [5, 4], 3: [4, 0, 5]}


def worker(rank, world_size):
    whole, part = Running(23, 2, gamma=0.3), Running(23, 2, gamma=0.3, sharded=True)
    ours, theirs = run(part, SHARES[world_size], rank), run(whole, SHARES[world_size], rank)
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
    rows, values = torch.tensor([25, 0, 7, 7, 3]), torch.tensor([1.0, 2.0, math.nan, math.nan, 4.0])
    assert same(part.read("log_mean", rows, direction=1), whole.read("log_mean", rows, direction=1))
    for running in (part, whole):
        running.write("log_mean", rows, values, direction=0)
    assert same(part.log_mean, whole.log_mean[:, rank::world_size])
    resumed = Running(26, 2, sharded=True)
    for state in (part.state_dict(), whole.state_dict()):  # its own shard, and its part of a whole state
        resumed.load_state_dict(state)
        assert same(resumed.log_mean, part.log_mean)
    if rank:
        with pytest.raises(AnybatchError, match="join_shards"):
            Running(26, 2).load_state_dict(part.state_dict())
    return {"part": part.state_dict(), "whole": whole.state_dict()}


@pytest.mark.distributed
@pytest.mark.parametrize("world_size", [2, 3])
def test_sharded_equals_replicated_bit_for_bit(world_size):
    saved = on_ranks(worker, world_size)
    alone = Running(23, 2, gamma=0.3)
    run(alone, SHARES[1], 0)
    joined = join_shards([rank["part"] for rank in reversed(saved)])
    assert same(joined["log_mean"], saved[0]["whole"]["log_mean"])
    for sharded in (False, True):
        again = Running(26, 2, sharded=sharded)
        again.load_state_dict(joined)  # one process goes on where several were
        assert same(again.log_mean, joined["log_mean"])
    untouched = torch.ones(26, dtype=torch.bool)
    untouched[torch.tensor([25, 0, 7, 3])] = False  # rewritten after the comparison's steps
    assert same(alone.log_mean[1], joined["log_mean"][1])
    assert same(alone.log_mean[0, untouched], joined["log_mean"][0, untouched])
    with pytest.raises(AnybatchError, match="each of 0 to"):
        join_shards([saved[0]["part"]] * world_size)


def test_a_sharded_state_waits_for_its_process_group(monkeypatch):
    running = Running(5, sharded=True)
    assert running.log_mean.shape == (1, 0)
    copied = copy.deepcopy(running)
    visit(running, [1, 4], [0.5, 0.25])
    assert running.log_mean.shape == (1, 5)
    assert copied.log_mean.shape == (1, 0)
    early = Running(5, sharded=True)
    assert early.state_dict()["log_mean"].shape == (1, 5)  # saved before there is a process group
    monkeypatch.setattr(distributed, "world_size", lambda: 2)
    early.state_dict()
    assert early.log_mean.shape == (1, 3)
    monkeypatch.undo()
    running.shard[1] = 4  # as if it came from a run of four ranks
    with pytest.raises(AnybatchError, match="shard 0 of 4; this is rank 0 of 1"):
        visit(running, [1], [0.5])
