"""The compiled annealing sweep stays inside its arrays. Compiled code does not check that, so it is run as Python here."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import sparse

from anybatch.mining import equal_clusters, partition


@pytest.mark.parametrize("num_clusters", [2, 5])
def test_links_that_cancel_do_not_fill_the_list_of_clusters(monkeypatch, num_clusters):
    """A wanted edge of 1 and a conflict of -1 into one cluster add up to 0, as if it had not been seen."""
    monkeypatch.setattr(partition, "_anneal", partition._anneal.py_func)
    rows = np.arange(80)
    upper = np.triu(np.random.default_rng(0).choice([-1.0, 0.0, 1.0], size=(80, 80)).astype(np.float32), 1)
    signed = sparse.csr_matrix(upper + upper.T)
    start = rows % num_clusters
    cluster = equal_clusters(start, signed, 80 // num_clusters, anchor_id=rows, positive_id=rows, sweeps=5)
    assert np.bincount(cluster).tolist() == [80 // num_clusters] * num_clusters
    dense, same = signed.toarray(), cluster[:, None] == cluster[None]
    assert dense[same].sum() > dense[start[:, None] == start[None]].sum()
