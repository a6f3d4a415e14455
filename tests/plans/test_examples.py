"""The record: columns come back as they were, and all of them travel in one collective."""

from __future__ import annotations

import pytest
import torch

from anybatch.core import distributed
from anybatch.core.errors import AnybatchError
from anybatch.plans.examples import Examples


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.uint8, torch.int32, torch.int64])
def test_columns_are_packed_exactly(dtype):
    values = torch.tensor([0.0, 1.7, 250.0]) if dtype.is_floating_point else torch.tensor([0, 3, 255 % 128])
    values = values.to(dtype)
    if dtype.is_floating_point:
        values[0] = -torch.inf
    examples = Examples(value=values, row=torch.tensor([2**62, -1, 5]), nothing=None)
    packed = examples.packed()
    assert (packed.dtype, packed.shape) == (torch.int64, (3, 2))
    again = examples.unpacked(packed)
    assert list(again.columns) == ["row", "value"]
    assert again["value"].dtype == (dtype if dtype.is_floating_point else torch.int64)
    assert torch.equal(again["value"], examples["value"])
    assert torch.equal(again["row"], torch.tensor([2**62, -1, 5]))


def test_one_collective_whatever_is_known(monkeypatch):
    calls = []
    monkeypatch.setattr(distributed, "gather_rows", lambda rows, sizes: calls.append(sizes) or torch.cat([rows, rows]))
    examples = Examples(row=torch.tensor([3, 4]), weight=torch.tensor([0.5, 1.5]), task=torch.tensor([0, 1]))
    both = examples.gathered([2, 2])
    assert calls == [[2, 2]]
    assert both["row"].tolist() == [3, 4, 3, 4]
    assert both["weight"].tolist() == [0.5, 1.5, 0.5, 1.5]
    assert Examples().gathered([2, 2]).columns == {}
    assert len(calls) == 1


def test_parts_and_what_follows():
    examples = Examples(row=torch.arange(5), author=torch.tensor([4, 3, 2, 1, 0]))
    assert len(examples) == 5
    assert len(Examples()) == 0
    assert examples.take(slice(1, 3))["author"].tolist() == [3, 2]
    assert examples.take(torch.tensor([4, 0]))["row"].tolist() == [4, 0]
    longer = examples.followed_by(examples.take(slice(0, 1)))
    assert longer["author"].tolist() == [4, 3, 2, 1, 0, 4]
    assert "task" not in examples
    assert examples.with_columns(task=torch.zeros(5).long())["task"].tolist() == [0] * 5
    with pytest.raises(AnybatchError, match="columns author, row stand beside examples with row"):
        examples.followed_by(Examples(row=torch.arange(2)))
    with pytest.raises(AnybatchError, match=r"asks for the column 'task' of the examples, which has author, row"):
        examples["task"]
