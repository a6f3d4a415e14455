"""The exact gradient against a loop, the error of known estimators, and the curve that gives effective sizes."""

import itertools
import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from anybatch import BatchPlan
from anybatch.core.errors import AnybatchError
from anybatch.family import EMC2, NUCLR, SCENT, FastCLIP, GloFND, ISogCLR, TempNet
from anybatch.insight.full_gradient import content_masks, full_gradient
from anybatch.insight.gradient_error import FrozenPairs, effective_batch_size, gradient_error, infonce_curve
from anybatch.losses import CountCorrectedInfoNCE, CrossBatchInfoNCE, DecoupledInfoNCE, InfoNCE, SogCLR
from anybatch.losses.rows import RowTable
from tests import reference


def embeddings(num_rows, dimensions=12, seed=0):
    """Pairs in a few loose groups, so that some negatives are hard."""
    generator = np.random.default_rng(seed)
    centres = generator.normal(size=(max(1, num_rows // 8), dimensions))
    rows = centres[np.arange(num_rows) % len(centres)]
    sides = [rows + 0.8 * generator.normal(size=rows.shape) for _ in range(2)]
    return tuple(side / np.linalg.norm(side, axis=1, keepdims=True) for side in sides)


def naive_gradient(anchors, positives, tau, allowed):
    """Autograd through the normalisation, over loops."""
    leaves = torch.tensor(anchors, requires_grad=True)
    total = reference.infonce(leaves, torch.tensor(positives), tau, allowed) * len(anchors)
    return torch.autograd.grad(total, leaves)[0]


@pytest.mark.parametrize("num_rows", [16, 23])
@pytest.mark.parametrize("tile_bytes", [1, 1000, 10**6])
def test_full_gradient_equals_autograd(num_rows, tile_bytes):
    anchors, positives = embeddings(num_rows)
    anchor_id, positive_id = torch.arange(num_rows), torch.arange(num_rows)
    anchor_id[5], positive_id[9], positive_id[10], positive_id[7] = 2, 1, 1, 5
    allowed = reference.pairs_allowed(num_rows, num_rows, anchor_id, positive_id)
    allowed[2, 7] = False  # the text of row 7 is what row 5 pairs with the same anchor
    expected = naive_gradient(anchors, positives, 0.1, allowed)
    sides = torch.tensor(anchors), torch.tensor(positives)
    ids = {"masks": content_masks(anchor_id, positive_id)}
    ours = full_gradient(*sides, temperature=0.1, tile_bytes=tile_bytes, **ids)
    torch.testing.assert_close(ours, expected, rtol=1e-10, atol=1e-12)
    some = torch.tensor([3, 9, 10])
    part = full_gradient(*sides, temperature=0.1, rows=some, tile_bytes=tile_bytes, **ids)
    torch.testing.assert_close(part, expected[some], rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(
    ("loss", "run_in"),
    [(InfoNCE(temperature=0.2), 0), (CountCorrectedInfoNCE(24, temperature=0.2), 0), (SogCLR(24, temperature=0.2), 2)],
)
def test_the_whole_data_as_one_batch_has_no_error(loss, run_in):
    anchors, positives = embeddings(24)
    ids = {"anchor_id": np.arange(24) // 2, "positive_id": np.arange(24)}
    ids["positive_id"][4] = 0  # known from row 0 to match the anchor of row 1
    if not isinstance(loss, InfoNCE):  # these count a mask's rows as data, so they agree only without masks
        ids = {}
    pairs = FrozenPairs.prepare(anchors, positives, temperature=0.2, **ids)
    result = gradient_error(pairs, loss, plan=BatchPlan.random(24, 24), run_in=run_in, epochs=2)
    assert result.rmse < 1e-6  # float32 memory
    assert result.bias < 1e-6
    assert result.scale == pytest.approx(1, abs=1e-6)
    assert result.shared_bias == pytest.approx(0, abs=1e-6)
    assert result.shared_cosine == pytest.approx(1, abs=1e-6)
    assert (result.num_anchors, result.num_draws) == (24, 4)


def test_bias_and_rmse_equal_an_enumeration_of_all_batches():
    """n = 7, B = 3: every batch of every anchor, in a loop; the estimate must be within its standard errors."""
    anchors, positives = embeddings(7, 4, seed=3)
    tau = 0.3
    exact = naive_gradient(anchors, positives, tau, reference.pairs_allowed(7, 7))
    bias, error, along, length = 0.0, 0.0, 0.0, 0.0
    for i in range(7):
        draws = []
        for j in range(7):
            for k in range(j + 1, 7):
                if i not in (j, k):
                    rows = [i, j, k]
                    draws.append(naive_gradient(anchors[rows], positives[rows], tau, reference.pairs_allowed(3, 3))[0])
        stacked = torch.stack(draws)
        bias += (stacked.mean(0) - exact[i]).square().sum()
        error += (stacked - exact[i]).square().sum(1).mean()
        along += (stacked @ exact[i]).mean()
        length += stacked.square().sum(1).mean()
    whole = exact.square().sum()
    pairs = FrozenPairs.prepare(anchors, positives, temperature=tau)
    plan = BatchPlan(
        num_rows=7, batch_size=3, cluster_size=1, cluster=np.arange(7, dtype=np.int32), seed=1, data_digest=""
    )
    result = gradient_error(pairs, InfoNCE(temperature=tau), plan=plan, epochs=300)
    assert result.bias == pytest.approx(math.sqrt(bias / whole), rel=0.03)
    assert result.rmse == pytest.approx(math.sqrt(error / whole), rel=0.03)
    assert result.scaled_rmse == pytest.approx(math.sqrt(1 - along**2 / (length * whole)), rel=0.03)
    assert result.scale == pytest.approx(float(along / length), rel=0.03)
    assert 1 < result.num_draws < 600  # one of seven rows sits out each epoch
    assert result.noise == pytest.approx(math.sqrt(result.rmse**2 - result.bias**2))


class NoisyExact(torch.nn.Module):
    """An unbiased method: the exact gradient and noise as large as it."""

    def __init__(self, pairs):
        super().__init__()
        self.pairs = pairs

    def forward(self, anchors, candidates, *, index, anchor_id, candidate_id):
        exact = self.pairs.exact[index]
        noise = torch.randn_like(exact)
        unit = anchors.detach()
        noise = noise - (noise * unit).sum(1, keepdim=True) * unit
        noise *= exact.norm() / noise.norm()
        return (anchors * (exact + noise)).sum() / len(anchors)


def test_noise_is_not_counted_as_bias():
    pairs = FrozenPairs.prepare(*embeddings(400), temperature=0.2)
    torch.manual_seed(0)
    result = gradient_error(pairs, NoisyExact(pairs), plan=BatchPlan.random(400, 40), epochs=4)
    assert result.rmse == pytest.approx(1, rel=0.02)
    # Eight draws averaged would leave a naive estimate of sqrt(1/8) = .35; half of the draws .5.
    assert result.bias < 0.15
    assert result.bias <= 4 * result.bias_se
    assert result.scale == pytest.approx(0.5, abs=0.03)
    assert result.scaled_rmse == pytest.approx(math.sqrt(0.5), rel=0.03)


class Bent(torch.nn.Module):
    """The exact gradient with an error that all anchors share: the gradient of a common linear map."""

    def __init__(self, pairs, size):
        super().__init__()
        self.pairs = pairs
        error = torch.randn(12, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(4))
        anchors = pairs.anchors
        error = anchors @ error.T
        error = error - (error * anchors).sum(1, keepdim=True) * anchors
        self.error = size * error * pairs.exact.norm() / error.norm()

    def forward(self, anchors, candidates, *, index, anchor_id, candidate_id):
        return (anchors * (self.pairs.exact[index] + self.error[index])).sum() / len(anchors)


def test_errors_in_common_show_in_the_shared_direction():
    pairs = FrozenPairs.prepare(*embeddings(400), temperature=0.2)
    loss = Bent(pairs, 0.3)
    plan = BatchPlan.random(400, 40)
    result = gradient_error(pairs, loss, plan=plan, epochs=2)
    assert result.rmse == pytest.approx(0.3, rel=0.05)
    exact, bent = ((side.T @ pairs.anchors) / 400 for side in (pairs.exact, pairs.exact + loss.error))
    assert result.shared_bias == pytest.approx(float((bent - exact).norm() / exact.norm()), rel=0.1)
    assert result.shared_bias > 2 * result.rmse  # it adds up
    expected = float((bent * exact).sum() / (bent.norm() * exact.norm()))
    assert result.shared_cosine == pytest.approx(expected, abs=0.05)
    torch.manual_seed(0)
    noisy = gradient_error(pairs, NoisyExact(pairs), plan=plan, epochs=4)
    assert noisy.shared_bias < 4 * max(noisy.shared_bias_se, 0.05)  # it cancels
    assert noisy.shared_cosine > 0.9
    # Some anchors, drawn at random, estimate the same.
    few = FrozenPairs.prepare(*embeddings(400), temperature=0.2, num_probes=200)
    part = gradient_error(few, loss, plan=plan, epochs=2)
    assert abs(part.shared_bias - result.shared_bias) < 4 * math.hypot(part.shared_bias_se, result.shared_bias_se)


def test_probes_estimate_the_whole():
    sides = embeddings(300)
    plan = BatchPlan.random(300, 20)
    whole = gradient_error(FrozenPairs.prepare(*sides), InfoNCE(), plan=plan, epochs=6)
    pairs = FrozenPairs.prepare(*sides, num_probes=100, seed=1)
    assert len(pairs.probes) == len(pairs.exact) == 100
    part = gradient_error(pairs, InfoNCE(), plan=plan, epochs=6)
    assert part.num_anchors == 100
    for name in ("bias", "rmse", "scaled_rmse"):
        assert abs(getattr(part, name) - getattr(whole, name)) < 4 * getattr(part, f"{name}_se")
        assert getattr(part, f"{name}_se") > 0


def test_inclusion_weights_lower_the_bias_of_mined_batches():
    sides = embeddings(240)
    groups = np.arange(240) % 30  # the groups of `embeddings` as clusters of 8
    plan = BatchPlan(
        num_rows=240, batch_size=16, cluster_size=8, cluster=groups.astype(np.int32), seed=0, data_digest=""
    )
    pairs = FrozenPairs.prepare(*sides, temperature=0.2)
    loss = CountCorrectedInfoNCE(240, temperature=0.2)
    ids = np.arange(240)
    bare = gradient_error(pairs, loss, plan=plan)
    weighted = gradient_error(pairs, loss, plan=plan, table=RowTable(ids, ids, plan=plan, weights="inclusion"))
    assert weighted.bias + 3 * weighted.bias_se < bare.bias - 3 * bare.bias_se


def test_curve_agrees_with_whole_batches_and_falls():
    pairs = FrozenPairs.prepare(*embeddings(260), temperature=0.1)
    curve = infonce_curve(pairs, epochs=4)
    assert list(curve) == [8, 16, 32, 64, 128]
    rmse = {size: error.rmse for size, error in curve.items()}
    assert sorted(rmse.values(), reverse=True) == list(rmse.values())
    for size in (16, 64):
        direct = gradient_error(pairs, InfoNCE(temperature=0.1), plan=BatchPlan.random(260, size), epochs=6)
        assert effective_batch_size(direct.rmse, rmse) == pytest.approx(size, rel=0.15)
    assert infonce_curve(pairs, batch_sizes=[260], epochs=1)[260].rmse < 1e-5


def test_curve_masks_identical_texts():
    sides = embeddings(40)
    ids = np.arange(40) // 2
    others = np.where(np.arange(40) == 4, 0, np.arange(40))
    pairs = FrozenPairs.prepare(*sides, anchor_id=ids, positive_id=others)
    assert infonce_curve(pairs, batch_sizes=[40], epochs=1)[40].rmse < 1e-5


def test_effective_batch_size():
    curve = {8: 0.8, 32: 0.4, 128: 0.2}
    assert effective_batch_size(0.4, curve) == pytest.approx(32)
    assert effective_batch_size(math.sqrt(0.8 * 0.4), curve) == pytest.approx(16)  # straight in logarithms
    assert effective_batch_size(0.9, curve) == 0
    assert effective_batch_size(0.1, curve) == math.inf


def test_the_loss_itself_is_left_alone():
    pairs = FrozenPairs.prepare(*embeddings(32))
    loss = SogCLR(32)
    gradient_error(pairs, loss, plan=BatchPlan.random(32, 8), epochs=1)
    assert not loss.denominator.visited.any()


def test_mistakes():
    anchors, positives = embeddings(20)
    with pytest.raises(AnybatchError, match="shapes"):
        FrozenPairs.prepare(anchors, positives[:10])
    with pytest.raises(AnybatchError, match=r"1 of the positive embeddings .* all zero"):
        FrozenPairs.prepare(anchors, np.where(np.arange(20)[:, None] == 3, 0.0, positives))
    with pytest.raises(AnybatchError, match="anchor_id has shape"):
        FrozenPairs.prepare(anchors, positives, anchor_id=np.arange(3))
    pairs = FrozenPairs.prepare(anchors, positives)
    with pytest.raises(AnybatchError, match="plan has 21 rows"):
        gradient_error(pairs, InfoNCE(), plan=BatchPlan.random(21, 4))
    with pytest.raises(AnybatchError, match="one_way"):
        gradient_error(pairs, InfoNCE(direction="both"), plan=BatchPlan.random(20, 4))
    with pytest.raises(AnybatchError, match="sizes from 2"):
        infonce_curve(pairs, batch_sizes=[4, 64])


def naive_both(anchors, positives, tau, allowed):
    """(n, 2 D): n times the gradient of the mean of both directions' losses, autograd through the normalisation, over
    loops.
    """
    leaves = [torch.tensor(side, requires_grad=True) for side in (anchors, positives)]
    forth = reference.infonce(*leaves, tau, allowed)
    back = reference.infonce(leaves[1], leaves[0], tau, allowed.T)
    return torch.cat(torch.autograd.grad((forth + back) / 2 * len(anchors), leaves), dim=1)


@pytest.mark.parametrize("num_rows", [16, 23])
@pytest.mark.parametrize("tile_bytes", [1, 1000, 10**6])
def test_the_two_way_gradient_equals_autograd(num_rows, tile_bytes):
    anchors, positives = embeddings(num_rows)
    anchor_id, positive_id = torch.arange(num_rows), torch.arange(num_rows)
    anchor_id[5], positive_id[9], positive_id[10], positive_id[7] = 2, 1, 1, 5
    allowed = reference.pairs_allowed(num_rows, num_rows, anchor_id, positive_id)
    allowed[2, 7] = False
    expected = naive_both(anchors, positives, 0.1, allowed)
    sides = torch.tensor(anchors), torch.tensor(positives)
    ids = {"masks": content_masks(anchor_id, positive_id), "direction": "both"}
    ours = full_gradient(*sides, temperature=0.1, tile_bytes=tile_bytes, **ids)
    torch.testing.assert_close(ours, expected, rtol=1e-10, atol=1e-12)
    some = torch.tensor([3, 9, 10])
    part = full_gradient(*sides, temperature=0.1, rows=some, tile_bytes=tile_bytes, **ids)
    torch.testing.assert_close(part, expected[some], rtol=1e-10, atol=1e-12)
    bare = full_gradient(*sides, temperature=0.1, direction="both", tile_bytes=tile_bytes)
    expected = naive_both(anchors, positives, 0.1, reference.pairs_allowed(num_rows, num_rows))
    torch.testing.assert_close(bare, expected, rtol=1e-10, atol=1e-12)


TWO_WAY = {
    "infonce": lambda: InfoNCE(temperature=0.2, direction="both"),
    "decoupled": lambda: DecoupledInfoNCE(temperature=0.2, direction="both"),
    "count corrected": lambda: CountCorrectedInfoNCE(24, temperature=0.2, direction="both"),
    "cross batch": lambda: CrossBatchInfoNCE(24, temperature=0.2, direction="both"),
    "sogclr": lambda: SogCLR(24, temperature=0.2, direction="both"),
    "fastclip": lambda: FastCLIP(24, version="v0", temperature=0.2, eps=None),
    "fastclip v2": lambda: FastCLIP(24, version="v2", temperature=0.2, temperature_lr=1e-9, eps=None),
    "isogclr": lambda: ISogCLR(24, temperature=0.2, temperature_lr=1e-9, eps=None, direction="both"),
    "tempnet": lambda: TempNet(24, 12, temperature=0.2, temperature_range=(0.1, 0.5), eps=None, direction="both"),
    "scent": lambda: SCENT(24, temperature=0.2, direction="both"),
    "nuclr": lambda: NUCLR(24, temperature=0.2, margin=0.0, margin_lr=1e-12, direction="both"),
    "glofnd": lambda: GloFND(24, temperature=0.2, alpha=1e-3, threshold_start=100, direction="both"),
    "emc2": lambda: EMC2(24, dimensions=12, temperature=0.2, direction="both"),
}
OTHER_OBJECTIVE = ("decoupled", "emc2")  # no positive in the denominator, and chains are not exact


@pytest.mark.parametrize("name", TWO_WAY)
def test_the_whole_data_as_one_two_way_batch_has_no_error(name):
    ids = {}
    if name == "infonce":
        ids = {"anchor_id": np.arange(24) // 2, "positive_id": np.arange(24)}
        ids["positive_id"][4] = 0
    pairs = FrozenPairs.prepare(*embeddings(24), temperature=0.2, direction="both", **ids)
    result = gradient_error(pairs, TWO_WAY[name](), plan=BatchPlan.random(24, 24), run_in=2, epochs=2)
    assert (result.num_anchors, result.num_draws) == (24, 4)
    if name in OTHER_OBJECTIVE:
        assert 0.02 < result.rmse < 1
        assert result.shared_cosine > 0.9
        return
    assert result.scaled_rmse < 1e-5  # float32 memory; a factor of tau is the scale of some objectives
    assert result.shared_cosine == pytest.approx(1, abs=1e-5)
    if name in ("infonce", "count corrected", "cross batch", "sogclr", "fastclip", "scent"):
        assert result.rmse < 1e-5
        assert result.shared_bias < 1e-5


def test_two_way_figures_equal_an_enumeration_of_all_batches():
    """n = 7, B = 3, as above: every batch of every pair, the gradient of both sides, also of the two shared maps."""
    anchors, positives = embeddings(7, 4, seed=3)
    tau = 0.3
    exact = naive_both(anchors, positives, tau, reference.pairs_allowed(7, 7))
    units = torch.tensor(np.concatenate([anchors, positives], axis=1))
    draws = [[] for _ in range(7)]
    for batch in itertools.combinations(range(7), 3):
        rows = list(batch)
        gradient = naive_both(anchors[rows], positives[rows], tau, reference.pairs_allowed(3, 3))
        for place, row in enumerate(rows):
            draws[row].append(gradient[place])
    stacked = torch.stack([torch.stack(of_row) for of_row in draws])  # (7, 15, 8)
    whole = exact.square().sum()
    bias = (stacked.mean(1) - exact).square().sum()
    error = (stacked - exact[:, None]).square().sum(2).mean(1).sum()
    along, length = (stacked * exact[:, None]).sum(2).mean(1).sum(), stacked.square().sum(2).mean(1).sum()

    def maps(gradients):
        return torch.stack([gradients[:, :4].T @ units[:, :4], gradients[:, 4:].T @ units[:, 4:]])

    of_mean, of_exact = maps(stacked.mean(1)), maps(exact)
    pairs = FrozenPairs.prepare(anchors, positives, temperature=tau, direction="both")
    plan = BatchPlan(
        num_rows=7, batch_size=3, cluster_size=1, cluster=np.arange(7, dtype=np.int32), seed=1, data_digest=""
    )
    result = gradient_error(pairs, InfoNCE(temperature=tau, direction="both"), plan=plan, epochs=300)
    assert result.bias == pytest.approx(math.sqrt(bias / whole), rel=0.03)
    assert result.rmse == pytest.approx(math.sqrt(error / whole), rel=0.03)
    assert result.scaled_rmse == pytest.approx(math.sqrt(1 - along**2 / (length * whole)), rel=0.03)
    assert result.scale == pytest.approx(float(along / length), rel=0.03)
    assert result.shared_bias == pytest.approx(float((of_mean - of_exact).norm() / of_exact.norm()), rel=0.03)
    cosine = float((of_mean * of_exact).sum() / (of_mean.norm() * of_exact.norm()))
    assert result.shared_cosine == pytest.approx(cosine, abs=0.01)


def test_a_two_way_memory_beside_a_naive_twin():
    """n = 40, batches of 8, SogCLR: every gradient of one of the two halves' epochs from Python floats, figure by
    figure.
    """
    num_rows, tau, gamma, eps = 40, 0.3, 0.5, 1 / 39
    anchors, positives = embeddings(num_rows)
    pairs = FrozenPairs.prepare(anchors, positives, temperature=tau, direction="both", num_probes=11)
    plan = BatchPlan.random(num_rows, 8, seed=2)
    result = gradient_error(
        pairs, SogCLR(num_rows, gamma=gamma, temperature=tau, direction="both"), plan=plan, epochs=2
    )
    exact = naive_both(anchors, positives, tau, reference.pairs_allowed(num_rows, num_rows))
    squares, count = 0.0, 0
    for seed in (2, 3):
        states: list[dict[int, float]] = [{}, {}]
        for epoch in range(2):
            for batch in replace(plan, seed=seed).epoch_batches(epoch):
                leaves = [torch.tensor(side[batch], requires_grad=True) for side in (anchors, positives)]
                units = [side / side.norm(dim=1, keepdim=True) for side in leaves]
                surrogate = 0.0
                for number, (queries, others) in enumerate((units, units[::-1])):
                    scores = queries @ others.T
                    for i, row in enumerate(batch.tolist()):
                        gaps = [(scores[i, j] - scores[i, i]) / tau for j in range(8) if j != i]
                        known = [gap.item() for gap in gaps]
                        mean = sum(math.exp(gap) for gap in known) / 7
                        old = states[number].get(row, mean)
                        states[number][row] = u = (1 - gamma) * old + gamma * mean
                        surrogate = surrogate + sum(math.exp(k) * gap for k, gap in zip(known, gaps, strict=True)) / (
                            14 * (eps + u)
                        )
                gradient = torch.cat(torch.autograd.grad(surrogate, leaves), dim=1)
                for place, row in enumerate(batch.tolist()):
                    if row in pairs.probes:
                        squares += float((gradient[place] - exact[row]).square().sum())
                        count += 1
    assert result.num_draws * result.num_anchors == count
    norm = float(exact[pairs.probes].square().sum()) / 11
    assert result.rmse == pytest.approx(math.sqrt(squares / count / norm), rel=1e-5)


def test_the_two_way_curve_agrees_with_whole_batches():
    pairs = FrozenPairs.prepare(*embeddings(260), temperature=0.1, direction="both")
    curve = infonce_curve(pairs, epochs=4)
    rmse = {size: error.rmse for size, error in curve.items()}
    assert sorted(rmse.values(), reverse=True) == list(rmse.values())
    for size in (16, 64):
        loss = InfoNCE(temperature=0.1, direction="both")
        direct = gradient_error(pairs, loss, plan=BatchPlan.random(260, size), epochs=6)
        assert effective_batch_size(direct.rmse, rmse) == pytest.approx(size, rel=0.15)
    ids = np.arange(40) // 2
    others = np.where(np.arange(40) == 4, 0, np.arange(40))
    same = FrozenPairs.prepare(*embeddings(40), anchor_id=ids, positive_id=others, direction="both")
    assert infonce_curve(same, batch_sizes=[40], epochs=1)[40].rmse < 1e-5


def test_directions_must_agree():
    anchors, positives = embeddings(20)
    pairs = FrozenPairs.prepare(anchors, positives, direction="both")
    with pytest.raises(AnybatchError, match=r"direction='one_way', the exact gradient 'both'"):
        gradient_error(pairs, InfoNCE(), plan=BatchPlan.random(20, 4))
    with pytest.raises(AnybatchError, match="expected 'one_way' or 'both'"):
        FrozenPairs.prepare(anchors, positives, direction="two_way")


@pytest.mark.parametrize("direction", ["one_way", "both"])
def test_what_is_remembered_of_other_batches_counts_although_they_hold_no_probe(direction):
    """A memory of all the data on embeddings that stand still: no error, whatever the batch; also where most batches
    hold no probe.
    """
    pairs = FrozenPairs.prepare(*embeddings(48), temperature=0.2, direction=direction, num_probes=5)
    loss = CrossBatchInfoNCE(48, memory_size=48, temperature=0.2, direction=direction, centred=False)
    result = gradient_error(pairs, loss, plan=BatchPlan.random(48, 6), run_in=5, epochs=2)
    assert result.rmse < 1e-4
