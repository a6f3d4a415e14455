"""`torch.compile` under the cached step: the gradients of the plain step, dropout included, and few graphs."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from anybatch.caching import RowSlicer, cached_step, plan_mini_batches
from anybatch.core.errors import AnybatchError
from tests.caching.helpers import Softmax, gradients, plain_step_in_pieces, relative_error, texts


class Words(nn.Module):
    """Token embeddings through a layer with dropout, their mean; small, so that it compiles in a moment."""

    def __init__(self, dropout: float = 0.3):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.table = nn.Embedding(60, 8)
            self.layers = nn.Sequential(
                nn.Dropout(dropout), nn.Linear(8, 16), nn.GELU(), nn.Dropout(dropout), nn.Linear(16, 6)
            )

    def forward(self, batch):
        mask = batch["attention_mask"][..., None]
        return (self.layers(self.table(batch["input_ids"])) * mask).sum(1) / mask.sum(1)


class Counting:
    """A backend that counts the graphs it is given."""

    def __init__(self, inner: str):
        self.inner, self.graphs = torch._dynamo.lookup_backend(inner), 0

    def __call__(self, graph, inputs):
        self.graphs += 1
        return self.inner(graph, inputs)


@pytest.fixture(autouse=True)
def fresh():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def batches(num_steps, rows=18):
    """Anchors and positives of other lengths in every step; 18 rows in mini-batches of 4 leave 2."""
    return [[texts(rows, 13, 2 * step), texts(rows, 30, 2 * step + 1)] for step in range(num_steps)]


def cached(encoder, loss, inputs, *, mini_batch_size=4, keep_graphs=0.0):
    torch.manual_seed(7)
    for one in inputs:
        cached_step(loss, encoder, one, mini_batch_size=mini_batch_size, keep_graphs=keep_graphs)
    return gradients(getattr(encoder, "_orig_mod", encoder), loss)


def plain(encoder, loss, inputs):
    """One graph a step, made of the same mini-batches, because masks belong to them."""
    torch.manual_seed(7)

    def cut(batch, rows):
        return RowSlicer(batch).take(rows)

    for one in inputs:
        plans = [plan_mini_batches(RowSlicer(batch), mini_batch_size=4) for batch in one]
        plain_step_in_pieces(loss, [encoder] * 2, one, plans, cut)
    return gradients(encoder, loss)


@pytest.mark.parametrize("inner", ["eager", pytest.param("aot_eager", marks=pytest.mark.slow)])
@pytest.mark.parametrize("keep_graphs", [0.0, 0.5, 1.0, "auto"])
def test_gradients_of_the_plain_step_and_few_graphs(inner, keep_graphs):
    """With sizes that are dynamic a handful of graphs for any width and any number of rows."""
    inputs, loss, backend = batches(3), Softmax().double(), Counting(inner)
    compiled = torch.compile(Words().double(), backend=backend, dynamic=True)
    with torch._dynamo.config.patch(fail_on_recompile_limit_hit=True):
        got = cached(compiled, loss, inputs, keep_graphs=keep_graphs)
        once = backend.graphs
        cached(compiled, loss, batches(6, rows=17)[3:], mini_batch_size=5, keep_graphs=keep_graphs)
    assert relative_error(got, plain(Words().double(), Softmax().double(), inputs)) < 1e-12
    assert once == backend.graphs <= 6


def test_a_compiler_that_draws_otherwise_without_a_graph_is_found_out():
    """As inductor's own generator beside eager's, where torch gave up compiling one of the two graphs."""

    def backend(graph, inputs):
        def run(*args):
            if not torch.is_grad_enabled():
                torch.rand(1)
            return graph.forward(*args)

        return run

    compiled = torch.compile(Words(), backend=backend, dynamic=False)
    with pytest.raises(AnybatchError, match=r"drew other random numbers.*fallback_random"):
        cached(compiled, Softmax(), batches(1))
    in_place = Words()
    in_place.compile(backend=backend, dynamic=False)
    with pytest.raises(AnybatchError, match="drew other random numbers"):
        cached(lambda batch: in_place(batch), Softmax(), batches(1))
    cached(torch.compile(Words(dropout=0.0), backend=backend), Softmax(), batches(1))  # nothing drawn matters
    hidden = Words()  # neither the callable nor the module shows that it is compiled
    hidden.forward = torch.compile(hidden.forward, backend=backend, dynamic=False)
    with pytest.raises(AnybatchError, match="drew other random numbers"):
        cached(hidden, Softmax(), batches(1))
