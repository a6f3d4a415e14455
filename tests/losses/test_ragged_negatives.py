"""Rows with different numbers of explicit negatives: what a row lacks is no candidate, for any loss, on any ranks."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from anybatch.core.errors import AnybatchError
from anybatch.integrations.sentence_transformers.loss import CachedLoss
from anybatch.losses import CountCorrectedInfoNCE, InfoNCE, SogCLR
from anybatch.losses.rows import RowTable
from anybatch.plans.plan import BatchPlan
from tests.ranks import on_ranks

ROWS, WIDTH = 8, 3
LACKING = np.array([[1, 1, 1], [1, 0, 0], [0, 0, 0], [1, 1, 0], [1, 0, 1], [0, 1, 1], [1, 1, 1], [0, 0, 0]]) == 0


def table(**settings) -> RowTable:
    ids = np.arange(ROWS)
    negatives = ROWS + np.arange(ROWS * WIDTH).reshape(ROWS, WIDTH) % 11  # some texts are negatives of two rows
    return RowTable(ids, ids, negative_id=np.where(LACKING, -1, negatives), **settings)


def embeddings():
    torch.manual_seed(0)
    draw = lambda *shape: nn.functional.normalize(torch.randn(*shape, 6, dtype=torch.float64), dim=-1)  # noqa: E731
    return draw(ROWS), draw(ROWS), draw(ROWS, WIDTH)


def present(negatives, index):
    """The batch's explicit negatives, column by column."""
    return torch.cat([negatives[index, place][~torch.from_numpy(LACKING)[index, place]] for place in range(WIDTH)])


@pytest.mark.parametrize("index", [[0, 1, 2, 3, 4, 5, 6, 7], [7, 2], [5, 4, 1], [2, 0]])
def test_each_row_is_contrasted_with_what_there_is(index):
    index = torch.tensor(index)
    anchors, positives, negatives = embeddings()
    candidates = torch.cat([positives[index], present(negatives, index)])
    arguments = table().arguments(index, num_candidates=len(candidates))
    scores = anchors[index] @ candidates.T / 0.05
    ids = arguments["candidate_id"]
    expected = []
    for row in range(len(index)):
        kept = (ids != ids[row]) | (torch.arange(len(ids)) == row)
        expected.append(scores[row][kept].logsumexp(0) - scores[row, row])
    value = InfoNCE(temperature=0.05)(anchors[index], candidates, **arguments)
    torch.testing.assert_close(value, torch.stack(expected).mean(), rtol=1e-12, atol=0)
    by_columns = table().arguments(index, num_negatives=WIDTH)
    assert torch.equal(by_columns["candidate_id"], ids)


@pytest.mark.parametrize(
    ("make", "weights"),
    [
        (InfoNCE, "none"),
        (InfoNCE, "inclusion"),
        (lambda **settings: CountCorrectedInfoNCE(num_rows=ROWS, **settings), "inclusion"),
        (lambda **settings: SogCLR(ROWS, **settings), "inclusion"),
    ],
)
def test_as_padding_that_is_masked(make, weights):
    """The same as a full column whose missing negatives are removed by a mask, where a loss does not count candidates.

    (Without inclusion weights the corrected losses do count what is masked: padding would be wrong for them.)
    """
    plan = BatchPlan(
        num_rows=ROWS, batch_size=ROWS, cluster_size=2, cluster=np.arange(ROWS, dtype=np.int32) // 2, seed=0,
        data_digest="",
    )  # fmt: skip
    index = torch.tensor([3, 1, 2, 0, 6, 5])
    anchors, positives, negatives = embeddings()
    ragged = table(plan=plan, weights=weights)
    arguments = ragged.arguments(index, num_negatives=WIDTH)
    candidates = torch.cat([positives[index], present(negatives, index)])
    padded = torch.cat([positives[index], *(negatives[index, place] for place in range(WIDTH))])
    there = torch.cat([torch.ones(len(index), dtype=bool), *(~torch.from_numpy(LACKING)[index].T)])
    full = {"index": index, "anchor_id": arguments["anchor_id"]}
    full["candidate_id"] = torch.full((len(padded),), 99).masked_scatter(there, arguments["candidate_id"])
    weight = arguments["log_weight"].tile(slice(None), slice(None)) if weights == "inclusion" else 0.0
    if weights == "inclusion":
        full["log_weight"] = torch.full((len(index), len(padded)), -torch.inf, dtype=torch.float64)
        full["log_weight"][:, there] = weight.expand(len(index), len(candidates))
    else:
        full["log_weight"] = torch.where(there, 0.0, -torch.inf)[None]
    results = []
    for given, known in ((candidates, arguments), (padded, full)):
        leaves = anchors[index].clone().requires_grad_(), given.clone().requires_grad_()
        value = make(temperature=0.05)(*leaves, **known)
        results.append((value.detach(), *torch.autograd.grad(value, leaves)))
    (value, of_anchors, of_candidates), (expected, anchors_expected, padded_expected) = results
    torch.testing.assert_close(value, expected, rtol=1e-12, atol=0)
    torch.testing.assert_close(of_anchors, anchors_expected, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(of_candidates, padded_expected[there], rtol=1e-10, atol=1e-12)
    assert not padded_expected[~there].any()


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(1)
        self.layer = nn.Linear(6, 4).double()

    def forward(self, features):
        return {"sentence_embedding": self.layer(features["x"])}


def test_cached_step_takes_columns_of_different_lengths():
    index = torch.tensor([1, 2, 3, 7])  # nobody has a third negative
    anchors, positives, negatives = embeddings()
    columns = [anchors[index], positives[index]]
    columns += [negatives[index, place][~torch.from_numpy(LACKING)[index, place]] for place in range(WIDTH)]
    columns = [column for column in columns if len(column)]
    assert [len(column) for column in columns] == [4, 4, 2, 1]
    model = Model()
    loss = CachedLoss(model, InfoNCE(temperature=0.05), rows=table(), mini_batch_size=2, keep_graphs=0.0)
    loss([{"x": column} for column in columns], index).backward()
    cached = model.layer.weight.grad.clone()
    model.zero_grad()
    embedded = [model.layer(column) for column in columns]
    arguments = table().arguments(index, num_negatives=WIDTH)
    InfoNCE(temperature=0.05)(embedded[0], torch.cat(embedded[1:]), **arguments).backward()
    torch.testing.assert_close(cached, model.layer.weight.grad, rtol=1e-12, atol=1e-14)


def gradient_of_share(rank, world_size):
    """Rank 0 has rows without any negative, and so fewer columns than rank 1."""
    index = torch.tensor([[2, 7], [1, 4]])[rank] if world_size == 2 else torch.tensor([2, 7, 1, 4])
    anchors, positives, negatives = embeddings()
    there = ~torch.from_numpy(LACKING)[index]
    columns = [anchors[index], positives[index], *(negatives[index, place][there[:, place]] for place in range(WIDTH))]
    columns = [column for column in columns if len(column)]
    model = Model()
    loss = CachedLoss(model, InfoNCE(temperature=0.05), rows=table(), mini_batch_size=2, keep_graphs=0.0)
    value = loss([{"x": column} for column in columns], index)
    value.backward()
    return len(columns), model.layer.weight.grad


@pytest.mark.distributed
def test_ranks_may_have_other_columns():
    shares = on_ranks(gradient_of_share, 2)
    assert [count for count, _ in shares] == [2, 4]
    _, alone = gradient_of_share(0, 1)
    mean = sum(gradient for _, gradient in shares) / 2  # what DDP makes of them
    torch.testing.assert_close(mean, alone, rtol=1e-12, atol=1e-14)


def test_columns_that_do_not_fit_are_refused():
    loss = CachedLoss(Model(), InfoNCE(temperature=0.05), rows=table(), mini_batch_size=2)
    columns = [{"x": torch.randn(2, 6, dtype=torch.float64)} for _ in range(3)]
    with pytest.raises(AnybatchError, match="2 explicit negatives of 2 rows; the table was made for 0 of these rows"):
        loss(columns, torch.tensor([2, 7]))
    with pytest.raises(AnybatchError, match="goes down to -2"):
        RowTable(np.arange(2), np.arange(2), negative_id=np.array([[-2], [1]]))
    large = RowTable(np.array([2**40, 1]), np.array([2**50, 3]), negative_id=np.array([[-1], [2**50]]))
    assert large.arguments(torch.tensor([0, 1]), num_negatives=1)["candidate_id"].tolist() == [1, 0, 1]
