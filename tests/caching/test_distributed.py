"""W gloo ranks, each with its share, leave the gradients of one process with the whole batch."""

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from anybatch.caching import average_gradients, cached_step
from anybatch.core.errors import AnybatchError
from tests.caching.helpers import Softmax, TextEncoder, gradients, plain_step, relative_error, texts
from tests.ranks import on_ranks

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
    "ddp": (True, {"mini_batch_size": 2}, "ddp"),
    "ddp, all kept": (True, {"mini_batch_size": 2, "keep_graphs": 1.0}, "ddp"),
    "ddp, one rank keeps all, others not": (True, {"mini_batch_size": 2, "keep_graphs": 2}, "ddp"),
    "ddp, half kept": (True, {"mini_batch_size": 2, "keep_graphs": 0.5}, "ddp"),
    "ddp, memory budget": (True, {"mini_batch_size": "auto", "keep_graphs": "auto"}, "ddp"),
    "ddp, mini-batches found": (False, {"mini_batch_size": "auto", "max_tokens": 20}, "ddp"),
    "ddp, untied": (False, {"mini_batch_size": 3, "keep_graphs": 1}, "ddp"),
    "ddp in a function, token budget": (True, {"mini_batch_size": None, "max_tokens": 20}, "lambda"),
    "ddp that looks for unused parameters": (True, {"mini_batch_size": 2}, "find_unused"),
    "ddp out of sight": (True, {"mini_batch_size": 2}, "hidden"),
    "the caller reduces": (False, {"mini_batch_size": 2}, "none"),
    "ddp, gradient accumulation": (True, {"mini_batch_size": 2}, "no_sync first"),
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


class Experts(nn.Module):
    """Top-1 mixture, a second tower, a counting buffer, a temperature that the loss reads, an unread parameter."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(4)
        self.gate, self.experts = nn.Linear(6, 4), nn.ModuleList(nn.Linear(6, 5) for _ in range(4))
        self.other = nn.Sequential(nn.Linear(6, 9), nn.Tanh(), nn.Linear(9, 5))
        self.scale, self.unread = nn.Parameter(torch.tensor(1.5)), nn.Parameter(torch.ones(3))
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x, tower):
        self.calls += 1
        if tower == 1:
            return self.other(x)
        weight = self.gate(x).softmax(1)
        chosen = weight.argmax(1)
        parts = [
            (chosen == k).to(x.dtype)[:, None] * expert(x) * weight[:, k : k + 1]
            for k, expert in enumerate(self.experts)
            if (chosen == k).any()
        ]
        return sum(parts)


class ReadsTheModel(nn.Module):
    """A loss on gathered candidates that reads the temperature of the model; each rank takes the mean over its rows."""

    def __init__(self, model, shares):
        super().__init__()
        self.held, self.gathering = [model], GatheringSoftmax(shares)

    def forward(self, anchors, candidates):
        scale = self.held[0].scale
        return self.gathering(anchors * scale, candidates)


EXPERT_CASES = {
    "plain": ({}, {}),
    "all kept": ({}, {"keep_graphs": 1.0}),
    "bucket views": ({"gradient_as_bucket_view": True}, {}),
    "find unused": ({"find_unused_parameters": True}, {"keep_graphs": 2}),
    "small buckets": ({"bucket_cap_mb": 1e-5}, {}),
    "no broadcast of buffers": ({"broadcast_buffers": False}, {}),
    "accumulation": ({}, {}),
    "ignored": ({}, {}),
    "frozen later": ({}, {}),
    "own group": ({}, {}),
    "unequal mini-batches": ({}, {}),
    "hook in half precision": ({}, {}),
}


def expert_rows(rank, shares):
    """Sorted by expert, so that the ranks, and the last mini-batches, use different ones."""
    model, generator = Experts(), torch.Generator().manual_seed(8)
    whole = torch.randn(sum(shares), 6, generator=generator), torch.randn(sum(shares), 6, generator=generator)
    order = model.gate(whole[0]).argmax(1).argsort()
    whole = [batch[order] for batch in whole]
    start = sum(shares[:rank])
    return whole, [batch[start : start + shares[rank]] for batch in whole]


def run_experts(rank, shares, name):
    whole, mine = expert_rows(rank, shares)
    reference, whole_loss = Experts(), Softmax()
    plain_step(
        lambda a, c: whole_loss(a * reference.scale, c),
        [lambda x: reference(x, 0), lambda x: reference(x, 1)],
        whole,
    )
    bare, (settings, options) = Experts(), EXPERT_CASES[name]
    if name == "ignored":
        DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(bare, ["experts.1.weight", "calls"])
    if name == "own group":
        settings = {"process_group": dist.new_group(list(range(len(shares))))}
    model = DistributedDataParallel(bare, **settings)
    if name == "hook in half precision":
        from torch.distributed.algorithms.ddp_comm_hooks import default_hooks

        model.register_comm_hook(None, default_hooks.fp16_compress_hook)
    if name == "frozen later":
        for module in (bare, reference):
            module.other.requires_grad_(False)
        reference.other.zero_grad()
    loss, encoders = ReadsTheModel(bare, shares), [lambda x: model(x, 0), lambda x: model(x, 1)]
    mini_batch_size = 2 if name != "unequal mini-batches" or rank == 0 else 5
    for _ in range(2):
        bare.zero_grad()
        if name == "accumulation":
            with model.no_sync():
                cached_step(loss, encoders, mine, mini_batch_size=mini_batch_size, scale=0.25)
            cached_step(loss, encoders, mine, mini_batch_size=mini_batch_size, scale=0.75)
        else:
            cached_step(loss, encoders, mine, mini_batch_size=mini_batch_size, **options)
    got, wanted = gradients(bare), gradients(reference)
    if name == "ignored":  # left to the caller
        del got["0.experts.1.weight"], wanted["0.experts.1.weight"]
    assert [key for key, value in got.items() if value is None] == [k for k, value in wanted.items() if value is None]
    assert got["0.unread"] is None
    return relative_error(got, wanted), {key: value for key, value in got.items() if value is not None}


def refused_on_all_ranks(rank, shares):
    """What one rank alone cannot replay stops the others too, and no gradient is left on any; then all go on."""
    _, mine = expert_rows(rank, shares)
    bare, calls = Experts(), []
    model = DistributedDataParallel(bare)

    def first(x):
        calls.append(1)
        return model(x, 0) * (1 + 0.1 * len(calls) * (rank == 1))

    messages = []
    with pytest.raises(AnybatchError) as caught:
        cached_step(GatheringSoftmax(shares), [first, lambda x: model(x, 1)], mine, mini_batch_size=2, modules=[model])
    messages.append(str(caught.value))
    assert all(parameter.grad is None for parameter in bare.parameters())
    cached_step(GatheringSoftmax(shares), [lambda x: model(x, 0), lambda x: model(x, 1)], mine, mini_batch_size=2)
    return messages, gradients(bare)


def averaged(rank):
    """Parameters with a gradient on no rank, on one, on all."""
    parameters = [nn.Parameter(torch.zeros(3)) for _ in range(3)]
    if rank == 1:
        parameters[1].grad = torch.full((3,), 6.0)
    parameters[2].grad = torch.full((3,), float(rank))
    average_gradients(parameters)
    return [parameter.grad for parameter in parameters]


def on_rank(rank: int, world_size: int, shares: list[int]):
    torch.set_default_dtype(torch.float64)
    results = {name: run_case(rank, shares, *case) for name, case in CASES.items()}
    experts = {name: run_experts(rank, shares, name) for name in EXPERT_CASES}
    others = experts, refused_on_all_ranks(rank, shares), averaged(rank)
    return results, *others


@pytest.fixture(scope="module", params=[2, 3])
def ranks(request):
    """All cases on one group of processes, because starting them is what takes the time."""
    shares = SHARES[request.param]
    return shares, on_ranks(on_rank, request.param, shares)


@pytest.mark.parametrize("case", CASES)
def test_ranks_equal_one_process(ranks, case):
    shares, results = ranks
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        wanted_value, wanted = reference(shares, tied=CASES[case][0])
    finally:
        torch.set_default_dtype(before)
    for result, *_ in results:
        value, got = result[case]
        torch.testing.assert_close(value, wanted_value, rtol=1e-12, atol=0)
        assert relative_error(got, wanted) < 1e-12


@pytest.mark.parametrize("case", EXPERT_CASES)
def test_one_wrapper_around_towers_and_experts(ranks, case):
    """Every rank, and every last mini-batch, leaves other parameters unused."""
    _, results = ranks
    tolerance = 1e-2 if case == "hook in half precision" else 1e-12
    first = results[0][1][case][1]
    for _, experts, *_ in results:
        error, got = experts[case]
        assert error < tolerance
        assert got.keys() == first.keys()
        assert all(torch.equal(value, first[name]) for name, value in got.items())


def test_one_rank_alone_never_leaves_the_others_waiting(ranks):
    _, results = ranks
    for rank, (_, _, ([message], after), _) in enumerate(results):
        assert ("differs from its recording" if rank == 1 else "Another rank") in message
        assert all(torch.equal(value, results[0][2][1][name]) for name, value in after.items() if value is not None)


def test_average_counts_a_missing_gradient_as_zero_where_another_rank_has_one(ranks):
    shares, results = ranks
    for *_, (nowhere, once, everywhere) in results:
        assert nowhere is None
        torch.testing.assert_close(once, torch.full((3,), 6.0 / len(shares), dtype=torch.float64))
        torch.testing.assert_close(everywhere, torch.full((3,), (len(shares) - 1) / 2, dtype=torch.float64))


def test_average_gradients_without_a_group_changes_nothing():
    module = nn.Linear(2, 2)
    module(torch.ones(1, 2)).sum().backward()
    average_gradients(module.parameters())
    torch.testing.assert_close(module.bias.grad, torch.ones(2))
