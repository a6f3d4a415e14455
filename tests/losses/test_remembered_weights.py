"""Inclusion weights of remembered rows, made by a `RowTable` of real plans: the batch and the memory together
estimate the sum over the data set.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch

from anybatch import BatchPlan
from anybatch.losses import CrossBatchInfoNCE, InfoNCE
from anybatch.losses.rows import RowTable

N = 240


def plan(cluster_size=4, batch_size=16, **k):
    cluster = np.repeat(np.arange(N // cluster_size), cluster_size).astype(np.int32)
    return BatchPlan(
        num_rows=N, batch_size=batch_size, cluster_size=cluster_size, cluster=cluster, seed=0, data_digest="", **k
    )


def sets(mixing):
    return {"task": np.repeat(np.arange(3), 80).astype(np.int32), "task_names": ("a", "b", "c"), "mixing": mixing}


GENERATOR = np.random.default_rng(0)
LOOSE = np.concatenate([np.repeat(np.arange(50), 4), -np.ones(40)]).astype(np.int32)
NEGATIVE = (np.arange(N)[:, None] + GENERATOR.integers(1, N - 1, (N, 2))) % N
CASES = {
    "one set": (plan(), None),
    "remainder rows": (
        BatchPlan(num_rows=N, batch_size=16, cluster_size=4, cluster=LOOSE, seed=0, data_digest=""),
        None,
    ),
    "three sets": (plan(**sets("mixed")), None),
    "three sets, within": (plan(**sets("within")), None),
    "explicit negatives": (plan(), NEGATIVE),
    "a batch is a cluster": (plan(16, 16), None),
}


@pytest.mark.filterwarnings("ignore:A batch of 16 is a single cluster")
@pytest.mark.parametrize("name", CASES)
def test_the_sum_over_the_data_is_unbiased(name):
    """Monte Carlo over epochs: positive numbers for all pairs, summed with the weights; the ratio to the true sum
    within 2%, a tenth of what the faults did.
    """
    drawn, negative = CASES[name]
    ids, per_row = np.arange(N), 0 if negative is None else negative.shape[1]
    table = RowTable(ids, ids, negative_id=negative, plan=drawn, weights="inclusion")
    loss = CrossBatchInfoNCE(N, memory_size=64).double()
    values = torch.distributions.Gamma(1.0, 1.0).sample((N, N)).double()
    points = torch.randn(N, 3, dtype=torch.float64)
    task = torch.zeros(N) if drawn.task is None else torch.from_numpy(drawn.task)
    total, times = torch.zeros(N, dtype=torch.float64), torch.zeros(N)
    for epoch in range(31):
        for rows in drawn.epoch_batches(epoch):
            index = torch.from_numpy(rows).long()
            arguments = table.arguments(index, num_negatives=per_row)
            candidates = points[arguments["candidate_id"]]
            if epoch:
                batch = loss._prepare(points[index], candidates, **arguments_of(arguments))
                memory = loss._recall(batch).memory
                weight = batch.log_weight.beside(memory, slice(0, len(memory)))
                tile = weight.tile(slice(0, len(index)), slice(0, len(candidates) + len(memory)))
                tile[:, : len(index)].fill_diagonal_(-torch.inf)
                column = torch.cat([arguments["candidate_id"], memory["row"]])
                total[index] += (tile.exp() * values[index][:, column]).sum(dim=1) * (N - 1)
                times[index] += 1
            loss(points[index], candidates, **arguments)
    allowed = (task[:, None] == task) & ~torch.eye(N, dtype=torch.bool)
    ratio = (total / times / (values * allowed).sum(dim=1))[times > 0]
    assert len(ratio) > N * 0.9
    assert float(ratio.mean()) == pytest.approx(1, abs=0.02)


def arguments_of(arguments):
    return {"log_weight": None, "anchor_id": None, "candidate_id": None, **arguments}


def test_all_data_remembered_is_the_exact_gradient_on_mined_batches_too():
    generator = torch.Generator().manual_seed(1)
    sides = [torch.randn(N, 6, generator=generator) for _ in range(2)]
    whole = sides[0].clone().requires_grad_()
    exact = torch.autograd.grad(InfoNCE(temperature=0.3)(whole, sides[1]) * N, whole)[0]
    for cluster_size in (4, 16):
        drawn = plan(cluster_size, 32)
        table = RowTable(np.arange(N), np.arange(N), plan=drawn, weights="inclusion")
        loss = CrossBatchInfoNCE(N, memory_size=N, temperature=0.3, centred=False)
        for epoch in range(5):
            for rows in drawn.epoch_batches(epoch):
                index = torch.from_numpy(rows).long()
                leaf = sides[0][index].requires_grad_()
                value = loss(leaf, sides[1][index], **table.arguments(index))
                gradient = torch.autograd.grad(value * len(index), leaf)[0]
                if epoch == 4:
                    torch.testing.assert_close(gradient, exact[index], rtol=1e-3, atol=2e-4)


def test_batches_within_data_sets_remember_their_own_set_without_weights_too():
    """Of the memory, each set's rows; of the batch itself nothing is removed. Both sides' gradients are exact when
    all is remembered.
    """
    drawn = plan(**sets("within"))
    table = RowTable(np.arange(N), np.arange(N), plan=drawn)
    generator = torch.Generator().manual_seed(0)
    sides = [
        torch.nn.functional.normalize(torch.randn(N, 5, generator=generator, dtype=torch.float64), dim=1)
        for _ in range(2)
    ]
    loss = CrossBatchInfoNCE(N, memory_size=N, centred=False, temperature=0.3).double()
    whole = [side.clone().requires_grad_() for side in sides]
    for number in range(3):
        rows = torch.from_numpy(drawn.task == number)
        (InfoNCE(temperature=0.3)(whole[0][rows], whole[1][rows]) * 80).backward()
    for epoch in range(5):
        for rows in drawn.epoch_batches(epoch):
            index = torch.from_numpy(rows).long()
            batch = [side[index].requires_grad_() for side in sides]
            (loss(*batch, **table.arguments(index)) * len(index)).backward()
            one_set = len(np.unique(drawn.task[rows])) == 1
            if epoch and one_set:
                assert loss.last_stats["num_negatives"] == 79
            if epoch == 4 and one_set:
                for part, exact in zip(batch, whole, strict=True):
                    torch.testing.assert_close(part.grad, exact.grad[index], rtol=1e-3, atol=1e-4)


def test_a_mask_of_data_sets_leaves_other_losses_alone():
    """Left-over clusters of several sets share batches, and stay each other's negatives."""
    task = np.repeat(np.arange(3), [84, 92, 64]).astype(np.int32)
    drawn = plan(task=task, task_names=("a", "b", "c"), mixing="within")
    table = RowTable(np.arange(N), np.arange(N), plan=drawn)
    mixed = [rows for rows in drawn.epoch_batches(0) if len(np.unique(task[rows])) > 1]
    assert mixed
    for rows in mixed:
        arguments = table.arguments(torch.from_numpy(rows).long())
        assert not arguments["log_weight"].tile(slice(0, 16), slice(0, 16)).any()
