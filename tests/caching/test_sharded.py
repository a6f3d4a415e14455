"""A sharded encoder (FSDP2) on two gloo ranks leaves the gradients of one process; what cannot be served is refused."""

import random
import warnings

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode

from anybatch.caching import cached_step
from anybatch.caching.encoder import ModuleFacts
from anybatch.core.errors import AnybatchError
from tests.caching.helpers import Mlp, TextEncoder, recorded, relative_error
from tests.caching.test_distributed import GatheringSoftmax, reference, share, whole_batch
from tests.ranks import on_ranks

SHARES = [7, 4]  # three mini-batches of three on one rank, two on the other
CASES = {
    "all replayed": {"keep_graphs": 0},
    "two kept": {"keep_graphs": 2},
    "all kept": {"keep_graphs": 1.0},
    "auto": {"keep_graphs": "auto"},
    "accumulation": {},
}


class CountReductions(TorchDispatchMode):
    """Counts the collectives that reduce gradients."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += "reduce_scatter" in str(func)
        return func(*args, **(kwargs or {}))


def sharded_encoder():
    encoder = TextEncoder(seed=1)
    for layer in encoder.bert.encoder.layer:
        fully_shard(layer)
    fully_shard(encoder)
    return encoder


def run_case(rank, name, options):
    encoder, loss = sharded_encoder(), GatheringSoftmax(SHARES)
    inputs = [share(batch, rank, SHARES) for batch in whole_batch(SHARES)]
    value, reductions = torch.tensor(0.0), []
    for _ in range(2):  # the second step starts from whatever state the first one left
        encoder.zero_grad()
        loss.zero_grad()
        with CountReductions() as seen, warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            if name == "accumulation":
                encoder.set_requires_gradient_sync(False)
                cached_step(loss, encoder, inputs, mini_batch_size=3, scale=0.25)
                assert seen.count == 0
                encoder.set_requires_gradient_sync(True)
                value = cached_step(loss, encoder, inputs, mini_batch_size=3, scale=0.75)
            else:
                value = cached_step(loss, encoder, inputs, mini_batch_size=3, **options)
        ignored = [str(warning.message) for warning in said if "ignored for a sharded encoder" in str(warning.message)]
        assert bool(ignored) == (name == "auto")
        reductions.append(seen.count)
    found = {}
    for number, module in enumerate((encoder, loss.whole)):
        for key, parameter in module.named_parameters():
            gradient = parameter.grad
            found[f"{number}.{key}"] = gradient.full_tensor() if isinstance(gradient, DTensor) else gradient
    return value, found, reductions


class UnlikeOnOneRank(nn.Module):
    """Two layers, sharded each; between them rank 0 alone does something."""

    def __init__(self, what):
        super().__init__()
        self.first, self.second, self.what = nn.Linear(6, 8), nn.Linear(8, 5), what
        fully_shard(self.first)
        fully_shard(self.second)
        fully_shard(self)

    def forward(self, x):
        hidden = self.first(x)
        return self.second(self.what(hidden) if dist.get_rank() == 0 else hidden)


def looks_at_rows_on_one_rank():
    """What becomes of encoders whose look at the rows takes more passes on one rank than on the other."""
    said = []
    for what in (lambda h: h * (1 + random.random()), lambda h: h - h.mean(0)):
        inputs = [torch.randn(12, 6), torch.randn(12, 6)]
        try:
            cached_step(GatheringSoftmax([12, 12]), UnlikeOnOneRank(what), inputs, mini_batch_size=4)
            said.append("")
        except AnybatchError as error:
            said.append(str(error))
    return said


def on_rank(rank, _):
    torch.set_default_dtype(torch.float64)
    results = {name: run_case(rank, name, options) for name, options in CASES.items()}
    inputs = [share(batch, rank, SHARES) for batch in whole_batch(SHARES)]
    messages = []
    for options in ({"mini_batch_size": "auto"}, {"mini_batch_size": 1}):
        # Seven rows one by one on one rank are seven passes, and the other has four rows.
        with pytest.raises(AnybatchError) as caught:
            cached_step(GatheringSoftmax(SHARES), sharded_encoder(), inputs, **options)
        messages.append(str(caught.value))
    return results, messages + looks_at_rows_on_one_rank()


@pytest.fixture(scope="module")
def ranks():
    return on_ranks(on_rank, 2, seconds=90)


@pytest.mark.distributed
@pytest.mark.parametrize("case", CASES)
def test_sharded_ranks_equal_one_process(ranks, case):
    torch.set_default_dtype(torch.float64)
    try:
        wanted_value, wanted = reference(SHARES, tied=True)
    finally:
        torch.set_default_dtype(torch.float32)
    for results, _ in ranks:
        value, found, reductions = results[case]
        torch.testing.assert_close(value, wanted_value, rtol=1e-12, atol=0)
        assert relative_error(found, wanted) < 1e-12
        assert reductions == [3, 3]  # two layers and what is left: one each a step


@pytest.mark.distributed
def test_ranks_that_cannot_run_equally_often(ranks):
    for _, (auto, uneven, *_) in ranks:
        assert "on all ranks together" in auto
        assert "One rank has 7 mini-batches and another 4 rows" in uneven


@pytest.mark.distributed
def test_ranks_look_at_the_rows_together(ranks):
    for _, (_, _, random_numbers, centred) in ranks:
        assert random_numbers == ""
        assert "depends on the rows" in centred


def wrapped_in(module):
    return ModuleFacts([module], None).wrapped


def test_zero_is_refused_with_what_to_use():
    engine = type(
        "DeepSpeedEngine",
        (nn.Module,),
        {"zero_optimization_stage": lambda self: 2, "__module__": "deepspeed.runtime.engine"},
    )
    with pytest.raises(AnybatchError, match=r"ZeRO-2.*fully_shard.*DistributedDataParallel"):
        wrapped_in(nn.Sequential(engine()))
    engine.zero_optimization_stage = lambda self: 1
    assert wrapped_in(engine()) == []
    partitioned = Mlp()
    partitioned.layers[0].weight.ds_id = 0  # what ZeRO-3 leaves on every parameter
    with pytest.raises(AnybatchError, match="ZeRO-3"):
        recorded(partitioned, torch.randn(4, 6), mini_batch_size=4)


def test_the_older_fsdp_is_refused():
    older = FullyShardedDataParallel.__new__(FullyShardedDataParallel)
    nn.Module.__init__(older)
    with pytest.raises(AnybatchError, match="fully_shard"):
        wrapped_in(older)
