"""Rows of the data set that occur several times in a batch, on any rank: one value each, the same on every rank and machine."""

from __future__ import annotations

import torch
from torch import Tensor

from anybatch import distributed


def mean_by_row(index: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    """The mean of each row's values over its occurrences on all ranks, added in a fixed order.

    Args:
        index: (b,) int64 rows; ranks may hold different numbers of them.
        values: (b,) float.

    Returns:
        rows (r,), ascending and distinct, and means (r,). The same on every rank.

    Cost: O(b log b). Collectives: one of sizes, two gathers of b numbers.
    """
    sizes = distributed.gather_sizes(len(index), index.device)
    index_all, values_all = distributed.gather_rows(index, sizes), distributed.gather_rows(values, sizes)
    rows, inverse, count = torch.unique(index_all, return_inverse=True, return_counts=True)
    order = torch.argsort(inverse, stable=True)
    occurrence = torch.arange(len(order), device=order.device) - (count.cumsum(0) - count)[inverse[order]]
    total = values_all.new_zeros(len(rows))
    for number in range(int(count.max()) if len(rows) else 0):  # one occurrence of each row at a time
        chosen = order[occurrence == number]
        total[inverse[chosen]] += values_all[chosen]
    return rows, total / count
