"""A learned number per row and direction, in buffers: temperatures, margins, thresholds."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from anybatch.core import distributed
from anybatch.core.errors import AnybatchError
from anybatch.losses.state import State, occurrences

Range = tuple[float, float]


class PerRowValues(State):
    """A number per row and direction, moved along the derivative of its own objective.

        velocity_i <- momentum velocity_i + (1 - momentum) clip(derivative_i)
        value_i    <- clamp(value_i - lr velocity_i, low, high)

    Args:
        num_rows: n.
        directions: Independent values per row.
        initial: The first value; NaN for none, to be given by `start`.
        limits: (low, high), the range that values are kept in.
        lr: Step.
        momentum: Weight of the old velocity, in [0, 1).
        clip: Derivatives are limited to [-clip, clip].

    Under several ranks every rank holds all values, and all make the same update, in float32 or better.

    Cost: 8 bytes a row and direction. Collectives of an update: one of sizes, two gathers of B numbers.
    """

    values: Tensor
    velocity: Tensor

    def __init__(
        self,
        num_rows: int,
        directions: int,
        *,
        initial: float,
        limits: Range,
        lr: float,
        momentum: float = 0.0,
        clip: float = math.inf,
    ) -> None:
        super().__init__(num_rows)
        if lr <= 0 or not 0 <= momentum < 1 or clip <= 0:
            raise AnybatchError(
                f"The learning rate of the rows' values is {lr}, their momentum {momentum}, the clip {clip}; expected "
                "positive numbers and a momentum in [0, 1)."
            )
        self.limits, self.lr, self.momentum, self.clip = limits, lr, momentum, clip
        self.register_rows("values", fresh=initial, directions=directions)
        self.register_rows("velocity", fresh=0.0, directions=directions)

    def of(self, index: Tensor, *, direction: int, dtype: torch.dtype) -> Tensor:
        """(B,) the values of these rows."""
        return self.values[direction, index].to(dtype)

    def update(self, index: Tensor, gradient: Tensor, *, direction: int) -> None:
        """One step for rows (b,) by the derivatives (b,) of their objectives, the mean of a row that occurs often."""
        gradient = torch.where(gradient.isfinite(), gradient.clamp(-self.clip, self.clip), torch.nan)
        rows, mean = _mean_by_row(index, gradient.to(self.values.dtype))
        velocity = self.momentum * self.velocity[direction, rows] + (1 - self.momentum) * mean
        self.velocity[direction, rows] = velocity
        self.values[direction, rows] = (self.values[direction, rows] - self.lr * velocity).clamp(*self.limits)

    def start(self, index: Tensor, values: Tensor, *, direction: int) -> None:
        """Give rows their first value, the mean over their occurrences."""
        rows, mean = _mean_by_row(index, values.to(self.values.dtype))
        self.values[direction, rows] = mean.clamp(*self.limits)


def _mean_by_row(index: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    """Distinct rows (r,), ascending, and the mean of each one's values on all ranks, added in a fixed order.

    Those whose mean is no number are left out: a step that has diverged must leave no NaN behind.
    """
    sizes = distributed.gather_sizes(len(index), index.device)
    index_all, values_all = distributed.gather_rows(index, sizes), distributed.gather_rows(values, sizes)
    rows, inverse, count = torch.unique(index_all, return_inverse=True, return_counts=True)
    total = values_all.new_zeros(len(rows))
    for chosen in occurrences(inverse, len(rows)):
        total[inverse[chosen]] += values_all[chosen]
    mean = total / count
    fine = mean.isfinite()
    return rows[fine], mean[fine]
