"""Rows made when they are taken: the same gradients, few at once, one mini-batch ahead."""

import threading
import time
import weakref

import pytest
import torch
from torch import nn

from anybatch.caching import cached_step
from anybatch.caching.on_demand import RowsOnDemand
from anybatch.core.errors import AnybatchError
from tests.caching.helpers import Mlp, Softmax, TextEncoder, gradients, relative_error, texts, vectors


class Maker:
    """Makes rows of a whole batch, and notes how many of them are alive, where and when."""

    def __init__(self, batch):
        self.batch, self.alive, self.most, self.calls, self.threads = batch, 0, 0, [], set()

    def _dead(self, count):
        self.alive -= count

    def __call__(self, numbers):
        rows = torch.tensor(numbers)
        made = {key: value[rows] for key, value in self.batch.items()}
        weakref.finalize(next(iter(made.values())).untyped_storage(), self._dead, len(rows))
        self.alive += len(rows)
        self.most = max(self.most, self.alive)
        self.calls.append(numbers)
        self.threads.add(threading.current_thread())
        return made


class OfX(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = Mlp(dropout=0.3)

    def forward(self, batch):
        return self.inner(batch["x"])


def step(encoder, inputs, **settings):
    torch.manual_seed(0)
    encoder.zero_grad()
    cached_step(Softmax(), encoder, inputs, **settings)
    return gradients(encoder)


@pytest.mark.parametrize("keep", [0.0, 0.5, 1.0, "auto"])
def test_gradients_are_those_of_the_whole_batch(keep):
    encoder, batches = OfX().double(), [{"x": vectors(11, seed=seed)} for seed in (1, 2)]
    wanted = step(encoder, batches, mini_batch_size=3, keep_graphs=keep)
    makers = [Maker(batch) for batch in batches]
    rows = [RowsOnDemand(range(11), maker) for maker in makers]
    got = step(encoder, rows, mini_batch_size=3, keep_graphs=keep)
    assert relative_error(got, wanted) == 0  # not a bit, dropout included
    replayed = {0.0: (1, 1), 0.5: (0, 1), 1.0: (0, 0)}.get(keep)
    for maker in makers:
        if replayed is not None:  # what kept its graph is not made again
            assert [maker.calls.count(rows) for rows in ([3, 4, 5], [9, 10])] == [1 + times for times in replayed]
        assert len(maker.threads) == 2  # the step's own, and the one that works ahead


def test_few_rows_are_in_memory_at_once():
    maker = Maker({"x": vectors(64)})
    step(OfX().double(), [RowsOnDemand(range(64), maker), {"x": vectors(64, seed=1)}], mini_batch_size=4)
    assert 4 <= maker.most <= 3 * 4  # the one in the encoder (and a copy of it), and the next


def test_the_next_is_made_while_one_is_encoded():
    """And not the one after it."""
    maker = Maker({"x": vectors(6)})
    rows = RowsOnDemand(range(6), maker)
    rows.prepare(torch.tensor([0, 1]))
    for _ in range(200):
        if maker.calls:
            break
        time.sleep(0.01)
    assert maker.calls == [[0, 1]]
    rows.take(torch.tensor([0, 1]))
    assert maker.calls == [[0, 1]]
    rows.prepare(torch.tensor([2, 3]))
    assert rows.take(torch.tensor([4]))["x"].equal(maker.batch["x"][4:5])  # something else after all


def test_tokens_are_padded_by_mini_batch_or_with_the_whole():
    """An encoder that reads its padding is given the whole batch; any other one never."""
    batch = texts(9, 12, 3)
    lengths = batch["attention_mask"].sum(1)
    encoder = TextEncoder().double()
    wanted = step(encoder, [batch, texts(9, 5, 4)], mini_batch_size=2)

    class Trimming(Maker):
        def __call__(self, numbers):
            width = int(lengths[torch.tensor(numbers)].max())
            return {key: value[:, :width] for key, value in super().__call__(numbers).items()}

    maker = Trimming(batch)
    got = step(encoder, [RowsOnDemand(range(9), maker, lengths=lengths), texts(9, 5, 4)], mini_batch_size=2)
    assert relative_error(got, wanted) < 1e-12
    assert max(map(len, maker.calls)) == 3  # to see whether padding counts, the longest row goes with two

    class Padded(nn.Module):
        """Embeds the padding, too."""

        def __init__(self):
            super().__init__()
            self.embed = nn.Embedding(60, 4)

        def forward(self, batch):
            return self.embed(batch["input_ids"]).sum(1)

    encoder, maker = Padded().double(), Trimming(batch)
    wanted = step(encoder, [batch, texts(9, 5, 4)], mini_batch_size=2)
    with pytest.warns(UserWarning, match="depend on the padding"):
        got = step(encoder, [RowsOnDemand(range(9), maker, lengths=lengths), texts(9, 5, 4)], mini_batch_size=2)
    assert relative_error(got, wanted) < 1e-12
    assert max(map(len, maker.calls)) == 9


def test_what_goes_beside_is_cut_or_shared():
    rows = RowsOnDemand(range(4), Maker({"x": vectors(4)}), form={"task": "query", "keys": torch.arange(8).view(4, 2)})
    part = rows.take(torch.tensor([3, 1]))
    assert part["task"] == "query"
    assert part["keys"].tolist() == [[6, 7], [2, 3]]
    assert rows.take(torch.arange(4))["keys"].shape == (4, 2)


def test_errors_of_either_thread_reach_the_caller():
    def make(numbers):
        if 5 in numbers:
            raise AnybatchError("The image in row 6 cannot be decoded.")
        return {"x": vectors(len(numbers))}

    encoder = OfX().double()
    with pytest.raises(AnybatchError, match="row 6"):
        step(encoder, [RowsOnDemand(range(8), make), {"x": vectors(8)}], mini_batch_size=2)
    assert all(parameter.grad is None for parameter in encoder.parameters())
