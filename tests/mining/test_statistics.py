"""What `batch_statistics` says, against loops over all pairs."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest

from anybatch.mining import MiningConfig, StatisticsLimits, Window, batch_statistics, exact_neighbors, mine_plan
from anybatch.mining.inputs import first_rows

from .test_mining import embeddings, naive_neighbors

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
    above = np.diag(scores) - scores.mean()
    wanted, conflicts = [], []
    for row, line in enumerate(ranks):
        bad = {
            other
            for rank, other in enumerate(line)
            if rank < SKIP or (margin is not None and 0 < margin * above[row] < scores[row, other] - scores.mean())
        }
        for found, texts in ((conflicts, bad), (wanted, set(line) - bad)):
            found.append(set(np.flatnonzero(np.isin(text, list(texts))).tolist()))
    return scores, ranks, wanted, conflicts


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
    neighbors = replace(neighbors, mean_score=float(scores.mean()))
    blocks = batch_statistics(neighbors, cluster, window, text=text, block_rows=37)  # several, the last one ragged
    assert blocks.relative_score == pytest.approx(statistics.relative_score)
    assert blocks.masked == pytest.approx(statistics.masked)
    assert replace(blocks, relative_score=statistics.relative_score, masked=statistics.masked) == statistics
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
    mean, own = scores.mean(), np.diagonal(scores)
    limits = np.full(num_rows, np.inf) if margin is None else np.where(own > mean, mean + margin * (own - mean), np.inf)
    shares = []
    for i in range(num_rows):
        mass = {j: np.exp(scores[i, j] / 0.05) for j in np.flatnonzero(np.isin(text, ranks[i]))}
        high = [mass[j] for j in mass if scores[i, j] > limits[i]]
        shares.append(sum(high) / sum(mass.values()))
    assert statistics.masked == pytest.approx(np.mean(shares), rel=1e-4)
    assert (statistics.masked > 0) == (margin is not None)
    assert result.report.audit is not None
    assert statistics.window_per_anchor == pytest.approx(result.report.audit.window_per_anchor)
    json.dumps(result.report.as_dict())


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


def test_a_teacher_that_suspects_most_of_the_mass_is_warned_of():
    generator = np.random.default_rng(0)
    positives = generator.normal(size=(2000, 32))
    for noise, warned in ((1.0, False), (1.5, True)):
        anchors = positives + noise * generator.normal(size=positives.shape)
        sides = [
            (side / np.linalg.norm(side, axis=1, keepdims=True)).astype(np.float32) for side in (anchors, positives)
        ]
        statistics = mine_plan(*sides, config=MiningConfig(batch_size=64)).report.statistics
        assert any("Compare with mining.method=random" in line for line in statistics.warnings) == warned
        assert (statistics.masked > 1 / 3) == warned


@pytest.mark.parametrize(
    ("limit", "value", "words"),
    [
        ("own_first", 1.1, "own positive first"),
        ("own_behind_skip", -1.0, "begin above it"),
        ("negatives_above_own", -1.0, "probably right answers"),
        ("suspects_per_anchor", -1.0, "conflict_weight"),
        ("masked", -1.0, "Compare with mining.method=random"),
        ("isolated", -1.0, "no wanted negative beside them"),
        ("window_gain", 1e9, "mining changes little"),
    ],
)
def test_every_limit_has_its_warning(limit, value, words):
    result, anchors, positives, same = mined()
    neighbors = exact_neighbors(anchors, positives, SKIP + TAKE, **same)
    never = {"own_first": 0.0, "own_behind_skip": 1.0, "negatives_above_own": 1.0}
    never |= {"suspects_per_anchor": 99.0, "masked": 1.0, "isolated": 1.0, "window_gain": 0.0}
    window = Window(SKIP, TAKE)
    quiet = batch_statistics(neighbors, result.plan.cluster, window, limits=StatisticsLimits(**never))
    assert quiet.warnings == ()
    limits = StatisticsLimits(**{**never, limit: value})
    loud = batch_statistics(neighbors, result.plan.cluster, window, limits=limits)
    assert len(loud.warnings) == 1
    assert words in loud.warnings[0]
