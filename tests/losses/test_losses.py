"""Every loss against its naive float64 twin, on ragged shapes."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from anybatch.core.errors import AnybatchError
from anybatch.losses import (
    CountCorrectedInfoNCE,
    CrossBatchInfoNCE,
    DecoupledInfoNCE,
    InfoNCE,
    SogCLR,
)
from anybatch.losses.rows import inclusion_log_weights
from anybatch.plans.plan import BatchPlan

from .. import reference, twin
from .methods import cluster_weights


def draw_batch(seed, rows, extra, width=5, repeated=True):
    generator = torch.Generator().manual_seed(seed)
    anchors = torch.randn(rows, width, generator=generator, dtype=torch.float64)
    candidates = torch.randn(rows + extra, width, generator=generator, dtype=torch.float64)
    high = max(2, rows if repeated else 10_000)
    anchor_id = torch.randint(high, (rows,), generator=generator)
    candidate_id = torch.randint(high, (rows + extra,), generator=generator)
    return anchors, candidates, anchor_id, candidate_id


def gradients(value, *tensors):
    return torch.autograd.grad(value, tensors, allow_unused=True)


def close(ours, theirs, tolerance=1e-10):
    for mine, other in zip(ours, theirs, strict=True):
        other = torch.zeros_like(mine) if other is None else other
        torch.testing.assert_close(mine, other, rtol=tolerance, atol=tolerance)


shapes = st.tuples(st.integers(0, 9999), st.integers(1, 9), st.integers(0, 7))
LOSSES = {
    "infonce": (lambda **k: InfoNCE(**k), lambda a, c, t, m: reference.infonce(a, c, t, m)),
    "decoupled": (lambda **k: DecoupledInfoNCE(**k), lambda a, c, t, m: reference.decoupled(a, c, t, m)),
    "count corrected": (
        lambda **k: CountCorrectedInfoNCE(50, **k),
        lambda a, c, t, m: reference.count_corrected(a, c, t, m, 50),
    ),
}


@pytest.mark.parametrize("name", list(LOSSES))
@settings(deadline=None, max_examples=40)
@given(
    shape=shapes,
    tau=st.sampled_from([0.05, 0.3, 1.0]),
    ids=st.booleans(),
    tile=st.sampled_from([1, 200, 10**7]),
    both=st.booleans(),
    margin=st.sampled_from([None, -0.1, 0.2]),
)
def test_stateless_losses_equal_their_twins(name, shape, tau, ids, tile, both, margin):
    make, formula = LOSSES[name]
    anchors, candidates, anchor_id, candidate_id = draw_batch(*shape)
    rows = len(anchors)
    known = {"anchor_id": anchor_id, "candidate_id": candidate_id} if ids else {}
    settings = {"tile_bytes": tile, "direction": "both" if both else "one_way", "mask_margin": margin}
    loss = make(temperature=tau, learnable_temperature=True, **settings).double()
    with torch.no_grad():
        loss.temperatures.log_temperature.fill_(math.log(tau))  # in float64, after it was made in float32
    for tensor in (anchors, candidates):
        tensor.requires_grad_()
    value = loss(anchors, candidates, **known)
    temperature = torch.tensor(tau, dtype=torch.float64, requires_grad=True)
    allowed = reference.pairs_allowed(rows, len(candidates), **known)
    scores = reference.unit(anchors) @ reference.unit(candidates).T
    highest = scores.diagonal()[:, None] + (math.inf if margin is None else margin)
    allowed &= scores <= highest
    expected = formula(anchors, candidates, temperature, allowed)
    if both:
        back = reference.pairs_allowed(rows, rows, candidate_id[:rows] if ids else None, anchor_id if ids else None)
        back &= highest >= scores[:, :rows].T
        expected = (expected + formula(candidates[:rows], anchors, temperature, back)) / 2
    if not isinstance(expected, torch.Tensor) or not expected.requires_grad:
        assert value.item() == pytest.approx(float(expected))
        return
    torch.testing.assert_close(value, expected, rtol=1e-10, atol=1e-10)
    ours = gradients(value, anchors, candidates, loss.temperatures.log_temperature)
    theirs = gradients(expected, anchors, candidates, temperature)
    close(ours[:2], theirs[:2])
    if theirs[2] is not None:
        torch.testing.assert_close(ours[2], theirs[2] * tau, rtol=1e-9, atol=1e-9)  # d/d log tau = tau d/d tau


@settings(deadline=None, max_examples=60)
@given(
    shape=shapes,
    gamma=st.sampled_from([0.2, 0.9, 1.0]),
    eps=st.sampled_from([None, 0.0, 1e-3]),
    state=st.sampled_from(["absolute", "relative"]),
    positive=st.sampled_from(["batch", "exact"]),
    both=st.booleans(),
    ids=st.booleans(),
    tile=st.sampled_from([1, 200, 10**7]),
    steps=st.integers(1, 4),
)
def test_sogclr_equals_its_twin_over_several_steps(shape, gamma, eps, state, positive, both, ids, tile, steps):
    """Values, states, and the gradients of embeddings and of a learned temperature: by autograd of the surrogate."""
    seed, rows, extra = shape
    loss = SogCLR(
        12, gamma=gamma, eps=eps, state=state, positive=positive, temperature=0.5, learnable_temperature=True,
        tile_bytes=tile,
        direction="both" if both else "one_way",
    ).double()  # fmt: skip
    loss.temperatures.log_temperature.data.fill_(math.log(0.5))
    twins = [reference.NaiveSogCLR(12, gamma, eps, state=state, positive=positive) for _ in range(1 + both)]
    for step in range(steps):
        anchors, candidates, anchor_id, candidate_id = draw_batch(seed + step, rows, extra)
        index = torch.randint(12, (rows,), generator=torch.Generator().manual_seed(seed + step))  # with repetitions
        known = {"anchor_id": anchor_id, "candidate_id": candidate_id} if ids else {}
        tau = torch.tensor(0.5, dtype=torch.float64)
        for tensor in (anchors, candidates, tau):
            tensor.requires_grad_()
        value = loss(anchors, candidates, index=index, **known)
        allowed = reference.pairs_allowed(rows, rows + extra, **known)
        allowed[:, :rows] &= index[:, None] != index[None]
        surrogate, objective = twins[0].step(anchors, candidates, tau, allowed, index.tolist())
        if both:
            back = reference.pairs_allowed(rows, rows, candidate_id[:rows] if ids else None, anchor_id if ids else None)
            back &= index[:, None] != index[None]
            other, other_objective = twins[1].step(candidates[:rows], anchors, tau, back, index.tolist())
            surrogate, objective = (surrogate + other) / 2, (objective + other_objective) / 2
        assert value.item() == pytest.approx(objective, abs=1e-9)
        ours = gradients(value, anchors, candidates, loss.temperatures.log_temperature)
        theirs = gradients(surrogate, anchors, candidates, tau)
        close(ours, (*theirs[:2], 0.5 * theirs[2]), 1e-9)  # d / d log tau
        for direction, own in enumerate(twins):
            for row in range(12):
                assert bool(loss.denominator.visited[direction, row]) == (row in own.u)
                if row in own.u:
                    assert loss.denominator.log_mean[direction, row].exp().item() == pytest.approx(own.u[row], rel=1e-9)


@pytest.mark.parametrize("eps_of", ["one over k", "zero", "one over n - 1"])
def test_gamma_one_needs_no_memory(eps_of):
    rows, n = 7, 40
    anchors, candidates, *_ = draw_batch(1, rows, 0)
    eps, stateless = {
        "one over k": (1 / (rows - 1), InfoNCE(temperature=0.1)),
        "zero": (0.0, DecoupledInfoNCE(temperature=0.1)),
        "one over n - 1": (1 / (n - 1), CountCorrectedInfoNCE(n, temperature=0.1)),
    }[eps_of]
    anchors.requires_grad_()
    theirs = gradients(stateless(anchors, candidates), anchors)
    for positive in ("batch", "exact"):
        memory = SogCLR(n, gamma=1.0, eps=eps, positive=positive, temperature=0.1)
        close(gradients(memory(anchors, candidates, index=torch.arange(rows)), anchors), theirs, 1e-10)


@pytest.mark.parametrize("direction", ["one_way", "both"])
def test_a_row_that_comes_again_is_no_draw(direction):
    """Rows that come once to three times, in any views: what is without memory is one method under three names, and so
    the estimate of the sum is that of SogCLR. Without `index` nothing says that a row came again.
    """
    anchors, candidates, *_ = draw_batch(6, 6, 0, repeated=False)
    anchors, candidates = anchors.requires_grad_(), candidates.requires_grad_()
    index, options = torch.tensor([3, 7, 3, 9, 3, 7]), {"temperature": 0.3, "direction": direction}
    sogclr = SogCLR(50, gamma=1.0, **options)(anchors, candidates, index=index)
    expected = gradients(sogclr, anchors, candidates)
    for tile_bytes in (100, 2**20):
        for make in (CountCorrectedInfoNCE, CrossBatchInfoNCE):
            value = make(50, tile_bytes=tile_bytes, **options)(anchors, candidates, index=index)
            assert value.item() == pytest.approx(sogclr.item() + math.log(49), rel=1e-12)
            close(gradients(value, anchors, candidates), expected)
    unit = reference.unit
    logits = unit(anchors) @ unit(candidates).T / 0.3
    shares = (logits - logits.diagonal()[:, None]).exp() * (index[:, None] != index)
    once = CountCorrectedInfoNCE(50, temperature=0.3)(anchors, candidates, index=index)
    expected = torch.log1p(49 * shares.sum(1) / (index[:, None] != index).sum(1)).mean()
    assert once.item() == pytest.approx(expected.item(), rel=1e-12)
    distinct = torch.arange(6)
    plain = CountCorrectedInfoNCE(50, **options)
    assert torch.equal(plain(anchors, candidates), plain(anchors, candidates, index=distinct))


def test_infonce_is_cross_entropy():
    anchors, candidates, *_ = draw_batch(2, 6, 4)
    scores = reference.unit(anchors) @ reference.unit(candidates).T / 0.07
    expected = torch.nn.functional.cross_entropy(scores, torch.arange(6))
    assert InfoNCE(temperature=0.07)(anchors, candidates).item() == pytest.approx(expected.item(), rel=1e-13)


class TestState:
    def step(self, loss, seed=0, rows=4, index=(0, 1, 2, 3)):
        anchors, candidates, *_ = draw_batch(seed, rows, 0)
        anchors = anchors.float().requires_grad_()
        loss(anchors, candidates.float(), index=torch.tensor(index)).backward()

    def test_first_visit_is_decided_row_by_row(self):
        loss = SogCLR(8, gamma=0.1)
        self.step(loss, 0)
        before = loss.denominator.log_mean.clone()
        self.step(loss, 1, index=(0, 1, 6, 7))  # two known rows and two new ones
        fresh = SogCLR(8, gamma=0.1)
        self.step(fresh, 1, index=(0, 1, 6, 7))
        assert torch.equal(loss.denominator.log_mean[0, 6:], fresh.denominator.log_mean[0, 6:])
        moved = (loss.denominator.log_mean - before)[0, :2]
        assert moved.abs().max() > 0

    def test_memory_stays_float32_under_bfloat16(self):
        loss = SogCLR(8, gamma=0.01)
        for seed in range(3):
            anchors, candidates, *_ = draw_batch(seed, 4, 0)
            with torch.autocast("cpu", dtype=torch.bfloat16):
                value = loss(anchors.bfloat16().requires_grad_(), candidates.bfloat16(), index=torch.arange(4))
            assert value.dtype == torch.float32
            value.backward()
        assert loss.denominator.log_mean.dtype == torch.float32
        assert loss.denominator.log_mean[0, :4].unique().numel() == 4

    def test_order_of_duplicates_does_not_matter_much_and_is_reproducible(self):
        states = []
        for _ in range(2):
            loss = SogCLR(8)
            self.step(loss, 0, rows=6, index=(5, 1, 5, 5, 2, 1))
            states.append(loss.denominator.log_mean.clone())
        assert torch.equal(states[0].nan_to_num(0), states[1].nan_to_num(0))

    def test_embeddings_of_another_width_are_refused(self):
        loss = SogCLR(8)
        self.step(loss)
        with pytest.raises(AnybatchError, match="5 dimensions, these have 3"):
            loss(torch.ones(2, 3), torch.ones(2, 3), index=torch.tensor([0, 1]))

    def test_a_running_value_can_fall(self):
        loss = SogCLR(4, gamma=0.5, temperature=0.1, normalize=False)
        far, near = torch.eye(4), torch.ones(4, 4)
        anchor = torch.eye(4).requires_grad_()
        loss(anchor, near + far, index=torch.arange(4))
        high = loss.denominator.log_mean.clone()
        for _ in range(20):
            loss(anchor, far * 3, index=torch.arange(4))
        assert (loss.denominator.log_mean < high - 5).all()


class TestNumbers:
    def test_masks_and_weights(self):
        anchors, candidates, *_ = draw_batch(3, 5, 2)
        weight = torch.randn(5, 7, dtype=torch.float64)
        weight[2, 4] = -torch.inf
        allowed = reference.pairs_allowed(5, 7, removed=weight.isneginf())
        expected = reference.infonce(anchors, candidates, 0.1, allowed, weight)
        assert InfoNCE(temperature=0.1)(anchors, candidates, log_weight=weight).item() == pytest.approx(
            expected.item(), rel=1e-12
        )
        columns = torch.randn(7, dtype=torch.float64)
        expected = reference.infonce(anchors, candidates, 0.1, reference.pairs_allowed(5, 7), columns.expand(5, 7))
        assert InfoNCE(temperature=0.1)(anchors, candidates, log_weight=columns).item() == pytest.approx(
            expected.item(), rel=1e-12
        )

    def test_learnable_temperature_is_positive_and_trains(self):
        loss = InfoNCE(temperature=0.5, learnable_temperature=True)
        optimizer = torch.optim.SGD(loss.parameters(), lr=5.0)
        anchors = torch.randn(8, 4)
        for _ in range(50):
            optimizer.zero_grad()
            loss(anchors, anchors).backward()
            optimizer.step()
        assert 0 < loss.temperature < 0.5

    @pytest.mark.parametrize(
        ("arguments", "match"),
        [
            ((torch.ones(3, 2), torch.ones(2, 2)), "M >= B"),
            ((torch.ones(3, 2), torch.ones(3, 4)), "expected"),
        ],
    )
    def test_shapes(self, arguments, match):
        with pytest.raises(AnybatchError, match=match):
            InfoNCE()(*arguments)
        with pytest.raises(AnybatchError, match="go together"):
            InfoNCE()(torch.ones(2, 2), torch.ones(2, 2), anchor_id=torch.arange(2))
        ids = torch.arange(3)
        with pytest.raises(
            AnybatchError, match="anchor_id runs from -1 to 0; expected 0 or more"
        ):  # it masked every explicit negative
            InfoNCE()(torch.ones(2, 2), torch.ones(3, 2), anchor_id=ids[:2] - 1, candidate_id=ids)
        with pytest.raises(AnybatchError, match="broadcastable"):
            InfoNCE()(torch.ones(2, 2), torch.ones(2, 2), log_weight=torch.ones(3, 3))
        with pytest.raises(AnybatchError, match="NaN"):
            InfoNCE()(torch.ones(2, 2), torch.ones(2, 2), log_weight=torch.full((2, 2), math.nan))

    def test_settings(self):
        for make, match in (
            (lambda: InfoNCE(temperature=0.0), "temperature is 0"),
            (lambda: InfoNCE(direction="sideways"), "direction"),
            (lambda: SogCLR(10, gamma=0.0), "gamma is 0"),
            (lambda: SogCLR(10, eps=-1.0), "eps is -1"),
            (lambda: SogCLR(10, state="both"), "state is 'both'"),
            (lambda: SogCLR(10, positive="none"), "positive is 'none'"),
            (lambda: SogCLR(1), "num_rows is 1"),
            (lambda: CountCorrectedInfoNCE(1), "num_rows is 1"),
        ):
            with pytest.raises(AnybatchError, match=match):
                make()


def inclusion_weights(num_clusters, size, per_batch):
    """Of a row of the same cluster and of another one, for a plan without remainder rows."""
    cluster = np.repeat(np.arange(num_clusters, dtype=np.int32), size)
    plan = BatchPlan(
        num_rows=len(cluster),
        batch_size=size * per_batch,
        cluster_size=size,
        cluster=cluster,
        seed=0,
        data_digest="",
    )
    return inclusion_log_weights(plan)[0, 0, :2].tolist()


def test_inclusion_weights_are_unbiased_on_mined_batches():
    """Enumerate every batch of a small plan: the weighted sum over the batch must average to the mean over all other
    rows.
    """
    import itertools

    num_clusters, size, per_batch = 5, 3, 2
    n = num_clusters * size
    cluster = torch.arange(n) // size
    values = torch.randn(n, n, dtype=torch.float64)
    same, other = inclusion_weights(num_clusters, size, per_batch)
    for row in (0, 7):
        estimates = []
        for companions in itertools.combinations([c for c in range(num_clusters) if c != cluster[row]], per_batch - 1):
            columns = torch.cat([torch.nonzero(cluster == c)[:, 0] for c in (int(cluster[row]), *companions)])
            columns = columns[columns != row]
            weight = cluster_weights(torch.cat([cluster[row : row + 1], cluster[columns]]), 1, same=same, other=other)
            estimates.append(
                (weight.tile(slice(0, 1), slice(1, 1 + len(columns))).exp()[0] * values[row, columns]).sum()
            )
        others = [j for j in range(n) if j != row]
        torch.testing.assert_close(torch.stack(estimates).mean(), values[row, others].mean(), rtol=1e-6, atol=1e-6)


def test_inclusion_weights_at_the_edges():
    same, other = inclusion_weights(2, 5, 2)  # every cluster in every batch
    assert same == other == pytest.approx(-math.log(9))
    assert inclusion_weights(100, 1, 10)[1] == pytest.approx(-math.log(9))  # clusters of one row: random batches
    assert inclusion_weights(10, 10, 2) == pytest.approx([-math.log(99), math.log(9 / 99)])
    assert inclusion_weights(10, 10, 1) == [-math.log(99), -math.log(99)]  # never together


def test_weighted_sogclr_and_count_corrected_equal_their_twins():
    anchors, candidates, *_ = draw_batch(5, 6, 2)
    cluster = torch.tensor([0, 0, 1, 1, -1, 2])
    same, other = inclusion_weights(10, 6, 3)
    columns = torch.cat([cluster, cluster[[0, 3]]])  # explicit negatives belong to the rows that bring them
    weight = cluster_weights(columns, 6, same=same, other=other)
    linear = torch.full((6, 8), math.exp(other), dtype=torch.float64)
    for i in range(6):
        for j in range(8):
            if cluster[i] == columns[j] and cluster[i] >= 0:
                linear[i, j] = math.exp(same)
    allowed = reference.pairs_allowed(6, 8)
    anchors.requires_grad_()
    naive = reference.NaiveSogCLR(60, 0.7, None)
    loss = SogCLR(60, gamma=0.7, temperature=0.2)
    loss.denominator.double()
    for _ in range(2):
        value = loss(anchors, candidates, index=torch.arange(6), log_weight=weight)
        surrogate, objective = naive.step(anchors, candidates, 0.2, allowed, list(range(6)), linear)
        assert value.item() == pytest.approx(objective, rel=1e-6)
        close(gradients(value, anchors), gradients(surrogate, anchors), 1e-6)
    scores = reference.unit(anchors) @ reference.unit(candidates).T / 0.2
    d = (scores - scores.diagonal()[:, None]).exp() * linear * allowed
    expected = torch.log(1 + 59 * d.sum(1)).mean()
    value = CountCorrectedInfoNCE(60, temperature=0.2)(anchors, candidates, log_weight=weight)
    assert value.item() == pytest.approx(expected.item(), rel=1e-6)


def test_a_log_weight_that_wants_a_gradient_is_refused():
    with pytest.raises(AnybatchError, match="NUCLR"):
        InfoNCE()(torch.ones(2, 2), torch.ones(2, 2), log_weight=torch.zeros(2, 2, requires_grad=True))


@pytest.mark.distributed
def test_scores_above_the_margin_are_no_negatives():
    formula = lambda positive, negatives, _: torch.cat([positive[None], negatives]).logsumexp(0) - positive  # noqa: E731
    twin.check(InfoNCE, formula, temperature=0.5, mask_margin=0.1)
    twin.check_ranks(InfoNCE, temperature=0.5, mask_margin=0.1)


@pytest.mark.parametrize("make", [InfoNCE, lambda **k: CrossBatchInfoNCE(9, **k)])
def test_the_figures_show_the_temperature_of_the_call(make):
    """And not that which the optimizer has made since."""
    loss = make(temperature=0.25, learnable_temperature=True)
    sides = torch.randn(2, 4, 5)
    loss(*sides, index=torch.arange(4))
    with torch.no_grad():
        loss.temperatures.log_temperature.add_(1.0)
    assert loss.last_stats["temperature"] == 0.25
    assert loss.temperature > 0.6
