"""k-NN and the linear probe against their formulas, written out."""

from __future__ import annotations

import math

import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression

from anybatch.core.errors import AnybatchError
from anybatch.evaluation.classes import NEIGHBOURS, TEMPERATURE, class_metrics, mean_per_class


@pytest.fixture
def points():
    generator = np.random.default_rng(0)
    labels = np.array(["ant", "bee", "cow"])[generator.integers(0, 3, 160)]
    centre = {"ant": [1, 0, 0, 0], "bee": [0, 1, 0, 0], "cow": [0.6, 0.6, 0.3, 0]}
    rows = np.array([centre[label] for label in labels]) + 0.5 * generator.normal(size=(160, 4))
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32), labels


def test_a_small_class_counts_as_a_large_one():
    labels = np.array(["a"] * 8 + ["b"] * 2)
    assert mean_per_class(np.array([1] * 8 + [0, 1]), labels) == pytest.approx((1 + 0.5) / 2)


def test_votes_are_weighted_by_similarity(points):
    rows, labels = points
    known, test = slice(0, 100), slice(100, None)
    correct = []
    for row, label in zip(rows[test], labels[test], strict=True):
        scores = rows[known] @ row
        votes = {}
        for place in sorted(range(100), key=lambda place: -scores[place])[:NEIGHBOURS]:
            votes[labels[place]] = votes.get(labels[place], 0) + math.exp(scores[place] / TEMPERATURE)
        correct.append(max(votes, key=votes.__getitem__) == label)
    figures = class_metrics(rows[known], labels[known], rows[test], labels[test])
    assert figures["knn"] == pytest.approx(mean_per_class(np.array(correct), labels[test]))
    assert 0.5 < figures["knn"] < 0.95


def test_the_probe_is_logistic_regression(points):
    rows, labels = points
    scaled = (rows - rows[:100].mean(axis=0)) / rows[:100].std(axis=0)
    probe = LogisticRegression(max_iter=5000).fit(scaled[:100], labels[:100])
    expected = mean_per_class(probe.predict(scaled[100:]) == labels[100:], labels[100:])
    figures = class_metrics(rows[:100], labels[:100], rows[100:], labels[100:])
    assert figures["linear"] == pytest.approx(expected, abs=0.02)


def test_a_class_that_is_not_known_is_always_wrong(points):
    rows, labels = points
    figures = class_metrics(rows[:100], labels[:100], rows[:100], np.full(100, "dog"))
    assert figures == {"knn": 0.0, "linear": 0.0}


def test_messages(points):
    rows, labels = points
    with pytest.raises(AnybatchError, match=r"are of 1 class\(es\), and 160 are to be told apart"):
        class_metrics(rows, np.full(160, "ant"), rows, labels)
    with pytest.raises(AnybatchError, match="and 0 are to be told apart"):
        class_metrics(rows, labels, rows[:0], labels[:0])
