"""Which rows go through the encoder together, and how many graphs stay alive.

Sorting by length inside the big batch takes padded over real tokens from 2-5 down to about 1, which is worth more than
the forward passes that caching adds.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from anybatch.caching.rows import RowSlicer
from anybatch.core.errors import AnybatchError


def plan_micro_batches(
    inputs: Any, *, micro_batch: int | None = 32, max_tokens: int | None = None, sort_by_length: bool = True
) -> list[Tensor]:
    """Split the rows of a batch into micro-batches, the longest rows first.

    A micro-batch is closed when it has `micro_batch` rows, or when another row would take `rows * longest row` (its
    padded tokens) past `max_tokens`. Rows of equal length keep their order.

    Args:
        inputs: The batch, or a `RowSlicer` of it.
        micro_batch: The most rows in a micro-batch; None: no limit (then `max_tokens` is needed).
        max_tokens: The most padded tokens in a micro-batch; a single longer row still gets one of its own. Images
            have no tokens to count: `micro_batch` alone holds for them.
        sort_by_length: Longest first; False keeps the order of the batch. Without an attention mask there is no
            length and the order is kept.

    Returns:
        Row indices, int64 on the CPU; every row exactly once.

    Raises:
        AnybatchError: No limit given, a limit below one, or `max_tokens` for inputs of which nothing tells the lengths.

    Cost: one sort of B lengths.
    """
    slicer = inputs if isinstance(inputs, RowSlicer) else RowSlicer(inputs)
    check_limits(micro_batch=micro_batch, max_tokens=max_tokens)
    lengths = slicer.lengths
    if max_tokens is not None and lengths is None and not (slicer.images and micro_batch is not None):
        raise AnybatchError(
            "max_tokens counts tokens, but nothing tells the lengths of these inputs: they have no two-dimensional "
            "attention_mask, or hold a tensor of unknown meaning with an axis as long as it. Use micro_batch."
        )
    order = torch.arange(slicer.num_rows)
    if lengths is None:
        assert micro_batch is not None
        return list(order.split(micro_batch)) if len(order) else []
    if sort_by_length:
        order = torch.sort(lengths, descending=True, stable=True).indices
    sizes: list[int] = []
    longest = count = 0
    for length in lengths[order].tolist():
        wider = max(longest, length)
        full = micro_batch is not None and count == micro_batch
        heavy = max_tokens is not None and count > 0 and wider * (count + 1) > max_tokens
        if full or heavy:
            sizes.append(count)
            wider, count = length, 0
        longest, count = wider, count + 1
    return list(order.split([*sizes, count])) if count else []


def check_limits(
    *,
    micro_batch: int | str | None = None,
    max_tokens: int | None = None,
    keep_graphs: int | float | str = 0,
    pad_to_multiple: int | None = None,
) -> None:
    """Refuse settings of the cached step that no batch could use, before there is one.

    Raises:
        AnybatchError: A word other than "auto"; not a whole number, or below 1; `keep_graphs` as in `count_kept`; no
            limit at all.
    """
    for name, value in (("micro_batch", micro_batch), ("keep_graphs", keep_graphs)):
        if isinstance(value, str) and value != "auto":
            raise AnybatchError(f'{name} is {value!r}; give a number, or "auto".')
    for name, value in (("micro_batch", micro_batch), ("max_tokens", max_tokens), ("pad_to_multiple", pad_to_multiple)):
        if value is None or value == "auto":
            continue
        if isinstance(value, bool) or not isinstance(value, (int, np.integer)):
            raise AnybatchError(f"{name} is {value!r}; a whole number is expected.")
        if value < 1:
            raise AnybatchError(f"{name} is {value}; it must be at least 1.")
    if micro_batch is None and max_tokens is None:
        raise AnybatchError("micro_batch and max_tokens are both None: give at least one limit to the micro-batch.")
    if keep_graphs != "auto":
        count_kept(keep_graphs, 1)  # type: ignore[arg-type]


def count_kept(keep_graphs: int | float, num_micro_batches: int) -> int:
    """How many micro-batches keep their graphs: a count (int) or a fraction of them (float in [0, 1], rounded).

    Raises:
        AnybatchError: Negative, a fraction above 1, or not a number.
    """
    if isinstance(keep_graphs, bool) or not isinstance(keep_graphs, (int, float)):
        raise AnybatchError(
            f"keep_graphs is {keep_graphs!r}; give a number of micro-batches or a fraction such as 0.5."
        )
    if isinstance(keep_graphs, int):
        if keep_graphs < 0:
            raise AnybatchError(f"keep_graphs is {keep_graphs}; a number of micro-batches cannot be negative.")
        return min(keep_graphs, num_micro_batches)
    if not 0.0 <= keep_graphs <= 1.0:
        raise AnybatchError(
            f"keep_graphs is {keep_graphs}; a fraction lies between 0.0 (replay all) and 1.0 (plain training). "
            "For a number of micro-batches pass an int."
        )
    return int(keep_graphs * num_micro_batches + 0.5)
