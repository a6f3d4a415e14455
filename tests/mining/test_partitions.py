"""Several partitions of one graph: each a whole plan's, different from the others, and together with more negatives."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from scipy import sparse

from anybatch.core.errors import AnybatchError
from anybatch.insight import plan_figures
from anybatch.insight.inspection import inspect_plan
from anybatch.mining import MiningConfig, MiningSet, mine_plan
from anybatch.mining import mine as mine_module
from anybatch.mining.graph import MiningGraph
from anybatch.plans.plan import BatchPlan

from .test_mining import embeddings

SIZES: dict[str, Any] = {"batch_size": 24, "cluster_size": 8, "skip": 3, "take": 12}


def together(matrix, clusters):
    """Per anchor: the entries that share a cluster of any partition, counted in a loop."""
    count = 0
    for row, other in zip(*matrix.nonzero(), strict=True):
        count += any(one[row] == one[other] >= 0 for one in clusters)
    return count / matrix.shape[0]


@pytest.mark.parametrize("cells", [1, 3])
def test_partitions_differ_and_bring_more_negatives(cells, tmp_path, monkeypatch):
    anchors, positives = embeddings(403, topics=12)
    config = MiningConfig(**SIZES, partitions=3, cells=cells)
    said = []
    result = mine_plan(anchors, positives, config=config, folder=tmp_path, progress=lambda *line: said.append(line))
    plan, graph, cycle = result.plan, result.graph, result.report.cycle
    assert plan.num_partitions == 3
    assert graph is not None
    assert cycle is not None
    assert plan.digest == mine_plan(anchors, positives, config=config).plan.digest
    one = mine_plan(anchors, positives, config=replace(config, partitions=1))
    np.testing.assert_array_equal(plan.cluster, one.plan.cluster)
    assert one.report.cycle is None
    assert one.plan.alternates is None
    assert result.report.audit == one.report.audit == cycle.partitions[0]
    assert cycle.distinct_window_per_anchor == pytest.approx(together(graph.window, plan.partition_clusters))
    assert cycle.distinct_conflicts_per_anchor == pytest.approx(together(graph.conflict, plan.partition_clusters))
    for number, audit in enumerate(cycle.partitions):
        assert audit.smallest == audit.largest == 8
        assert audit.hard_pairs == 0
        assert audit.window_per_anchor == pytest.approx(together(graph.window, plan.partition_clusters[number, None]))
        assert audit.window_per_anchor > 0.6 * cycle.partitions[0].window_per_anchor
    monkeypatch.setattr(mine_module, "SPENT", 1.0)  # nothing but other seeds
    seeds = mine_plan(anchors, positives, config=config).report.cycle
    assert seeds is not None
    assert cycle.distinct_window_per_anchor > 1.1 * seeds.distinct_window_per_anchor
    assert cycle.distinct_window_per_anchor > 1.5 * cycle.partitions[0].window_per_anchor
    assert ("partition 3 of 3: refinement", 1.0) in said
    assert plan.suspects is not None
    pairs = {tuple(pair) for pair in plan.suspects.tolist()}
    conflict = graph.conflict + graph.conflict.T
    expected = {
        (row, other)
        for row, other in zip(*conflict.nonzero(), strict=True)
        if row < other and any(part[row] == part[other] >= 0 for part in plan.partition_clusters)
    }
    assert pairs == expected
    json.dumps(result.report.as_dict())


def test_spent_edges_count_less():
    generator = np.random.default_rng(0)
    half = sparse.csr_matrix(generator.random((30, 30)) * (generator.random((30, 30)) < 0.3))
    weight = sparse.csr_matrix(half + half.T, dtype=np.float32)
    graph = MiningGraph(window=half, conflict=half, weight=weight)
    cluster = np.where(np.arange(30) < 28, np.arange(30) // 4, -1)
    spent = graph.spent(cluster, 0.25).spent(cluster[::-1], 0.25).weight.toarray()
    factor = np.ones((30, 30))
    for one in (cluster, cluster[::-1]):
        factor[(one[:, None] == one) & (one >= 0)] *= 0.25
    np.testing.assert_allclose(spent, factor * weight.toarray(), rtol=1e-6)


def test_several_data_sets_a_small_one_and_hard_negatives():
    sides = [embeddings(rows, seed=seed, topics=6) for seed, rows in enumerate((203, 104, 5))]
    anchors, positives = (np.concatenate([side[number] for side in sides]) for number in (0, 1))
    sets = [MiningSet(name=name, num_rows=rows) for name, rows in (("a", 203), ("b", 104), ("small", 5))]
    config = MiningConfig(**SIZES, partitions=2, num_negatives=2)
    with pytest.warns(UserWarning, match="no cluster of 8"):
        result = mine_plan(anchors, positives, config=config, sets=sets)
    plan = result.plan
    assert plan.num_partitions == 2
    assert plan.partition_clusters.max(axis=1).tolist() == [25 + 13 - 1] * 2
    assert plan.negatives is not None
    assert plan.negatives.shape == (312, 2)
    for name in ("a", "b"):
        cycle = result.report.sets[name].cycle
        assert cycle is not None
        assert len(cycle.partitions) == 2
    for epoch in range(2):
        rows = plan.epoch_batches(epoch).reshape(-1)
        assert len(np.unique(rows)) == len(rows)
        # Each set is cut as it is alone, whatever lies before it.
        alone = mine_plan(*sides[1], config=config).plan.partition(epoch).cluster
        np.testing.assert_array_equal(plan.partition(epoch).cluster[203:307], np.where(alone >= 0, alone + 25, -1))


def test_a_search_goes_on_from_the_clusters_of_each_partition():
    anchors, positives = embeddings(203, topics=6)
    config = MiningConfig(**SIZES, partitions=2, sweeps=2)
    first = mine_plan(anchors, positives, config=config).plan
    moved = anchors + 0.02 * np.random.default_rng(0).normal(size=anchors.shape).astype(np.float32)
    second = mine_plan(moved, positives, config=config, start=first.partition_clusters).plan
    for ours, theirs in zip(second.partition_clusters, first.partition_clusters, strict=True):
        before, after = ((one[:, None] == one) & (one[:, None] >= 0) for one in (theirs, ours))
        assert (before & after).sum() > 0.6 * before.sum()
    with pytest.raises(AnybatchError, match=r"start has shape \(3, 203\)"):
        mine_plan(anchors, positives, config=config, start=np.zeros((3, 203), int))


def test_inspection_shows_each_and_all_together():
    anchors, positives = embeddings(203, topics=6)
    result = mine_plan(anchors, positives, config=MiningConfig(**SIZES, partitions=2))
    cycle = result.report.cycle
    assert cycle is not None
    seen = inspect_plan(result.plan, anchors, positives)
    assert seen.window_by_partition == pytest.approx([one.window_per_anchor for one in cycle.partitions])
    assert seen.conflicts_by_partition == pytest.approx([one.conflicts_per_anchor for one in cycle.partitions])
    assert seen.distinct_window == pytest.approx(cycle.distinct_window_per_anchor)
    assert seen.distinct_conflicts == pytest.approx(cycle.distinct_conflicts_per_anchor)
    stored = json.loads(json.dumps(result.report.as_dict()))
    lines = [
        {figure.name: figure.plan for figure in figures}
        for figures in (plan_figures(result.plan, inspection=seen), plan_figures(result.plan, mining=stored))
    ]
    for name in ("partitions", "partition 2: wanted negatives, conflicts"):
        assert lines[0][name] == lines[1][name]
    both = lines[0]["different wanted negatives, conflicts over a cycle"]
    assert both.startswith(f"{cycle.distinct_window_per_anchor:.2f}, ")
    single = BatchPlan.random(203, 24)
    assert not any("partition" in figure.name for figure in plan_figures(single))


def test_settings_that_make_one_partition():
    with pytest.raises(AnybatchError, match=r"mining\.partitions is 0"):
        MiningConfig(partitions=0)
    with pytest.raises(AnybatchError, match="'published', which makes one"):
        MiningConfig(partitions=2, method="published")
