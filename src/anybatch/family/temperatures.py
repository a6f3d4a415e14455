"""Temperatures read off the embedding by a small network, and the check of a range of temperatures."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from anybatch.core import distributed
from anybatch.core.errors import AnybatchError
from anybatch.losses.example_values import Range


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

    A network that draws random numbers, for dropout, is asked once a call. Under several ranks each rank draws its own, and the gradients of its
    parameters then differ from rank to rank: average them, as DDP does.

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
        parameter = next(self.net[direction].parameters(), embeddings_all)  # a network may have none
        low, high = self.limits
        with torch.autocast(embeddings.device.type, enabled=False):
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
