"""Matryoshka: the sum over prefixes, a memory for each, from one leaf; resumed, on ranks, by configuration, and beside
sentence-transformers.
"""

from __future__ import annotations

import copy

import pytest
import torch

from anybatch.core.configuration import from_mapping
from anybatch.core.errors import AnybatchError
from anybatch.family import SigLIP, TempNet
from anybatch.losses import InfoNCE, Matryoshka, SogCLR
from anybatch.losses.registry import LossConfig, build_loss
from tests.ranks import on_ranks

from .methods import ALL

DIMS, WEIGHTS = [5, 2, 3], [1.0, 0.5, 2.0]


def embeddings(seed, rows=7, extra=2, width=5):
    generator = torch.Generator().manual_seed(seed)
    anchors, candidates = (
        torch.randn(n, width, generator=generator, dtype=torch.float64) for n in (rows, rows + extra)
    )
    return anchors.requires_grad_(), candidates.requires_grad_()


def step(loss, seed, rows=slice(0, 7)):
    anchors, candidates = embeddings(seed, extra=0)
    mine = [side.detach()[rows].clone().requires_grad_() for side in (anchors, candidates)]
    value = loss(*mine, index=torch.tensor([3, 9, 3, 11, 0, 9, 20])[rows])
    value.backward()
    return [value.detach(), *(side.grad for side in mine)]


@pytest.mark.parametrize("name", [name for name in ALL if name != "tempnet"])
def test_equals_one_loss_a_dimension(name):
    make = ALL[name]
    torch.manual_seed(0)
    ours = Matryoshka(make(temperature=0.2), DIMS, weights=WEIGHTS).double()
    torch.manual_seed(0)
    apart = [make(temperature=0.2).double() for _ in DIMS]
    for seed in range(3):
        anchors, candidates = embeddings(seed)
        index = torch.tensor([3, 9, 3, 11, 0, 9, 20])
        value = ours(anchors, candidates, index=index)
        got = torch.autograd.grad(value, [anchors, candidates])
        terms = [
            weight * loss(anchors[:, :width], candidates[:, :width], index=index)
            for width, weight, loss in zip(DIMS, WEIGHTS, apart, strict=True)
        ]
        expected = torch.autograd.grad(sum(terms), [anchors, candidates])
        torch.testing.assert_close(value, sum(terms), rtol=1e-13, atol=0)
        torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-14)
    for part, loss in zip(ours.losses, apart, strict=True):
        torch.testing.assert_close(part.state_dict(), loss.state_dict(), rtol=0, atol=0, equal_nan=True)
    assert set(ours.last_stats) >= {"objective", "objective_5", "objective_2", "objective_3", "temperature"}


def test_equals_a_naive_float64_sum():
    anchors, candidates = embeddings(4)
    value = Matryoshka(InfoNCE(temperature=0.2), DIMS, weights=WEIGHTS)(anchors, candidates)
    naive = torch.zeros((), dtype=torch.float64)
    for width, weight in zip(DIMS, WEIGHTS, strict=True):
        short = [torch.nn.functional.normalize(side[:, :width], dim=1) for side in (anchors, candidates)]
        naive = naive + weight * torch.nn.functional.cross_entropy(short[0] @ short[1].T / 0.2, torch.arange(7))
    torch.testing.assert_close(value, naive, rtol=1e-13, atol=0)
    got, expected = (torch.autograd.grad(scalar, [anchors, candidates]) for scalar in (value, naive))
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-14)


def test_memories_are_apart_and_resume_bit_for_bit():
    whole = Matryoshka(SogCLR(40, gamma=0.4, learnable_temperature=True), DIMS)
    for seed in range(2):
        step(whole, seed)
    resumed = Matryoshka(SogCLR(40, gamma=0.4, learnable_temperature=True), DIMS)
    resumed.load_state_dict(copy.deepcopy(whole.state_dict()))
    assert [int(part.denominator.embedding_width) for part in resumed.losses] == DIMS
    assert not torch.equal(resumed.losses[0].denominator.log_mean, resumed.losses[1].denominator.log_mean)
    for ours, theirs in zip(step(whole, 2), step(resumed, 2), strict=True):
        assert torch.equal(ours, theirs)
    assert all(
        torch.equal(value.nan_to_num(7.0), resumed.state_dict()[name].nan_to_num(7.0))
        for name, value in whole.state_dict().items()
    )


def test_losses_made_for_a_width_are_given_one_by_one():
    loss = Matryoshka([TempNet(40, width, hidden=3) for width in DIMS], DIMS).double()
    assert step(loss, 0)[0].isfinite()


def test_pairwise_losses_too():
    assert step(Matryoshka(SigLIP(), [2, 5]).double(), 0)[0].isfinite()


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({"dimensions": []}, "dimensions are"),
        ({"dimensions": [4, 4]}, "dimensions are"),
        ({"dimensions": [0, 4]}, "dimensions are"),
        ({"dimensions": [2, 4], "weights": [1.0]}, "one number a dimension"),
        ({"dimensions": [2, 4], "weights": [1.0, -1.0]}, "one number a dimension"),
    ],
)
def test_mistakes(arguments, match):
    with pytest.raises(AnybatchError, match=match):
        Matryoshka(InfoNCE(), **arguments)
    same = InfoNCE()
    with pytest.raises(AnybatchError, match="a different one for each"):
        Matryoshka([same, same], [2, 4])
    with pytest.raises(AnybatchError, match="prefixes go up to 8"):
        Matryoshka(InfoNCE(), [8, 4])(*embeddings(0))


def test_by_configuration():
    config = from_mapping(LossConfig, {"name": "sogclr", "matryoshka": [4, 2]})
    loss = build_loss(config, num_rows=30)
    assert isinstance(loss, Matryoshka)
    assert (loss.dimensions, loss.weights) == ((4, 2), (1.0, 1.0))
    assert loss(*embeddings(0), index=torch.arange(7)).isfinite()
    tempnet = build_loss(LossConfig(name="tempnet", matryoshka=(4, 2)), num_rows=30)
    assert tempnet.double()(*embeddings(0), index=torch.arange(7)).isfinite()
    for given, match in [
        ({"matryoshka": (4, 4)}, "different positive widths"),
        ({"name": "tempnet", "matryoshka": (4,), "dimensions": 4}, "says the widths already"),
    ]:
        with pytest.raises(AnybatchError, match=match):
            LossConfig(**given)


def worker(rank, world_size):
    loss = Matryoshka(SogCLR(40, gamma=0.4, learnable_temperature=True, tile_bytes=64), DIMS, weights=WEIGHTS).double()
    rows = [slice(0, 4), slice(4, 5), slice(5, 7)][rank]
    steps = [step(loss, seed, rows) for seed in range(2)]
    return steps, dict(loss.state_dict())


@pytest.mark.distributed
def test_three_ranks_equal_one_process():
    ranks = on_ranks(worker, 3)
    loss = Matryoshka(SogCLR(40, gamma=0.4, learnable_temperature=True), DIMS, weights=WEIGHTS).double()
    for number in range(2):
        value, *gradients = step(loss, number)
        for side, expected in enumerate(gradients):
            together = torch.cat([rank[0][number][1 + side] for rank in ranks]) / 3
            torch.testing.assert_close(together, expected, rtol=1e-10, atol=1e-12)
        for rank in ranks:
            torch.testing.assert_close(rank[0][number][0], value, rtol=1e-12, atol=1e-12)
    for rank in ranks:
        torch.testing.assert_close(rank[1], dict(loss.state_dict()), rtol=1e-10, atol=1e-12, equal_nan=True)
