"""The parameter gradient over all data and of batches against autograd, and the errors against enumeration."""

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
from anybatch.insight.gradient_error import FrozenPairs, gradient_error
from anybatch.losses import CountCorrectedInfoNCE, CrossBatchInfoNCE, DecoupledInfoNCE, InfoNCE, SogCLR
from tests import reference

DIRECTIONS = ("one_way", "both")


def embeddings(num_rows, dimensions=12, seed=0):
    """Pairs in a few loose groups, so that some negatives are hard."""
    generator = np.random.default_rng(seed)
    centres = generator.normal(size=(max(1, num_rows // 8), dimensions))
    rows = centres[np.arange(num_rows) % len(centres)]
    sides = [rows + 0.8 * generator.normal(size=rows.shape) for _ in range(2)]
    return tuple(side / np.linalg.norm(side, axis=1, keepdims=True) for side in sides)


def naive(anchors, positives, tau, direction, allowed=None, rows=None):
    """Autograd in the two maps, through the normalisation, of InfoNCE over loops; `rows` are averaged."""
    maps = [torch.eye(anchors.shape[1], dtype=torch.float64, requires_grad=True) for _ in range(2)]
    sides = [torch.tensor(side) @ part.T for side, part in zip((anchors, positives), maps, strict=True)]
    allowed = reference.pairs_allowed(len(anchors), len(anchors)) if allowed is None else allowed
    total = 0.0
    for row in range(len(anchors)) if rows is None else rows:
        order = [row, *(other for other in range(len(anchors)) if other != row)]  # the first is the own pair
        for queries, candidates, mask in ((*sides, allowed), (*sides[::-1], allowed.T))[: 1 + (direction == "both")]:
            value = reference.infonce(queries[order][:1], candidates[order], tau, mask[order][:1, order])
            total = total + value / (2 if direction == "both" else 1)
    return torch.autograd.grad(total / (len(anchors) if rows is None else len(rows)), maps)


def parameters(maps, tied):
    return (maps[0] + maps[1]).flatten() if tied else torch.cat([part.flatten() for part in maps])


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("num_rows", [16, 23])
def test_the_gradient_over_all_data_equals_autograd(num_rows, direction):
    anchors, positives = embeddings(num_rows)
    anchor_id, positive_id = torch.arange(num_rows), torch.arange(num_rows)
    anchor_id[5], positive_id[9], positive_id[10], positive_id[7] = 2, 1, 1, 5
    allowed = reference.pairs_allowed(num_rows, num_rows, anchor_id, positive_id)
    allowed[2, 7] = False  # the text of row 7 is what row 5 pairs with the same anchor
    given = {"temperature": 0.1, "direction": direction}
    for masks, mask in ((content_masks(anchor_id, positive_id), allowed), (None, None)):
        for rows in (None, torch.tensor([3, 9, 10])):
            ours = full_gradient(torch.tensor(anchors), torch.tensor(positives), rows=rows, masks=masks, **given)
            expected = naive(anchors, positives, 0.1, direction, mask, rows=None if rows is None else rows.tolist())
            for part, wanted in zip(ours, expected, strict=True):
                torch.testing.assert_close(part, wanted, rtol=1e-10, atol=1e-12)


LOSSES = {
    "infonce": lambda **k: InfoNCE(temperature=0.2, **k),
    "decoupled": lambda **k: DecoupledInfoNCE(temperature=0.2, **k),
    "count corrected": lambda **k: CountCorrectedInfoNCE(24, temperature=0.2, **k),
    "cross batch": lambda **k: CrossBatchInfoNCE(24, temperature=0.2, **k),
    "sogclr": lambda **k: SogCLR(24, temperature=0.2, **k),
    "fastclip": lambda **k: FastCLIP(24, version="v0", temperature=0.2, eps=None),
    "fastclip v2": lambda **k: FastCLIP(24, version="v2", temperature=0.2, temperature_lr=1e-9, eps=None),
    "isogclr": lambda **k: ISogCLR(24, temperature=0.2, temperature_lr=1e-9, eps=None, **k),
    "tempnet": lambda **k: TempNet(24, 12, temperature=0.2, temperature_range=(0.1, 0.5), eps=None, **k),
    "scent": lambda **k: SCENT(24, temperature=0.2, **k),
    "nuclr": lambda **k: NUCLR(24, temperature=0.2, margin=0.0, margin_lr=1e-12, **k),
    "glofnd": lambda **k: GloFND(24, temperature=0.2, alpha=1e-3, learn_from=100, **k),
    "emc2": lambda **k: EMC2(24, temperature=0.2, **k),
}
OTHER_OBJECTIVE = ("decoupled", "emc2")  # no positive in the denominator, and chains are not exact
OWN_SCALE = ("fastclip v2", "isogclr", "tempnet", "nuclr", "glofnd")  # a factor of tau is the scale of some objectives


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_the_whole_data_as_one_batch_has_no_error(name, direction):
    if name.startswith("fastclip") and direction == "one_way":
        pytest.skip("two-way by definition")
    ids = {}
    if name == "infonce":  # the others count a mask's rows as data, so they agree only without masks
        ids = {"anchor_id": np.arange(24) // 2, "positive_id": np.arange(24)}
        ids["positive_id"][4] = 0  # known from row 0 to match the anchor of row 1
    pairs = FrozenPairs.prepare(*embeddings(24), temperature=0.2, direction=direction, **ids)
    loss = LOSSES[name](direction=direction)
    result = gradient_error(pairs, loss, plan=BatchPlan.random(24, 24), run_in=2, num_batches=2)
    assert result.num_batches == 4
    if name in OTHER_OBJECTIVE:
        assert 0.02 < math.hypot(result.bias, result.noise) < 1
        assert result.cosine > 0.9
        return
    assert result.cosine == pytest.approx(1, abs=1e-5)
    assert result.noise < 1e-3
    if name not in OWN_SCALE:
        assert math.hypot(result.bias, result.noise) < 1e-4  # float32 memory


@pytest.mark.parametrize(("direction", "tied"), [("one_way", True), ("both", False)])
def test_errors_equal_an_enumeration_of_all_batches(direction, tied):
    """n = 7, B = 3: every batch there is; the estimates within their standard errors."""
    anchors, positives = embeddings(7, 4, seed=3)
    tau = 0.3
    exact = parameters(naive(anchors, positives, tau, direction), tied)
    every = torch.stack(
        [
            parameters(naive(anchors[list(rows)], positives[list(rows)], tau, direction), tied)
            for rows in itertools.combinations(range(7), 3)
        ]
    )
    mean, whole = every.mean(0), exact.square().sum()
    expected = {
        "bias": (mean - exact).square().sum(),
        "noise": (every - mean).square().sum(1).mean(),
    }
    of_epoch = mean.square().sum() + expected["noise"] / 2  # two batches an epoch
    expected["epoch_error"] = whole - (mean @ exact) ** 2 / of_epoch
    pairs = FrozenPairs.prepare(anchors, positives, temperature=tau, direction=direction, tied=tied)
    plan = BatchPlan.random(7, 3, seed=1)
    result = gradient_error(pairs, InfoNCE(temperature=tau, direction=direction), plan=plan, num_batches=600)
    for name, square in expected.items():
        value, spread = getattr(result, name), getattr(result, f"{name}_se")
        wanted = float((square / whole).sqrt())
        assert abs(value - wanted) < 4 * spread
        assert 0 < spread < 0.2 * wanted
    assert result.cosine == pytest.approx(float(torch.cosine_similarity(mean, exact, dim=0)), abs=0.02)


class Unbiased(torch.nn.Module):
    """Each row's own part of the full-data gradient, and noise: right in the mean, far off in each batch."""

    def __init__(self, anchors, positives, tau):
        super().__init__()
        leaves = [torch.tensor(side, requires_grad=True) for side in (anchors, positives)]
        value = reference.infonce(*leaves, tau, reference.pairs_allowed(len(anchors), len(anchors)))
        self.parts = [part * len(anchors) for part in torch.autograd.grad(value, leaves)]
        self.generator = torch.Generator().manual_seed(0)

    def __deepcopy__(self, memo):
        return self  # one stream of noise for both copies

    def forward(self, anchors, candidates, *, index, **ids):
        noisy = [
            part[index] + 0.5 * torch.randn(index.shape[0], part.shape[1], generator=self.generator)
            for part in self.parts
        ]
        return sum((side * part).sum() for side, part in zip((anchors, candidates), noisy, strict=True)) / len(anchors)


def test_noise_is_not_counted_as_bias():
    sides = embeddings(200)
    pairs = FrozenPairs.prepare(*sides, temperature=0.2)
    result = gradient_error(pairs, Unbiased(*sides, 0.2), plan=BatchPlan.random(200, 20), num_batches=40)
    assert result.noise > 2
    # 80 draws averaged would leave a naive estimate of a ninth of the noise.
    assert result.bias < 0.5 * result.noise / math.sqrt(80)
    assert result.bias <= 4 * result.bias_se
    assert result.cosine == pytest.approx(1, abs=4 * result.cosine_se)
    assert not result.bias_to_remove


def test_some_anchors_stand_for_all():
    """The full-data gradient from a part of the anchors: their choice does not count as bias either."""
    sides = embeddings(1500)
    plan = BatchPlan.random(1500, 30)
    loss = InfoNCE(temperature=0.1)
    whole = gradient_error(FrozenPairs.prepare(*sides, temperature=0.1), loss, plan=plan, num_batches=200)
    for seed in range(3):
        pairs = FrozenPairs.prepare(*sides, temperature=0.1, num_anchors=600, seed=seed)
        assert [len(half) for half in pairs.full] == [10, 10]
        part = gradient_error(pairs, loss, plan=plan, num_batches=200)
        for name in ("bias", "noise", "cosine", "epoch_error"):
            spread = math.hypot(getattr(part, f"{name}_se"), getattr(whole, f"{name}_se"))
            assert abs(getattr(part, name) - getattr(whole, name)) < 4 * spread


def clusters(num_rows, size, batch_size, **more):
    """The groups of `embeddings` as clusters."""
    cluster = (np.arange(num_rows) % (num_rows // size)).astype(np.int32)
    return BatchPlan(
        num_rows=num_rows, batch_size=batch_size, cluster_size=size, cluster=cluster, seed=0, data_digest="", **more
    )


def test_inclusion_weights_lower_the_bias_of_mined_batches_and_clusters_raise_the_noise():
    pairs = FrozenPairs.prepare(*embeddings(240), temperature=0.2)
    plan = clusters(240, 8, 16)
    loss = CountCorrectedInfoNCE(240, temperature=0.2)
    bare, weighted = (
        gradient_error(pairs, loss, plan=plan, weights=weights, num_batches=510) for weights in ("none", "inclusion")
    )
    random = gradient_error(pairs, loss, plan=BatchPlan.random(240, 16))
    assert weighted.bias + 2 * weighted.bias_se < bare.bias - 2 * bare.bias_se
    assert weighted.noise > random.noise + 3 * math.hypot(weighted.noise_se, random.noise_se)


def test_hard_negatives_of_the_plan_are_candidates():
    """Batches of all rows, so that one is enough: InfoNCE over the positives and the hard negatives behind them."""
    anchors, positives = embeddings(8, 4)
    negatives = np.stack([np.roll(np.arange(8), -3), np.full(8, -1)], axis=1).astype(np.int32)
    plan = clusters(8, 4, 8, negatives=negatives)
    pairs = FrozenPairs.prepare(anchors, positives, temperature=0.3)
    result = gradient_error(pairs, InfoNCE(temperature=0.3), plan=plan, num_batches=2)
    rows = [*range(8), *negatives[:, 0]]  # without the missing ones
    allowed = reference.pairs_allowed(8, 16, candidate_id=rows)
    maps = [torch.eye(4, dtype=torch.float64, requires_grad=True) for _ in range(2)]
    value = reference.infonce(
        torch.tensor(anchors) @ maps[0].T, torch.tensor(positives[rows]) @ maps[1].T, 0.3, allowed
    )
    with_negatives = parameters(torch.autograd.grad(value, maps), True)
    exact = pairs.full[0][0]
    assert result.bias == pytest.approx(float((with_negatives - exact).norm() / exact.norm()), rel=1e-3)
    assert result.bias > 0.05


def test_a_memory_beside_a_naive_one():
    """n = 40, batches of 8, SogCLR: every gradient of both copies from Python floats, figure by figure."""
    num_rows, tau, gamma, eps = 40, 0.3, 0.5, 1 / 39
    anchors, positives = embeddings(num_rows)
    pairs = FrozenPairs.prepare(anchors, positives, temperature=tau, direction="both", tied=False)
    plan = BatchPlan.random(num_rows, 8, seed=2)
    loss = SogCLR(num_rows, gamma=gamma, state="relative", temperature=tau, direction="both")
    result = gradient_error(pairs, loss, plan=plan, run_in=1, num_batches=10)
    exact = parameters(naive(anchors, positives, tau, "both"), False)
    halves = []
    for seed in (2, 3):
        states: list[dict[int, float]] = [{}, {}]
        gradients = []
        for epoch in range(3):
            for batch in replace(plan, seed=seed).epoch_batches(epoch):
                maps = [torch.eye(12, dtype=torch.float64, requires_grad=True) for _ in range(2)]
                sides = [torch.tensor(side[batch]) @ part.T for side, part in zip((anchors, positives), maps)]
                units = [side / side.norm(dim=1, keepdim=True) for side in sides]
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
                gradients.append(parameters(torch.autograd.grad(surrogate / 8, maps), False))
        halves.append(torch.stack(gradients[5:]))
    means, whole = [half.mean(0) for half in halves], exact.square().sum()
    square = torch.cat(halves).square().sum(1).mean()
    noise = square - means[0] @ means[1]
    bias = (means[0] - exact) @ (means[1] - exact)
    assert result.noise == pytest.approx(float((noise / whole).sqrt()), rel=1e-5)
    assert result.bias == pytest.approx(float((bias / whole).clamp(min=0).sqrt()), rel=1e-4)
    cosine = (sum(means) / 2) @ exact / ((means[0] @ means[1]) * whole).sqrt()
    assert result.cosine == pytest.approx(float(cosine), rel=1e-5)


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_all_data_remembered_has_no_bias(direction):
    """Embeddings that stand still: whatever the batch, its rows' gradients are exact, and an epoch holds all rows."""
    pairs = FrozenPairs.prepare(*embeddings(48), temperature=0.2, direction=direction)
    loss = CrossBatchInfoNCE(48, memory_size=48, temperature=0.2, direction=direction, centred=False)
    result = gradient_error(pairs, loss, plan=BatchPlan.random(48, 6), run_in=5, num_batches=16)
    assert result.bias < 1e-3
    assert result.noise > 0.5  # the choice of the batch's rows


def test_the_loss_itself_is_left_alone():
    pairs = FrozenPairs.prepare(*embeddings(32))
    loss = SogCLR(32)
    gradient_error(pairs, loss, plan=BatchPlan.random(32, 8), num_batches=4)
    assert not loss.denominator.visited.any()


def test_mistakes():
    anchors, positives = embeddings(20)
    with pytest.raises(AnybatchError, match="shapes"):
        FrozenPairs.prepare(anchors, positives[:10])
    with pytest.raises(AnybatchError, match=r"1 of the positive embeddings .* all zero"):
        FrozenPairs.prepare(anchors, np.where(np.arange(20)[:, None] == 3, 0.0, positives))
    with pytest.raises(AnybatchError, match="anchor_id has shape"):
        FrozenPairs.prepare(anchors, positives, anchor_id=np.arange(3))
    with pytest.raises(AnybatchError, match="expected 'one_way' or 'both'"):
        FrozenPairs.prepare(anchors, positives, direction="two_way")
    with pytest.raises(AnybatchError, match="temperature is 0"):
        FrozenPairs.prepare(anchors, positives, temperature=0)
    pairs = FrozenPairs.prepare(anchors, positives)
    with pytest.raises(AnybatchError, match="plan has 21 rows"):
        gradient_error(pairs, InfoNCE(), plan=BatchPlan.random(21, 4))
    with pytest.raises(AnybatchError, match=r"direction='both', the full-data gradient 'one_way'"):
        gradient_error(pairs, InfoNCE(direction="both"), plan=BatchPlan.random(20, 4))
