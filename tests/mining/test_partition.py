"""The search by exchanges, piece by piece, against a dense matrix: what it promises after every pass."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import sparse

from anybatch.mining import exchange, partition
from anybatch.mining.exchange import Clusters, SearchGraph, anneal, best_exchanges, measure_ties, repair
from anybatch.mining.partition import equal_clusters, metis_clusters, whole_weights

SIZE, CLUSTERS = 5, 6
ROWS = SIZE * CLUSTERS + 2  # two find no place


def signed_graph(seed, density=0.4):
    """Symmetric, small whole numbers of both signs, so that sums are exact."""
    random = np.random.default_rng(seed)
    dense = np.triu(random.integers(-4, 7, (ROWS, ROWS)) * (random.random((ROWS, ROWS)) < density), 1)
    return sparse.csr_matrix((dense + dense.T).astype(np.float32))


def begun(seed, *, same=()):
    """The dense graph, and what the passes take, after `repair`; `same` are rows of one positive."""
    signed = signed_graph(seed)
    positive_id = np.arange(ROWS)
    positive_id[list(same)] = min(same, default=0)
    graph = SearchGraph(
        indptr=signed.indptr.astype(np.int64),
        indices=signed.indices,
        data=signed.data,
        duplicates=np.isin(np.arange(ROWS), same),
        anchor_id=np.arange(ROWS),
        positive_id=positive_id,
        known=np.array([ROWS], np.int64),
    )
    clusters = Clusters(
        cluster=np.random.default_rng(seed).integers(CLUSTERS, size=ROWS).astype(np.int32),
        members=np.full((CLUSTERS + 1, SIZE), -1, np.int32),
        tie=np.empty(ROWS, np.float32),
    )
    repair(graph, clusters)
    return signed.toarray(), graph, clusters


def ties(dense, cluster):
    inside = (cluster[:, None] == cluster[None]) & (cluster < CLUSTERS)[:, None]
    return (dense * inside).sum(axis=1)


def assert_whole(clusters):
    cluster, members, _ = clusters
    for number in range(CLUSTERS):
        assert sorted(members[number]) == np.flatnonzero(cluster == number).tolist()
    assert sorted(members[CLUSTERS][members[CLUSTERS] >= 0]) == np.flatnonzero(cluster == CLUSTERS).tolist()


@pytest.mark.parametrize("seed", range(6))
def test_the_best_rows_of_a_cluster_that_is_too_large_stay(seed):
    signed = signed_graph(seed)
    start = np.random.default_rng(seed).integers(CLUSTERS, size=ROWS).astype(np.int32)
    dense = signed.toarray()
    own = (dense * (start[:, None] == start[None])).sum(axis=1)
    _, _, clusters = begun(seed)
    assert_whole(clusters)
    cluster = clusters.cluster
    assert (np.bincount(cluster, minlength=CLUSTERS + 1)[:CLUSTERS] == SIZE).all()
    for number in range(CLUSTERS):
        rows = np.flatnonzero(start == number)
        stayed, left = rows[cluster[rows] == number], rows[cluster[rows] != number]
        if len(left):
            assert len(stayed) == SIZE
            assert own[stayed].min() >= own[left].max()


@pytest.mark.parametrize("seed", range(6))
def test_annealing_keeps_its_books_and_never_loses_when_cold(seed):
    dense, graph, clusters = begun(seed)
    cluster, _, tie = clusters
    measure_ties(graph, clusters)
    np.testing.assert_array_equal(tie, ties(dense, cluster))
    moved = 0
    for step in range(30):
        before, were = tie.sum(), cluster.copy()
        anneal(graph, clusters, 1e-3, seed * 100 + step)
        np.testing.assert_array_equal(tie, ties(dense, cluster))
        assert_whole(clusters)
        assert tie.sum() >= before
        moved += int((were != cluster).any())
    assert moved


@pytest.mark.parametrize("seed", range(6))
def test_the_best_exchanges_gain_what_they_say(seed):
    dense, graph, clusters = begun(seed)
    for step in range(4):
        order = np.random.default_rng(step).permutation(ROWS).astype(np.int32)
        before = ties(dense, clusters.cluster).sum()
        gained = best_exchanges(graph, clusters, order)
        assert_whole(clusters)
        assert ties(dense, clusters.cluster).sum() - before == pytest.approx(2 * gained)  # a pair has two ties
        if step == 0:
            assert gained > 0


@pytest.mark.parametrize("seed", range(6))
def test_annealing_takes_equal_content_apart(seed):
    same = [3, 8, 11, 17, 21, 30]  # as many as there are clusters
    dense, graph, clusters = begun(seed, same=same)
    cluster, members, tie = clusters
    # All of them in the first cluster as far as they fit, the next ones in the second.
    order = np.array([*same, *(row for row in range(ROWS) if row not in same)])
    cluster[order] = np.minimum(np.arange(ROWS) // SIZE, CLUSTERS)
    members[:] = -1
    for number in range(CLUSTERS + 1):
        rows = np.flatnonzero(cluster == number)
        members[number, : len(rows)] = rows
    tie[:] = ties(dense, cluster)
    for step in range(40):
        anneal(graph, clusters, 0.5, seed * 100 + step)
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


@pytest.mark.parametrize("num_clusters", [2, 5])
def test_links_that_cancel_do_not_fill_the_list_of_clusters(monkeypatch, num_clusters):
    """A wanted edge of 1 and a conflict of -1 into one cluster add up to 0, as if it had not been seen.

    Compiled code would write past its arrays without a word, so the pass is run as Python here.
    """
    monkeypatch.setattr(exchange, "_drawn_target", exchange._drawn_target.py_func)
    monkeypatch.setattr(partition, "anneal", exchange.anneal.py_func)
    rows = np.arange(80)
    upper = np.triu(np.random.default_rng(0).choice([-1.0, 0.0, 1.0], size=(80, 80)).astype(np.float32), 1)
    signed = sparse.csr_matrix(upper + upper.T)
    start = rows % num_clusters
    cluster = equal_clusters(start, signed, 80 // num_clusters, anchor_id=rows, positive_id=rows, sweeps=5)
    assert np.bincount(cluster).tolist() == [80 // num_clusters] * num_clusters
    dense, same = signed.toarray(), cluster[:, None] == cluster[None]
    assert dense[same].sum() > dense[start[:, None] == start[None]].sum()
