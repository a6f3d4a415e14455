"""`inspect_plan` of several data sets against loops over all pairs, for batches of one set each and for mixed ones."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from anybatch.insight.inspection import _random_batches, inspect_plan
from anybatch.mining import MiningConfig, MiningSet, mine_plan

from ..mining.test_mining import embeddings, naive_neighbors

SIZES = {"first": 70, "second": 45, "tiny": 5}
WINDOWS = {"first": (2, 9), "second": (1, 6)}
TEMPERATURE = 0.2
BY_RANK = {"margin": None, "conflict_weight": 0.0}


def mined(mixing):
    parts = [embeddings(size, seed=number) for number, size in enumerate(SIZES.values())]
    generator = np.random.default_rng(3)
    anchors, positives = (np.concatenate(side) for side in zip(*parts, strict=True))
    positives = positives + 0.3 * generator.normal(size=positives.shape).astype(np.float32)
    positives = (positives / np.linalg.norm(positives, axis=1, keepdims=True)).astype(np.float32)
    anchor_id = np.arange(len(anchors))
    anchor_id[80] = anchor_id[75]
    anchors[80] = anchors[75]
    same = {"anchor_id": anchor_id, "positive_id": np.arange(len(anchors))}
    sets = [MiningSet(name=name, num_rows=size, window=WINDOWS.get(name)) for name, size in SIZES.items()]
    config = MiningConfig(batch_size=16, cluster_size=8, window=(3, 12), mixing=mixing, seed=1, **BY_RANK)
    with pytest.warns(UserWarning, match="'tiny' has 5 rows"):
        plan = mine_plan(anchors, positives, config=config, sets=sets, **same).plan
    return plan, anchors, positives, same


@pytest.mark.parametrize("mixing", ["mixed", "within"])
def test_equals_a_loop(mixing):
    plan, anchors, positives, same = mined(mixing)
    seen = inspect_plan(plan, anchors, positives, temperature=TEMPERATURE, num_anchors=10**6, **same)
    assert set(seen) >= {"first", "second"}
    scores = anchors.astype(np.float64) @ positives.astype(np.float64).T
    batches = plan.epoch_batches(0)
    if mixing == "mixed":
        assert any(len(set(plan.task[rows])) > 1 for rows in batches)
    start = 0
    for name, size in SIZES.items():
        own = range(start, start + size)
        part = slice(start, start + size)
        start += size
        if name == "tiny":
            continue
        skip, take = WINDOWS[name]
        result = seen[name]
        assert (result.num_anchors, result.skip, result.take) == (size, skip, take)
        ranks = naive_neighbors(
            anchors[part], positives[part], skip + take, anchor_id=same["anchor_id"][part], positive_id=np.arange(size)
        )
        wanted = conflicts = companions = dealt = 0
        losses = []
        for rows in batches:
            mates = {int(row) for row in rows}
            for row in sorted(mates & set(own)):
                line = [own[other] for other in ranks[row - own[0]]]
                dealt += 1
                conflicts += len(mates & set(line[:skip]))
                wanted += len(mates & set(line[skip:]))
                companions += len(mates & set(own)) - 1
                others = [j for j in mates if same["anchor_id"][j] != same["anchor_id"][row]]
                differences = (scores[row, others] - scores[row, row]) / TEMPERATURE
                losses.append(np.log1p(np.exp(differences).sum()))
        assert result.window_in_batch == pytest.approx(wanted / dealt)
        assert result.conflicts_in_batch == pytest.approx(conflicts / dealt)
        chance = companions / dealt / (size - 1)
        assert result.random_window_in_batch == pytest.approx(np.mean([len(r) - skip for r in ranks]) * chance)
        assert result.random_conflicts_in_batch == pytest.approx(skip * chance)
        assert result.planned.loss == pytest.approx(np.mean(losses), rel=1e-5)
        assert result.planned.loss > result.random.loss  # mined batches are harder than random ones dealt alike
        for pair in (*result.suspects, *result.duplicates):
            assert {pair.row, pair.other} <= set(own)
        assert all(set(example.rows.tolist()) <= set(own) for example in result.clusters)
        assert [example.kind for example in result.clusters] == ["tightest", "typical", "loosest", "random"]
        for example in result.clusters[:3]:
            assert set(plan.cluster[example.rows]) == {example.number}
        assert all(row in own for row, _ in result.hubs)
    assert seen["second"].repeated_anchors == 2


def test_one_named_set_agrees_with_a_plan_without_sets():
    anchors, positives = embeddings(70)
    config = MiningConfig(batch_size=16, cluster_size=8, window=(3, 12), mixing="mixed")  # as without sets
    plan = mine_plan(anchors, positives, config=config).plan
    alone = mine_plan(anchors, positives, config=config, sets=[MiningSet(name="only", num_rows=70)]).plan
    one, other = inspect_plan(plan, anchors, positives)[""], inspect_plan(alone, anchors, positives)["only"]
    assert one.window_in_batch == other.window_in_batch
    assert one.planned.loss == other.planned.loss
    assert one.random.loss == other.random.loss
    assert one.statistics == other.statistics
    assert [pair.row for pair in one.suspects] == [pair.row for pair in other.suspects]


@pytest.mark.parametrize("mixing", ["mixed", "within"])
def test_small_shares_that_still_deal_a_cluster_of_each_set(mixing):
    """A tenth of 40 rows is 4, and a tenth of one cluster is one: the random batches have as many rows of each as the
    plan.
    """
    anchors, positives = embeddings(80)
    sets = [MiningSet(name=name, num_rows=40, share=0.1) for name in "ab"]
    config = MiningConfig(batch_size=64, cluster_size=32, window=(2, 10), mixing=mixing)
    plan = mine_plan(anchors, positives, config=config, sets=sets).plan
    batches = _random_batches(plan, 0)
    assert batches.shape == plan.epoch_batches(0).shape == (1, 64)
    assert np.bincount(plan.task[batches[0]]).tolist() == [32, 32]
    assert set(inspect_plan(plan, anchors, positives)) == {"a", "b"}


def test_one_positive_of_many_rows_is_shown_once():
    """One caption of many images: pairs of the same two captions differ by nothing that could be read."""
    anchors, positives = embeddings(64, seed=4)
    positive_id = np.arange(64) // 4
    positives = positives[positive_id * 4]
    positives[4:8] = positives[0] + 1e-3  # two captions that say the same
    positives[4:8] /= np.linalg.norm(positives[4:8], axis=1, keepdims=True)
    config = MiningConfig(batch_size=16, cluster_size=8, window=(1, 8), margin=None, conflict_weight=0.0)
    plan = mine_plan(anchors, positives, config=config, positive_id=positive_id).plan
    plan = replace(plan, suspects=np.array([[0, 9], [1, 10], [2, 33], [3, 11]], np.int32))
    seen = inspect_plan(plan, anchors, positives, positive_id=positive_id)[""]
    scores = anchors.astype(np.float64) @ positives.astype(np.float64).T
    over = {
        (row, other): scores[row, other] - scores[row, row]
        for pair in plan.suspects
        for row, other in (pair, pair[::-1])
    }
    best = max((pair for pair in over if 33 not in pair), key=lambda pair: over[pair])
    assert len(seen.suspects) == 2
    assert best in [(pair.row, pair.other) for pair in seen.suspects]
    assert [sorted((positive_id[pair.row], positive_id[pair.other])) for pair in seen.duplicates].count([0, 1]) == 1
    assert seen.duplicate_share > 0
