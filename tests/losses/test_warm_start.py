"""Warm start against naive float64 loops; duplicates; ranks."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from anybatch.core.errors import AnybatchError
from anybatch.family import EMC2, NUCLR, ISogCLR, TempNet
from anybatch.losses import InfoNCE, SogCLR
from anybatch.losses import warm_start as room
from anybatch.losses.warm_start import exact_log_mean, make_table, warm_start
from tests.ranks import on_ranks

from .. import reference

N, WIDTH = 37, 6


def data(dtype=torch.float64, n=N):
    generator = torch.Generator().manual_seed(2)
    anchors, positives = (torch.randn(n, WIDTH, generator=generator, dtype=dtype) for _ in range(2))
    anchor_id, positive_id = torch.randint(n, (n,), generator=generator), torch.randint(n, (n,), generator=generator)
    return anchors, positives + anchors, anchor_id, positive_id


def naive(queries, targets, tau, query_id=None, target_id=None):
    """One list of relative logits a row."""
    scores = reference.unit(queries) @ reference.unit(targets).T / tau
    allowed = reference.pairs_allowed(len(queries), len(targets), query_id, target_id)
    return [(scores[i][allowed[i]] - scores[i, i]) for i in range(len(queries))]


def level(anchors, positives, tau):
    """(N,) logits of the positives."""
    return (reference.unit(anchors) * reference.unit(positives)).sum(dim=1) / tau


@pytest.mark.parametrize("tile_bytes", [1, 999, 10**7])
@pytest.mark.parametrize("ids", [False, True])
def test_rows_equal_the_loop(tile_bytes, ids):
    anchors, positives, anchor_id, positive_id = data()
    known = (anchor_id, positive_id) if ids else (None, None)
    table = make_table(
        anchors.numpy(), positives.numpy(), anchor_id=known[0], positive_id=known[1],
        normalize=True, device=torch.device("cpu"),
    )  # fmt: skip
    expected = naive(anchors, positives, 0.05, *known)
    log_mean, positive = exact_log_mean(table, slice(5, 30), temperature=0.05, tile_bytes=tile_bytes)
    for i, row in enumerate(range(5, 30)):
        assert log_mean[i].item() == pytest.approx((expected[row].exp().sum() / (N - 1)).log().item(), rel=1e-12)
    torch.testing.assert_close(positive, level(anchors, positives, 0.05)[5:30], rtol=1e-12, atol=0)


def test_rows_that_are_far_below_their_positive_stay_finite():
    sides = {"anchors": np.eye(4, dtype=np.float32), "positives": np.eye(4, dtype=np.float32)}
    settings = {"normalize": True, "device": torch.device("cpu")}
    table = make_table(**sides, anchor_id=None, positive_id=None, **settings)
    # The first tile of row 0 is its own positive alone.
    log_mean, _ = exact_log_mean(table, slice(0, 4), temperature=0.002, tile_bytes=1)
    torch.testing.assert_close(log_mean, torch.full((4,), -500.0, dtype=torch.float64))
    alone = make_table(**sides, anchor_id=np.zeros(4, int), positive_id=np.arange(4), **settings)
    assert exact_log_mean(alone, slice(0, 4), temperature=0.1)[0].isneginf().all()


@pytest.mark.parametrize("ids", [False, True])
def test_fills_both_directions_exactly(ids):
    anchors, positives, anchor_id, positive_id = data()
    known = {"anchor_id": anchor_id.numpy(), "positive_id": positive_id.numpy()} if ids else {}
    loss = SogCLR(N, temperature=0.07, direction="both")
    loss.denominator.double()
    warm_start(loss, anchors.numpy(), positives.numpy(), tile_bytes=700, **known)
    forward = naive(anchors, positives, 0.07, *((anchor_id, positive_id) if ids else ()))
    back = naive(positives, anchors, 0.07, *((positive_id, anchor_id) if ids else ()))
    for direction, rows in enumerate((forward, back)):
        expected = torch.stack([(row.exp().sum() / (N - 1)).log() for row in rows])
        expected += level(anchors, positives, 0.07)
        torch.testing.assert_close(loss.denominator.log_mean[direction], expected, rtol=1e-6, atol=1e-6)
    assert int(loss.denominator.embedding_width) == WIDTH


def test_is_where_a_batch_of_everything_would_go():
    """With the whole data set as one batch and gamma = 1 the loss itself writes what the warm start does."""
    anchors, positives, anchor_id, positive_id = data(torch.float32)
    trained, warmed = (SogCLR(N, temperature=0.1, gamma=1.0, direction="both") for _ in range(2))
    trained(anchors.requires_grad_(), positives, index=torch.arange(N), anchor_id=anchor_id, candidate_id=positive_id)
    warm_start(warmed, anchors, positives, anchor_id=anchor_id, positive_id=positive_id)
    torch.testing.assert_close(
        warmed.denominator.log_mean, trained.denominator.log_mean, rtol=1e-5, atol=1e-5, equal_nan=True
    )


def test_mistakes():
    anchors, positives, anchor_id, _ = data()
    for make, arguments, match in (
        (lambda: InfoNCE(), {}, "InfoNCE has no memory"),
        (lambda: EMC2(N), {}, "EMC2 has no memory of plain"),
        (lambda: NUCLR(N), {}, "NUCLR has no memory of plain"),
        (lambda: SogCLR(N, mask_margin=0.1), {}, "SogCLR has mask_margin, by which"),
        (lambda: SogCLR(N + 1), {}, f"Got embeddings of {N} rows; the memory was made for {N + 1}"),
        (lambda: SogCLR(N), {"anchor_id": anchor_id}, "go together"),
    ):
        with pytest.raises(AnybatchError, match=match):
            warm_start(make(), anchors, positives, **arguments)
    with pytest.raises(AnybatchError, match="two equal shapes"):
        warm_start(SogCLR(N), anchors, positives[:3])


def warm_all():
    """Replicated and sharded."""
    anchors, positives, anchor_id, positive_id = data(torch.float32)
    room.BLOCK_ROWS = 5
    states = []
    for sharded in (False, True):
        loss = ISogCLR(N, temperature=0.1, direction="both", sharded=sharded)
        loss.temperatures.rows.values[:] = torch.linspace(0.05, 0.2, 2 * N).view(2, N)
        warm_start(loss, anchors, positives, anchor_id=anchor_id, positive_id=positive_id)
        for name in ("log_mean", "made_at"):
            states += [loss.denominator.read(name, torch.arange(N), direction=direction) for direction in (0, 1)]
    return states


def worker(rank, world_size):
    return warm_all()


def refusing_worker(rank, world_size):
    """Rows that are too few on rank 1; then all go on together."""
    anchors, positives, *_ = data(torch.float32)
    with pytest.raises(AnybatchError) as refused:
        warm_start(SogCLR(N), anchors[: N - rank], positives[: N - rank])
    loss = SogCLR(N)
    warm_start(loss, anchors, positives)
    return [str(refused.value), str(int(loss.denominator.visited.sum()))]


@pytest.mark.distributed
def test_what_one_rank_finds_stops_all_ranks():
    for said, visited in on_ranks(refusing_worker, 2):
        assert f"Got embeddings of {N - 1} rows" in said
        assert visited == str(N)


@pytest.mark.distributed
@pytest.mark.parametrize("world_size", [2])
def test_ranks_equal_one_process(world_size, monkeypatch):
    monkeypatch.setattr(room, "BLOCK_ROWS", 5)
    alone = warm_all()
    for states in on_ranks(worker, world_size):
        for ours, theirs in zip(states, alone, strict=True):
            assert math.isfinite(ours.nan_to_num(0).sum().item())
            torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5, equal_nan=True)


def test_a_network_with_dropout_is_asked_in_evaluation_mode():
    class Net(torch.nn.Sequential):
        def forward(self, embeddings):
            return super().forward(embeddings) + 0 * torch.rand(1)  # draws in either mode

    torch.manual_seed(0)
    anchors, positives, *_ = data(torch.float32)
    net = Net(torch.nn.Linear(WIDTH, 8), torch.nn.BatchNorm1d(8), torch.nn.Dropout(0.5), torch.nn.Linear(8, 1))
    net[2].eval()  # somebody froze it; it is to stay so
    loss = TempNet(N, WIDTH, temperature_range=(0.02, 0.5), net=torch.nn.ModuleList([net]))
    modes = [module.training for module in loss.modules()]
    network = {name: value.clone() for name, value in net.state_dict().items()}
    generator = torch.get_rng_state()
    warm_start(loss, anchors, positives)
    first = loss.denominator.log_mean.clone()
    warm_start(loss, anchors, positives)
    assert torch.equal(loss.denominator.log_mean, first)
    assert torch.equal(torch.get_rng_state(), generator)
    assert [module.training for module in loss.modules()] == modes
    for name, value in net.state_dict().items():
        assert torch.equal(value, network[name]), name


def test_temperatures_of_single_rows():
    anchors, positives, *_ = data()
    for loss in (
        ISogCLR(N, temperature=0.1, direction="both"),
        TempNet(N, WIDTH, temperature=0.05, temperature_range=(0.01, 0.1), direction="both"),
    ):
        generator = torch.Generator().manual_seed(5)
        for parameter in loss.parameters():
            torch.nn.init.normal_(parameter, generator=generator)
        if isinstance(loss, ISogCLR):
            loss.temperatures.rows.values.uniform_(0.05, 0.2, generator=generator)
        loss.denominator.double()
        warm_start(loss, anchors, positives)
        loss.denominator.gamma = 1.0  # the whole data set as one batch says the same
        warmed = loss.denominator.log_mean.clone()
        loss(anchors.clone().requires_grad_(), positives, index=torch.arange(N))
        torch.testing.assert_close(warmed, loss.denominator.log_mean, rtol=1e-6, atol=1e-6)
        assert len(warmed.unique()) == 2 * N
