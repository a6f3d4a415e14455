"""Graphs kept while memory allows; mini-batches split when it runs out."""

import gc

import pytest
import torch

from anybatch.caching import StepMemory, cached_step, plan_mini_batches, record_towers
from anybatch.caching.device_memory import parse_memory
from anybatch.caching.memory import GraphBudget
from anybatch.core.errors import AnybatchError
from tests.caching.helpers import (
    Crowded,
    Mlp,
    Softmax,
    TextEncoder,
    clone,
    gradients,
    num_kept,
    plain_step,
    recorded,
    relative_error,
    send_back,
    texts,
    vectors,
    within,
)


def test_parse_memory():
    assert parse_memory("8GiB", 0) == 8 * 2**30
    assert parse_memory("500 MB", 0) == 500_000_000
    assert parse_memory("80%", 1000) == 800
    assert parse_memory(4096, 0) == 4096
    for wrong in ("lots", "0%", "120%", "8 Gi", -1):
        with pytest.raises(AnybatchError, match="memory is"):
            parse_memory(wrong, 1000)


def budget_of(spare: int) -> GraphBudget:
    """A budget with `spare` bytes beyond what the process uses now."""
    budget = GraphBudget("100%")
    budget.limit = budget.start + spare
    return budget


def test_a_budget_keeps_what_fits():
    encoder, batch = TextEncoder(), texts(24, 30, 1)
    plan = plan_mini_batches(batch, mini_batch_size=4)
    everything = recorded(encoder, batch, mini_batch_size=4, **within(budget_of(2**40)))
    assert num_kept(everything) == len(plan)  # when everything fits it is plain training
    assert num_kept(recorded(encoder, batch, mini_batch_size=4, **within(budget_of(0)))) == 0
    probe = budget_of(2**40)
    recorded(encoder, batch, mini_batch_size=4, **within(probe))
    middle = budget_of(int(probe.spent * 0.5) + probe.largest)
    kept = num_kept(recorded(encoder, batch, mini_batch_size=4, **within(middle)))
    assert 0 < kept < len(plan)
    assert middle.spent + middle.largest <= middle.limit - middle.start


def test_one_budget_serves_all_towers():
    encoder, batch = TextEncoder(), texts(24, 30, 1)
    plan = plan_mini_batches(batch, mini_batch_size=4)
    probe = budget_of(2**40)
    recorded(encoder, batch, mini_batch_size=4, **within(probe))
    shared = budget_of(probe.spent + 2 * probe.largest)
    recordings = record_towers([encoder] * 2, [batch] * 2, mini_batch_size=4, **within(shared))
    kept = [num_kept(recording) for recording in recordings]
    assert kept[0] == len(plan)
    assert kept[1] < len(plan)


def test_the_measurement_counts_what_autograd_saves():
    """A linear layer and a tanh save the input and the output: 4 bytes * rows * (6 + 5)."""
    layer = torch.nn.Linear(6, 5)
    budget = budget_of(2**40)
    batch = torch.randn(8, 6)
    recorded(lambda x: layer(x).tanh(), batch, mini_batch_size=8, **within(budget))
    assert budget.largest == 4 * 8 * (6 + 5)


class Limited(torch.nn.Module):
    """An encoder on a device with room for so many rows."""

    def __init__(self, room: int, *, dropout: float = 0.0):
        super().__init__()
        self.inner, self.room, self.only_replays = Mlp(dropout=dropout).double(), room, False
        self.calls: list[int] = []  # a number would be put back

    def forward(self, x):
        self.calls.append(len(x))
        # Two passes look at rows alone, three are recorded.
        if len(x) > self.room and not (self.only_replays and len(self.calls) <= 5):
            raise torch.OutOfMemoryError("no room")
        return self.inner(x)


def test_out_of_memory_splits_the_mini_batch_and_warns():
    encoder = Limited(2).double()
    reference, loss = clone(encoder.inner), Softmax().double()
    inputs = [vectors(9), vectors(9, seed=1)]
    plain_step(Softmax().double(), [reference] * 2, inputs)
    with pytest.warns(UserWarning, match="split into 2 and 2"):
        cached_step(loss, encoder, inputs, mini_batch_size=4)
    assert relative_error(gradients(encoder.inner), gradients(reference)) < 1e-12


def test_dropout_masks_survive_a_split_while_recording():
    encoder = Limited(2, dropout=0.5).train()
    reference = clone(encoder.inner)
    batch = vectors(8)
    torch.manual_seed(1)
    with pytest.warns(UserWarning, match="split"):
        recording = recorded(encoder, batch, mini_batch_size=4)
    send_back(recording, torch.ones_like(recording.embeddings))
    torch.manual_seed(1)
    torch.cat([reference(part) for part in batch.split(2)]).sum().backward()
    assert relative_error(gradients(encoder.inner), gradients(reference)) < 1e-12


def test_out_of_memory_while_replaying():
    batch = vectors(9)
    encoder = Limited(2)
    encoder.only_replays = True
    reference = clone(encoder.inner)
    recording = recorded(encoder, batch, mini_batch_size=3)
    with pytest.warns(UserWarning, match="split"):
        send_back(recording, torch.ones_like(recording.embeddings))
    reference(batch).sum().backward()
    assert relative_error(gradients(encoder.inner), gradients(reference)) < 1e-12
    noisy = Limited(2, dropout=0.5).train()
    noisy.only_replays = True
    recording = recorded(noisy, batch, mini_batch_size=3)
    with pytest.raises(AnybatchError, match=r"dropout.*No gradient was changed.*lower mini_batch_size"):
        send_back(recording, torch.ones_like(recording.embeddings))


def test_kept_graphs_give_way_before_the_mini_batch_does():
    crowded = Crowded(Mlp().double(), 2)
    with pytest.warns(UserWarning, match="with 2 graphs kept"):
        recording = recorded(crowded, vectors(12), mini_batch_size=3, keep_graphs=1.0)
    assert num_kept(recording) == 1  # one gave way to the replays


def test_no_room_for_the_graphs_of_the_first_step_beside_a_kept_one_splits_nothing():
    crowded = Crowded(Mlp().double(), 1)
    recording = recorded(crowded, vectors(12), mini_batch_size=3, keep_graphs=1)
    assert num_kept(recording) == 1  # and no warning, which would be an error here
    send_back(recording, torch.ones_like(recording.embeddings))


def test_a_single_row_that_does_not_fit():
    with (
        pytest.warns(UserWarning, match="split"),
        pytest.raises(AnybatchError, match="single row"),
    ):
        cached_step(Softmax().double(), Limited(0), [vectors(4), vectors(4)], mini_batch_size=2)


def test_other_errors_pass():
    def broken(x):
        raise RuntimeError("shapes differ")

    with pytest.raises(RuntimeError, match="shapes differ"):
        recorded(broken, vectors(4), mini_batch_size=4)


class Unused(torch.nn.Module):
    """As BERT with its pooler: an output that its own node saves, and that nobody uses."""

    def __init__(self):
        super().__init__()
        self.linear = torch.nn.Linear(4, 7)
        self.pooler = torch.nn.Linear(7, 7)

    def forward(self, batch):
        hidden = self.linear(batch)
        torch.tanh(self.pooler(hidden))
        return torch.softmax(hidden, dim=1)


def test_measured_graphs_are_freed():
    encoder, batch = Unused(), torch.randn(12, 4)

    def tensors():
        gc.collect()
        return sum(isinstance(thing, torch.Tensor) and thing.shape == (3, 7) for thing in gc.get_objects())

    def step():
        [recording] = record_towers([encoder], [batch], mini_batch_size=3, keep_graphs="auto", memory=StepMemory("80%"))
        send_back(recording, torch.ones_like(recording.embeddings))

    for _ in range(2):
        step()
    before = tensors()
    for _ in range(5):
        step()
    assert tensors() == before
