"""The figures of mined clusters and of their teacher, against loops over all pairs; what they advise against."""

from __future__ import annotations

import json
import re
from dataclasses import asdict

import numpy as np
import pytest
from benchmarks.clusters import audit_of

from anybatch.mining import MiningConfig, mine_plan
from anybatch.mining.audit import advice, marks
from anybatch.mining.inputs import first_rows
from anybatch.mining.inspection import inspect_plan

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
def test_the_figures_equal_a_loop(margin):
    result, anchors, positives, same = mined(margin=margin)
    scores, ranks, wanted, conflicts = windows(anchors, positives, same, margin)
    report, num_rows = result.report, len(anchors)
    beside = [np.flatnonzero(result.plan.cluster == cluster) if cluster >= 0 else () for cluster in result.plan.cluster]
    beside = [{int(other) for other in others} - {row} for row, others in enumerate(beside)]
    # 1. What the clusters hold.
    negatives = sum(len(wanted[i] & beside[i]) for i in range(num_rows)) / num_rows
    random = sum(map(len, wanted)) / num_rows * np.mean([len(others) for others in beside]) / (num_rows - 1)
    audit = audit_of(result, **same)
    assert audit.window_per_anchor == pytest.approx(negatives)
    assert audit.random_window_per_anchor == pytest.approx(random)
    inside = sum(len(conflicts[i] & beside[i]) for i in range(num_rows)) / num_rows
    assert audit.conflicts_per_anchor == pytest.approx(inside)
    # 2. The rest is what `inspect_plan` measures of the plan.
    seen = inspect_plan(result.plan, anchors, positives, **same)[""]
    assert report.figures == seen.figures
    own, placed = np.diagonal(scores), np.unique(result.plan.epoch_batches(0))
    assert report.figures["own_first"] == np.mean([all(scores[i, ranks[i]] <= own[i]) for i in placed])
    assert report.figures["gain"] == seen.planned.in_batch / seen.random.in_batch
    json.dumps(asdict(report))


def test_the_mass_masked_is_over_all_rows_not_the_ranked_ones():
    """Mining ranks 40 texts of an anchor; of the others a thousand hold most of the mass."""
    generator = np.random.default_rng(0)
    positives = generator.normal(size=(1200, 64))
    anchors = positives + 1.3 * generator.normal(size=positives.shape)
    sides = [(side / np.linalg.norm(side, axis=1, keepdims=True)).astype(np.float32) for side in (anchors, positives)]
    result = mine_plan(*sides, config=MiningConfig(batch_size=64, window=(8, 32)), temperature=0.2)
    mass = np.exp(sides[0] @ sides[1].T / 0.2)
    np.fill_diagonal(mass, 0)
    row, other = result.plan.suspects.T
    masked = np.zeros_like(mass, bool)
    masked[row, other] = True
    placed = np.unique(result.plan.epoch_batches(0))
    shares = ((mass * masked).sum(axis=1) / mass.sum(axis=1))[placed]
    assert result.report.figures["masked"] == pytest.approx(shares.mean(), rel=1e-4)
    ranked = np.sort(mass, axis=1)[:, -40:].sum(axis=1)[placed]
    assert ((mass * masked).sum(axis=1)[placed] / ranked).mean() > 3 * shares.mean() > 0


def test_a_teacher_that_knows_nothing_is_warned_of_and_a_good_one_is_not():
    anchors, positives = embeddings(600, width=64, topics=60)
    config = MiningConfig(batch_size=32, cluster_size=8)
    assert mine_plan(anchors, positives, config=config).report.warnings == []
    shuffled = positives[np.random.default_rng(0).permutation(600)]
    warnings = mine_plan(anchors, shuffled, config=config).report.warnings
    assert "finds the own positive first for only" in warnings[0]


def test_a_teacher_that_suspects_most_of_the_mass_is_warned_of():
    generator = np.random.default_rng(0)
    positives = generator.normal(size=(2000, 32))
    for noise, warned in ((1.0, False), (1.5, True)):
        anchors = positives + noise * generator.normal(size=positives.shape)
        sides = [
            (side / np.linalg.norm(side, axis=1, keepdims=True)).astype(np.float32) for side in (anchors, positives)
        ]
        report = mine_plan(*sides, config=MiningConfig(batch_size=64)).report
        assert any("Compare with mining.method=random" in line for line in report.warnings) == warned
        assert (report.figures["masked"] > 1 / 3) == warned


@pytest.mark.parametrize(
    ("figure", "value", "words"),
    [
        ("own_first", 0.39, "own positive first"),
        ("suspects", 1.1, "conflict_weight, or set loss.mask_suspects"),
        ("masked", 0.34, "Compare with mining.method=random"),
        ("gain", 2.9, "mining changes little"),
    ],
)
def test_every_limit_has_its_advice(figure, value, words):
    good = {"own_first": 0.4, "suspects": 1.0, "masked": 1 / 3, "gain": 3.0}
    assert advice(good) == []
    (found,) = advice({**good, figure: value})
    assert words in found
    assert [mark.passed for mark in marks(good)] == [True] * 4
    (mark,) = [mark for mark in marks({**good, figure: value}) if not mark.passed]
    assert re.search(r" or (more|less)$", mark.good)
    random = advice({**good, figure: value}, mined=False)  # of random batches nothing was chosen
    assert len(random) == (figure == "own_first")
    assert "set loss.mask_suspects" not in " ".join(advice({**good, figure: value}, mask_suspects=True))
