"""Coarse cells: exact sizes, near the quality of the whole, the plan the same from a folder or a second call."""

from __future__ import annotations

import numpy as np
import pytest

from anybatch.core.errors import AnybatchError
from anybatch.mining import MiningConfig, mine_plan
from anybatch.mining.cells import _joined

from .test_mining import embeddings


@pytest.mark.parametrize(("num_rows", "cells"), [(403, 3), (400, 7), (90, 40)])
def test_cells_give_equal_clusters_of_nearly_the_same_quality(num_rows, cells, tmp_path):
    anchors, positives = embeddings(num_rows, topics=12)
    whole, apart, stored = (
        mine_plan(
            anchors,
            positives,
            config=MiningConfig(batch_size=24, cluster_size=8, skip=3, take=12, cells=number),
            folder=folder,
        )
        for number, folder in ((1, None), (cells, None), (cells, tmp_path))
    )
    for result in (apart, stored):
        audit, reference = result.report.audit, whole.report.audit
        assert audit is not None
        assert reference is not None
        assert audit.smallest == audit.largest == 8
        assert audit.remainder_rows == num_rows % 8
        assert audit.window_per_anchor > 0.8 * reference.window_per_anchor > 2 * reference.random_window_per_anchor
        assert audit.conflicts_per_anchor < reference.conflicts_per_anchor + 0.15
    assert stored.plan.digest == apart.plan.digest


def test_left_over_rows_fill_further_clusters():
    cell = np.array([0, 1, 0, 1, 0, 1, 1, 0, 2, 0, 1])
    cluster = np.array([0, 0, 0, 0, 0, 0, -1, -1, -1, -1, -1])
    joined = _joined(cell, cluster, 3, 3)
    assert joined.tolist() == [0, 1, 0, 1, 0, 1, 2, 2, 2, 2, 2]
    assert (np.bincount(_joined(np.zeros(12, int), np.arange(12) // 4, 1, 4)) == 4).all()


def test_no_cells_are_refused():
    with pytest.raises(AnybatchError, match=r"mining\.cells is 0"):
        MiningConfig(cells=0)
    with pytest.raises(AnybatchError, match="all rows at once"):
        MiningConfig(cells=2, method="published")
