"""Where the images, videos and words of each row are, in tensors that have any number of entries per row.

* `image_grid_thw` (images, 3): the patches of each image; those of all lie one after the other in `pixel_values`.
* `pixel_values` (images, ...) one after the other, where `num_images_per_sample` or tokens tell whose they are.
* `pixel_values` (B, most images, ...) padded to the most images of a row, with `pixel_attention_mask`.
* `input_ids` (words,) with `offsets` (B,): bags of words.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from anybatch.core.errors import AnybatchError

PIXELS = "pixel_values"  # no sequence, whatever its axes are
GRIDS = {"image_grid_thw": PIXELS, "video_grid_thw": "pixel_values_videos"}  # image by image, and patch by patch
COUNTS = {
    "image_grid_thw": ("num_images_per_sample", "images_per_sample"),
    "video_grid_thw": ("num_videos_per_sample", "videos_per_sample"),
}
TOKENS = ("input_ids", "inputs_embeds", "attention_mask")
_TYPES = "mm_token_type_ids"  # of each token: 1 of an image, 2 of a video
_TYPE_OF = {"image_grid_thw": 1, "video_grid_thw": 2}
_BY_IMAGE = (PIXELS, "image_sizes", "image_position_ids")  # of models that have no grid
_PADDED = "pixel_attention_mask"  # (B, images, H, W): images of a row are padded to as many
_BY_ROW = (_PADDED, "aspect_ratio_ids")  # where they are, no image is counted by itself
_PATCH = 16 * 16  # pixels that cost about as much as a token, where nothing says more


@dataclass
class Pieces:
    """A tensor in which a row has any number of entries, one row after the other, or padded to the most of any row."""

    sizes: Tensor  # (B,) int64 on the CPU
    offsets: bool = False  # the tensor holds the starts themselves
    padded: bool = False  # (B, most entries, ...)
    optional: bool = False  # left out where the rows have no entry
    cost: float = 0.0  # of an entry, in tokens

    def absent(self, rows: Tensor) -> bool:
        """Whether a mini-batch of `rows` does without it, as if its processor had seen none."""
        return self.optional and not bool(self.sizes[rows].any())

    def take(self, value: Any, rows: Tensor) -> Any:
        """The entries of `rows`, or their new starts."""
        sizes = self.sizes[rows]
        if self.padded:
            return value.index_select(0, rows.to(value.device))[:, : int(sizes.max())].contiguous()
        starts = sizes.cumsum(0) - sizes
        if self.offsets:
            return starts.to(value.device, value.dtype)
        begins = (self.sizes.cumsum(0) - self.sizes)[rows]
        places = torch.repeat_interleave(begins - starts, sizes) + torch.arange(int(sizes.sum()))
        if isinstance(value, Tensor):
            return value.index_select(0, places.to(value.device))
        return value[places.numpy()] if isinstance(value, np.ndarray) else [value[place] for place in places.tolist()]


def pieces_of(
    columns: Mapping[str, Any], num_rows: int, name: str, image_tokens: Collection[int] = ()
) -> dict[str, Pieces]:
    """What in a mapping is not counted by row, and whose it is: by counts per row, else by the tokens that stand for
    images, known from `mm_token_type_ids` or by `image_tokens`, the ids that the model's configuration names.
    """
    found: dict[str, Pieces] = {}
    if is_bag(columns):
        ids, starts = columns["input_ids"], columns["offsets"].detach().cpu().to(torch.int64)
        sizes = torch.diff(starts, append=torch.tensor([len(ids)]))
        if len(starts) and (int(starts[0]) != 0 or bool((sizes < 0).any())):
            raise AnybatchError(
                f"{name} holds offsets that do not rise from 0 to at most {len(ids)}, the number of input_ids."
            )
        flat = [key for key, item in columns.items() if isinstance(item, Tensor) and item.shape[:1] == ids.shape[:1]]
        certain = ("input_ids", "per_sample_weights")
        found = {key: Pieces(sizes) for key in flat if key in certain or len(ids) != num_rows}
        found["offsets"] = Pieces(sizes, offsets=True)
    for grid_key in GRIDS:
        if columns.get(grid_key) is not None:
            found |= _by_grid(columns, grid_key, num_rows, name, image_tokens)
    if "image_grid_thw" not in columns and PIXELS in columns:
        found |= _by_image(columns, num_rows, name, image_tokens)
    return found


def is_bag(columns: Mapping[str, Any]) -> bool:
    """Whether words stand one after the other, with `offsets`."""
    ids, offsets = columns.get("input_ids"), columns.get("offsets")
    return isinstance(ids, Tensor) and isinstance(offsets, Tensor) and ids.ndim == 1 and offsets.ndim == 1


def _by_grid(
    columns: Mapping[str, Any], grid_key: str, num_rows: int, name: str, image_tokens: Collection[int]
) -> dict[str, Pieces]:
    """Grids image by image, and pixels patch by patch."""
    # 1. The images of each row.
    patches = torch.as_tensor(columns[grid_key]).detach().cpu().to(torch.int64).prod(dim=1)
    counts, tokens = _counts(columns, grid_key, num_rows, name), _tokens(columns, grid_key, num_rows, image_tokens)
    if counts is None and tokens is not None:
        counts = _images_of(tokens, patches)
    if counts is None and not any(key in columns for key in TOKENS):  # images alone are the rows
        counts = torch.ones(len(patches), dtype=torch.int64)
    if counts is None:
        raise _unclear(grid_key, grid_key, num_rows)
    _refuse_sum(counts, len(patches), grid_key, name)
    # 2. Their patches.
    owner = torch.repeat_interleave(torch.arange(num_rows), counts)
    sizes = torch.zeros(num_rows, dtype=torch.int64).index_add_(0, owner, patches)
    found, pixel_key = {}, GRIDS[grid_key]
    if pixel_key in columns:
        _refuse_sum(sizes, len(columns[pixel_key]), pixel_key, name)
        found[pixel_key] = Pieces(sizes, optional=True, cost=1.0)
    by_image = [key for key in _BY_IMAGE if grid_key == "image_grid_thw" and key in columns and key != pixel_key]
    for key in (grid_key, *by_image):
        _refuse_sum(counts, len(columns[key]), key, name)
        found[key] = Pieces(counts, optional=True)
    return found


def _by_image(columns: Mapping[str, Any], num_rows: int, name: str, image_tokens: Collection[int]) -> dict[str, Pieces]:
    """Images without grids: padded to the most of a row, or one after the other, or one per row."""
    mask, pixels = columns.get(_PADDED), columns[PIXELS]
    if isinstance(mask, Tensor) and mask.ndim == 4 and isinstance(pixels, Tensor) and len(mask) == num_rows:
        there = mask.flatten(2).any(dim=2).cpu()  # (B, images)
        sizes = (there * torch.arange(1, there.shape[1] + 1)).amax(dim=1) if there.numel() else there.sum(dim=1)
        # Rows of images alone all have some, and keep their key.
        piece = {"padded": True, "optional": any(key in columns for key in TOKENS)}
        return {PIXELS: Pieces(sizes, cost=_cost(pixels[:1, :1]), **piece), _PADDED: Pieces(sizes, **piece)}
    if any(key in columns for key in _BY_ROW):
        return {}
    # 1. Two ways to count: what is given, and what stands in the text (an image may be cut into several).
    counts = _counts(columns, "image_grid_thw", num_rows, name)
    tokens = _tokens(columns, "image_grid_thw", num_rows, image_tokens)
    of_text = None if tokens is None else _shares_of(tokens, len(pixels))
    ways = [way for way in (counts, of_text) if way is not None]
    by_image = [key for key in _BY_IMAGE if key in columns]
    if not ways and len(by_image) > 1 and any(key in columns for key in TOKENS):  # any number of images per row
        raise _unclear(PIXELS, "image_grid_thw", num_rows)
    # 2. The one that each tensor fits.
    found = {}
    for key in by_image if ways else ():
        fitting = next((way for way in ways if int(way.sum()) == len(columns[key])), ways[0])
        _refuse_sum(fitting, len(columns[key]), key, name)
        found[key] = Pieces(fitting, optional=True, cost=_cost(columns[key]) if key == PIXELS else 0.0)
    return found


def _counts(columns: Mapping[str, Any], grid_key: str, num_rows: int, name: str) -> Tensor | None:
    for key in COUNTS[grid_key]:
        if columns.get(key) is not None:
            counts = torch.as_tensor(columns[key]).detach().cpu().to(torch.int64)
            if counts.shape != (num_rows,) or bool((counts < 0).any()):
                raise AnybatchError(
                    f"{name} holds {key!r} of shape {tuple(counts.shape)}; one count for each of the {num_rows} rows "
                    "is expected."
                )
            return counts
    return None


def _tokens(columns: Mapping[str, Any], grid_key: str, num_rows: int, image_tokens: Collection[int]) -> Tensor | None:
    """(B,) tokens that stand for images (or videos) in each row, or None where nothing tells."""
    types, ids = columns.get(_TYPES), columns.get("input_ids")
    if isinstance(types, Tensor) and types.ndim == 2 and len(types) == num_rows:
        return (types == _TYPE_OF[grid_key]).sum(dim=1).cpu()
    if image_tokens and grid_key == "image_grid_thw" and isinstance(ids, Tensor) and ids.ndim == 2:
        return torch.isin(ids, torch.tensor(list(image_tokens), device=ids.device)).sum(dim=1).cpu()
    return None


def _images_of(tokens: Tensor, patches: Tensor) -> Tensor | None:
    """(B,) images of each row, if each row's tokens (one for so many patches) end where an image ends; else None."""
    total = int(tokens.sum())
    if not total or int(patches.sum()) % total:
        return None if total or len(patches) else torch.zeros_like(tokens)
    merged = int(patches.sum()) // total
    ends = torch.cat([patches.new_zeros(1), patches.cumsum(0)])
    reached = torch.searchsorted(ends, tokens.cumsum(0) * merged)
    if not torch.equal(ends[reached], tokens.cumsum(0) * merged):
        return None
    return torch.diff(reached, prepend=reached.new_zeros(1))


def _shares_of(tokens: Tensor, num_images: int) -> Tensor | None:
    """(B,) images of each row, if each image has as many tokens; else None."""
    total = int(tokens.sum())
    if not num_images or not total or total % num_images or bool((tokens % (total // num_images)).any()):
        return None
    return tokens // (total // num_images)


def _cost(pixels: Any) -> float:
    """Of one entry `(..., C, H, W)`, in tokens."""
    shape = tuple(getattr(pixels, "shape", ()))[1:]
    return math.prod(shape) / shape[-3] / _PATCH if len(shape) >= 3 and shape[-3] else 1.0


def _unclear(key: str, grid_key: str, num_rows: int) -> AnybatchError:
    return AnybatchError(
        f"{key!r} is counted by image, and nothing tells which of the {num_rows} rows an image belongs to. "
        f"Add {COUNTS[grid_key][0]!r}, a tensor with one count per row."
    )


def _refuse_sum(sizes: Tensor, total: int, key: str, name: str) -> None:
    if int(sizes.sum()) != total:
        raise AnybatchError(f"{name} holds {total} entries of {key!r}, but the rows count {int(sizes.sum())} of them.")
