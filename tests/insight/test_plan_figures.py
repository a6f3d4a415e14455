"""The figures of a plan against loops over all pairs; its warnings; its page: whole, alone, escaped."""

from __future__ import annotations

import re
from dataclasses import asdict, replace

import numpy as np
import pytest
import torch

from anybatch.core.errors import AnybatchError
from anybatch.data.pairs import PairData
from anybatch.insight.gradient_error import FrozenPairs, gradient_error
from anybatch.insight.gradient_methods import compare_methods, gradient_figures, name_of
from anybatch.insight.plan_figures import plan_sentence, plan_warnings, set_figures
from anybatch.insight.plan_page import render_plan_page
from anybatch.losses import CountCorrectedInfoNCE, InfoNCE
from anybatch.losses.registry import LossConfig
from anybatch.losses.rows import RowTable
from anybatch.mining import MiningConfig, MiningSet, inspection, mine_plan
from anybatch.mining.inspection import MARGIN, inspect_plan
from anybatch.plans.plan import BatchPlan
from tests.insight.test_gradient_error import clusters
from tests.mining.test_mining import embeddings

from .test_report import Checker

EVIL = "<script>alert('x')</script> & \"quoted\""
SIZES = {"first": 70, "second": 45}
TAU = 0.2


def data(num_rows=115):
    """Clustered embeddings with repeated anchors and positives, of any length."""
    anchors, positives = embeddings(num_rows, seed=5)
    positives = positives + 0.3 * np.random.default_rng(6).normal(size=positives.shape).astype(np.float32)
    anchor_id, positive_id = np.arange(num_rows), np.arange(num_rows)
    anchor_id[40:44], positive_id[60:62] = 7, 9
    for ids, side in ((anchor_id, anchors), (positive_id, positives)):
        for row, first in enumerate(ids):
            side[row] = side[first]
    return 3 * anchors, positives, {"anchor_id": anchor_id, "positive_id": positive_id}


def make_plan(kind, anchors, positives, same):
    if kind == "random":
        return BatchPlan.random(115, 16, seed=3)
    config = MiningConfig(
        batch_size=16, cluster_size=8, conflict_weight=0.0, num_negatives=int(kind == "negatives"), seed=2
    )
    sets = ()
    if kind in ("within", "mixed"):
        config = replace(config, mixing=kind)
        sets = [MiningSet(name=name, num_rows=size) for name, size in SIZES.items()]
    return mine_plan(anchors, positives, config=config, sets=sets, **same).plan


@pytest.mark.filterwarnings("ignore:The rank window")
@pytest.mark.parametrize("kind", ["mined", "negatives", "random", "within", "mixed"])
def test_figures_equal_a_loop(kind):
    anchors, positives, same = data()
    plan = make_plan(kind, anchors, positives, same)
    seen = inspect_plan(plan, anchors, positives, temperature=TAU, num_anchors=10**6, **same)
    assert set(seen) == (set(SIZES) if kind in ("within", "mixed") else {""})
    units = [side.astype(np.float64) / np.linalg.norm(side, axis=1, keepdims=True) for side in (anchors, positives)]
    scores = units[0] @ units[1].T
    suspected = set()  # rows and texts, as the loss masks them
    if plan.suspects is not None:
        table = RowTable(*same.values(), plan=plan, mask_suspects=True)
        suspected = set(zip(*(part.tolist() for part in np.divmod(table.suspects.numpy(), table.width)), strict=True))
    for name, members in plan.set_rows.items():
        sums, near, near_all, first, mates, count = np.zeros(2), 0, 0, 0, 0, 0
        nearest = [-1.0]
        for batch in plan.epoch_batches(0):
            rows = set(batch.tolist())
            brought = set() if plan.negatives is None else set(plan.negatives[batch].ravel().tolist()) - {-1}
            for row in rows & set(members.tolist()):
                count += 1
                mates += len(rows & set(members.tolist())) - 1
                negatives = [j for j in members if all(ids[row] != ids[j] for ids in same.values())]
                mass = {j: np.exp(scores[row, j] / TAU) for j in negatives}
                beside = [j for j in negatives if j in rows | brought]
                masked = [j for j in negatives if (row, same["positive_id"][j]) in suspected]
                sums += [sum(mass[j] for j in part) / sum(mass.values()) for part in (beside, masked)]
                high = masked
                if plan.suspects is None:
                    high = [j for j in negatives if 0 < MARGIN * scores[row, row] <= scores[row, j]]
                near, near_all = near + len(set(high) & set(beside)), near_all + len(high)
                first += max(scores[row, j] for j in negatives) <= scores[row, row]
                nearest += [scores[row, j] for j in set(high) & set(beside)]
        result = seen[name]
        chance = mates / count / (len(members) - 1)
        assert result.num_anchors == count
        assert result.own_first == pytest.approx(first / count)
        assert asdict(result.planned) == pytest.approx(
            dict(zip(("in_batch", "masked"), sums / count, strict=True), suspects=near / count), rel=1e-4
        )
        assert result.random.in_batch == pytest.approx(chance)
        assert result.random.suspects == pytest.approx(near_all / count * chance)
        assert bool(result.suspects) == (near > 0)
        for pair in result.suspects[:1]:
            assert pair.score == pytest.approx(max(nearest), rel=1e-5)
            assert pair.own == pytest.approx(scores[pair.row, pair.row], rel=1e-5)
        if kind != "random":
            assert result.planned.in_batch > result.random.in_batch


@pytest.mark.parametrize("labels", [None, 30])
def test_the_mass_masked_is_what_the_loss_masks(labels):
    anchors, positives = embeddings(240, seed=5)
    positive_id = np.arange(240) % (labels or 240)
    positives = positives[positive_id]
    anchors = positives + 0.4 * np.random.default_rng(1).normal(size=anchors.shape).astype(np.float32)
    config = MiningConfig(batch_size=16, cluster_size=8)
    plan = mine_plan(anchors, positives, config=config, positive_id=positive_id).plan
    seen = inspect_plan(plan, anchors, positives, positive_id=positive_id, temperature=TAU)[""]
    table = RowTable(np.arange(240), positive_id, plan=plan, mask_suspects=True)
    anchors, positives = (side / np.linalg.norm(side, axis=1, keepdims=True) for side in (anchors, positives))
    mass = np.exp(anchors @ positives.T / TAU) * (positive_id[:, None] != positive_id)
    every = torch.arange(240)
    kept = table.arguments(every)["log_weight"].tile(slice(None), slice(None)).exp().numpy()
    share = (mass * (1 - kept)).sum(axis=1) / mass.sum(axis=1)
    placed = np.unique(plan.epoch_batches(0))
    assert seen.planned.masked == pytest.approx(share[placed].mean(), rel=1e-4)
    assert seen.planned.masked > 0.01


def test_positives_are_read_in_pieces(monkeypatch):
    anchors, positives, same = data()
    for kind in ("mined", "negatives", "mixed", "random"):
        plan = make_plan(kind, anchors, positives, same)
        whole = inspect_plan(plan, anchors, positives, temperature=TAU, **same)
        with monkeypatch.context() as patched:
            patched.setattr(inspection, "BLOCK", 115 * 7)
            pieces = inspect_plan(plan, anchors, positives, temperature=TAU, **same)
        for name, seen in whole.items():
            assert pieces[name].figures == pytest.approx(seen.figures)
            assert [pair.row for pair in pieces[name].suspects] == [pair.row for pair in seen.suspects]


def test_one_positive_of_many_rows_is_shown_once():
    """One caption of many images: pairs of the same two captions differ by nothing that could be read."""
    positives = 1 + 0.05 * np.random.default_rng(4).normal(size=(64, 8))
    positive_id = np.arange(64) // 2
    positives = positives[positive_id * 2]
    seen = inspect_plan(BatchPlan.random(64, 32), positives, positives, positive_id=positive_id)[""]
    shown = [frozenset((positive_id[pair.row], positive_id[pair.other])) for pair in seen.suspects]
    assert len(shown) == len(set(shown)) == len({pair.row for pair in seen.suspects}) == 20
    scores = [pair.score for pair in seen.suspects]
    assert scores == sorted(scores, reverse=True)


def test_a_sample_is_near_the_whole_and_repeatable():
    anchors, positives = embeddings(1500, seed=1, width=16)
    plan = mine_plan(anchors, positives, config=MiningConfig(batch_size=32, cluster_size=8)).plan
    whole, part, again = (
        inspect_plan(plan, anchors, positives, num_anchors=count, seed=3)[""] for count in (5000, 400, 400)
    )
    assert part == again
    assert (whole.num_anchors, part.num_anchors) == (plan.num_batches * 32, 400)
    assert part.planned.in_batch == pytest.approx(whole.planned.in_batch, rel=0.15)


def test_mistakes():
    anchors, positives, _ = data()
    plan = BatchPlan.random(115, 16)
    with pytest.raises(AnybatchError, match=r"expected \(115, dim"):
        inspect_plan(plan, anchors[:-1], positives[:-1])
    with pytest.raises(AnybatchError, match="temperature is 0"):
        inspect_plan(plan, anchors, positives, temperature=0)
    with pytest.raises(AnybatchError, match="number of anchors 0"):
        inspect_plan(plan, anchors, positives, num_anchors=0)


@pytest.fixture(scope="module")
def mined():
    """A plan whose figures give no cause for a warning, with what was measured of it."""
    anchors, positives = embeddings(120, width=32)
    plan = clusters(120, 8, 16, suspects=np.array([[0, 15], [3, 33]], np.int32))
    seen = inspect_plan(plan, anchors, positives)[""]
    gradients = measured(FrozenPairs.prepare(anchors, positives), plan, LossConfig(name="infonce"), num_batches=28)
    quiet = replace(seen, own_first=0.9, planned=replace(seen.planned, suspects=0.1, in_batch=0.9))
    return plan, quiet, with_planned(gradients, gradients.plain)


def measured(pairs, plan, loss, **settings):
    return compare_methods(pairs, plan, methods=[loss], **settings)


def with_planned(gradients, error):
    """The same with another error on the plan's batches."""
    errors = {key: error if key[1] == "plan" else measured for key, measured in gradients.errors.items()}
    return replace(gradients, errors=errors)


def test_each_warning_has_its_cause(mined):
    plan, seen, gradients = mined
    assert plan_warnings(plan, seen, gradients) == []
    assert plan_warnings(plan, None, None) == []
    error = gradients.plain
    worse = replace(error, epoch_error=error.epoch_error + 3 * error.epoch_error_se)
    (warning,) = plan_warnings(plan, seen, with_planned(gradients, worse))
    assert warning.startswith("The gradient speaks against this plan: with loss.name=infonce")
    less_bias = with_planned(gradients, replace(worse, bias=error.bias / 2, noise=2 * error.noise))
    assert "larger batches lower the noise alone" in plan_warnings(plan, seen, less_bias)[1]
    for changed, words in (
        (replace(seen, own_first=0.1), "own positive first for only 10.0%"),
        (replace(seen, planned=replace(seen.planned, suspects=1.5)), "1.50 suspected false negatives"),
        (replace(seen, planned=replace(seen.planned, masked=0.5)), "Compare with mining.method=random"),
        (replace(seen, planned=replace(seen.planned, in_batch=2 * seen.random.in_batch)), "mining changes little"),
    ):
        (warning,) = plan_warnings(plan, changed, gradients)
        assert words in warning
    many = replace(seen, planned=replace(seen.planned, suspects=1.5))
    assert "set loss.mask_suspects" in plan_warnings(plan, many, None)[0]
    assert "set loss.mask_suspects" not in plan_warnings(plan, many, None, mask_suspects=True)[0]
    random = BatchPlan.random(120, 16)  # nothing was chosen that could hurt
    assert plan_warnings(random, replace(seen, planned=replace(seen.planned, suspects=9.0)), None) == []
    assert [figure.name for figure in set_figures(seen, random)] == ["own positive first"]


def test_a_figure_passes_where_there_is_no_warning(mined):
    """The pass marks of the page are those of the warnings."""
    plan, seen, gradients = mined
    assert [figure.passed for figure in set_figures(seen, plan)] == [True] * 4
    changes = [{"own_first": 0.1}] + [
        {"planned": replace(seen.planned, **change)}
        for change in ({"in_batch": 2 * seen.random.in_batch}, {"masked": 0.5}, {"suspects": 1.5})
    ]
    for place, change in enumerate(changes):
        changed = replace(seen, **change)
        assert [figure.passed for figure in set_figures(changed, plan)].index(False) == place
        assert len(plan_warnings(plan, changed)) == 1
    error = gradients.plain
    for difference, passed in ((3, False), (0, None), (-3, True)):
        other = replace(error, epoch_error=error.epoch_error + difference * error.epoch_error_se)
        assert gradient_figures("a", other, "b", error)[0].passed is passed


def test_a_plan_of_alike_anchors_loses_in_the_parameter_gradient():
    """Each batch a single cluster of near duplicates: hard negatives, and anchors that say the same."""
    generator = np.random.default_rng(0)
    centres = generator.normal(size=(30, 16)).repeat(8, axis=0)
    sides = [centres + 0.2 * generator.normal(size=centres.shape) for _ in range(2)]
    plan = BatchPlan(
        num_rows=240, batch_size=8, cluster_size=8, cluster=np.arange(240, dtype=np.int32) // 8, seed=0, data_digest=""
    )
    gradients = measured(FrozenPairs.prepare(*sides, temperature=0.1), plan, LossConfig(name="infonce"), num_batches=60)
    assert gradients.of("infonce", "plan").noise > gradients.plain.noise
    assert plan_warnings(plan, None, gradients)[0].startswith("The gradient speaks against this plan")


def test_what_the_loss_masks_is_no_negative_of_the_objective_and_of_random_batches():
    anchors, positives = embeddings(240, width=16, seed=3)
    positives = positives + 0.25 * np.random.default_rng(4).normal(size=positives.shape).astype(np.float32)
    plan = mine_plan(anchors, positives, config=MiningConfig(batch_size=32, cluster_size=4)).plan
    assert len(plan.suspects)
    loss = LossConfig(name="count_corrected", weights="inclusion", mask_suspects=True)
    with pytest.raises(AnybatchError, match=r"suspects=plan\.suspects"):
        measured(FrozenPairs.prepare(anchors, positives), plan, loss)
    given = {"temperature": 0.1, "suspects": plan.suspects}
    masked = FrozenPairs.prepare(anchors, positives, **given)
    # One batch of all rows is the objective, where it has the same masks.
    whole = replace(BatchPlan.random(240, 240), suspects=plan.suspects)
    infonce = replace(LossConfig(name="infonce"), mask_suspects=True)
    assert measured(masked, whole, infonce, num_batches=2).plain.bias < 1e-3
    bare = gradient_error(masked, InfoNCE(temperature=0.1), plan=whole, num_batches=2)
    assert bare.bias > 0.01
    unmasked = FrozenPairs.prepare(anchors, positives, temperature=0.1)
    corrected = CountCorrectedInfoNCE(240, temperature=0.1)
    settings = {"plan": plan, "weights": "inclusion", "mask_suspects": True, "num_batches": 60}
    biases = [gradient_error(pairs, corrected, **settings).bias for pairs in (masked, unmasked)]
    assert biases[0] < 0.8 * biases[1]
    assert measured(masked, plan, loss, num_batches=60).of(name_of(loss), "plan").bias == biases[0]


def check(page):
    checker = Checker()
    checker.feed(page)
    assert checker.stack == []
    assert checker.scripts == 0
    assert checker.external == []
    assert re.findall(r"https?://|//\w|@import|url\(", page) == []


def test_the_page_is_escaped_and_stands_alone(mined):
    plan, seen, gradients = mined
    pairs = PairData(
        anchors=[f"anchor {row} {EVIL}" for row in range(120)],
        positives=[f"positive {row} {EVIL} {'long ' * 100}" for row in range(120)],
    )
    anchors, positives = embeddings(120, width=32)
    positives[1] = positives[16]  # a suspected pair in one cluster
    seen = inspect_plan(plan, anchors, positives)[""]
    of_gradient = gradient_figures("infonce", gradients.of("infonce", "plan"), "random batches", gradients.plain)
    tables = {"Figures": set_figures(seen, plan) + of_gradient}
    given = {"tables": tables, "inspections": {"": seen}, "pairs": pairs}
    page = render_plan_page(plan, title=f"Plan {EVIL}", warnings=["Look & see"], **given)
    check(page)
    assert "<script" not in page
    assert '<p class="warning">Look &amp; see</p>' in page
    # Warnings first, then texts of suspects, then figures, each with its pass mark.
    places = [page.index(words) for words in ("Look &amp; see", "its own positive", "softmax mass in the batch")]
    assert places == sorted(places)
    assert page.count('data-label="good is"') == len(tables["Figures"])
    for words in ("suspected false negatives per anchor", "gradient, direction: infonce", f"{seen.own_first:.1%}"):
        assert words in page
    pair = seen.suspects[0]
    for side, row in (("anchor", pair.row), ("positive", pair.row), ("positive", pair.other)):
        assert f"row {row}: {side} {row} &lt;script" in page
    assert "long " * 50 not in page  # texts are cut
    assert "Not shown" not in page


def test_a_page_without_embeddings_and_texts(mined):
    plan, _, _ = mined
    missing = ["Texts: give --data & more."]
    page = render_plan_page(plan, title="Plan", tables={}, warnings=[], inspections={}, missing=missing)
    check(page)
    assert "<li>Texts: give --data &amp; more.</li>" in page
    assert "row 0: " in page
    assert "row 15: " in page
    random = BatchPlan.random(60, 8)
    page = render_plan_page(random, title="Plan", tables={}, warnings=[], inspections={})
    assert "nothing was chosen" in page
    assert "Nobody looked" in page
    assert plan_sentence(random) in page
    assert plan_sentence(random) == (
        "60 rows; an epoch is 7 batches of 8; 4 rows that do not fill a batch sit out, other ones each epoch."
    )
