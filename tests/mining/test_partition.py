"""The exchange search, piece by piece, against what a dense matrix says: what it promises after every pass, whatever it found."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import sparse

from anybatch.mining.partition import (
    _anneal,
    _best_exchanges,
    _measure_ties,
    _repair,
    equal_clusters,
    metis_clusters,
    whole_weights,
)

SIZE, CLUSTERS = 5, 6
ROWS = SIZE * CLUSTERS + 2  # two find no place


def signed_graph(seed, density=0.4):
    """Symmetric, small whole numbers of both signs, so that sums are exact."""
    random = np.random.default_rng(seed)
    dense = np.triu(random.integers(-4, 7, (ROWS, ROWS)) * (random.random((ROWS, ROWS)) < density), 1)
    return sparse.csr_matrix((dense + dense.T).astype(np.float32))


def begun(seed, *, same=()):
    """Everything the passes take, after `_repair`; `same` are rows of one positive."""
    signed = signed_graph(seed)
    anchor_id, positive_id = np.arange(ROWS), np.arange(ROWS)
    positive_id[list(same)] = min(same, default=0)
    twins = np.isin(np.arange(ROWS), same)
    known = np.array([ROWS], np.int64)
    graph = (signed.indptr.astype(np.int64), signed.indices, signed.data, twins, anchor_id, positive_id, known)
    cluster = np.random.default_rng(seed).integers(CLUSTERS, size=ROWS).astype(np.int32)
    members = np.full((CLUSTERS + 1, SIZE), -1, np.int32)
    _repair(cluster, members, CLUSTERS, SIZE, *graph)
    return signed.toarray(), cluster, members, graph


def ties(dense, cluster):
    inside = (cluster[:, None] == cluster[None]) & (cluster < CLUSTERS)[:, None]
    return (dense * inside).sum(axis=1)


def assert_whole(cluster, members):
    for number in range(CLUSTERS):
        assert sorted(members[number]) == np.flatnonzero(cluster == number).tolist()
    assert sorted(members[CLUSTERS][members[CLUSTERS] >= 0]) == np.flatnonzero(cluster == CLUSTERS).tolist()


@pytest.mark.parametrize("seed", range(6))
def test_the_best_rows_of_a_cluster_that_is_too_large_stay(seed):
    signed = signed_graph(seed)
    start = np.random.default_rng(seed).integers(CLUSTERS, size=ROWS).astype(np.int32)
    dense = signed.toarray()
    own = (dense * (start[:, None] == start[None])).sum(axis=1)
    _, cluster, members, _ = begun(seed)
    assert_whole(cluster, members)
    assert (np.bincount(cluster, minlength=CLUSTERS + 1)[:CLUSTERS] == SIZE).all()
    for number in range(CLUSTERS):
        rows = np.flatnonzero(start == number)
        stayed, left = rows[cluster[rows] == number], rows[cluster[rows] != number]
        if len(left):
            assert len(stayed) == SIZE
            assert own[stayed].min() >= own[left].max()


@pytest.mark.parametrize("seed", range(6))
def test_annealing_keeps_its_books_and_never_loses_when_cold(seed):
    dense, cluster, members, graph = begun(seed)
    tie = np.empty(ROWS, np.float32)
    _measure_ties(tie, cluster, CLUSTERS, *graph[:3])
    np.testing.assert_array_equal(tie, ties(dense, cluster))
    moved = 0
    for step in range(30):
        before, were = tie.sum(), cluster.copy()
        _anneal(cluster, members, tie, CLUSTERS, *graph, 1e-3, seed * 100 + step)
        np.testing.assert_array_equal(tie, ties(dense, cluster))
        assert_whole(cluster, members)
        assert tie.sum() >= before
        moved += int((were != cluster).any())
    assert moved


@pytest.mark.parametrize("seed", range(6))
def test_the_best_exchanges_gain_what_they_say(seed):
    dense, cluster, members, graph = begun(seed)
    for step in range(4):
        order = np.random.default_rng(step).permutation(ROWS).astype(np.int32)
        before = ties(dense, cluster).sum()
        gained, _ = _best_exchanges(order, cluster, members, CLUSTERS, *graph)
        assert_whole(cluster, members)
        assert ties(dense, cluster).sum() - before == pytest.approx(2 * gained)  # a pair has two ties
        if step == 0:
            assert gained > 0


@pytest.mark.parametrize("seed", range(6))
def test_annealing_takes_equal_content_apart(seed):
    same = [3, 8, 11, 17, 21, 30]  # as many as there are clusters
    dense, cluster, members, graph = begun(seed, same=same)
    # All of them in the first cluster as far as they fit, the next ones in the second.
    order = np.array([*same, *(row for row in range(ROWS) if row not in same)])
    cluster[order] = np.minimum(np.arange(ROWS) // SIZE, CLUSTERS)
    members[:] = -1
    for number in range(CLUSTERS + 1):
        rows = np.flatnonzero(cluster == number)
        members[number, : len(rows)] = rows
    tie = ties(dense, cluster).astype(np.float32)
    for step in range(40):
        _anneal(cluster, members, tie, CLUSTERS, *graph, 0.5, seed * 100 + step)
    homes = cluster[same]
    homes = homes[homes < CLUSTERS]
    assert len(np.unique(homes)) == len(homes)


def test_sizes_are_equal_and_the_rest_is_told():
    signed = signed_graph(1)
    ids = {"anchor_id": np.arange(ROWS), "positive_id": np.arange(ROWS)}
    start = metis_clusters(abs(signed), CLUSTERS, recursive=True)
    found = equal_clusters(start, signed, SIZE, **ids)
    assert np.bincount(found[found >= 0]).tolist() == [SIZE] * CLUSTERS
    assert (found == -1).sum() == ROWS - SIZE * CLUSTERS


def test_weights_are_whole_sixteenths_of_the_mean():
    weight = sparse.csr_matrix(np.array([[0, 1.0, 3.0], [1.0, 0, 0.001], [3.0, 0.001, 0]]))
    mean = weight.data.mean()
    assert whole_weights(weight).tolist() == [max(1, round(16 * value / mean)) for value in weight.data]
