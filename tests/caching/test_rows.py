"""Cutting by rows: trimmed where that is safe, refused where rows cannot be told apart."""

from collections import OrderedDict
from collections.abc import MutableMapping

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import BatchEncoding

from anybatch.caching import RowSlicer, plan_micro_batches
from anybatch.errors import AnybatchError


def padded(lengths, width, **more):
    mask = (torch.arange(width) < torch.tensor(lengths)[:, None]).long()
    return {"input_ids": torch.arange(len(lengths) * width).view(-1, width), "attention_mask": mask, **more}


def test_tensors_and_lists():
    rows = torch.tensor([2, 0])
    assert RowSlicer(torch.arange(12).view(4, 3)).take(rows).tolist() == [[6, 7, 8], [0, 1, 2]]
    assert RowSlicer(["a", "b", "c"]).take(rows) == ["c", "a"]
    assert RowSlicer(torch.arange(4)).lengths is None


def test_trailing_padding_goes_for_every_tensor_of_that_width():
    batch = padded([3, 1, 5, 2], 6, token_type_ids=torch.ones(4, 6).long(), labels=torch.arange(4))
    slicer = RowSlicer(batch)
    part = slicer.take(torch.tensor([3, 0]))
    assert {key: tuple(value.shape) for key, value in part.items()} == {
        "input_ids": (2, 3), "attention_mask": (2, 3), "token_type_ids": (2, 3), "labels": (2,),
    }  # fmt: skip
    assert part["input_ids"].tolist() == [[18, 19, 20], [0, 1, 2]]
    assert slicer.lengths.tolist() == [3, 1, 5, 2]


def test_left_padding_stays():
    mask = torch.tensor([[0, 0, 1], [0, 1, 1]])
    part = RowSlicer({"input_ids": torch.arange(6).view(2, 3), "attention_mask": mask}).take(torch.tensor([0]))
    assert part["input_ids"].tolist() == [[0, 1, 2]]


def test_boolean_flags_hold_their_columns():
    """Expansion tokens of multi-vector models are masked for attention and scored all the same."""
    flags = torch.zeros(2, 4, dtype=torch.bool)
    flags[0, 2] = True
    part = RowSlicer(padded([1, 1], 4, query_expansion_positions=flags)).take(torch.tensor([0, 1]))
    assert part["input_ids"].shape == (2, 3)
    assert part["query_expansion_positions"].shape == (2, 3)


@pytest.mark.parametrize(
    "extra",
    [
        torch.zeros(2, 4),
        torch.zeros(2, 4, 4),
        torch.zeros(2, 1, 4, 4),
        torch.zeros(2, 3, 4).long(),
        torch.zeros(2, 4).long(),  # four categories of each row, say, and by chance four tokens
        torch.ones(2, 4, dtype=torch.bool),
    ],
)
def test_no_trimming_where_an_axis_may_or_may_not_be_the_sequence(extra):
    slicer = RowSlicer(padded([1, 2], 4, extra=extra))
    part = slicer.take(torch.tensor([0]))
    assert part["input_ids"].shape == (1, 4)
    assert part["extra"].shape == (1, *extra.shape[1:])
    assert slicer.lengths is None


@pytest.mark.parametrize("width", [3, 5, 8])
def test_pictures_beside_a_text_leave_it_its_lengths(width):
    """Whatever axis of the pictures, channels or height, happens to be as long as the sequence."""
    pictures = torch.arange(4 * 3 * 8 * 8.0).view(4, 3, 8, 8)
    batch = padded([2, 1, 3, 2], width, pixel_values=pictures)
    slicer = RowSlicer(batch)
    assert slicer.lengths.tolist() == [2, 1, 3, 2]
    assert not slicer.pictures
    assert [part.tolist() for part in plan_micro_batches(slicer, micro_batch=4, max_tokens=4)] == [[2], [0, 3], [1]]
    for wide, rows in ((slicer, [1, 0]), (RowSlicer(batch, pad_to_multiple=4), [3, 1])):
        part = wide.take(torch.tensor(rows))
        assert torch.equal(part["pixel_values"], pictures[rows])
        assert part["input_ids"].shape == (2, 2 if wide is slicer else 4)
    unknown = RowSlicer(padded([2, 1, 3, 2], width, pixel_values=pictures, other=torch.zeros(4, width)))
    with pytest.raises(AnybatchError, match="max_tokens"):
        plan_micro_batches(unknown, micro_batch=4, max_tokens=4)
    assert RowSlicer({"pixel_values": pictures, "attention_mask": torch.ones(4, 2, 2)}).pictures


def test_nested_mappings_trim_on_their_own():
    batch = {"query": padded([1, 2], 4), "page": padded([5, 3], 7), "scale": torch.tensor(2.0), "name": "x"}
    slicer = RowSlicer(batch)
    part = slicer.take(torch.tensor([1]))
    assert part["query"]["input_ids"].shape == (1, 2)
    assert part["page"]["input_ids"].shape == (1, 3)
    assert part["scale"] == 2.0
    assert part["name"] == "x"
    assert slicer.lengths.tolist() == [6, 5]


def test_the_container_keeps_its_type_and_the_batch_its_values():
    batch = BatchEncoding(padded([2, 2], 3))
    part = RowSlicer(batch).take(torch.tensor([0]))
    assert isinstance(part, BatchEncoding)
    part["input_ids"].zero_()
    assert batch["input_ids"].tolist() == [[0, 1, 2], [3, 4, 5]]
    assert part.attention_mask.shape == (1, 2)


class Store(MutableMapping):
    """A mapping of somebody's own; a shallow copy of it shares what it holds."""

    def __init__(self, items):
        self.items_by_name = dict(items)

    def __getitem__(self, key):
        return self.items_by_name[key]

    def __setitem__(self, key, value):
        self.items_by_name[key] = value

    def __delitem__(self, key):
        del self.items_by_name[key]

    def __iter__(self):
        return iter(self.items_by_name)

    def __len__(self):
        return len(self.items_by_name)


def test_a_mapping_of_the_callers_own_is_not_written_into():
    batch = Store(padded([2, 1, 3], 3))
    part = RowSlicer(batch).take(torch.tensor([1]))
    assert type(part) is dict
    assert part["input_ids"].tolist() == [[3]]
    assert batch["input_ids"].shape == (3, 3)
    ordered = OrderedDict(padded([2, 1, 3], 3))
    assert type(RowSlicer(ordered).take(torch.tensor([1]))) is OrderedDict
    assert ordered["input_ids"].shape == (3, 3)


def test_rows_without_a_token_keep_one_column():
    assert RowSlicer(padded([0, 2], 3)).take(torch.tensor([0]))["input_ids"].shape == (1, 1)


def test_flattened_inputs_are_refused():
    with pytest.raises(AnybatchError, match=r"pixel_values has shape \(9, 8\).*2 rows.*num_images_per_sample.*Shared"):
        RowSlicer(padded([1, 2], 4, pixel_values=torch.zeros(9, 8)))
    with pytest.raises(AnybatchError, match=r"cu_seq_lens_q.*flattened"):
        RowSlicer({"input_ids": torch.zeros(1, 9).long(), "cu_seq_lens_q": torch.tensor([0, 4, 9])})


def test_inputs_with_a_history_are_refused():
    with pytest.raises(AnybatchError, match="computed by earlier operations"):
        RowSlicer(torch.zeros(2, 2, requires_grad=True) * 2)


def test_nothing_to_cut():
    with pytest.raises(AnybatchError, match="holds no tensor"):
        RowSlicer({"text": "x"})


@given(lengths=st.lists(st.integers(0, 6), min_size=1, max_size=9), data=st.data())
@settings(max_examples=30, deadline=None)
def test_taking_equals_indexing_and_cutting_padding(lengths, data):
    batch = padded(lengths, 6)
    chosen = data.draw(st.lists(st.integers(0, len(lengths) - 1), min_size=1, max_size=5))
    part = RowSlicer(batch).take(torch.tensor(chosen))
    width = max(1, *[lengths[row] for row in chosen]) if len(chosen) > 1 else max(1, lengths[chosen[0]])
    for key, value in batch.items():
        assert torch.equal(part[key], torch.stack([value[row] for row in chosen])[:, :width])
