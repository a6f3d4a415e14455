"""Whose an image is: by counts, by the tokens that stand for it; and what it costs."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from anybatch.caching import RowSlicer, plan_mini_batches
from anybatch.core.errors import AnybatchError
from tests.caching.helpers import padded

MERGED = 4  # patches behind one token
IMAGE = 99  # id of a token


def list_of(tensor: torch.Tensor | None) -> list | None:
    return None if tensor is None else tensor.tolist()


def batch(counts, *, grids: bool, types: bool, seed: int = 0) -> tuple[dict, torch.Tensor]:
    """Rows with so many images, each of its own size, a token for so many patches; and whose each image is."""
    generator = torch.Generator().manual_seed(seed)
    owner = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))
    per_image = torch.randint(1, 4, (len(owner),), generator=generator) if grids else torch.full((len(owner),), 2)
    tokens = torch.zeros(len(counts), dtype=torch.int64).index_add_(0, owner, per_image)
    width = int(tokens.max()) + 2
    inputs = padded((tokens + 2).tolist(), width)
    of_image = (torch.arange(width) >= 1) & (torch.arange(width) <= tokens[:, None])
    inputs["input_ids"] = torch.where(of_image, IMAGE, 5)
    if types:
        inputs["mm_token_type_ids"] = of_image.long()
    if grids:
        inputs["image_grid_thw"] = torch.stack([torch.ones_like(per_image), per_image, 0 * per_image + MERGED], dim=1)
        inputs["pixel_values"] = torch.repeat_interleave(owner, per_image * MERGED)[:, None].float()
    else:
        inputs["pixel_values"] = owner.view(-1, 1, 1, 1).expand(-1, 3, 32, 16).float()
    return inputs, owner


@given(counts=st.lists(st.integers(0, 3), min_size=1, max_size=6), grids=st.booleans(), types=st.booleans())
@settings(max_examples=60, deadline=None)
def test_tokens_tell_whose_an_image_is(counts, grids, types):
    if not any(counts):
        return
    inputs, owner = batch(counts, grids=grids, types=types)
    slicer = RowSlicer(inputs, image_tokens=() if types else (IMAGE,))
    for row, count in enumerate(counts):
        part = slicer.take(torch.tensor([row]))
        assert part.get("pixel_values", torch.zeros(0)).unique().tolist() == [float(row)] * (count > 0)
    whose = slicer.take(torch.arange(len(counts)).flip(0))["pixel_values"].flatten(1)[:, 0]
    sizes = torch.bincount(inputs["pixel_values"].flatten(1)[:, 0].long(), minlength=len(counts))
    assert whose.tolist() == torch.repeat_interleave(torch.arange(len(counts)), sizes).flip(0).tolist()
    # A patch of a grid is one, any other image is worth a token for each 256 pixels.
    assert list_of(slicer.patches) == (sizes if grids else 2 * torch.bincount(owner, minlength=len(counts))).tolist()


def test_an_image_cut_into_several_is_found_by_its_tokens():
    """Two images each in three pieces (pan and scan): the counts per row do not say so."""
    inputs, _ = batch([3, 0, 3], grids=False, types=True)
    inputs["num_images_per_sample"] = torch.tensor([1, 0, 1])
    part = RowSlicer(inputs).take(torch.tensor([2, 1]))
    assert part["pixel_values"].flatten(1)[:, 0].tolist() == [2.0] * 3
    inputs["mm_token_type_ids"][0, 1] = 0  # no whole number of pieces
    with pytest.raises(AnybatchError, match="holds 6 entries of 'pixel_values', but the rows count 2"):
        RowSlicer(inputs)


def test_tokens_that_end_within_an_image_are_refused():
    inputs, _ = batch([1, 2], grids=True, types=True, seed=2)
    inputs["image_grid_thw"] = inputs["image_grid_thw"].flip(0)
    sizes = inputs["image_grid_thw"].prod(1)
    assert sizes[0] != sizes[-1]
    with pytest.raises(AnybatchError, match=r"nothing tells which of the 2 rows.*num_images_per_sample"):
        RowSlicer(inputs)


def test_images_padded_to_the_most_of_a_row_are_trimmed():
    """As Idefics gives them: (B, images, ...) with a mask; a mini-batch of texts has no pixels at all."""
    pixels = torch.arange(4 * 3).view(4, 3, 1, 1, 1).expand(-1, -1, 3, 16, 16).float()
    there = torch.tensor([[1, 1, 0], [0, 0, 0], [1, 1, 1], [0, 0, 0]])
    mask = there[:, :, None, None].expand(-1, -1, 16, 16)
    # The sequence is as wide as the mask is high: that hinders no trimming.
    slicer = RowSlicer(padded([2, 1, 16, 3], 16, pixel_values=pixels, pixel_attention_mask=mask))
    part = slicer.take(torch.tensor([3, 0]))
    assert part["pixel_values"].flatten(2)[:, :, 0].tolist() == [[9.0, 10.0], [0.0, 1.0]]
    assert part["pixel_attention_mask"].shape == (2, 2, 16, 16)
    assert part["input_ids"].shape == (2, 3)
    assert set(slicer.take(torch.tensor([1, 3]))) == {"input_ids", "attention_mask"}
    assert list_of(slicer.patches) == [2, 0, 3, 0]


def test_patches_fill_mini_batches():
    inputs, _ = batch([3, 3, 0, 0, 0, 0], grids=False, types=True)  # 8 or 2 tokens, and 6 patches
    slicer = RowSlicer(inputs)
    assert list_of(slicer.costs) == [8 + 6, 8 + 6, 2, 2, 2, 2]
    assert [rows.tolist() for rows in plan_mini_batches(slicer, mini_batch_size=None, max_tokens=14)] == [
        [0],
        [1],
        [2, 3, 4, 5],
    ]
    assert slicer.padded_tokens(torch.tensor([0, 2])) == 2 * 8 + 6
    alone = RowSlicer({key: inputs[key] for key in ("pixel_values",)})
    assert (alone.lengths, alone.patches, alone.images) == (None, None, True)
    grids, _ = batch([1, 1, 1], grids=True, types=True)
    alone = RowSlicer({key: grids[key] for key in ("pixel_values", "image_grid_thw")})
    assert list_of(alone.costs) == grids["image_grid_thw"].prod(1).tolist()


def test_positions_of_several_axes_are_refused():
    """With three rows they would be cut along the axis that is not theirs."""
    with pytest.raises(AnybatchError, match=r"position_ids of shape \(3, 3, 4\).*several axes"):
        RowSlicer(padded([1, 2, 3], 4, position_ids=torch.zeros(3, 3, 4)))
