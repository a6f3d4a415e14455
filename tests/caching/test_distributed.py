"""W gloo ranks, each with its share, leave the gradients of one process with the whole batch."""

import os
import tempfile
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from anybatch.caching import average_gradients, cached_step
from anybatch.errors import AnybatchError
from tests.caching.helpers import Softmax, TextEncoder, gradients, plain_step, relative_error, texts

pytestmark = pytest.mark.distributed
SHARES = {2: [7, 4], 3: [5, 2, 6]}


class GatheringSoftmax(nn.Module):
    """The loss contract in a few lines: the global mean on every rank, embeddings with W times the gradient."""

    def __init__(self, shares: list[int]):
        super().__init__()
        self.shares, self.whole = shares, Softmax()

    def forward(self, anchors, candidates):
        gathered = []
        for local in (anchors, candidates):
            parts = [torch.zeros(rows, local.shape[1]) for rows in self.shares]
            for source, part in enumerate(parts):
                if source == dist.get_rank():
                    part.copy_(local.detach())
                dist.broadcast(part, source)
            # World size times the gradient reaches the embeddings; the parameters keep the full one.
            world = dist.get_world_size()
            parts[dist.get_rank()] = local * world - local.detach() * (world - 1)
            gathered.append(torch.cat(parts))
        return self.whole(*gathered)


def share(batch: dict, rank: int, shares: list[int]) -> dict:
    start = sum(shares[:rank])
    return {key: value[start : start + shares[rank]] for key, value in batch.items()}


def whole_batch(shares: list[int]) -> list[dict]:
    return [texts(sum(shares), 7, 1), texts(sum(shares), 15, 2)]


def reference(shares: list[int], *, tied: bool):
    first, loss = TextEncoder(seed=1), Softmax()
    encoders = [first, first if tied else TextEncoder(seed=2)]
    value = plain_step(loss, encoders, whole_batch(shares))
    return value, gradients(*dict.fromkeys(encoders), loss)


CASES = {
    "ddp": (True, {"micro_batch": 2}, "ddp"),
    "ddp, all kept": (True, {"micro_batch": 2, "keep_graphs": 1.0}, "ddp"),
    "ddp, one rank keeps all, others not": (True, {"micro_batch": 2, "keep_graphs": 2}, "ddp"),
    "ddp, half kept": (True, {"micro_batch": 2, "keep_graphs": 0.5}, "ddp"),
    "ddp, memory budget": (True, {"micro_batch": "auto", "keep_graphs": "auto"}, "ddp"),
    "ddp, micro-batches found": (False, {"micro_batch": "auto", "max_tokens": 20}, "ddp"),
    "ddp, untied": (False, {"micro_batch": 3, "keep_graphs": 1}, "ddp"),
    "ddp in a function, token budget": (True, {"micro_batch": None, "max_tokens": 20}, "lambda"),
    "ddp that looks for unused parameters": (True, {"micro_batch": 2}, "find_unused"),
    "ddp out of sight": (True, {"micro_batch": 2}, "hidden"),
    "the caller reduces": (False, {"micro_batch": 2}, "none"),
    "ddp, gradient accumulation": (True, {"micro_batch": 2}, "no_sync first"),
}


class CountReductions:
    """A communication hook that counts reductions by their last bucket."""

    def __init__(self):
        self.reductions = 0

    def reduce(self, bucket):
        self.reductions += bucket.is_last()
        future = dist.all_reduce(bucket.buffer(), async_op=True).get_future()
        return future.then(lambda done: done.value()[0] / dist.get_world_size())


def wrapped_in_ddp(bare, wrap: str):
    wrapped, counters = {}, []
    for encoder in dict.fromkeys(bare):
        wrapped[encoder] = DistributedDataParallel(encoder, find_unused_parameters=wrap == "find_unused")
        counters.append(CountReductions())
        wrapped[encoder].register_comm_hook(counters[-1], CountReductions.reduce)
    return [wrapped[encoder] for encoder in bare], counters


def run_case(rank: int, shares: list[int], tied: bool, options: dict, wrap: str):
    first = TextEncoder(seed=1)
    bare = [first, first if tied else TextEncoder(seed=2)]
    loss = GatheringSoftmax(shares)
    inputs = [share(batch, rank, shares) for batch in whole_batch(shares)]
    encoders, counters = (list(bare), []) if wrap == "none" else wrapped_in_ddp(bare, wrap)
    called = encoders
    if wrap == "lambda":
        called = [lambda batch, module=module: module(batch) for module in encoders]
    elif wrap == "hidden":
        hidden = {"a": {"b": {"c": encoders}}}
        called = [lambda batch: hidden["a"]["b"]["c"][0](batch)] * 2
        with pytest.raises(AnybatchError, match=r"modules=\[module\]"):
            cached_step(loss, called, inputs, **options)
        options = {**options, "modules": encoders}
    value = torch.tensor(0.0)
    for _ in range(2):  # the second step sees rebuilt buckets
        for module in (*bare, loss):
            module.zero_grad()
        before = [counter.reductions for counter in counters]
        if wrap == "no_sync first":
            with encoders[0].no_sync():
                cached_step(loss, called, inputs, scale=0.25, **options)
            assert [counter.reductions for counter in counters] == before
            value = cached_step(loss, called, inputs, scale=0.75, **options)
        else:
            value = cached_step(loss, called, inputs, **options)
        if wrap == "none":
            average_gradients([p for encoder in dict.fromkeys(bare) for p in encoder.parameters()])
        counted = [counter.reductions for counter in counters]
        assert counted == [count + 1 for count in before], f"{wrap} {options}: {before} to {counted}"
    return value, gradients(*dict.fromkeys(bare), loss.whole)


def on_rank(rank: int, shares: list[int], folder: str) -> None:
    torch.set_num_threads(1)
    torch.set_default_dtype(torch.float64)
    start = f"file://{folder}/rendezvous"
    limit = timedelta(seconds=60)
    dist.init_process_group("gloo", init_method=start, rank=rank, world_size=len(shares), timeout=limit)
    try:
        results = {name: run_case(rank, shares, *case) for name, case in CASES.items()}
        torch.save(results, os.path.join(folder, f"{rank}.pt"))
    finally:
        dist.destroy_process_group()


@pytest.fixture(scope="module", params=[2, 3])
def ranks(request):
    """All cases on one group of processes, because starting them is what takes the time."""
    shares = SHARES[request.param]
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(on_rank, args=(shares, folder), nprocs=request.param)
        return shares, [torch.load(os.path.join(folder, f"{rank}.pt")) for rank in range(request.param)]


@pytest.mark.parametrize("case", CASES)
def test_ranks_equal_one_process(ranks, case):
    shares, results = ranks
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        wanted_value, wanted = reference(shares, tied=CASES[case][0])
    finally:
        torch.set_default_dtype(before)
    for result in results:
        value, got = result[case]
        torch.testing.assert_close(value, wanted_value, rtol=1e-12, atol=0)
        assert relative_error(got, wanted) < 1e-12


def test_average_gradients_without_a_group_changes_nothing():
    module = nn.Linear(2, 2)
    module(torch.ones(1, 2)).sum().backward()
    average_gradients(module.parameters())
    torch.testing.assert_close(module.bias.grad, torch.ones(2))
