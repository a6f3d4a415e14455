"""What `inspect_plan` and `batch_statistics` say, against loops over all pairs."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest

from anybatch.core.errors import AnybatchError
from anybatch.insight.cosines import BINS, Cosines
from anybatch.insight.inspection import DUPLICATE, inspect_plan
from anybatch.mining import MiningConfig, StatisticsLimits, Window, batch_statistics, exact_neighbors, mine_plan
from anybatch.mining.inputs import first_rows
from anybatch.plans.plan import BatchPlan

from ..mining.test_mining import embeddings, naive_neighbors

SKIP, TAKE = 3, 12


def data(num_rows=143):
    """Clustered embeddings with repeated anchors and positives, and one positive that nearly repeats another's."""
    anchors, positives = embeddings(num_rows, seed=5)
    positives = positives + 0.3 * np.random.default_rng(6).normal(size=positives.shape).astype(np.float32)
    positives = (positives / np.linalg.norm(positives, axis=1, keepdims=True)).astype(np.float32)
    anchor_id, positive_id = np.arange(num_rows), np.arange(num_rows)
    anchor_id[40:44] = 7
    positive_id[60:62] = 9
    for ids, side in ((anchor_id, anchors), (positive_id, positives)):
        for row, first in enumerate(ids):
            side[row] = side[first]
    positives[100] = positives[101] + 1e-3
    positives[100] /= np.linalg.norm(positives[100])
    anchors[100] = positives[101]
    return anchors, positives, {"anchor_id": anchor_id, "positive_id": positive_id}


def mined(margin=None):
    anchors, positives, same = data()
    config = MiningConfig(batch_size=16, cluster_size=8, window=(SKIP, TAKE), margin=margin, seed=2)
    return mine_plan(anchors, positives, config=config, **same), anchors, positives, same


def windows(anchors, positives, same, margin=None):
    """All scores, in float64; of each row the texts ranked; the rows with wanted, with suspected texts."""
    scores = anchors.astype(np.float64) @ positives.astype(np.float64).T
    text = first_rows(same["positive_id"])
    ranks = naive_neighbors(anchors, positives, len(text), **same)
    ranks = [[row for row in line if text[row] == row][: SKIP + TAKE] for line in ranks]
    wanted, conflicts = [], []
    for row, line in enumerate(ranks):
        bad = {
            other
            for rank, other in enumerate(line)
            if rank < SKIP or (margin is not None and 0 < margin * scores[row, row] < scores[row, other])
        }
        for found, texts in ((conflicts, bad), (wanted, set(line) - bad)):
            found.append(set(np.flatnonzero(np.isin(text, list(texts))).tolist()))
    return scores, ranks, wanted, conflicts


def different(same, row, other):
    return all(ids[row] != ids[other] for ids in same.values())


@pytest.mark.parametrize("margin", [None, 0.9])
def test_batch_statistics_equal_a_loop(margin):
    result, anchors, positives, same = mined(margin=margin)
    scores, ranks, wanted, conflicts = windows(anchors, positives, same, margin)
    cluster, num_rows = result.plan.cluster, len(anchors)
    beside = [{j for j in range(num_rows) if j != i and cluster[i] == cluster[j] >= 0} for i in range(num_rows)]
    better = [sum(scores[i, j] > scores[i, i] for j in ranks[i]) for i in range(num_rows)]
    negatives = [(i, j) for i in range(num_rows) for j in wanted[i] & beside[i]]
    statistics = result.report.statistics
    assert statistics is not None
    text, window = first_rows(same["positive_id"]), Window(SKIP, TAKE, margin)
    neighbors = exact_neighbors(anchors, positives, SKIP + TAKE, columns=np.unique(text), **same)
    blocks = batch_statistics(neighbors, cluster, window, text=text, block_rows=37)  # several, the last one ragged
    assert blocks.relative_score == pytest.approx(statistics.relative_score)
    assert replace(blocks, relative_score=statistics.relative_score) == statistics
    assert statistics.num_anchors == num_rows
    assert statistics.own_first == pytest.approx(np.mean([count == 0 for count in better]))
    assert statistics.own_behind_skip == pytest.approx(np.mean([count > SKIP for count in better]))
    assert statistics.window_per_anchor == pytest.approx(len(negatives) / num_rows)
    random = sum(map(len, wanted)) / num_rows * np.mean([len(others) for others in beside]) / (num_rows - 1)
    assert statistics.window_gain == pytest.approx(len(negatives) / num_rows / random)
    inside = sum(len(conflicts[i] & beside[i]) for i in range(num_rows))
    assert statistics.suspects_per_anchor == pytest.approx(inside / num_rows)
    above = np.mean([scores[i, j] > scores[i, i] for i, j in negatives])
    assert statistics.negatives_above_own == pytest.approx(above)
    near = np.mean([scores[i, j] > (0.95 if scores[i, i] > 0 else 1) * scores[i, i] for i, j in negatives])
    assert statistics.negatives_near_own == pytest.approx(near)
    relative = sum(scores[pair] for pair in negatives) / sum(scores[i, i] for i, _ in negatives)
    assert statistics.relative_score == pytest.approx(relative, rel=1e-5)
    assert statistics.isolated == pytest.approx(np.mean([not wanted[i] & beside[i] for i in range(num_rows)]))
    assert 0 < above < near < 1 or margin is not None
    assert result.report.audit is not None
    assert statistics.window_per_anchor == pytest.approx(result.report.audit.window_per_anchor)
    degree = np.bincount([j for line in wanted for j in line if text[j] == j], minlength=num_rows)
    assert result.report.hubs == [(int(j), int(degree[j])) for j in np.argsort(-degree, kind="stable")[:20]]
    json.dumps(result.report.as_dict())


@pytest.mark.parametrize("kind", ["mined", "random"])
def test_inspection_equals_a_loop(kind):
    result, anchors, positives, same = mined()
    plan = result.plan if kind == "mined" else BatchPlan.random(143, 16, seed=3)
    if kind == "random":
        plan = replace(plan, meta={"method": "random", "windows": {"": (SKIP, TAKE)}})
    seen = inspect_plan(plan, anchors, positives, temperature=0.1, **same)[""]
    scores, ranks, wanted, conflicts = windows(anchors, positives, same)
    dealt = plan.epoch_batches(0)
    batch_of = {int(row): set(line.tolist()) - {int(row)} for line in dealt for row in line}
    for figure, chance, sets in (
        (seen.window_in_batch, seen.random_window_in_batch, wanted),
        (seen.conflicts_in_batch, seen.random_conflicts_in_batch, conflicts),
    ):
        assert figure == pytest.approx(np.mean([len(sets[row] & others) for row, others in batch_of.items()]))
        assert chance == pytest.approx(np.mean([len(line) for line in sets]) * 15 / 142)

    losses, first, differences = [], [], []
    for row, others in batch_of.items():
        negatives = [j for j in others if different(same, row, j)]
        values = np.array([scores[row, j] - scores[row, row] for j in negatives])
        losses.append(np.log(1 + np.exp(values / 0.1).sum()))
        first.append((values <= 0).all())
        differences += values.tolist()
    assert seen.planned.loss == pytest.approx(np.mean(losses), rel=1e-5)
    assert seen.planned.own_first == pytest.approx(np.mean(first))
    assert seen.planned.above_own == pytest.approx(np.mean(np.array(differences) > 0))
    expected = np.histogram(differences, BINS)[0] / len(differences)
    np.testing.assert_allclose(seen.planned.histogram, expected, atol=2 / len(differences))  # float32 at a bin's edge

    text = first_rows(same["positive_id"])
    degree = np.bincount([j for line in wanted for j in line if text[j] == j], minlength=143)
    assert seen.hubs == [(int(j), int(degree[j])) for j in np.argsort(-degree, kind="stable")[:20]]
    near = positives.astype(np.float64) @ positives.astype(np.float64).T
    twins = {(i, j) for i in range(143) for j in ranks[i][:8] if near[i, j] >= DUPLICATE}
    assert (100, 101) in twins
    assert {(pair.row, pair.other) for pair in seen.duplicates} <= twins
    assert len(seen.duplicates) == min(20, len(twins))
    assert seen.duplicate_share == pytest.approx(len({i for i, _ in twins}) / 143)
    assert (seen.repeated_anchors, seen.repeated_positives) == (5, 3)
    if kind == "random":
        assert seen.suspects == []
        assert seen.clusters == []
        return
    assert plan.suspects is not None
    best = sorted(
        (max(scores[i, j] - scores[i, i], scores[j, i] - scores[j, j]) for i, j in plan.suspects), reverse=True
    )
    np.testing.assert_allclose([pair.score for pair in seen.suspects], best[:20], atol=1e-5)
    for pair in seen.suspects:
        assert pair.score == pytest.approx(scores[pair.row, pair.other] - scores[pair.row, pair.row], abs=1e-5)
    means = {}
    for example in seen.clusters:
        np.testing.assert_allclose(example.scores, scores[np.ix_(example.rows, example.rows)], atol=1e-5)
        means[example.kind] = (example.scores.sum() - np.trace(example.scores)) / 56
        if example.kind != "random":
            assert set(example.rows) == set(np.flatnonzero(plan.cluster == example.number))
    assert means["tightest"] >= means["typical"] >= means["loosest"]
    assert seen.planned.loss > seen.random.loss  # mined batches are harder


def test_unnormalised_embeddings_and_blocks():
    """Losses are of cosines whatever the lengths, and the same in blocks of any size."""
    result, anchors, positives, same = mined()
    batches = result.plan.epoch_batches(0)
    whole, blocks = (
        Cosines(anchors, positives, **same, block_rows=rows).batch_scores(batches, 60, 0.1) for rows in (256, 5)
    )
    assert blocks.loss == pytest.approx(whole.loss, rel=1e-6)
    assert (blocks.own_first, blocks.above_own) == (whole.own_first, whole.above_own)
    np.testing.assert_allclose(blocks.histogram, whole.histogram)
    longer = inspect_plan(mined()[0].plan, 3 * anchors, 2 * positives, **same)[""]
    plain = inspect_plan(mined()[0].plan, anchors, positives, **same)[""]
    assert longer.planned.loss == pytest.approx(plain.planned.loss, rel=1e-5)


def test_a_sample_is_near_the_whole_and_repeatable():
    anchors, positives = embeddings(1500, seed=1, width=16)
    result = mine_plan(anchors, positives, config=MiningConfig(batch_size=32, cluster_size=8, window=(5, 20)))
    whole = inspect_plan(result.plan, anchors, positives, num_anchors=5000)[""]
    part = inspect_plan(result.plan, anchors, positives, num_anchors=400, seed=3)[""]
    again = inspect_plan(result.plan, anchors, positives, num_anchors=400, seed=3)[""]
    assert whole.num_anchors == 1500
    assert whole.statistics == result.report.statistics
    assert part.num_anchors == 400
    assert part.statistics.window_per_anchor == pytest.approx(whole.statistics.window_per_anchor, rel=0.15)
    assert part.planned.loss == pytest.approx(whole.planned.loss, rel=0.25)
    assert (part.statistics, part.hubs, part.suspects) == (again.statistics, again.hubs, again.suspects)


def test_a_teacher_that_knows_nothing_is_warned_of_and_a_good_one_is_not():
    anchors, positives = embeddings(600, width=64, topics=30)
    config = MiningConfig(batch_size=32, cluster_size=8, window=(5, 20))
    good = mine_plan(anchors, positives, config=config).report.statistics
    shuffled = positives[np.random.default_rng(0).permutation(600)]
    bad = mine_plan(anchors, shuffled, config=config).report.statistics
    assert good is not None
    assert bad is not None
    assert good.warnings == ()
    assert len(bad.warnings) >= 3
    assert "finds the own positive first for only" in bad.warnings[0]


@pytest.mark.parametrize(
    ("limit", "value", "words"),
    [
        ("own_first", 1.1, "own positive first"),
        ("own_behind_skip", -1.0, "begin above it"),
        ("negatives_above_own", -1.0, "probably right answers"),
        ("suspects_per_anchor", -1.0, "conflict_weight"),
        ("isolated", -1.0, "no wanted negative beside them"),
        ("window_gain", 1e9, "mining changes little"),
    ],
)
def test_every_limit_has_its_warning(limit, value, words):
    result, anchors, positives, same = mined()
    neighbors = exact_neighbors(anchors, positives, SKIP + TAKE, **same)
    never = {"own_first": 0.0, "own_behind_skip": 1.0, "negatives_above_own": 1.0}
    never |= {"suspects_per_anchor": 99.0, "isolated": 1.0, "window_gain": 0.0}
    window = Window(SKIP, TAKE)
    quiet = batch_statistics(neighbors, result.plan.cluster, window, limits=StatisticsLimits(**never))
    assert quiet.warnings == ()
    limits = StatisticsLimits(**{**never, limit: value})
    loud = batch_statistics(neighbors, result.plan.cluster, window, limits=limits)
    assert len(loud.warnings) == 1
    assert words in loud.warnings[0]


def test_mistakes():
    result, anchors, positives, _ = mined()
    with pytest.raises(AnybatchError, match=r"expected \(143, dim"):
        inspect_plan(result.plan, anchors[:-1], positives[:-1])
    with pytest.raises(AnybatchError, match="temperature is 0"):
        inspect_plan(result.plan, anchors, positives, temperature=0)
    with pytest.raises(AnybatchError, match="number of anchors 0"):
        inspect_plan(result.plan, anchors, positives, num_anchors=0)
