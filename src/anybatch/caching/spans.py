"""Where the tokens of each row are, in tensors that padding widens."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from anybatch.caching.pieces import PIXELS

MASK = "attention_mask"
_SEQUENCES = frozenset(
    (
        *("input_ids", "token_ids", MASK, "token_type_ids", "mm_token_type_ids", "position_ids"),
        *("special_tokens_mask", "global_attention_mask", "query_expansion_positions"),
    )
)  # (B, T) by their name: their second axis is the sequence
Trim = Literal["both", "trailing", "none"]


@dataclass
class Spans:
    """The tokens of each row: from column `first` `(B,)` up to `last` `(B,)`, of `width`."""

    first: Tensor
    last: Tensor
    width: int
    positions: bool = False  # given with the tokens, so that they need not be counted from the first column

    def lengths(self, trim: Trim) -> Tensor:
        """(B,) columns that a row alone would take."""
        if trim == "none":
            return torch.full_like(self.last, self.width)
        first = self.first if self._cuts_leading(trim) else 0
        return (self.last - first).clamp(min=0)

    def window(self, rows: Tensor, trim: Trim) -> tuple[int, int, int]:
        """The width, and the first and last column that these rows need."""
        if trim == "none":
            return self.width, 0, self.width
        start = int(self.first[rows].min()) if self._cuts_leading(trim) else 0
        return self.width, start, max(start + 1, int(self.last[rows].max()))

    def _cuts_leading(self, trim: Trim) -> bool:
        return trim == "both" or self.positions


def has_mask(columns: Mapping[str, Any]) -> bool:
    """Whether a mask tells the tokens of each row."""
    mask = columns.get(MASK)
    return isinstance(mask, Tensor) and mask.ndim == 2


def spans_of(columns: Mapping[str, Any], num_rows: int, pieces: Collection[str] = ()) -> Spans | None:
    """The columns that each row needs, or None where trimming is not known to be safe. `pieces` are no sequences."""
    if not has_mask(columns) or len(columns[MASK]) != num_rows or columns[MASK].shape[1] == 0:
        return None
    mask: Tensor = columns[MASK]
    width = mask.shape[1]
    active: Tensor = mask.bool()
    for key, item in columns.items():
        if not isinstance(item, Tensor) or key in (MASK, PIXELS, *pieces) or width not in item.shape[1:]:
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
    return Spans(first, last, width, positions=given)
