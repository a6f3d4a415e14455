"""Where the tokens and the images of each row are, in tensors that padding widens or that are not counted by row."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from anybatch.core.errors import AnybatchError

MASK = "attention_mask"
PIXELS = "pixel_values"  # no sequence, whatever its axes are
_SEQUENCES = frozenset(
    (
        *("input_ids", "token_ids", MASK, "token_type_ids", "mm_token_type_ids", "position_ids"),
        *("special_tokens_mask", "global_attention_mask", "query_expansion_positions"),
    )
)  # (B, T) by their name: their second axis is the sequence
GRIDS = {"image_grid_thw": PIXELS, "video_grid_thw": "pixel_values_videos"}  # image by image, and patch by patch
COUNTS = {
    "image_grid_thw": ("num_images_per_sample", "images_per_sample"),
    "video_grid_thw": ("num_videos_per_sample", "videos_per_sample"),
}
_BY_IMAGE = (PIXELS, "image_sizes", "image_position_ids")  # of models that have no grid
_BY_ROW = ("pixel_attention_mask", "aspect_ratio_ids")  # where they are, the images of a row are padded to as many
Trim = Literal["both", "trailing", "none"]


@dataclass
class Spans:
    """The tokens of each row: from column `first` `(B,)` up to `last` `(B,)`, of `width`."""

    first: Tensor
    last: Tensor
    width: int
    positions: bool = False  # given with the tokens, so that they need not be counted from the first column
    multiple: int = 1  # of every width

    def lengths(self, trim: Trim) -> Tensor:
        """(B,) columns that a row alone would take."""
        if trim == "none":
            return torch.full_like(self.last, self.width)
        first = self.first if self._cuts_leading(trim) else 0
        return self._up((self.last - first).clamp(min=1 if self.multiple > 1 else 0))

    def window(self, rows: Tensor, trim: Trim) -> tuple[int, int, int]:
        """The width, and the first and last column that these rows need."""
        if trim == "none":
            return self.width, 0, self.width
        start = int(self.first[rows].min()) if self._cuts_leading(trim) else 0
        return self.width, start, start + self._up(max(1, int(self.last[rows].max()) - start))

    def _cuts_leading(self, trim: Trim) -> bool:
        return trim == "both" or self.positions

    def _up(self, sizes: Any) -> Any:
        return -(-sizes // self.multiple) * self.multiple


def has_mask(columns: Mapping[str, Any]) -> bool:
    """Whether a mask tells the tokens of each row."""
    mask = columns.get(MASK)
    return isinstance(mask, Tensor) and mask.ndim == 2


def spans_of(columns: Mapping[str, Any], num_rows: int, multiple: int = 1) -> Spans | None:
    """The columns that each row needs, or None where trimming is not known to be safe."""
    if not has_mask(columns) or len(columns[MASK]) != num_rows or columns[MASK].shape[1] == 0:
        return None
    mask: Tensor = columns[MASK]
    width = mask.shape[1]
    active: Tensor = mask.bool()
    for key, item in columns.items():
        if not isinstance(item, Tensor) or key in (MASK, PIXELS) or width not in item.shape[1:]:
            continue
        tokens = key in _SEQUENCES and item.ndim == 2
        embedded = key == "inputs_embeds" and item.ndim == 3 and item.shape[1] == width
        if not (tokens or embedded):
            return None
        # Expansion tokens are masked for attention and scored all the same.
        if item.dtype == torch.bool and item.shape == mask.shape:
            active = active | item
    numbers = torch.arange(1, width + 1, device=mask.device)
    last = (active * numbers).amax(dim=1).cpu()
    first = torch.minimum(torch.where(active, numbers - 1, width).amin(dim=1).cpu(), last)
    positions = columns.get("position_ids")
    given = isinstance(positions, Tensor) and positions.shape == mask.shape
    return Spans(first, last, width, positions=given, multiple=multiple)


@dataclass
class Pieces:
    """A tensor in which a row has any number of entries, one row after the other."""

    sizes: Tensor  # (B,) int64 on the CPU
    offsets: bool = False  # the tensor holds the starts themselves
    optional: bool = False  # left out where the rows have no entry

    def take(self, value: Any, rows: Tensor) -> Any:
        """The entries of `rows`, or their new starts."""
        sizes = self.sizes[rows]
        starts = sizes.cumsum(0) - sizes
        if self.offsets:
            return starts.to(value.device, value.dtype)
        begins = (self.sizes.cumsum(0) - self.sizes)[rows]
        places = torch.repeat_interleave(begins - starts, sizes) + torch.arange(int(sizes.sum()))
        if isinstance(value, Tensor):
            return value.index_select(0, places.to(value.device))
        return value[places.numpy()] if isinstance(value, np.ndarray) else [value[place] for place in places.tolist()]


def pieces_of(columns: Mapping[str, Any], num_rows: int, name: str) -> dict[str, Pieces]:
    """What in a mapping is not counted by row, where something tells whose it is: bags of words, images, videos."""
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
        found |= _pieces_of_images(columns, grid_key, num_rows, name)
    return found


def _pieces_of_images(columns: Mapping[str, Any], grid_key: str, num_rows: int, name: str) -> dict[str, Pieces]:
    found: dict[str, Pieces] = {}
    grid, pixel_key = columns.get(grid_key), GRIDS[grid_key]
    counts = _counts(columns, grid_key, num_rows, name)
    by_image = [key for key in _BY_IMAGE if grid_key == "image_grid_thw" and key in columns]
    padded = any(key in columns for key in _BY_ROW)
    rows_are_images = not any(key in columns for key in (MASK, "input_ids", "inputs_embeds"))
    # Sizes beside pixels: a row has any number of images.
    unclear = grid_key if grid is not None else PIXELS if len(by_image) > 1 and not padded else None
    if unclear is not None and counts is None and not rows_are_images:
        raise AnybatchError(
            f"{unclear!r} is counted by image, and nothing tells which of the {num_rows} rows an image belongs to. "
            f"Add {COUNTS[grid_key][0]!r}, a tensor with one count per row."
        )
    if grid is not None:
        grid = torch.as_tensor(grid).detach().cpu()
        counts = torch.ones(len(grid), dtype=torch.int64) if counts is None else counts
        _refuse_sum(counts, len(grid), grid_key, name)
        owner = torch.repeat_interleave(torch.arange(num_rows), counts)
        sizes = torch.zeros(num_rows, dtype=torch.int64).index_add_(0, owner, grid.prod(dim=1).to(torch.int64))
        if pixel_key in columns:
            _refuse_sum(sizes, len(columns[pixel_key]), pixel_key, name)
            found[pixel_key] = Pieces(sizes, optional=True)
        by_image = [grid_key, *(key for key in by_image if key != pixel_key)]
    if counts is not None and not padded:
        for key in by_image:
            _refuse_sum(counts, len(columns[key]), key, name)
            found[key] = Pieces(counts, optional=True)
    return found


def is_bag(columns: Mapping[str, Any]) -> bool:
    """Whether words stand one after the other, with `offsets`."""
    ids, offsets = columns.get("input_ids"), columns.get("offsets")
    return isinstance(ids, Tensor) and isinstance(offsets, Tensor) and ids.ndim == 1 and offsets.ndim == 1


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


def _refuse_sum(sizes: Tensor, total: int, key: str, name: str) -> None:
    if int(sizes.sum()) != total:
        raise AnybatchError(f"{name} holds {total} entries of {key!r}, but the rows count {int(sizes.sum())} of them.")
