from __future__ import annotations

import pickle
import time
from dataclasses import replace
from fractions import Fraction
from math import comb

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from anybatch.core.errors import AnybatchError
from anybatch.plans.plan import BatchPlan, PlanSampler
from anybatch.plans.sampling import ClusterSampling, _drawn_without_return


def clustered(num_rows: int, cluster_size: int, clusters_per_batch: int, seed: int = 0) -> BatchPlan:
    rows = np.random.default_rng(seed).permutation(num_rows)
    whole = num_rows // cluster_size * cluster_size
    cluster = np.full(num_rows, -1, np.int32)
    cluster[rows[:whole]] = np.repeat(np.arange(whole // cluster_size), cluster_size)
    return BatchPlan(
        num_rows=num_rows,
        batch_size=cluster_size * clusters_per_batch,
        cluster_size=cluster_size,
        cluster=cluster,
        seed=seed,
        data_digest="d",
    )


@st.composite
def plans(draw):
    size, per_batch = draw(st.integers(1, 6)), draw(st.integers(2, 4))
    num_rows = draw(st.integers(size * per_batch, size * per_batch * 6 + 5))
    return clustered(num_rows, size, per_batch, draw(st.integers(0, 99)))


@settings(deadline=None, max_examples=60)
@given(plan=plans(), epoch=st.integers(0, 5))
def test_every_row_at_most_once_and_the_rest_is_reported(plan, epoch):
    batches = plan.epoch_batches(epoch)
    assert batches.shape == (plan.num_batches, plan.batch_size)
    rows = batches.reshape(-1)
    assert len(np.unique(rows)) == len(rows)
    left = plan.rows_left_out(epoch)
    assert sorted([*rows, *left]) == list(range(plan.num_rows))
    assert len(left) == plan.num_rows - plan.num_batches * plan.batch_size
    np.testing.assert_array_equal(batches, plan.epoch_batches(epoch))


@settings(deadline=None, max_examples=30)
@given(plan=plans())
def test_no_row_is_lost_for_ever(plan):
    seen = np.zeros(plan.num_rows, bool)
    for epoch in range(400):
        seen[plan.epoch_batches(epoch).reshape(-1)] = True
        if seen.all():
            return
    raise AssertionError(f"rows {np.flatnonzero(~seen)} were never dealt in 400 epochs")


def test_clusters_stay_and_their_combination_changes():
    plan = clustered(64, 4, 4)
    first, second = (plan.epoch_batches(epoch).reshape(-1, 4) for epoch in (0, 1))
    for batches in (first, second):
        assert all(len(set(plan.cluster[rows])) == 1 for rows in batches)
    assert not np.array_equal(first, second)
    neighbours = [{tuple(sorted(set(plan.cluster[batch]))) for batch in plan.epoch_batches(epoch)} for epoch in (0, 1)]
    assert neighbours[0] != neighbours[1]


def test_seed_decides():
    assert not np.array_equal(
        BatchPlan.random(100, 10, seed=1).epoch_batches(0), BatchPlan.random(100, 10, seed=2).epoch_batches(0)
    )


def test_save_and_load(tmp_path):
    plan = clustered(50, 4, 3)
    full = BatchPlan(
        **{
            **{
                name: getattr(plan, name)
                for name in ("num_rows", "batch_size", "cluster_size", "cluster", "seed", "data_digest")
            },
            "suspects": np.array([[0, 3], [4, 7]]),
            "negatives": np.full((50, 2), -1),
            "meta": {"method": "test", "window": [1, 2]},
        }
    )
    full.save(tmp_path / "plan.safetensors")
    again = BatchPlan.load(tmp_path / "plan.safetensors")
    assert again.digest == full.digest
    assert again.meta == full.meta
    np.testing.assert_array_equal(again.suspects, full.suspects)
    np.testing.assert_array_equal(again.negatives, full.negatives)
    np.testing.assert_array_equal(again.epoch_batches(3), full.epoch_batches(3))


@pytest.mark.parametrize("keep", [0, 5, 60, -1])
def test_cut_short_on_disk(tmp_path, keep):
    path = tmp_path / "plan.safetensors"
    clustered(50, 4, 3).save(path)
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(AnybatchError, match=r"plan\.safetensors is damaged"):
        BatchPlan.load(path)


def test_every_flipped_bit_is_found(tmp_path):
    """Of header and arrays alike; every byte once, with a bit of its own."""
    path = tmp_path / "plan.safetensors"
    full = replace(clustered(50, 4, 3), suspects=np.array([[0, 5]], np.int32), meta={"method": "m"})
    full.save(path)
    whole = path.read_bytes()
    for place in range(len(whole)):
        flipped = bytearray(whole)
        flipped[place] ^= 1 << place % 8
        path.write_bytes(flipped)
        with pytest.raises(AnybatchError, match="is damaged"):
            BatchPlan.load(path)
    path.write_bytes(whole)
    assert BatchPlan.load(path).digest == full.digest


@pytest.mark.parametrize(
    ("arrays", "match"),
    [
        ({"cluster": np.array([0, 0, 1, 1, 2**31 - 1], np.int32)}, "cluster holds numbers from 0 to 2147483647"),
        ({"cluster": np.array([0, 0, 1, 1, -2], np.int32)}, "cluster holds numbers from -2"),
        ({"cluster": np.array([0, 0, 1, 1, -1], np.float32)}, "cluster holds float32; expected whole numbers"),
        ({"cluster": np.array([[0, 0, 1, 1, -1]], np.int32)}, r"cluster has shape \(1, 5\); expected \(5\)"),
        ({"suspects": np.array([[0, 5]], np.int32)}, "suspects holds numbers from 0 to 5; expected 0 to 4"),
        ({"suspects": np.array([[-1, 2]], np.int32)}, "suspects holds numbers from -1"),
        ({"suspects": np.array([0, 1], np.int32)}, r"suspects has shape \(2,\); expected \(any, 2\)"),
        ({"suspects": np.array([[0, np.nan]])}, "suspects holds float64"),
        ({"negatives": np.full((5, 2), 5, np.int32)}, "negatives holds numbers from 5 to 5; expected -1 to 4"),
        ({"negatives": np.full((4, 2), 1, np.int32)}, r"negatives has shape \(4, 2\); expected \(5, any\)"),
        ({"task": np.array([0, 0, 1, 1, 2], np.int32), "task_names": ("a", "b")}, "task holds numbers from 0 to 2"),
        ({"task": np.zeros(4, np.int32), "task_names": ("a",)}, r"task has shape \(4,\)"),
    ],
)
def test_numbers_out_of_range_are_refused_before_they_are_counted(arrays, match):
    """A cluster of 2^31 - 1 would ask for 16 GiB."""
    plan = {"num_rows": 5, "batch_size": 4, "cluster_size": 2, "seed": 0, "data_digest": ""}
    with pytest.raises(AnybatchError, match=match):
        BatchPlan(**{**plan, "cluster": np.array([0, 0, 1, 1, -1], np.int32), **arrays})


def test_foreign_files(tmp_path):
    from safetensors.numpy import save, save_file

    from anybatch.core.files import SEAL, write_sealed

    path = tmp_path / "weights.safetensors"
    with pytest.raises(AnybatchError, match="no plan at"):
        BatchPlan.load(tmp_path / "absent")
    save_file({"a": np.zeros(3)}, path)
    with pytest.raises(AnybatchError, match="not written by this version"):
        BatchPlan.load(path)
    write_sealed(path, save({"a": np.zeros(3)}, {"digest": SEAL}))
    with pytest.raises(AnybatchError, match="is no plan"):
        BatchPlan.load(path)


def test_other_data_is_refused():
    plan = clustered(50, 4, 3)
    plan.check(num_rows=50, data_digest="d")
    with pytest.raises(AnybatchError, match="50 rows, the data has 51"):
        plan.check(num_rows=51, data_digest="d")
    with pytest.raises(AnybatchError, match="the texts do not"):
        plan.check(num_rows=50, data_digest="e")


@pytest.mark.parametrize(
    ("arguments", "match"),
    [((10, 16), "fewer than one batch"), ((10, 1), "at least 2")],
)
def test_sizes_that_do_not_fit(arguments, match):
    with pytest.raises(AnybatchError, match=match):
        BatchPlan.random(*arguments)


def test_a_negative_seed_is_refused():
    with pytest.raises(AnybatchError, match="seed is -1"):
        BatchPlan.random(32, 8, seed=-1)


def test_unequal_clusters_are_refused():
    with pytest.raises(AnybatchError, match="expected exactly 2"):
        BatchPlan(num_rows=5, batch_size=4, cluster_size=2, cluster=np.array([0, 0, 0, 1, 1]), seed=0, data_digest="")
    with pytest.raises(AnybatchError, match="not a multiple"):
        BatchPlan(num_rows=8, batch_size=5, cluster_size=2, cluster=np.arange(8) // 2, seed=0, data_digest="")


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_ranks_together_make_the_global_batches(world_size):
    plan = clustered(80, 4, 3)
    batches = plan.epoch_batches(2)
    ranks = [list(PlanSampler(plan, rank=rank, world_size=world_size, epoch=2)) for rank in range(world_size)]
    for number, batch in enumerate(batches):
        assert [row for rank in ranks for row in rank[number]] == batch.tolist()
    in_turns = list(PlanSampler(plan, world_size=world_size, epoch=2))
    assert in_turns == [rank[number] for number in range(len(batches)) for rank in ranks]
    assert len(in_turns) == len(PlanSampler(plan, world_size=world_size))


@pytest.mark.parametrize("stop", [0, 1, 3, 5])
def test_sampler_resumes_in_mid_epoch(stop):
    plan = clustered(80, 4, 3)
    sampler = PlanSampler(plan, epoch=1)
    whole = list(PlanSampler(plan, epoch=1))
    iterator = iter(sampler)
    begun = [next(iterator) for _ in range(stop)]
    state = pickle.loads(pickle.dumps(sampler.state_dict()))
    resumed = PlanSampler(plan)
    resumed.load_state_dict(state)
    resumed.set_epoch(1)
    assert begun + list(resumed) == whole
    assert list(resumed) == whole, "only the first epoch after a resume is shortened"
    assert list(sampler) == whole, "an abandoned loop does not shorten the next"


def test_sampler_refuses_a_foreign_state():
    state = PlanSampler(clustered(80, 4, 3)).state_dict()
    with pytest.raises(AnybatchError, match="another plan"):
        PlanSampler(clustered(80, 4, 3, seed=1)).load_state_dict(state)
    with pytest.raises(AnybatchError, match="shared equally by 5"):
        PlanSampler(clustered(80, 4, 3), world_size=5)
    with pytest.raises(AnybatchError, match="rank is 2"):
        PlanSampler(clustered(80, 4, 3), rank=2, world_size=2)


def test_sampler_pickles():
    sampler = PlanSampler(clustered(80, 4, 3))
    assert list(pickle.loads(pickle.dumps(sampler))) == list(sampler)


def several(sizes=(24, 41, 3), cluster_size=4, per_batch=3, **settings) -> BatchPlan:
    """A plan over several data sets, clusters of the rows' order."""
    cluster, task, count = [], [], 0
    for number, size in enumerate(sizes):
        whole = size // cluster_size
        cluster += [*(count + np.repeat(np.arange(whole), cluster_size)), *[-1] * (size - whole * cluster_size)]
        task += [number] * size
        count += whole
    return BatchPlan(
        num_rows=sum(sizes),
        batch_size=cluster_size * per_batch,
        cluster_size=cluster_size,
        cluster=np.array(cluster, np.int32),
        task=np.array(task, np.int32),
        task_names=tuple("abcde"[: len(sizes)]),
        seed=1,
        data_digest="d",
        **settings,
    )


@pytest.mark.parametrize("mixing", ["mixed", "within"])
def test_several_data_sets(mixing, tmp_path):
    plan = several(mixing=mixing)
    seen = np.zeros(plan.num_rows, int)
    for epoch in range(60):
        batches = plan.epoch_batches(epoch)
        assert batches.shape == (plan.num_batches, 12)
        assert plan.num_batches == (6 + 10) // 3
        rows = batches.reshape(-1)
        assert len(np.unique(rows)) == len(rows)
        seen[rows] += 1
        tasks = plan.task[batches]
        tasks = tasks[(tasks != 2).all(axis=1)]  # the third set is smaller than a cluster, so its rows come one by one
        pure = (tasks == tasks[:, :1]).all(axis=1)
        if mixing == "within":
            assert (~pure).sum() <= 1  # 10 clusters by 3 leave 1, and 6 none
    assert seen.min() > 0
    plan.save(tmp_path / "plan")
    again = BatchPlan.load(tmp_path / "plan")
    assert again.digest == plan.digest
    np.testing.assert_array_equal(again.epoch_batches(3), plan.epoch_batches(3))
    assert len(plan.set_rows["b"]) == 41


@pytest.mark.parametrize("mixing", ["mixed", "within"])
def test_chance_of_sharing_a_batch(mixing):
    plan = several(sizes=(20, 44), mixing=mixing)
    beside, present = np.zeros((16, 16)), np.zeros(16)
    for epoch in range(3000):
        clusters = plan.cluster[plan.epoch_batches(epoch)][:, ::4]
        for batch in clusters:
            present[batch] += 1
            beside[np.ix_(batch, batch)] += 1
    chance = beside / present[:, None]
    for task, part in ((0, slice(0, 5)), (1, slice(5, 16))):
        size = part.stop - part.start
        measured = (chance[part, part].sum() - size) / (size * (size - 1))
        assert measured == pytest.approx(plan.sampling.chances(task).other, rel=0.05)


def test_small_sets_that_outnumber_the_places_leave_everybody_a_chance():
    """8 places, one set of two clusters, 12 rows of small sets: 4 of them come in an epoch, drawn from all alike."""
    plan = several(sizes=(8, 3, 3, 3, 3), per_batch=2)
    seen = np.zeros(plan.num_rows)
    for epoch in range(4000):
        seen[plan.epoch_batches(epoch).reshape(-1)] += 1 / 4000
    np.testing.assert_allclose(seen[:8], 4 / 8, atol=0.04)
    np.testing.assert_allclose(seen[8:], 4 / 12, atol=0.04)
    assert (plan.sampling.single_rows, plan.sampling.num_single_rows) == ([0, 3, 3, 3, 3], 4)


def test_a_remainder_larger_than_its_clusters_leaves_them_a_chance():
    cluster = np.where(np.arange(30) < 8, np.arange(30) // 4, -1).astype(np.int32)
    plan = BatchPlan(num_rows=30, batch_size=8, cluster_size=4, cluster=cluster, seed=0, data_digest="")
    seen = np.zeros(30)
    for epoch in range(2000):
        seen[plan.epoch_batches(epoch).reshape(-1)] += 1 / 2000
    np.testing.assert_allclose(seen[:8], 4.5 / 8, atol=0.05)
    np.testing.assert_allclose(seen[8:], 3.5 / 22, atol=0.05)
    with pytest.raises(AnybatchError, match="a cluster of its own"):
        BatchPlan(
            num_rows=9, batch_size=4, cluster_size=1, cluster=np.arange(-1, 8, dtype=np.int32), seed=0, data_digest=""
        )


@pytest.mark.parametrize("mixing", ["mixed", "within"])
@pytest.mark.parametrize(
    ("sizes", "cluster_size"),
    [
        ((8, 3, 3, 3, 3), 4),  # rows of small sets outnumber the places
        ((7, 6, 7, 3, 2), 4),  # one cluster and up to three rows in none; small sets
        ((10, 17, 5, 2, 2), 3),
        ((3, 5, 3, 1), 2),
    ],
)
def test_every_chance_is_what_the_batches_show(mixing, sizes, cluster_size):
    plan = several(sizes=sizes, cluster_size=cluster_size, per_batch=2, mixing=mixing)
    epochs, n = 8000, plan.num_rows
    together = np.zeros((n, n))
    for epoch in range(epochs):
        batches = plan.epoch_batches(epoch)
        present = np.zeros((len(batches), n))
        np.put_along_axis(present, batches, 1.0, axis=1)
        together += present.T @ present
    times, loose = together.diagonal(), plan.cluster < 0
    assert times.min() > 0
    same = (plan.cluster[:, None] == plan.cluster) & ~loose
    for task in range(len(sizes)):
        own = plan.task == task
        others = own[:, None] & own & ~np.eye(n, dtype=bool)
        chances = plan.sampling.chances(task)
        for name, pairs in (
            ("same", others & same),
            ("other", others & ~same & ~loose[:, None] & ~loose),
            ("remainder", others & ~loose[:, None] & loose),
            ("from_remainder", others & loose[:, None] & ~loose),
            ("between_remainders", others & loose[:, None] & loose),
        ):
            if not pairs.any():
                continue
            expected = (times[:, None] * pairs).sum() * getattr(chances, name)
            # Pairs of one epoch depend on each other: of the standard error of independent ones four times as much.
            assert together[pairs].sum() == pytest.approx(expected, abs=12 * np.sqrt(expected) + 1), (task, name)
            assert name != "same" or chances.same > 0


@pytest.mark.parametrize("pool", [1, 2, 7, 30])
def test_chances_of_drawing_without_return_are_exact(pool):
    for own in range(pool + 1):
        for out in range(pool + 1):
            found = dict(_drawn_without_return(pool, own, out))
            for k in range(max(0, own + out - pool), min(own, out) + 1):
                exact = Fraction(comb(own, k) * comb(pool - own, out - k), comb(pool, out))
                assert abs(found.pop(k) / exact - 1) < 1e-12
            assert not found


@pytest.mark.parametrize("within", [False, True])
def test_chances_over_very_many_clusters_come_at_once(within):
    """With exact binomial coefficients a data set took 8 s; the mean number of clusters is known without a sum."""
    deal = ClusterSampling(
        cluster_task=np.repeat([0, 1], [130_000, 73_000]), num_sets=2, clusters_per_batch=4095, within=within
    )
    begun = time.perf_counter()
    chances = [deal.chances(task) for task in (0, 1)]
    assert time.perf_counter() - begun < 2
    left = [130_000 % 4095, 73_000 % 4095] if within else [130_000, 73_000]
    out = sum(left) % 4095
    dealt = [(size - own * out / sum(left)) / size for size, own in zip((130_000, 73_000), left, strict=True)]
    assert deal.sampled_shares == pytest.approx(dealt, rel=1e-12)
    assert all(0 < one.other <= 1 for one in chances)
    if not within:
        assert chances[0].other == pytest.approx(4094 / 202_999, rel=1e-10)


def test_no_chance_is_above_one():
    """As rounding makes one of ten clusters of two, where a row in none takes a place."""
    deal = ClusterSampling(
        cluster_task=np.repeat([0, 1], [10, 3]), num_sets=2, clusters_per_batch=3, within=False, cluster_size=2,
        remainders=(1, 0),
    )  # fmt: skip
    for task in (0, 1):
        assert max(vars(deal.chances(task)).values()) <= 1


def test_mistakes_with_several_data_sets():
    with pytest.raises(AnybatchError, match="several data sets"):
        BatchPlan(
            num_rows=8, batch_size=8, cluster_size=4, cluster=np.repeat([0, 1], 4), seed=0, data_digest="",
            task=np.repeat([0, 1], [2, 6]), task_names=("a", "b"),
        )  # fmt: skip
