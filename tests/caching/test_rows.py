"""Cutting by rows: trimmed where that is safe, refused where rows cannot be told apart."""

import collections
import dataclasses
from collections import OrderedDict
from collections.abc import MutableMapping

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import BatchEncoding

from anybatch.caching import RowSlicer, Shared, plan_mini_batches
from anybatch.core.errors import AnybatchError
from tests.caching.helpers import padded


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
def test_images_beside_a_text_leave_it_its_lengths(width):
    """Whatever axis of the images, channels or height, happens to be as long as the sequence."""
    images = torch.arange(4 * 3 * 8 * 8.0).view(4, 3, 8, 8)
    batch = padded([2, 1, 3, 2], width, pixel_values=images)
    slicer = RowSlicer(batch)
    assert slicer.lengths.tolist() == [2, 1, 3, 2]
    assert not slicer.images
    assert [part.tolist() for part in plan_mini_batches(slicer, mini_batch_size=4, max_tokens=4)] == [[2], [0, 3], [1]]
    part = slicer.take(torch.tensor([1, 0]))
    assert torch.equal(part["pixel_values"], images[[1, 0]])
    assert part["input_ids"].shape == (2, 2)
    unknown = RowSlicer(padded([2, 1, 3, 2], width, pixel_values=images, other=torch.zeros(4, width)))
    with pytest.raises(AnybatchError, match="max_tokens"):
        plan_mini_batches(unknown, mini_batch_size=4, max_tokens=4)
    assert RowSlicer({"pixel_values": images, "attention_mask": torch.ones(4, 2, 2)}).images


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


SHAPES = {
    "list": lambda rows: [f"row {row}" for row in range(rows)],
    "list of lists": lambda rows: [["turn"] * row for row in range(rows)],
    "list of tensors or None": lambda rows: [torch.full((row,), row) if row % 2 else None for row in range(rows)],
    "tuple": lambda rows: tuple(range(rows)),
    "array": lambda rows: np.arange(rows) * 1.5,
    "array of words": lambda rows: np.array([f"w{row}" for row in range(rows)], dtype=object),
    "tensor": lambda rows: torch.arange(rows * 2).view(rows, 2),
}


@given(
    rows=st.integers(2, 7),
    names=st.lists(st.sampled_from(sorted(SHAPES)), min_size=1, unique=True),
    nested=st.booleans(),
    data=st.data(),
)
@settings(max_examples=60, deadline=None)
def test_whatever_has_one_entry_a_row_is_cut(rows, names, nested, data):
    inner = {name: SHAPES[name](rows) for name in names}
    batch = {"task": "query", "flag": True, "none": None, "number": 3, **({"part": inner} if nested else inner)}
    chosen = data.draw(st.lists(st.integers(0, rows - 1), min_size=1, max_size=5))
    part = RowSlicer(batch).take(torch.tensor(chosen))
    assert [part[key] for key in ("task", "flag", "none", "number")] == ["query", True, None, 3]
    for name, value in (part["part"] if nested else part).items():
        if name in inner:
            assert type(value) is type(inner[name])
            assert len(value) == len(chosen)
            assert all(
                got is inner[name][row] or np.all(np.asarray(got == inner[name][row]))
                for got, row in zip(value, chosen)
            )


@pytest.mark.parametrize(
    "value",
    [
        [1, 2], (1, 2, 3), np.zeros(5), torch.zeros(3), {1, 2, 3, 4}, object(), range(9),
        [torch.zeros(4), torch.zeros(4)], torch.nn.utils.rnn.pack_sequence([torch.zeros(2)]).data,
    ],
)  # fmt: skip
def test_anything_else_is_refused_by_its_name_or_declared_shared(value):
    with pytest.raises(AnybatchError, match=r"inner\.odd .*4 rows.*Shared"):
        RowSlicer({"inner": {"x": torch.zeros(4, 2), "odd": value}})
    slicer = RowSlicer({"odd": Shared(value), "x": torch.zeros(4, 2)})
    assert slicer.num_rows == 4
    assert slicer.take(torch.tensor([1, 3]))["odd"] is value


Named = collections.namedtuple("Named", "ids mask")


@dataclasses.dataclass
class Fields:
    ids: torch.Tensor
    mask: torch.Tensor


@pytest.mark.parametrize("make", [Named, Fields, lambda *columns: columns, lambda *columns: list(columns)])
def test_columns_without_a_mapping(make):
    ids, mask = torch.arange(8).view(4, 2), torch.rand(4, 2)
    batch = make(ids, mask)
    part = RowSlicer(batch).take(torch.tensor([2, 0]))
    assert type(part) is type(batch)
    got = [part.ids, part.mask] if isinstance(part, (Named, Fields)) else part
    assert torch.equal(got[0], ids[[2, 0]])
    assert torch.equal(got[1], mask[[2, 0]])
    assert (batch.ids if isinstance(batch, Fields) else batch[0]) is ids


def test_a_tuple_of_like_tensors_may_be_rows_or_columns():
    with pytest.raises(AnybatchError, match="columns or rows"):
        RowSlicer((torch.zeros(3, 4), torch.ones(3, 4)))
    assert RowSlicer([torch.zeros(3, 4), torch.ones(3, 4)]).num_rows == 2


def patches(counts, generator):
    """Qwen's form: grids image by image, patches one after the other; each patch says whose it is."""
    grids = [torch.randint(1, 4, (count, 3), generator=generator) for count in counts]
    pixels = [torch.full((int(grid.prod(1).sum()), 2), float(row)) for row, grid in enumerate(grids)]
    return torch.cat(grids), torch.cat(pixels), grids


@given(counts=st.lists(st.integers(0, 3), min_size=2, max_size=6), seed=st.integers(0, 99), data=st.data())
@settings(max_examples=40, deadline=None)
def test_images_go_with_their_rows(counts, seed, data):
    """As many images as rows or not, none in a row or several; by patches, by images, and videos beside them."""
    generator = torch.Generator().manual_seed(seed)
    grid, pixels, grids = patches(counts, generator)
    film, frames, films = patches(counts[::-1], generator)
    rows = len(counts)
    by_patch = padded(
        [2] * rows, 3, image_grid_thw=grid, pixel_values=pixels, num_images_per_sample=torch.tensor(counts)
    )
    by_patch |= {"video_grid_thw": film, "pixel_values_videos": frames, "num_videos_per_sample": counts[::-1]}
    owner = torch.repeat_interleave(torch.arange(rows), torch.tensor(counts))
    by_image = padded([2] * rows, 3, pixel_values=owner.view(-1, 1, 1, 1).float(), num_images_per_sample=counts)
    by_image["image_sizes"] = owner.view(-1, 1)
    chosen = data.draw(st.lists(st.integers(0, rows - 1), min_size=1, max_size=4))
    part = RowSlicer(by_patch).take(torch.tensor(chosen))
    wanted = torch.cat([grids[row] for row in chosen])
    if len(wanted):
        assert torch.equal(part["image_grid_thw"], wanted)
        whose = torch.cat([pixels[pixels[:, 0] == row, 0] for row in chosen])
        assert torch.equal(part["pixel_values"][:, 0], whose)
    else:
        assert "pixel_values" not in part
        assert "image_grid_thw" not in part
    if sum(len(films[row]) for row in chosen):
        assert torch.equal(part["video_grid_thw"], torch.cat([films[row] for row in chosen]))
        assert len(part["pixel_values_videos"]) == int(part["video_grid_thw"].prod(1).sum())
    part = RowSlicer(by_image).take(torch.tensor(chosen))
    mine = torch.cat([owner[owner == row] for row in chosen])
    assert torch.equal(part["pixel_values"].flatten().long(), mine) if len(mine) else "image_sizes" not in part


def test_images_of_unknown_rows_are_refused():
    grid, pixels, _ = patches([1, 2, 0], torch.Generator().manual_seed(0))
    for extra in (
        {"image_grid_thw": grid, "pixel_values": pixels},  # three images and three rows, and not one each
        {"pixel_values": torch.zeros(3, 3, 4, 4), "image_sizes": torch.zeros(3, 2)},
    ):
        with pytest.raises(AnybatchError, match="num_images_per_sample"):
            RowSlicer(padded([1, 2, 3], 3, **extra))
    with pytest.raises(AnybatchError, match="count 4"):
        RowSlicer(padded([1] * 3, 3, image_grid_thw=grid, pixel_values=pixels, num_images_per_sample=[1, 2, 1]))
    with pytest.raises(AnybatchError, match="one count for each of the 3 rows"):
        RowSlicer(padded([1] * 3, 3, image_grid_thw=grid, pixel_values=pixels, num_images_per_sample=[3]))
    alone = RowSlicer({"image_grid_thw": grid, "pixel_values": pixels})  # images alone are the rows
    assert alone.num_rows == 3
    padded_images = padded([1] * 3, 3, pixel_values=torch.zeros(3, 2, 3, 4, 4), pixel_attention_mask=torch.ones(3, 2))
    padded_images["num_images_per_sample"] = torch.tensor([2, 1, 0])
    assert RowSlicer(padded_images).take(torch.tensor([0, 2]))["pixel_values"].shape[0] == 2


@given(sizes=st.lists(st.integers(0, 4), min_size=1, max_size=7), data=st.data())
@settings(max_examples=40, deadline=None)
def test_bags_of_words_are_cut(sizes, data):
    bag = torch.nn.EmbeddingBag(50, 3)
    ids = torch.arange(sum(sizes)) % 50
    offsets = torch.tensor([0, *sizes]).cumsum(0)[:-1]
    slicer = RowSlicer({"input_ids": ids, "offsets": offsets})
    chosen = data.draw(st.lists(st.integers(0, len(sizes) - 1), min_size=1, max_size=5))
    part = slicer.take(torch.tensor(chosen))
    torch.testing.assert_close(bag(part["input_ids"], part["offsets"]), bag(ids, offsets)[chosen])
    assert slicer.lengths.tolist() == sizes
    assert sorted(torch.cat(plan_mini_batches(slicer, max_tokens=5)).tolist()) == list(range(len(sizes)))


def test_broken_offsets_are_refused():
    with pytest.raises(AnybatchError, match="offsets"):
        RowSlicer({"input_ids": torch.arange(4), "offsets": torch.tensor([0, 3, 1])})
