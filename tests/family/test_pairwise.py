"""SigLIP and AUC-CL against naive float64 loops, on ragged shapes, with duplicates, weights, tiles and ranks."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from anybatch.core.errors import AnybatchError
from anybatch.family import AUCCL, SigLIP
from anybatch.losses.registry import LossConfig, build_loss, make_loss
from tests import reference
from tests.losses.methods import cluster_weights
from tests.losses.test_losses import close, draw_batch, gradients
from tests.ranks import on_ranks


def naive_siglip(anchors, candidates, tau, bias, allowed, weight=None):
    scores = reference.unit(anchors) @ reference.unit(candidates).T
    total = 0.0
    for i in range(len(anchors)):
        total = total - torch.log(torch.sigmoid(scores[i, i] / tau + bias))
        for j in range(len(candidates)):
            if allowed[i, j]:
                factor = 1.0 if weight is None else weight[i, j].exp()
                total = total - factor * torch.log(torch.sigmoid(-(scores[i, j] / tau + bias)))
    return total / len(anchors)


def naive_auc(anchors, candidates, margin, allowed, weight=None):
    scores = reference.unit(anchors) @ reference.unit(candidates).T
    total, count = 0.0, 0.0
    for i in range(len(anchors)):
        for k in range(len(anchors)):
            for j in range(len(candidates)):
                if allowed[k, j]:
                    factor = 1.0 if weight is None else weight[k, j].exp().item()
                    total = total + factor * (margin - scores[i, i] + scores[k, j]) ** 2
                    count += factor
    return total / count if count else scores.sum() * 0.0


shapes = st.tuples(st.integers(0, 9999), st.integers(1, 7), st.integers(0, 5))


@settings(deadline=None, max_examples=40)
@given(
    shape=shapes,
    tau=st.sampled_from([0.1, 0.5]),
    ids=st.booleans(),
    weighted=st.booleans(),
    tile=st.sampled_from([1, 150, 10**7]),
)
def test_siglip_equals_its_twin(shape, tau, ids, weighted, tile):
    anchors, candidates, anchor_id, candidate_id = draw_batch(*shape)
    known = {"anchor_id": anchor_id, "candidate_id": candidate_id} if ids else {}
    weight = torch.randn(len(anchors), len(candidates), dtype=torch.float64) if weighted else None
    loss = SigLIP(temperature=tau, bias=-2.0, tile_bytes=tile).double()
    with torch.no_grad():
        loss.temperatures.log_temperature.fill_(math.log(tau))
    temperature, bias = (torch.tensor(value, dtype=torch.float64, requires_grad=True) for value in (tau, -2.0))
    for tensor in (anchors, candidates):
        tensor.requires_grad_()
    value = loss(anchors, candidates, log_weight=weight, **known)
    expected = naive_siglip(
        anchors, candidates, temperature, bias, reference.pairs_allowed(len(anchors), len(candidates), **known), weight
    )
    torch.testing.assert_close(value, expected, rtol=1e-10, atol=1e-12)
    ours = gradients(value, anchors, candidates, loss.temperatures.log_temperature, loss.bias)
    theirs = gradients(expected, anchors, candidates, temperature, bias)
    close(ours[:2], theirs[:2])
    torch.testing.assert_close(ours[2], theirs[2] * tau, rtol=1e-9, atol=1e-10)
    torch.testing.assert_close(ours[3], theirs[3], rtol=1e-9, atol=1e-10)


@settings(deadline=None, max_examples=30)
@given(shape=shapes, ids=st.booleans(), weighted=st.booleans(), tile=st.sampled_from([1, 150, 10**7]))
def test_auc_equals_its_twin(shape, ids, weighted, tile):
    anchors, candidates, anchor_id, candidate_id = draw_batch(*shape)
    known = {"anchor_id": anchor_id, "candidate_id": candidate_id} if ids else {}
    weight = torch.randn(len(anchors), len(candidates), dtype=torch.float64) if weighted else None
    for tensor in (anchors, candidates):
        tensor.requires_grad_()
    value = AUCCL(margin=0.7, tile_bytes=tile)(anchors, candidates, log_weight=weight, **known)
    allowed = reference.pairs_allowed(len(anchors), len(candidates), **known)
    expected = naive_auc(anchors, candidates, 0.7, allowed, weight)
    torch.testing.assert_close(value, expected, rtol=1e-10, atol=1e-12)
    close(gradients(value, anchors, candidates), gradients(expected, anchors, candidates))


def test_published_start_and_training():
    loss = SigLIP()
    assert loss.temperature == pytest.approx(0.1)
    assert loss.last_stats == {}
    optimizer = torch.optim.SGD(loss.parameters(), lr=0.01)
    torch.manual_seed(0)
    anchors = torch.randn(16, 8)
    for _ in range(60):
        optimizer.zero_grad()
        loss(anchors, anchors).backward()
        optimizer.step()
    assert loss.temperature < 0.1
    assert loss.bias.item() != -10.0
    assert loss.last_stats["num_negatives"] == 15
    assert loss.last_stats["bias"] == loss.bias.item()


def test_configuration_and_mistakes():
    built = make_loss("siglip", 9, temperature=0.1, bias=-8.0)
    assert isinstance(built, SigLIP)
    assert built.bias.item() == -8.0
    assert build_loss(LossConfig(name="auc_cl", margin=0.5, weights="inclusion"), num_rows=9).margin == 0.5
    for settings_, match in (
        ({"name": "siglip", "direction": "both"}, "one direction"),
        ({"name": "auc_cl", "temperature": 0.1}, "no temperature"),
        ({"name": "auc_cl", "learnable_temperature": True}, "learnable_temperature is given"),
        ({"name": "siglip", "weights": "inclusion"}, "inclusion"),
        ({"name": "auc_cl", "margin": 0.0}, "margin is 0"),
    ):
        with pytest.raises(AnybatchError, match=match):
            build_loss(LossConfig(**settings_), num_rows=9)
    with pytest.raises(AnybatchError, match="M >= B"):
        SigLIP()(torch.ones(3, 2), torch.ones(2, 2))


@pytest.mark.parametrize("make", [lambda: SigLIP(temperature=0.001, min_temperature=0.001), AUCCL])
@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_hostile_similarities_stay_finite_and_float32(make, sign):
    anchors = torch.eye(4).requires_grad_()
    loss = make()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        value = loss(anchors.bfloat16(), (sign * torch.eye(4)).roll(1, 0).bfloat16())
    value.backward()
    assert value.dtype == torch.float32
    assert value.isfinite()
    assert anchors.grad.isfinite().all()
    assert all(parameter.grad.isfinite().all() for parameter in loss.parameters())
    assert all(type(figure) is float for figure in loss.last_stats.values())


def test_one_gradient_evaluation_keeps_no_graph():
    with torch.no_grad():
        assert not SigLIP()(torch.eye(3), torch.eye(3)).requires_grad
    frozen = torch.eye(3)
    trained = torch.randn(3, 3, requires_grad=True)
    AUCCL()(frozen, trained).backward()  # a frozen tower
    assert trained.grad.abs().max() > 0


SHARES, EXTRA = {2: [3, 5], 3: [4, 1, 3]}, {2: [2, 1], 3: [0, 2, 1]}
MAKE = {"siglip": lambda tile: SigLIP(bias=-1.0, tile_bytes=tile), "auc": lambda tile: AUCCL(tile_bytes=tile)}


def run(name, tile, rows, extras):
    generator = torch.Generator().manual_seed(4)
    sides = [torch.randn(length, 5, generator=generator, dtype=torch.float64) for length in (8, 8, 3)]
    mine = [side[part].clone().requires_grad_() for side, part in zip(sides, (rows, rows, extras), strict=True)]
    anchor_id = torch.tensor([0, 1, 0, 3, 4, 1, 6, 7])[rows]
    candidate_id = torch.cat([torch.tensor([0, 1, 2, 3, 2, 5, 6, 7])[rows], torch.tensor([7, 8, 0])[extras]])
    cluster = torch.tensor([0, 0, 1, 1, -1, 0, 2, 2])[rows]
    columns = torch.cat([cluster, torch.full((len(mine[2]),), -2)])
    weight = cluster_weights(columns, len(cluster), same=-0.5, other=0.25)
    loss = MAKE[name](tile).double()
    value = loss(mine[0], torch.cat(mine[1:]), log_weight=weight, anchor_id=anchor_id, candidate_id=candidate_id)
    value.backward()
    return value.detach(), [side.grad for side in mine], [parameter.grad for parameter in loss.parameters()]


def worker(rank, world_size):
    first, first_extra = sum(SHARES[world_size][:rank]), sum(EXTRA[world_size][:rank])
    rows = slice(first, first + SHARES[world_size][rank])
    extras = slice(first_extra, first_extra + EXTRA[world_size][rank])
    return {(name, tile): run(name, tile, rows, extras) for name in MAKE for tile in (1, 10**7)}


@pytest.mark.distributed
@pytest.mark.parametrize("world_size", [3])
def test_ranks_equal_one_process(world_size):
    ranks = on_ranks(worker, world_size)
    for name in MAKE:
        value, sides, parameters = run(name, 10**7, slice(0, 8), slice(0, 3))
        for tile in (1, 10**7):
            parts = [rank[name, tile] for rank in ranks]
            for column in range(3):
                together = torch.cat([part[1][column] for part in parts]) / world_size
                torch.testing.assert_close(together, sides[column], rtol=1e-10, atol=1e-12)
            for part in parts:
                torch.testing.assert_close(part[0], value, rtol=1e-12, atol=1e-12)
                for ours, theirs in zip(part[2], parameters, strict=True):
                    torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_cast_model_leaves_bias_and_temperature_in_float32(dtype):
    """A bias of -10 has steps of 1/16 in bfloat16."""
    loss = SigLIP()
    torch.nn.Sequential(torch.nn.Linear(2, 2), loss).to(dtype)
    assert {parameter.dtype for parameter in loss.parameters()} == {torch.float32}
    assert loss.bias.item() == -10.0
