"""Temperatures of single examples: remembered and learned one by one, or read off the embedding by a small network."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from anybatch import distributed
from anybatch.errors import AnybatchError
from anybatch.losses.grouping import mean_by_row

Range = tuple[float, float]


class TemperatureMemory(nn.Module):
    """A temperature for each example and direction, moved along the derivative of its own objective.

        velocity_i    <- momentum velocity_i + (1 - momentum) clip(dF_i / d tau_i)
        temperature_i <- clamp(temperature_i - lr velocity_i, low, high)

    Args:
        num_rows: n.
        num_directions: Independent states a row.
        initial: The first temperature.
        limits: (low, high), the range that temperatures are kept in.
        lr: Step.
        momentum: Weight of the old velocity, in [0, 1).
        clip: Derivatives are limited to [-clip, clip].

    Cost: 8 bytes a row and direction. Collectives of an update: see `mean_by_row`.
    """

    def __init__(
        self,
        num_rows: int,
        num_directions: int,
        *,
        initial: float,
        limits: Range,
        lr: float,
        momentum: float,
        clip: float,
    ) -> None:
        super().__init__()
        check_limits(limits, initial)
        if lr <= 0 or not 0 <= momentum < 1 or clip <= 0:
            raise AnybatchError(
                f"temperature_lr is {lr}, momentum {momentum}, clip {clip}; expected positive numbers and a momentum in [0, 1)."
            )
        self.limits, self.lr, self.momentum, self.clip = limits, lr, momentum, clip
        self.values: Tensor
        self.velocity: Tensor
        self.register_buffer("values", torch.full((num_directions, num_rows), initial))
        self.register_buffer("velocity", torch.zeros(num_directions, num_rows))

    def of(self, index: Tensor, *, direction: int, dtype: torch.dtype) -> Tensor:
        """(B,) the temperatures of these rows."""
        return self.values[direction, index].to(dtype)

    def update(self, index: Tensor, gradient: Tensor, *, direction: int) -> None:
        """One step for these rows; a row that occurs several times takes the mean of its derivatives."""
        rows, mean = mean_by_row(index, gradient.clamp(-self.clip, self.clip).to(self.values.dtype))
        velocity = self.momentum * self.velocity[direction, rows] + (1 - self.momentum) * mean
        self.velocity[direction, rows] = velocity
        self.values[direction, rows] = (self.values[direction, rows] - self.lr * velocity).clamp(*self.limits)

    def mean(self) -> float:
        """The mean temperature over all rows and directions."""
        return self.values.mean().item()


class TemperatureNet(nn.Module):
    """A temperature from the embedding: low + (high - low) * sigmoid(net(embedding)), one network a direction.

    The embedding is a constant to the network: it learns from the temperatures' derivatives alone. Every rank evaluates it
    on the rows of all ranks, so that its parameters receive the full gradient without a collective in the backward pass.

    Args:
        dimensions: Width of the embeddings.
        num_directions: Networks.
        initial: The temperature that every embedding has at first.
        limits: (low, high).
        hidden: Width of the hidden layer.
        net: One module a direction that takes (B, D) to (B, 1), in place of the default of two layers.

    Cost: parameters of `net`. Collectives a direction: one of sizes, a gather of the embeddings and one of (B,) numbers.
    """

    def __init__(
        self,
        dimensions: int,
        num_directions: int,
        *,
        initial: float,
        limits: Range,
        hidden: int = 64,
        net: nn.ModuleList | None = None,
    ) -> None:
        super().__init__()
        check_limits(limits, initial)
        if net is not None and len(net) != num_directions:
            raise AnybatchError(f"net holds {len(net)} modules; expected one a direction, {num_directions}.")
        self.limits = limits
        low, high = limits
        share = min(max((initial - low) / (high - low), 1e-3), 1 - 1e-3)
        self.net = nn.ModuleList() if net is None else net
        for _ in range(num_directions if net is None else 0):
            last = nn.Linear(hidden, 1)
            nn.init.zeros_(last.weight)
            nn.init.constant_(last.bias, math.log(share / (1 - share)))
            self.net.append(nn.Sequential(nn.Linear(dimensions, hidden), nn.Tanh(), last))

    def of(self, embeddings: Tensor, *, direction: int) -> tuple[Tensor, slice]:
        """The temperatures of the rows of all ranks, differentiable in the network, and which of them are this rank's.

        Args:
            embeddings: (B, D) of this rank.
            direction: Which network.
        """
        sizes = distributed.gather_sizes(len(embeddings), embeddings.device)
        embeddings_all = distributed.gather_rows(embeddings, sizes)
        parameter = next(self.net[direction].parameters())
        low, high = self.limits
        raw = self.net[direction](embeddings_all.to(parameter.dtype)).reshape(-1)
        first = sum(sizes[: distributed.rank()])
        own = slice(first, first + len(embeddings))
        return (low + (high - low) * raw.sigmoid()).to(embeddings.dtype), own


def check_limits(limits: Range, initial: float) -> None:
    """Refuse a range that is empty or does not hold the first temperature."""
    low, high = limits
    if not 0 < low < high or not low <= initial <= high:
        raise AnybatchError(
            f"temperature_range is {limits} and the first temperature {initial}; expected 0 < low < high and a temperature between them."
        )
