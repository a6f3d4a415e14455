"""The memory itself: keys, growth, float16, shards, versions."""

from __future__ import annotations

import copy
import math

import numpy as np
import pytest
import torch
from anybatch.losses.memory import VERSION, ExampleMemory
from anybatch.losses.memory_states import grown_state, join_shards

from anybatch.core import distributed
from anybatch.core.errors import AnybatchError
from anybatch.losses import SogCLR
from tests.ranks import on_ranks

KEYS = [7, 3, 7, -2, 3, 3, 9]  # slots 0 1 0 2 1 1 3


def visit(memory, index, values, *, gamma=0.5, direction=0, update=True):
    return memory.blend(
        torch.tensor(index), torch.tensor(values), direction=direction, gamma=gamma, update=update, dimensions=4
    )


def same(first, second):
    return first.dtype == second.dtype and torch.equal(first.nan_to_num(-99.0), second.nan_to_num(-99.0))


class TestKeys:
    def test_rows_of_one_key_share_a_state(self):
        memory = ExampleMemory.from_keys(KEYS)
        assert (memory.num_rows, memory.num_slots, memory.keyed) == (7, 4, True)
        assert memory.slot.tolist() == [0, 1, 0, 2, 1, 1, 3]
        new = visit(memory, [0, 1, 5], [math.log(2.0), math.log(4.0), math.log(8.0)])
        assert new.exp().tolist() == pytest.approx([2.0, 6.0, 6.0])  # rows 1 and 5 are one query: the mean of 4 and 8
        new = visit(memory, [2], [math.log(4.0)])
        assert new.exp().tolist() == pytest.approx([3.0])  # row 2 goes on from what row 0 left
        assert memory.read(torch.tensor([0, 2, 4, 6])).exp().nan_to_num(-1).tolist() == pytest.approx([3, 3, 6, -1])

    def test_equals_a_plain_memory_given_keys_as_index(self):
        memory, plain = ExampleMemory.from_keys(KEYS), ExampleMemory(4)
        generator = torch.Generator().manual_seed(0)
        for _ in range(5):
            rows = torch.randint(7, (6,), generator=generator)
            values = torch.randn(6, generator=generator)
            ours = memory.blend(rows, values, direction=0, gamma=0.3, update=True, dimensions=4)
            theirs = plain.blend(memory.slot[rows], values, direction=0, gamma=0.3, update=True, dimensions=4)
            assert torch.equal(ours, theirs)
        assert same(memory.log_mean, plain.log_mean)

    def test_the_map_is_part_of_the_state(self):
        memory = ExampleMemory.from_keys(KEYS)
        visit(memory, [0, 1, 3], [0.1, 0.2, 0.3])
        again = ExampleMemory.from_keys(KEYS)
        again.load_state_dict(memory.state_dict())
        assert same(again.log_mean, memory.log_mean)
        for other in (ExampleMemory.from_keys([7, 3, 3, -2, 3, 3, 9]), ExampleMemory(4)):
            with pytest.raises(AnybatchError, match="between other rows"):
                other.load_state_dict(memory.state_dict())

    def test_grow(self):
        memory = ExampleMemory.from_keys(KEYS, num_directions=2)
        visit(memory, [0, 1], [0.5, 0.25], direction=1)
        memory.grow(keys=[*KEYS, 3, 11])
        assert (memory.num_rows, memory.num_slots) == (9, 5)
        assert memory.read(torch.tensor([0, 7, 8]), direction=1).nan_to_num(-9).tolist() == [0.5, 0.25, -9]
        with pytest.raises(AnybatchError, match="do not begin"):
            memory.grow(keys=[3, *KEYS, 3, 11])
        with pytest.raises(AnybatchError, match="give keys="):
            memory.grow(12)

    def test_mistakes(self):
        with pytest.raises(AnybatchError, match="one integer a row"):
            ExampleMemory.from_keys([0.5, 1.0])
        with pytest.raises(AnybatchError, match="bfloat16 never moves"):
            ExampleMemory(4, dtype="bfloat16")


class TestGrowth:
    def test_grow_keeps_old_rows(self):
        memory = ExampleMemory(3)
        visit(memory, [0, 2], [1.0, 2.0])
        memory.grow(5)
        assert memory.log_mean.nan_to_num(-9).tolist() == [[1.0, -9, 2.0, -9, -9]]
        visit(memory, [4], [3.0])
        assert memory.state_dict()["log_mean"].shape == (1, 5)
        with pytest.raises(AnybatchError, match="only grow"):
            memory.grow(4)
        with pytest.raises(AnybatchError, match="give num_rows"):
            memory.grow(keys=[1, 2, 3, 4, 5, 6])

    def test_older_state_only_when_asked(self):
        old = SogCLR(6)
        old(torch.randn(4, 3, requires_grad=True), torch.randn(4, 3), index=torch.arange(4))
        new = SogCLR(9)
        with pytest.raises(AnybatchError, match="grown_state"):
            new.load_state_dict(old.state_dict())
        new.load_state_dict(grown_state(old.state_dict(), new))
        assert same(new.memory.log_mean[:, :6], old.memory.log_mean)
        assert not new.memory.visited[:, 6:].any()
        with pytest.raises(AnybatchError, match="only grow"):
            grown_state(old.state_dict(), SogCLR(5))


def test_a_state_without_its_share_of_entries_or_of_another_version_is_refused():
    state = {
        "log_mean": torch.tensor([[0.5, math.nan, 2.0]]),
        "version": torch.tensor(VERSION),
        "dimensions": torch.tensor(4),
        "shard": torch.tensor([0, 1, 3]),
    }
    for memory in (ExampleMemory(3), ExampleMemory(3, sharded=True)):
        memory.load_state_dict(dict(state))
        assert same(memory.log_mean, state["log_mean"])
        assert int(memory.state_dict()["dimensions"]) == 4
        with pytest.raises(AnybatchError, match=f"version 1 .version.; this anybatch reads version {VERSION}"):
            memory.load_state_dict({**state, "version": torch.tensor(1)})
        with pytest.raises(AnybatchError, match="missing are shard, unknown here are nothing"):
            memory.load_state_dict({name: value for name, value in state.items() if name != "shard"})
        with pytest.raises(AnybatchError, match="of embeddings of 5 dimensions, this one of 4"):
            memory.load_state_dict({**state, "dimensions": torch.tensor(5)})
        assert same(memory.log_mean, state["log_mean"])
    with pytest.raises(AnybatchError, match=r"shape \(1, 3\), this loss \(1, 4\)"):
        ExampleMemory(4).load_state_dict(dict(state))


def test_float16_stays_within_its_rounding():
    exact, half = ExampleMemory(50), ExampleMemory(50, dtype="float16")
    assert half.log_mean.element_size() == 2
    generator = torch.Generator().manual_seed(1)
    for _ in range(60):
        rows, values = torch.randperm(50, generator=generator)[:20], 8 * torch.randn(20, generator=generator) - 10
        for memory in (exact, half):
            memory.blend(rows, values, direction=0, gamma=0.3, update=True, dimensions=4)
    error = (half.log_mean.float() - exact.log_mean).abs()
    # Each visit rounds by at most 2^-11 of the size, and keeps 1 - gamma or more of the earlier error: in the worst case rather more than one rounding.
    assert error.max() < 20 * 2**-11 * exact.log_mean.abs().max()
    assert error.max() > 0
    again = ExampleMemory(50, dtype="float16")
    again.load_state_dict(half.state_dict())
    assert same(again.log_mean, half.log_mean)


def run(memories, shares, rank, grow):
    """Some steps on this rank's share of each batch; what each call gave, for every memory."""
    results = []
    generator = torch.Generator().manual_seed(7)
    first = sum(shares[:rank])
    for step in range(8):
        if step == 5 and grow:
            for memory in memories:
                memory.grow(26)
        high = 26 if step >= 5 and grow else 23
        index, values = (
            torch.randint(high, (sum(shares),), generator=generator),
            3 * torch.randn(sum(shares), generator=generator),
        )
        values[3] = -torch.inf
        part = slice(first, first + shares[rank])
        for memory in memories:
            results.append(
                memory.blend(index[part], values[part], direction=step % 2, gamma=0.3, update=step != 6, dimensions=4)
            )
    return results


SHARES = {1: [9], 2: [5, 4], 3: [4, 0, 5]}


def worker(rank, world_size):
    keys = np.arange(60)[:23] * 5 % 17
    whole = [ExampleMemory(23, 2), ExampleMemory(23, 2, dtype="float16")]
    parts = [ExampleMemory(23, 2, sharded=True), ExampleMemory(23, 2, dtype="float16", sharded=True)]
    keyed = [ExampleMemory.from_keys(keys, 2), ExampleMemory.from_keys(keys, 2, sharded=True)]
    ours, theirs = run(parts, SHARES[world_size], rank, True), run(whole, SHARES[world_size], rank, True)
    shared = run(keyed, SHARES[world_size], rank, False)
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(shared[::2], shared[1::2], strict=True))
    rows = torch.tensor([25, 0, 7, 7, 3])
    for a, b in zip(parts, whole, strict=True):
        assert same(a.read(rows, direction=1), b.read(rows, direction=1))
        values = torch.tensor([1.0, 2.0, math.nan, math.nan, 4.0])
        a.write(rows, values, dimensions=4)
        b.write(rows, values, dimensions=4)
        assert same(a.log_mean, b.log_mean[:, rank::world_size])
        resumed = ExampleMemory(
            26, 2, sharded=True, dtype="float16" if a.log_mean.dtype == torch.float16 else "float32"
        )
        resumed.load_state_dict(a.state_dict())  # its own shard
        assert same(resumed.log_mean, a.log_mean)
        resumed.load_state_dict(b.state_dict())  # the whole state of a replicated memory
        assert same(resumed.log_mean, a.log_mean)
        if rank:
            with pytest.raises(AnybatchError, match="join_shards"):
                ExampleMemory(26, 2).load_state_dict(a.state_dict())
    return {"parts": [m.state_dict() for m in parts], "whole": [m.state_dict() for m in whole]}


@pytest.mark.distributed
@pytest.mark.parametrize("world_size", [2, 3])
def test_sharded_equals_replicated_bit_for_bit(world_size):
    saved = on_ranks(worker, world_size)
    alone = [ExampleMemory(23, 2), ExampleMemory(23, 2, dtype="float16", sharded=True)]
    run(alone, SHARES[1], 0, True)
    for number in range(2):
        joined = join_shards([rank["parts"][number] for rank in reversed(saved)])
        assert same(joined["log_mean"], saved[0]["whole"][number]["log_mean"])
        again = ExampleMemory(26, 2, dtype="float16" if number else "float32", sharded=bool(number))
        again.load_state_dict(joined)  # one process goes on where several were
        assert same(again.log_mean, joined["log_mean"])
        untouched = torch.ones(26, dtype=torch.bool)
        untouched[torch.tensor([25, 0, 7, 3])] = False  # rewritten after the comparison's steps
        assert same(alone[number].log_mean[1], joined["log_mean"][1])
        assert same(alone[number].log_mean[0, untouched], joined["log_mean"][0, untouched])
        with pytest.raises(AnybatchError, match="each of 0 to"):
            join_shards([saved[0]["parts"][number]] * world_size)


def test_a_sharded_memory_waits_for_its_process_group(monkeypatch):
    memory = ExampleMemory(5, sharded=True)
    assert memory.log_mean.shape == (1, 0)
    copied = copy.deepcopy(memory)
    visit(memory, [1, 4], [0.5, 0.25])
    assert memory.log_mean.shape == (1, 5)
    assert copied.log_mean.shape == (1, 0)
    early = ExampleMemory(5, sharded=True)
    assert early.state_dict()["log_mean"].shape == (1, 5)  # saved before there is a process group
    monkeypatch.setattr(distributed, "world_size", lambda: 2)
    early.settle()
    assert early.log_mean.shape == (1, 3)
    monkeypatch.undo()
    memory.shard[1] = 4  # as if it came from a run of four ranks
    with pytest.raises(AnybatchError, match="shard 0 of 4; this is rank 0 of 1"):
        visit(memory, [1], [0.5])


class TestKeyedSogCLR:
    """Four rows a query with positives of very different similarity: the shared state is the query's, not a positive's."""

    def draw(self, seed):
        generator = torch.Generator().manual_seed(seed)
        query = torch.arange(12) // 4
        anchors = torch.nn.functional.normalize(torch.randn(3, 5, generator=generator, dtype=torch.float64), dim=1)[
            query
        ]
        positives = (
            torch.randn(12, 5, generator=generator, dtype=torch.float64) + 2 * torch.arange(12)[:, None] % 4 * anchors
        )
        return query, anchors, positives

    def test_equals_the_loop(self):
        tau, gamma = 0.5, 0.4
        query, anchors, positives = self.draw(0)
        loss = SogCLR(12, gamma=gamma, eps=0.01, temperature=tau, memory=ExampleMemory.from_keys(query.numpy()))
        loss.memory.double()
        shared: dict[int, float] = {}
        for rows in ([0, 1, 5, 8], [2, 6, 7, 11], [0, 3, 9, 10]):
            batch = torch.tensor(rows)
            a, p = anchors[batch].clone().requires_grad_(), positives[batch]
            value = loss(a, p, index=batch, anchor_id=query[batch], candidate_id=batch)
            scores = torch.nn.functional.normalize(a, dim=1) @ torch.nn.functional.normalize(p, dim=1).T / tau
            groups: dict[int, list[float]] = {}
            for i in range(4):
                others = [scores[i, j].exp().item() for j in range(4) if query[batch[j]] != query[batch[i]]]
                groups.setdefault(int(query[batch[i]]), []).append(sum(others) / 3)
            for key, said in groups.items():
                mean = sum(said) / len(said)
                shared[key] = mean if key not in shared else (1 - gamma) * shared[key] + gamma * mean
            surrogate, objective = 0.0, 0.0
            for i in range(4):
                others = [j for j in range(4) if query[batch[j]] != query[batch[i]]]
                u = shared[int(query[batch[i]])] / scores[i, i].exp().item()
                objective += math.log(0.01 + u)
                for j in others:
                    gap = scores[i, j] - scores[i, i]
                    surrogate = surrogate + gap.detach().exp() / (3 * (0.01 + u)) * gap
            assert value.item() == pytest.approx(objective / 4, rel=1e-9)
            ours, theirs = torch.autograd.grad(value, a)[0], torch.autograd.grad(surrogate / 4, a)[0]
            torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-12)
        assert loss.memory.log_mean[0].exp().tolist() == pytest.approx([shared[key] for key in range(3)], rel=1e-9)

    def test_without_repeated_keys_nothing_changes_but_the_fresh_positive(self):
        """With every key once and the same embeddings at each visit, relative and absolute states say the same."""
        _, anchors, positives = self.draw(1)
        plain, keyed = SogCLR(12, gamma=0.3), SogCLR(12, gamma=0.3, memory=ExampleMemory.from_keys(np.arange(12)))
        for loss in (plain, keyed):
            loss.memory.double()
        for _ in range(3):
            index = torch.randperm(12)[:6]
            values = [loss(anchors[index].requires_grad_(), positives[index], index=index) for loss in (plain, keyed)]
            assert values[0].item() == pytest.approx(values[1].item(), rel=1e-9)

    def test_mistakes(self):
        memory = ExampleMemory.from_keys(KEYS, 2)
        with pytest.raises(AnybatchError, match=r"7 rows and 2 direction\(s\); expected 7 and 1"):
            SogCLR(7, memory=memory)
        with pytest.raises(AnybatchError, match="name anchors"):
            SogCLR(7, memory=memory, direction="both")(torch.eye(3), torch.eye(3), index=torch.arange(3))
