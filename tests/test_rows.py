from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from anybatch.errors import AnybatchError
from anybatch.plan import BatchPlan
from anybatch.rows import RowTable


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
    same, other = 1 / 12, (4 - 1) / (2 - 1) / 12
    assert weight[0].tolist() == pytest.approx([same, same, other, other] + [same] * 8)
    assert weight[3].tolist() == pytest.approx([other, other, other, other] + [same] * 8), (
        "a remainder row belongs to no cluster"
    )
    capped = RowTable(ids, ids, plan=plan(), weights="inclusion", weight_cap=2.0).arguments(index)["log_weight"]
    assert math.exp(capped.other) == pytest.approx(2 / 12)
    assert "log_weight" not in RowTable(ids, ids, plan=plan()).arguments(index)


def test_mistakes():
    ids = np.arange(13)
    with pytest.raises(AnybatchError, match="cover 13 anchors and 12 positives"):
        RowTable(ids, ids[:-1])
    with pytest.raises(AnybatchError, match="goes down to -1"):
        RowTable(ids - 1, ids)
    with pytest.raises(AnybatchError, match="it has 13 rows, the ids cover 12"):
        RowTable(ids[:-1], ids[:-1], plan=plan())
    with pytest.raises(AnybatchError, match="needs the plan"):
        RowTable(ids, ids, weights="inclusion")
    with pytest.raises(AnybatchError, match="2 negatives a row"):
        RowTable(ids, ids).arguments(torch.arange(3), num_negatives=2)
    with pytest.warns(UserWarning, match="single cluster"):
        RowTable(ids, ids, plan=plan(clusters_per_batch=1), weights="inclusion")
