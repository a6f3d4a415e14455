"""KaMinPar: the graph arrives as it was, the same seed gives the same clusters, and mining hands the option on."""

from __future__ import annotations

import sys
from typing import Any

import numpy as np
import pytest
from scipy import sparse

from anybatch.core.errors import AnybatchError
from anybatch.mining import MiningConfig, mine_plan
from anybatch.mining.kaminpar import kaminpar_clusters, load_graph
from anybatch.mining.partition import whole_weights

from .test_mining import embeddings


def random_graph(num_rows=157, seed=0):
    generator = np.random.default_rng(seed)
    values = generator.random((num_rows, num_rows), dtype=np.float32)
    half = sparse.csr_matrix(np.triu(values * (generator.random(values.shape) < 0.08), k=1))
    kept = sparse.diags((np.arange(num_rows) != 5).astype(np.float32))  # row 5 has no neighbours
    weight = sparse.csr_matrix(kept @ (half + half.T) @ kept, dtype=np.float32)
    weight.eliminate_zeros()
    weight.sort_indices()
    return weight


def test_the_graph_is_read_as_it_was_written(tmp_path):
    pytest.importorskip("kaminpar")
    weight = random_graph()
    whole = whole_weights(weight)
    assert len(np.unique(whole)) > 10
    graph = load_graph(weight, tmp_path / "scratch")
    assert list((tmp_path / "scratch").iterdir()) == []
    assert (graph.n(), graph.m()) == (157, weight.nnz)
    assert graph.is_edge_weighted()
    assert not graph.is_node_weighted()
    for row in range(157):
        part = slice(weight.indptr[row], weight.indptr[row + 1])
        expected = list(zip(weight.indices[part].tolist(), whole[part].tolist(), strict=True))
        assert sorted(graph.neighbors(row)) == expected
        assert graph.degree(row) == len(expected)
    assert graph.degree(5) == 0


def test_one_seed_one_partition():
    kaminpar = pytest.importorskip("kaminpar")
    weight = random_graph(num_rows=600)
    first, again, other = (kaminpar_clusters(weight, 37, seed=seed) for seed in (3, 3, 4))
    np.testing.assert_array_equal(first, again)
    assert not np.array_equal(first, other)
    assert first.dtype == np.int32
    sizes = np.bincount(first, minlength=37)
    assert len(sizes) == 37
    assert sizes.max() <= 2 * 600 / 37
    graph = load_graph(weight)
    shuffled = np.random.default_rng(0).permutation(first)
    assert kaminpar.edge_cut(graph, first.tolist()) < 0.9 * kaminpar.edge_cut(graph, shuffled.tolist())


def test_graphs_with_nothing_to_cut():
    pytest.importorskip("kaminpar")
    assert kaminpar_clusters(random_graph(), 1).tolist() == [0] * 157
    empty = sparse.csr_matrix((10, 10), dtype=np.float32)
    assert kaminpar_clusters(empty, 3).tolist() == [0, 1, 2, 0, 1, 2, 0, 1, 2, 0]


@pytest.mark.parametrize("cells", [1, 3])
def test_mining_asks_it_for_the_start(cells, tmp_path, monkeypatch):
    pytest.importorskip("kaminpar")
    from anybatch.mining import kaminpar as module

    asked = []
    partition = module.kaminpar_clusters

    def count(weight, num_clusters, **settings):
        asked.append(num_clusters)
        return partition(weight, num_clusters, **settings)

    monkeypatch.setattr(module, "kaminpar_clusters", count)
    anchors, positives = embeddings(403, topics=12)
    given: dict[str, Any] = {"batch_size": 24, "cluster_size": 8, "skip": 3, "take": 12, "cells": cells}
    metis = mine_plan(anchors, positives, config=MiningConfig(**given))
    assert not asked
    found, again = (
        mine_plan(anchors, positives, config=MiningConfig(**given, partitioner="kaminpar"), folder=folder)
        for folder in (tmp_path, None)
    )
    assert sum(asked) == pytest.approx(2 * 50, abs=2 * cells)  # of all rows, or cell by cell
    assert found.plan.digest == again.plan.digest != metis.plan.digest
    assert found.plan.meta["partitioner"] == "kaminpar"
    ours, theirs = found.report.audit, metis.report.audit
    assert ours is not None
    assert theirs is not None
    assert ours.smallest == ours.largest == 8
    assert ours.window_per_anchor > 0.85 * theirs.window_per_anchor


def test_without_the_package_its_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "kaminpar", None)
    anchors, positives = embeddings(64)
    config = MiningConfig(batch_size=16, cluster_size=8, skip=2, take=8, partitioner="kaminpar")
    with pytest.raises(AnybatchError, match=r"anybatch\[kaminpar\]"):
        mine_plan(anchors, positives, config=config)


def test_settings_that_no_partitioner_can_follow():
    with pytest.raises(AnybatchError, match="expected one of metis, kaminpar"):
        MiningConfig(partitioner="scotch")  # pyright: ignore[reportArgumentType]
    with pytest.raises(AnybatchError, match="method 'published'"):
        MiningConfig(partitioner="kaminpar", method="published")
