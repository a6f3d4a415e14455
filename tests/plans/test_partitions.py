"""Plans of several partitions that epochs take in turn, and the row table that has to follow."""

from __future__ import annotations

import pickle
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from anybatch.core.errors import AnybatchError
from anybatch.losses.rows import RowTable
from anybatch.plans.plan import BatchPlan, PlanSampler

from .test_plan import clustered, several

DIGESTS = (
    "6f8dbb4bd1dfff6a87255adf0253dbe8",
    "143612f3e93fc04fcbc4553e1fe4eeb2",
)  # of plans made before there were partitions


def alternating(num_rows=83, cluster_size=4, clusters_per_batch=3, partitions=3, seed=5) -> BatchPlan:
    parts = [clustered(num_rows, cluster_size, clusters_per_batch, seed + number) for number in range(partitions)]
    return replace(parts[0], alternates=np.stack([part.cluster for part in parts[1:]]))


@settings(deadline=None, max_examples=30)
@given(size=st.integers(1, 5), per_batch=st.integers(2, 3), partitions=st.integers(2, 4), data=st.data())
def test_each_epoch_is_that_of_its_partition_alone(size, per_batch, partitions, data):
    num_rows = data.draw(st.integers(size * per_batch, size * per_batch * 5 + 3))
    plan = alternating(num_rows, size, per_batch, partitions, data.draw(st.integers(0, 50)))
    assert plan.num_partitions == partitions
    for epoch in range(2 * partitions):
        alone = plan.partition(epoch)
        assert alone.num_partitions == 1
        assert alone is plan.partition(epoch + partitions)
        np.testing.assert_array_equal(alone.cluster, plan.partition_clusters[epoch % partitions])
        batches = plan.epoch_batches(epoch)
        np.testing.assert_array_equal(batches, alone.epoch_batches(epoch))
        rows = batches.reshape(-1)
        assert len(np.unique(rows)) == len(rows) == plan.num_batches * plan.batch_size
        assert sorted([*rows, *plan.rows_left_out(epoch)]) == list(range(num_rows))


def test_several_data_sets_and_random_shares_follow():
    first = several(mixing="within", task_shares=(1.0, 0.5, 1.0), random_shares=(0.5, 0.0))
    other = first.cluster.copy()
    for rows in (slice(0, 24), slice(24, 65)):
        other[rows] = np.random.default_rng(1).permutation(other[rows])
    plan = replace(first, alternates=other[None])
    for epoch in range(4):
        alone = replace(first, cluster=(first.cluster, other)[epoch % 2])
        np.testing.assert_array_equal(plan.epoch_batches(epoch), alone.epoch_batches(epoch))
    mixed = np.random.default_rng(1).permutation(first.cluster)
    with pytest.raises(AnybatchError, match="rows of several data sets"):
        replace(first, alternates=mixed[None])


def test_saved_and_loaded(tmp_path):
    plan = alternating()
    plan.save(tmp_path / "plan.safetensors")
    again = BatchPlan.load(tmp_path / "plan.safetensors")
    assert again.digest == plan.digest != plan.partition(0).digest
    np.testing.assert_array_equal(again.partition_clusters, plan.partition_clusters)
    np.testing.assert_array_equal(again.epoch_batches(4), plan.epoch_batches(4))
    assert again.stats()["partitions"] == 3
    assert plan.alternates is not None
    digests = {plan.digest, replace(plan, alternates=plan.alternates[::-1]).digest, alternating(partitions=2).digest}
    assert len(digests) == 3


def test_one_partition_is_what_it_was(tmp_path):
    """Digests of plans made before there were partitions."""
    plan, sets = clustered(50, 4, 3), several(mixing="within", random_shares=(0.5, 0.0))
    assert (plan.digest, sets.digest) == DIGESTS
    for one in (plan, sets):
        one.save(tmp_path / "plan.safetensors")
        assert BatchPlan.load(tmp_path / "plan.safetensors").digest == one.digest
    assert plan.partition(7) is plan.partition(0)
    assert "partitions" not in plan.stats()


@pytest.mark.parametrize("stop", [0, 2, 5])
def test_sampler_goes_from_partition_to_partition_and_resumes_in_one(stop):
    plan = alternating()
    whole = {epoch: list(PlanSampler(plan, epoch=epoch)) for epoch in range(4)}
    sampler = PlanSampler(plan)
    for epoch in range(4):
        sampler.set_epoch(epoch)
        assert list(sampler) == whole[epoch] == plan.partition(epoch).epoch_batches(epoch).tolist()
    sampler = PlanSampler(plan, epoch=2)
    iterator = iter(sampler)
    begun = [next(iterator) for _ in range(stop)]
    state = pickle.loads(pickle.dumps(sampler.state_dict()))
    resumed = pickle.loads(pickle.dumps(PlanSampler(plan)))
    resumed.load_state_dict(state)
    resumed.set_epoch(2)
    assert begun + list(resumed) == whole[2]
    with pytest.raises(AnybatchError, match="another plan"):
        PlanSampler(plan.partition(2)).load_state_dict(state)


def test_partitions_that_do_not_fit_are_refused():
    plan = alternating()
    with pytest.raises(AnybatchError, match=r"shape \(83,\); expected \(any, 83\)"):
        replace(plan, alternates=plan.cluster)
    with pytest.raises(AnybatchError, match="expected exactly 4"):
        replace(plan, alternates=np.arange(83, dtype=np.int32)[None] // 5)
    fewer = clustered(83, 4, 3).cluster.copy()
    fewer[fewer >= 12] = -1
    with pytest.raises(AnybatchError, match=r"make \[6, 4\] batches"):
        replace(plan, alternates=fewer[None])


def table(plan, **settings):
    rows = np.arange(plan.num_rows)
    return RowTable(rows, rows, plan=plan, **settings)


def weights(table, index):
    return table.arguments(index)["log_weight"].tile(slice(0, len(index)), slice(0, len(index)))


def test_weights_are_those_of_the_epochs_partition():
    plan = alternating()
    rows = table(plan, weights="inclusion")
    for epoch in (0, 1, 2, 3, 7):
        rows.set_epoch(epoch)
        alone = table(plan.partition(epoch), weights="inclusion")
        for batch in torch.from_numpy(plan.epoch_batches(epoch)):
            torch.testing.assert_close(weights(rows, batch), weights(alone, batch), rtol=0, atol=0)
            torch.testing.assert_close(weights(rows, batch[4:9]), weights(alone, batch[4:9]), rtol=0, atol=0)


def test_inclusion_weights_are_unbiased_over_a_cycle():
    generator = np.random.default_rng(0)
    plan = alternating(24, 2, 3, partitions=2)
    rows, values = table(plan, weights="inclusion"), torch.tensor(generator.random(24))
    total, count = np.zeros(24), np.zeros(24)
    for epoch in range(1500):
        rows.set_epoch(epoch)
        for batch in torch.from_numpy(plan.epoch_batches(epoch)):
            weight = weights(rows, batch).exp().fill_diagonal_(0.0)
            total[batch] += (weight * values[batch]).sum(dim=1).numpy()
            count[batch] += 1
    truth = (values.sum().item() - values.numpy()) / 23
    np.testing.assert_allclose((total / count).mean(), truth.mean(), rtol=0.01)
    np.testing.assert_allclose(total / count, truth, rtol=0.1)


def test_a_table_that_is_not_told_the_epoch_says_so():
    plan = alternating()
    rows = table(plan, weights="inclusion")
    first, second = (torch.from_numpy(plan.epoch_batches(epoch)[0]) for epoch in (0, 1))
    with pytest.raises(AnybatchError, match=r"Call set_epoch\(epoch\) of the row table"):
        rows.arguments(first)
    rows.set_epoch(0)
    rows.arguments(first)
    with pytest.raises(AnybatchError, match="was told epoch 0"):
        rows.arguments(second)
    rows.set_epoch(1)
    rows.arguments(second)
    rows.use_plan(plan)
    with pytest.raises(AnybatchError, match="set_epoch"):
        rows.arguments(second)
    rows.use_plan(plan.partition(1))  # a plan of one partition needs no epoch
    rows.arguments(second)


def test_without_inclusion_weights_the_table_needs_no_epoch():
    suspects = np.array([[0, 1], [2, 30]], np.int32)
    rows = table(replace(alternating(), suspects=suspects), mask_suspects=True)
    mask = weights(rows, torch.tensor([0, 2, 1, 30]))
    assert mask.isinf().nonzero().tolist() == [[0, 2], [1, 3], [2, 0], [3, 1]]
