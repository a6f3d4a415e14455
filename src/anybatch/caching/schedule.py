"""Which rows go through the encoder together, and how many graphs stay alive. Sorting by length takes padded over
real tokens from 2-5 down to about 1, worth more than the forward passes that caching adds.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from anybatch.caching.rows import NO_LENGTHS, rows_of
from anybatch.core.errors import AnybatchError


def plan_mini_batches(
    inputs: Any, *, mini_batch_size: int | None = 32, max_tokens: int | None = None, sort_by_length: bool = True
) -> list[Tensor]:
    """Split the rows of a batch into mini-batches, the longest rows first; int64 on the CPU, every row exactly once.

    A mini-batch is closed when it has `mini_batch_size` rows, or when another row would take `rows * longest row` (its
    padded tokens) and the patches of its images past `max_tokens`; a single longer row still gets one of its own. Rows
    of equal length keep their order. Where there are no lengths the order is kept, and images are limited by
    `mini_batch_size` alone.
    """
    slicer = rows_of(inputs)
    check_limits(mini_batch_size=mini_batch_size, max_tokens=max_tokens)
    lengths = slicer.lengths
    if max_tokens is not None and lengths is None and not (slicer.images and mini_batch_size is not None):
        raise AnybatchError(f"max_tokens counts tokens, but {NO_LENGTHS}. Use mini_batch_size.")
    order = torch.arange(slicer.num_rows)
    if lengths is None:
        assert mini_batch_size is not None
        return list(order.split(mini_batch_size)) if len(order) else []
    if sort_by_length:
        order = torch.sort(lengths, descending=True, stable=True).indices
    sizes: list[int] = []
    longest = count = visual = 0
    patches = [0] * len(order) if slicer.patches is None else slicer.patches[order].tolist()
    for length, of_images in zip(lengths[order].tolist(), patches):
        wider = max(longest, length)
        tokens = wider * (count + 1) + visual + of_images
        if count == mini_batch_size or (max_tokens is not None and count > 0 and tokens > max_tokens):
            sizes.append(count)
            wider, count, visual = length, 0, 0
        longest, count, visual = wider, count + 1, visual + of_images
    return list(order.split([*sizes, count])) if count else []


def check_limits(
    *, mini_batch_size: int | str | None = None, max_tokens: int | None = None, keep_graphs: int | float | str = 0
) -> None:
    """Refuse settings of the cached step that no batch could use, before there is one."""
    for name, value in (("mini_batch_size", mini_batch_size), ("keep_graphs", keep_graphs)):
        if isinstance(value, str) and value != "auto":
            raise AnybatchError(f'{name} is {value!r}; give a number, or "auto".')
    for name, value in (("mini_batch_size", mini_batch_size), ("max_tokens", max_tokens)):
        whole = isinstance(value, (int, np.integer)) and not isinstance(value, bool) and value >= 1
        if value not in (None, "auto") and not whole:
            raise AnybatchError(f"{name} is {value!r}; expected a whole number of at least 1.")
    if mini_batch_size is None and max_tokens is None:
        raise AnybatchError("mini_batch_size and max_tokens are both None: give at least one limit to the mini-batch.")
    if keep_graphs != "auto":
        count_kept(keep_graphs, 1)  # type: ignore[arg-type]


def count_kept(keep_graphs: int | float, num_mini_batches: int) -> int:
    """How many mini-batches keep their graphs: a count (int) or a fraction of them (float in [0, 1], rounded)."""
    if isinstance(keep_graphs, int) and not isinstance(keep_graphs, bool) and keep_graphs >= 0:
        return min(keep_graphs, num_mini_batches)
    if not isinstance(keep_graphs, float) or not 0.0 <= keep_graphs <= 1.0:
        raise AnybatchError(
            f"keep_graphs is {keep_graphs!r}; expected a number of mini-batches (an int, 0 or more), or a fraction of "
            "them from 0.0 (replay all) to 1.0 (plain training)."
        )
    return int(keep_graphs * num_mini_batches + 0.5)
