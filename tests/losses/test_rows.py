from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from anybatch.core.errors import AnybatchError
from anybatch.losses import CountCorrectedInfoNCE, InfoNCE
from anybatch.losses.rows import RESERVED, RowTable
from anybatch.mining import MiningConfig, mine_plan
from anybatch.plans.plan import BatchPlan


def plan(clusters_per_batch=2):
    return BatchPlan(
        num_rows=13,
        batch_size=3 * clusters_per_batch,
        cluster_size=3,
        cluster=np.repeat([0, 1, 2, 3, -1], [3, 3, 3, 3, 1]),
        seed=0,
        data_digest="",
    )


def test_ids_and_weights_of_a_batch():
    ids = np.arange(13)
    table = RowTable(
        ids, ids + 100, negative_id=np.stack([ids + 200, ids + 300], axis=1), plan=plan(), weights="inclusion"
    )
    index = torch.tensor([0, 1, 4, 12])
    arguments = table.arguments(index, num_negatives=2)
    assert torch.equal(arguments["index"], index)
    assert arguments["candidate_id"].tolist() == [100, 101, 104, 112, 200, 201, 204, 212, 300, 301, 304, 312]
    weight = arguments["log_weight"].tile(slice(0, 4), slice(0, 12)).exp()
    stays = 10 / 11  # row 12 takes one of 12 places, and not the anchor's
    same, other, remainder = 1 / stays / 12, 3 / stays / 12, 11 / 5 / 12
    assert weight[0].tolist() == pytest.approx(
        [same, same, other, remainder] * 3
    )  # explicit negatives come with the row that brings them
    from_remainder = 12 / 5 / 12  # the others are on 11 of 12 places, 5 beside it
    own = 1 / 12  # what it brings itself is there
    assert weight[3].tolist() == pytest.approx([*[from_remainder] * 3, own] * 3)
    assert "log_weight" not in RowTable(ids, ids, plan=plan()).arguments(index)


def test_a_row_in_no_cluster_is_sure_of_what_it_brings_itself_alone():
    """Two of them are in one batch by chance; each one's own explicit negative is there whenever it is."""
    ids = np.arange(14)
    loose = replace(plan(), num_rows=14, cluster=np.repeat([0, 1, 2, 3, -1], [3, 3, 3, 3, 2]))
    table = RowTable(ids, ids + 100, negative_id=(ids + 200)[:, None], plan=loose, weights="inclusion")
    arguments = table.arguments(torch.tensor([0, 12, 13]), num_negatives=1)
    weight = arguments["log_weight"].tile(slice(0, 3), slice(0, 6)).exp()
    beside = 1 / loose.sampling.chances(0).between_remainders / 13
    assert beside > 1.5 / 13
    assert weight[1, [1, 4]].tolist() == pytest.approx([1 / 13] * 2)
    assert weight[1, [2, 5]].tolist() == pytest.approx([beside] * 2)
    assert weight[2, [1, 2, 4, 5]].tolist() == pytest.approx([beside, 1 / 13] * 2)


def test_mistakes():
    ids = np.arange(13)
    with pytest.raises(AnybatchError, match=r"have shapes \(13,\) \(anchors\), \(12,\) \(positives\)"):
        RowTable(ids, ids[:-1])
    with pytest.raises(AnybatchError, match="goes down to -1"):
        RowTable(ids - 1, ids)
    with pytest.raises(AnybatchError, match="of 13 rows, the ids of 12"):
        RowTable(ids[:-1], ids[:-1], plan=plan())
    with pytest.raises(AnybatchError, match="needs the plan"):
        RowTable(ids, ids, weights="inclusion")
    with pytest.raises(AnybatchError, match="2 negatives a row"):
        RowTable(ids, ids).arguments(torch.arange(3), num_negatives=2)
    with pytest.warns(UserWarning, match="single cluster"):
        RowTable(ids, ids, plan=plan(clusters_per_batch=1), weights="inclusion")


def test_suspected_pairs_are_no_negatives():
    torch.manual_seed(0)
    suspects = np.array([[0, 1], [1, 0], [1, 5], [2, 7]], np.int32)
    plan = BatchPlan(
        num_rows=8, batch_size=8, cluster_size=4, cluster=np.arange(8, dtype=np.int32) // 4, seed=0, data_digest="",
        suspects=suspects,
    )  # fmt: skip
    ids = np.arange(8)
    index = torch.tensor([5, 0, 1, 3, 7])
    negative_id = np.full((8, 1), 100) + ids[:, None]
    table = RowTable(ids, ids, negative_id=negative_id, plan=plan, mask_suspects=True)
    arguments = table.arguments(index, num_negatives=1)
    anchors, candidates = torch.randn(5, 6).double(), torch.randn(10, 6).double()
    loss = InfoNCE(temperature=0.1, direction="both")(anchors, candidates, **arguments)
    a, c = (torch.nn.functional.normalize(x, dim=1) for x in (anchors, candidates))
    mask = torch.zeros(5, 10, dtype=torch.float64)
    for i, row in enumerate(index.tolist()):
        for j, other in enumerate(index.tolist()):
            if [row, other] in suspects.tolist():
                mask[i, j] = -torch.inf
    assert mask.isinf().sum() == 3  # (0, 1), (1, 0) and (1, 5), which is no suspect the other way; 2 is not there
    forward = torch.nn.functional.cross_entropy(a @ c.T / 0.1 + mask, torch.arange(5))
    back = torch.nn.functional.cross_entropy((c[:5] @ a.T / 0.1) + mask[:, :5].T, torch.arange(5))
    torch.testing.assert_close(loss, (forward + back) / 2)


def test_a_plan_of_other_rows_is_refused():
    with pytest.raises(AnybatchError, match="20 rows"):
        RowTable(np.arange(10), np.arange(10), plan=BatchPlan.random(20, 4))


@pytest.mark.parametrize("mixing", ["mixed", "within"])
def test_inclusion_weights_are_unbiased_over_each_data_set_and_with_hard_negatives(mixing):
    generator = np.random.default_rng(0)
    sizes, size = (12, 20), 2
    task = np.repeat([0, 1], sizes)
    cluster = np.concatenate([np.repeat(np.arange(6), size), 6 + np.repeat(np.arange(10), size)])
    negatives = np.stack(
        [(np.arange(32) + generator.integers(1, 9, 32)) % n + start for n, start in ((12, 0), (20, 12))]
    )
    negatives = np.where(task == 0, negatives[0], negatives[1])
    plan = BatchPlan(
        num_rows=32, batch_size=8, cluster_size=size, cluster=cluster.astype(np.int32), seed=0, data_digest="",
        task=task.astype(np.int32), task_names=("a", "b"), mixing=mixing,
    )  # fmt: skip
    ids = np.arange(32)
    rows = RowTable(ids, ids, negative_id=ids[negatives][:, None], plan=plan, weights="inclusion")
    values = torch.tensor(generator.random(32))
    total, count = np.zeros(32), np.zeros(32)
    for epoch in range(3000):
        for batch in torch.from_numpy(plan.epoch_batches(epoch)):
            arguments = rows.arguments(batch, num_negatives=1)
            columns = arguments["candidate_id"]
            weight = arguments["log_weight"].tile(slice(0, 8), slice(0, 16)).exp()
            weight = weight.masked_fill(batch[:, None] == columns[None], 0.0)  # its own content is no negative
            total[batch] += (weight * values[columns]).sum(dim=1).numpy()
            count[batch] += 1
    for number in (0, 1):
        own = task == number
        truth = (values[own].sum().item() - values[own].numpy()) / 31  # of all rows: the other set's add nothing
        np.testing.assert_allclose((total / count)[own].mean(), truth.mean(), rtol=0.01)
        np.testing.assert_allclose((total / count)[own], truth, rtol=0.12)


def test_a_data_set_that_is_its_own_batch_has_its_own_infonce():
    """8 of 64 rows are the set a and come together; the loss was made for all 64 rows, as `anybatch train` makes it."""
    task = np.repeat([0, 1], [8, 56]).astype(np.int32)
    plan = BatchPlan(
        num_rows=64, batch_size=8, cluster_size=2, cluster=np.repeat(np.arange(32, dtype=np.int32), 2), seed=0,
        data_digest="", task=task, task_names=("a", "b"), mixing="within",
    )  # fmt: skip
    index = torch.arange(8)
    arguments = RowTable(np.arange(64), np.arange(64), plan=plan, weights="inclusion").arguments(index)
    sides = torch.randn(2, 8, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    expected = InfoNCE(temperature=0.2)(*sides)
    ours = CountCorrectedInfoNCE(64, temperature=0.2)(*sides, **arguments)
    torch.testing.assert_close(ours, expected, rtol=1e-12, atol=0)


def test_ways_are_counted_within_a_data_set():
    """The text 5 is a positive of one row of a, a hard negative of three, and a positive of four rows of b, which
    never come beside a.
    """
    task = np.repeat([0, 1], [8, 8]).astype(np.int32)
    plan = BatchPlan(
        num_rows=16, batch_size=4, cluster_size=2, cluster=np.repeat(np.arange(8, dtype=np.int32), 2), seed=0,
        data_digest="", task=task, task_names=("a", "b"), mixing="within",
    )  # fmt: skip
    positive_id = np.arange(16)
    positive_id[12:] = 5
    negative_id = np.where(np.arange(16) < 3, 5, 100 + np.arange(16))[:, None]
    table = RowTable(np.arange(16), positive_id, negative_id=negative_id, plan=plan, weights="inclusion")
    weight = table.arguments(torch.arange(16), num_negatives=1)["log_weight"]
    ways = weight.candidates["log_ways"].exp()
    assert ways[5].item() == pytest.approx(4)  # a: one row stands for itself, four bring it
    assert ways[12].item() == pytest.approx(1)  # b: four rows, each brings it once
    assert ways[16].item() == pytest.approx(4)  # row 0's hard negative


def test_suspects_are_masked_whoever_brings_them():
    plan = replace(BatchPlan.random(10, 4), suspects=np.array([[0, 6]], np.int32))
    negative_id = np.arange(10)[:, None] + 20
    negative_id[1] = 6  # row 1 brings the text of row 6
    table = RowTable(np.arange(10), np.arange(10), negative_id=negative_id, plan=plan, mask_suspects=True)
    arguments = table.arguments(torch.tensor([0, 1, 6]), num_negatives=1)
    masked = arguments["log_weight"].tile(slice(0, 3), slice(0, 6)) == -torch.inf
    assert masked.nonzero().tolist() == [[0, 2], [0, 4]]  # and row 6 keeps row 0's text
    assert plan.digest != BatchPlan.random(10, 4).digest  # who masks them trains otherwise


def test_of_labels_each_row_masks_the_texts_that_it_suspects_itself():
    """Not those of all rows that suspect its own label, of which one row stands for the others."""
    generator = np.random.default_rng(0)
    labels, positive_id = generator.normal(size=(20, 8)), 19 - np.arange(400) % 20
    positives = labels[positive_id]
    sides = [positives + 1.2 * generator.normal(size=(400, 8)), positives]
    sides = [(side / np.linalg.norm(side, axis=1, keepdims=True)).astype(np.float32) for side in sides]
    result = mine_plan(*sides, config=MiningConfig(batch_size=32, cluster_size=8), positive_id=positive_id)
    table = RowTable(np.arange(400), positive_id, plan=result.plan, mask_suspects=True)
    rows, texts = np.divmod(table.suspects.numpy(), table.width)
    conflict = result.graph.conflict.tocoo()
    assert set(zip(rows, texts, strict=True)) == set(zip(conflict.row, positive_id[conflict.col], strict=True))
    counts = np.bincount(rows, minlength=400)
    assert 0 < counts[:20].mean() < 1.3 * counts[20:].mean()  # the first row of each label, and the others


def estimates(plan, epochs):
    """What the weighted batches say of each row's mean over all other rows, those of its data set alone, as weights
    of them, and the truth: (n, n) both.
    """
    n = plan.num_rows
    together = np.zeros((n, n))
    for epoch in range(epochs):
        batches = plan.epoch_batches(epoch)
        present = np.zeros((len(batches), n))
        np.put_along_axis(present, batches, 1.0, axis=1)
        together += present.T @ present
    table = RowTable(np.arange(n), np.arange(n), plan=plan, weights="inclusion")
    everything = slice(0, n)
    weight = table.arguments(torch.arange(n))["log_weight"].tile(everything, everything).exp().numpy()
    task = np.zeros(n, int) if plan.task is None else plan.task
    others = (task[:, None] == task) & ~np.eye(n, dtype=bool)
    return weight * together / together.diagonal()[:, None] * others, others / (n - 1)


@pytest.mark.parametrize("per_batch", [2, 3])
@pytest.mark.parametrize("remainder", [3, 6])
def test_inclusion_weights_are_unbiased_with_remainder_rows(per_batch, remainder):
    """K = 4: 24 rows in clusters, and 3 or 6 (more than a cluster, as a plan made by hand may have) in none."""
    loose = np.arange(24 + remainder) >= 24
    plan = BatchPlan(
        num_rows=len(loose), batch_size=4 * per_batch, cluster_size=4, seed=3, data_digest="",
        cluster=np.where(loose, -1, np.arange(len(loose)) // 4).astype(np.int32),
    )  # fmt: skip
    found, truth = estimates(plan, 10_000)
    for rows in (loose, ~loose):
        for columns in (loose, ~loose):  # of each kind as much as there is, and not more of one for less of the other
            block = np.ix_(rows, columns)
            assert found[block].sum() == pytest.approx(truth[block].sum(), rel=0.02)


@pytest.mark.parametrize("mixing", ["mixed", "within"])
def test_inclusion_weights_are_unbiased_with_remainders_and_a_small_set(mixing):
    """Sets of 15 rows (3 in no cluster), of 23 at half their share (3), and a small set of 3; 3 + 2 clusters make two
    batches, and one sits out.
    """
    sizes, size = (15, 23, 3), 4
    task = np.repeat([0, 1, 2], sizes)
    cluster, first = [], 0
    for rows in sizes:
        own = np.arange(rows) // size
        cluster.append(np.where(own < rows // size, own + first, -1))
        first += rows // size
    cluster = np.concatenate(cluster).astype(np.int32)
    plan = BatchPlan(
        num_rows=41, batch_size=8, cluster_size=size, cluster=cluster, seed=0, data_digest="",
        task=task.astype(np.int32), task_names=("a", "b", "c"), mixing=mixing,
    )  # fmt: skip
    found, truth = estimates(plan, 10_000)
    kinds = [cluster < 0, cluster >= 0]
    for number in (0, 1):
        for rows in kinds:
            for columns in kinds:
                block = np.ix_(rows & (task == number), columns & (task == number))
                assert found[block].sum() == pytest.approx(truth[block].sum(), rel=0.05), (mixing, number)
    # The small set's two rows an epoch are seldom side by side.
    assert found[task == 2].sum() == pytest.approx(truth[task == 2].sum(), rel=0.1)


@pytest.mark.parametrize("cast", ["bfloat16", "half", "float"])
def test_a_cast_of_the_model_leaves_the_table_alone(cast):
    ids = np.arange(13)
    make = lambda: RowTable(  # noqa: E731
        ids, ids, negative_id=np.stack([(ids + 1) % 13, (ids + 5) % 13], axis=1), plan=plan(), weights="inclusion"
    )
    table, twin = torch.nn.Sequential(make(), torch.nn.Linear(2, 2)), make()
    getattr(table, cast)()
    assert table[1].weight.dtype == getattr(torch, cast)
    for name, values in twin.named_buffers():
        assert table[0].get_buffer(name).dtype == values.dtype
        assert torch.equal(table[0].get_buffer(name), values), name
    assert twin.log_weights.dtype == twin.ways.dtype == torch.float64
    assert table.to("meta")[0].log_weights.device.type == "meta"  # moved as before


@pytest.mark.parametrize(
    ("given", "match"),
    [
        *(({"columns": {name: np.arange(4)}}, f"a column '{name}'") for name in (*RESERVED, "a.b")),
        ({"weights": "incluson"}, "weights is 'incluson'; expected one of none, inclusion"),
    ],
)
def test_names_that_the_table_uses_itself_or_does_not_know_are_refused(given, match):
    with pytest.raises(AnybatchError, match=match):
        RowTable(np.arange(4), np.arange(4), **given)
