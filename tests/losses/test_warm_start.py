"""Warm start and monitoring against naive float64 loops; resuming; duplicates; ranks."""

from __future__ import annotations

import math
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist

from anybatch.core import distributed
from anybatch.core.errors import AnybatchError
from anybatch.family import EMC2, NUCLR, FastCLIP, ISogCLR, TempNet
from anybatch.losses import InfoNCE, SogCLR
from anybatch.losses import warm_start as room
from anybatch.losses.exact_rows import exact_rows, make_table
from anybatch.losses.warm_start import memory_figures, warm_start
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


@pytest.mark.parametrize("tile_bytes", [1, 999, 10**7])
@pytest.mark.parametrize("ids", [False, True])
def test_rows_equal_the_loop(tile_bytes, ids):
    anchors, positives, anchor_id, positive_id = data()
    known = (anchor_id, positive_id) if ids else (None, None)
    table = make_table(
        anchors.numpy(), positives.numpy(), anchor_id=known[0], positive_id=known[1],
        normalize=True, device=torch.device("cpu"),
    )  # fmt: skip
    expected = naive(anchors, positives, 0.02, *known)
    rows = exact_rows(table, slice(5, 30), temperature=0.02, tile_bytes=tile_bytes)
    plain = exact_rows(table, slice(5, 30), temperature=0.02, moments=False, tile_bytes=tile_bytes)
    assert torch.equal(plain.log_sum, rows.log_sum)
    assert plain.purity.isnan().all()
    some = np.array([7, 12, 20])  # rows by number, in any order
    for order in (some, some[::-1].copy()):
        subset = exact_rows(table, order, temperature=0.02, tile_bytes=tile_bytes)
        torch.testing.assert_close(subset.log_sum, rows.log_sum[order - 5], rtol=1e-12, atol=0)
        assert torch.equal(subset.num_negatives, rows.num_negatives[order - 5])
    assert rows.num_drawn == N - 1
    for i, row in enumerate(range(5, 30)):
        p = expected[row].softmax(0)
        assert rows.log_sum[i].item() == pytest.approx(expected[row].logsumexp(0).item(), rel=1e-12)
        assert rows.num_negatives[i].item() == len(expected[row])
        assert rows.log_mean[i].item() == pytest.approx((expected[row].exp().sum() / (N - 1)).log().item(), rel=1e-12)
        assert rows.entropy[i].item() == pytest.approx(-(p * p.log()).sum().item(), rel=1e-9, abs=1e-12)
        assert rows.purity[i].item() == pytest.approx((p * p).sum().item(), rel=1e-12)


def test_rows_that_are_far_below_their_positive_stay_finite():
    table = make_table(
        np.eye(4, dtype=np.float32), np.eye(4, dtype=np.float32) * 1.0, anchor_id=None, positive_id=None,
        normalize=True, device=torch.device("cpu"),
    )  # fmt: skip
    rows = exact_rows(
        table, slice(0, 4), temperature=0.002, tile_bytes=1
    )  # the first tile of row 0 is its own positive alone
    torch.testing.assert_close(rows.log_mean, torch.full((4,), -500.0, dtype=torch.float64))
    torch.testing.assert_close(rows.purity, torch.full((4,), 1 / 3, dtype=torch.float64))
    alone = make_table(
        np.eye(2), np.eye(2), anchor_id=np.zeros(2, int), positive_id=np.arange(2),
        normalize=True, device=torch.device("cpu"),
    )  # fmt: skip
    rows = exact_rows(alone, slice(0, 2), temperature=0.1)
    assert rows.log_mean.isneginf().all()
    assert rows.num_negatives.tolist() == [0, 0]


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
        expected += (reference.unit(anchors) * reference.unit(positives)).sum(dim=1) / 0.07
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


def test_a_killed_one_goes_on_bit_for_bit(tmp_path, monkeypatch):
    anchors, positives, *_ = data(torch.float32)
    for name, value in (("BLOCK_ROWS", 10), ("SAVE_SECONDS", 0.0), ("SAVE_RATIO", 0.0)):
        monkeypatch.setattr(room, name, value)
    whole = SogCLR(N, direction="both")
    warm_start(whole, anchors, positives)
    file = tmp_path / "state.safetensors"

    def killed(done, total):
        assert total == 2 * N
        if done > N:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        warm_start(SogCLR(N, direction="both"), anchors, positives, file=file, progress=killed)
    seen, again = [], SogCLR(N, direction="both")
    warm_start(again, anchors, positives, file=file, progress=lambda done, total: seen.append(done))
    assert seen == [47, 57, 67, 74]  # the first is what was there
    assert torch.equal(again.denominator.log_mean, whole.denominator.log_mean)
    seen.clear()
    third = SogCLR(N, direction="both")
    warm_start(third, anchors, positives, file=file, progress=lambda done, total: seen.append(done))
    assert seen == [74]  # finished: only read
    assert torch.equal(third.denominator.log_mean, whole.denominator.log_mean)
    with pytest.raises(AnybatchError, match="another temperature"):
        warm_start(SogCLR(N, direction="both", temperature=0.2), anchors, positives, file=file)
    with pytest.raises(AnybatchError, match="other embeddings"):
        warm_start(SogCLR(N, direction="both"), anchors + 1, positives, file=file)
    file.write_bytes(b"cut short")
    with pytest.raises(AnybatchError, match="is damaged"):
        warm_start(SogCLR(N, direction="both"), anchors, positives, file=file)


def test_mistakes():
    anchors, positives, anchor_id, _ = data()
    for make, arguments, match in (
        (lambda: InfoNCE(), {}, "InfoNCE has no memory"),
        (lambda: EMC2(N), {}, "EMC2 has no memory of plain"),
        (lambda: NUCLR(N), {}, "NUCLR has no memory of plain"),
        (lambda: SogCLR(N + 1), {}, f"Got embeddings of {N} rows; the memory was made for {N + 1}"),
        (lambda: SogCLR(N), {"anchor_id": anchor_id}, "go together"),
    ):
        with pytest.raises(AnybatchError, match=match):
            warm_start(make(), anchors, positives, **arguments)
    with pytest.raises(AnybatchError, match="two equal shapes"):
        warm_start(SogCLR(N), anchors, positives[:3])


class TestMonitoring:
    def test_an_exact_memory_has_no_error(self):
        anchors, positives, anchor_id, positive_id = data()
        known = {"anchor_id": anchor_id, "positive_id": positive_id}
        loss = SogCLR(N, temperature=0.1, direction="both")
        loss.denominator.double()
        before = memory_figures(loss, anchors, positives, index=torch.arange(N), **known)
        assert before["memory_visited"] == 0
        assert "memory_log_rmse" not in before
        warm_start(loss, anchors, positives, **known)
        for direction in (0, 1):
            figures = memory_figures(loss, anchors, positives, index=torch.arange(N), direction=direction, **known)
            assert figures["memory_visited"] == 1
            assert figures["memory_log_rmse"] < 1e-6
            assert figures["objective_memory"] == pytest.approx(figures["objective_true"], rel=1e-6)
            sides = (anchors, positives) if direction == 0 else (positives, anchors)
            ids = (anchor_id, positive_id) if direction == 0 else (positive_id, anchor_id)
            rows = naive(*sides, 0.1, *ids)
            u = torch.stack([row.exp().sum() / (N - 1) for row in rows])
            assert figures["objective_true"] == pytest.approx(
                0.1 * (loss.denominator.eps + u).log().mean().item(), rel=1e-9
            )
            entropy = torch.stack([-(row.softmax(0) * row.log_softmax(0)).sum() for row in rows])
            assert figures["effective_negatives"] == pytest.approx(entropy.exp().mean().item(), rel=1e-9)
            surrogate = torch.stack(
                [
                    (row.exp() / (N - 1) / (loss.denominator.eps + u_i) * row * 0.1).sum()
                    for row, u_i in zip(rows, u, strict=True)
                ]
            )
            assert figures["surrogate"] == pytest.approx(surrogate.mean().item(), rel=1e-6)
            assert all(type(value) is float for value in figures.values())

    def test_a_stale_memory_shows(self):
        anchors, positives, *_ = data()
        loss = SogCLR(50, temperature=0.1)
        index = torch.arange(50)[-N:]
        positive = (reference.unit(anchors) * reference.unit(positives)).sum(dim=1) / 0.1
        loss.denominator.double().fill(
            index[:20], positive[:20], direction=0, dimensions=WIDTH
        )  # 0 beside the positive
        figures = memory_figures(loss, anchors, positives, index=index, probe=30)
        truth = torch.stack([row.exp().mean().log() for row in naive(anchors, positives, 0.1)])[:20]
        assert figures["memory_visited"] == pytest.approx(2 / 3)
        assert figures["memory_log_rmse"] == pytest.approx(truth.square().mean().sqrt().item(), rel=1e-9)
        assert figures["memory_log_bias"] == pytest.approx(-truth.mean().item(), rel=1e-9)
        some = memory_figures(loss, anchors, positives, index=index, probe=np.array([3, 25]))
        assert some["memory_visited"] == 0.5

    def test_mistakes(self):
        anchors, positives, *_ = data()
        with pytest.raises(AnybatchError, match="InfoNCE has no memory"):
            memory_figures(InfoNCE(), anchors, positives, index=torch.arange(N))
        with pytest.raises(AnybatchError, match="index has shape"):
            memory_figures(SogCLR(N), anchors, positives, index=torch.arange(3))


def warm_all(folder):
    """Replicated and sharded; killed after the first block and resumed."""
    anchors, positives, anchor_id, positive_id = data(torch.float32)
    room.BLOCK_ROWS, room.SAVE_SECONDS = 5, 0.0
    states = []
    for number in range(2):
        loss = SogCLR(N, temperature=0.1, direction="both", sharded=number == 1)
        file = Path(folder) / f"{number}-{dist.get_world_size() if dist.is_initialized() else 1}.safetensors"

        def killed(done, total):
            raise KeyboardInterrupt

        for progress in (killed, None):
            try:
                warm_start(
                    loss, anchors, positives, anchor_id=anchor_id, positive_id=positive_id, file=file, progress=progress
                )
            except KeyboardInterrupt:
                assert progress is killed
        rows = torch.arange(N)
        states.append(
            torch.stack([loss.denominator.read("log_mean", rows, direction=direction) for direction in (0, 1)])
        )
    return states


def worker(rank, world_size, folder):
    return warm_all(folder)


def refusing_worker(rank, world_size, folder):
    """Each rank says what it was told; without an agreement rank 1 would wait for a gather that never comes."""
    anchors, positives, *_ = data(torch.float32)
    said = []
    for name in ("bad", "other"):
        try:
            warm_start(SogCLR(N), anchors, positives, file=Path(folder) / name)
        except AnybatchError as error:
            said.append(str(error))
    try:
        with distributed.alone() as chosen:
            if chosen:
                raise OSError("disk full")
    except (OSError, AnybatchError) as error:
        said.append(repr(error))
    loss = SogCLR(N)
    warm_start(loss, anchors, positives, file=Path(folder) / "good")  # all go on together
    return [*said, str(int(loss.denominator.visited.sum()))]


def failing_worker(rank, world_size, folder):
    """What one rank finds alone, all refuse: a file that rank 0 cannot write, rows that are too few on rank 1."""
    anchors, positives, *_ = data(torch.float32)
    said = []
    for rows, file in ((N, Path(folder) / "missing" / "file"), (N - rank, None)):
        try:
            warm_start(SogCLR(N), anchors[:rows], positives[:rows], file=file)
        except AnybatchError as error:
            said.append(str(error))
    return said


@pytest.mark.distributed
def test_what_one_rank_finds_stops_all_ranks():
    with tempfile.TemporaryDirectory() as folder:
        said = on_ranks(failing_worker, 2, folder)
    assert said[0] == said[1]
    assert "Cannot write" in said[1][0]
    assert f"Got embeddings of {N - 1} rows" in said[0][1]


@pytest.mark.parametrize("name", ["tempnet", "isogclr", "fastclip v2"])
def test_a_file_is_of_its_temperatures(name, tmp_path):
    """Temperatures of single examples are not told by their mean, nor by what the last call saw of them."""
    anchors, positives, *_ = data(torch.float32)
    make = {
        "tempnet": lambda **k: TempNet(N, WIDTH, **k),
        "isogclr": lambda **k: ISogCLR(N, **k),
        "fastclip v2": lambda **k: FastCLIP(N, version="v2", direction="one_way", **k),
    }[name]
    limits = {"temperature": 0.05, "temperature_range": (0.02, 0.1)}
    torch.manual_seed(0)
    loss, again, other = (make(**limits) for _ in range(3))
    again.load_state_dict(loss.state_dict())
    again.temperatures._mean = 0.06  # what a call leaves behind, with a network
    with torch.no_grad():
        if name == "tempnet":
            for learned in other.parameters():
                learned.add_(torch.randn_like(learned))
        else:
            spread = torch.linspace(0.02, 0.08, N)
            loss.temperatures.rows.values[0], again.temperatures.rows.values[0], other.temperatures.rows.values[0] = (
                spread,
                spread,
                spread.flip(0),
            )
    file = tmp_path / "state"
    warm_start(loss, anchors, positives, file=file)
    warm_start(again, anchors, positives, file=file)
    assert torch.equal(again.denominator.log_mean, loss.denominator.log_mean)
    with pytest.raises(AnybatchError, match="another temperature"):
        warm_start(other, anchors, positives, file=file)
    wider = make(temperature=0.05, temperature_range=(0.02, 0.2))
    wider.temperatures.load_state_dict(loss.temperatures.state_dict())
    with pytest.raises(AnybatchError, match="another temperature"):
        warm_start(wider, anchors, positives, file=file)


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
    figures = memory_figures(loss, anchors, positives, index=torch.arange(N))
    assert figures["memory_log_rmse"] < 1e-5
    assert torch.equal(torch.get_rng_state(), generator)
    assert [module.training for module in loss.modules()] == modes
    for name, value in net.state_dict().items():
        assert torch.equal(value, network[name]), name


@pytest.mark.distributed
def test_a_bad_file_is_refused_by_all_ranks():
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "bad").write_bytes(b"cut short")
        anchors, positives, *_ = data(torch.float32)
        positives[N - 2, WIDTH - 1] += 0.01  # one number of one row
        warm_start(SogCLR(N), anchors, positives, file=Path(folder) / "other")
        said = on_ranks(refusing_worker, 2, folder)
    assert said[0][:2] == said[1][:2]
    assert "is damaged" in said[1][0]
    assert "other embeddings" in said[1][1]
    assert [lines[2:] for lines in said] == [
        ["OSError('disk full')", str(N)],
        ["AnybatchError(\"OSError('disk full')\")", str(N)],
    ]


@pytest.mark.parametrize("kind", ["float16", "bfloat16", "memory map"])
def test_every_number_counts_in_a_resume(kind, tmp_path, monkeypatch):
    """A change anywhere is other embeddings, in all kinds of arrays."""
    monkeypatch.setattr(room, "DIGEST_ROWS", 100)
    n = 600
    anchors, positives, *_ = data(torch.float32, n)
    if kind == "memory map":
        np.save(tmp_path / "a.npy", anchors.numpy())
        anchors = np.load(tmp_path / "a.npy", mmap_mode="r")
    else:
        anchors, positives = (side.to(getattr(torch, kind)) for side in (anchors, positives))
    loss, file = SogCLR(n), tmp_path / "state"
    warm_start(loss, anchors, positives, file=file)
    warm_start(loss, anchors, positives, file=file)
    changed = positives.clone()
    changed[n - 2, 0] += 1
    with pytest.raises(AnybatchError, match="other embeddings"):
        warm_start(loss, anchors, changed, file=file)


@pytest.mark.distributed
@pytest.mark.parametrize("world_size", [2])
def test_ranks_equal_one_process(world_size, monkeypatch):
    monkeypatch.setattr(room, "BLOCK_ROWS", 5)
    monkeypatch.setattr(room, "SAVE_SECONDS", 0.0)
    with tempfile.TemporaryDirectory() as folder:
        ranks = on_ranks(worker, world_size, folder)
        alone = warm_all(folder)
    for states in ranks:
        for ours, theirs in zip(states, alone, strict=True):
            assert math.isfinite(ours.nan_to_num(0).sum().item())
            torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5, equal_nan=True)


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
