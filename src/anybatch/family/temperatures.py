"""Temperatures of single rows: learned, or read off the embedding. The dual of a distributionally robust loss.

The worst-case mean of the differences d_ij = s_ij - s_ip over distributions p_i of negatives that stay within KL(p_i,
uniform) <= rho is

    F_i = min over tau_i of  tau_i (log(eps + u_i(tau_i)) + rho),     u_i = mean_j exp(d_ij / tau_i)

so that a row whose negatives are many and close gets a high temperature, and a rare one a low one. With p_ij = exp(d_ij
/ tau_i) / (k (eps + u_i)):

    dF_i / d tau_i = log(eps + u_i) + rho - sum_j p_ij d_ij / tau_i
                   = rho - KL(p_i, uniform) at gamma = 1, eps = 0
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from anybatch.core import distributed
from anybatch.core.errors import AnybatchError
from anybatch.family.per_row import PerRowValues, Range
from anybatch.losses.engine import Side, SoftmaxStats
from anybatch.losses.parts import Batch, Temperature, check_rho, times_temperature


class RobustTemperature(Temperature):
    """Abstract: temperatures in a range, of which each is a factor of its row's objective."""

    def __init__(self, num_rows: int | None, *, initial: float, limits: Range, rho: float) -> None:
        super().__init__(num_rows)
        check_limits(limits, initial)
        check_rho(rho)
        self.limits, self.rho = limits, rho

    def ask(self, side: Side, batch: Batch, direction: int) -> Side:
        """See `Part.ask`."""
        return times_temperature(side, self.rho, len(batch.anchors))


class PerRowTemperature(RobustTemperature):
    """A temperature per row and direction, stepped after the gradient was taken; for `steps` see `PerRowValues`."""

    needs_index = True

    def __init__(
        self, num_rows: int, directions: int, *, initial: float, limits: Range, rho: float, **steps: float
    ) -> None:
        super().__init__(num_rows, initial=initial, limits=limits, rho=rho)
        self.rows = PerRowValues(num_rows, directions, initial=initial, limits=limits, **steps)

    @property
    def value(self) -> float:
        """The mean."""
        return self.rows.values.mean().item()

    def of(self, batch: Batch, direction: int) -> Tensor:
        """See `Temperature.of`."""
        return self.rows.of(batch.rows, direction=direction, dtype=batch.anchors.dtype)

    def learn(self, batch: Batch, sides: tuple[Side, ...], stats: tuple[SoftmaxStats, ...], loss: Tensor) -> Tensor:
        """See `Part.learn`."""
        for direction, figures in enumerate(stats) if batch.updating else ():
            heard = figures.num_negatives > 0
            self.rows.update(batch.rows[heard], _derivative(figures)[heard], direction=direction)
        return loss


class NetworkTemperature(RobustTemperature):
    """A temperature from the embedding: low + (high - low) * sigmoid(net(embedding)), one network a direction.

    The embedding is a constant to the network: it learns from the temperatures' derivatives alone. Every rank evaluates
    it on the rows of all ranks, so that its parameters receive the full gradient without a collective in the backward
    pass. With dropout each rank draws its own numbers: average the gradients over ranks, as DDP does.

    Cost: parameters of `net`. Collectives a direction: two of sizes, a gather of the embeddings and one of (B,)
    numbers.
    """

    def __init__(
        self,
        dimensions: int,
        directions: int,
        *,
        initial: float,
        limits: Range,
        rho: float,
        hidden: int = 64,
        net: nn.ModuleList | None = None,
    ) -> None:
        super().__init__(None, initial=initial, limits=limits, rho=rho)
        if net is not None and len(net) != directions:
            raise AnybatchError(f"net holds {len(net)} modules; expected one a direction, {directions}.")
        self._mean = initial
        low, high = limits
        share = min(max((initial - low) / (high - low), 1e-3), 1 - 1e-3)
        self.net = nn.ModuleList() if net is None else net
        for _ in range(directions if net is None else 0):
            last = nn.Linear(hidden, 1)
            nn.init.zeros_(last.weight)
            nn.init.constant_(last.bias, math.log(share / (1 - share)))
            self.net.append(nn.Sequential(nn.Linear(dimensions, hidden), nn.Tanh(), last))

    @property
    def value(self) -> float:
        """The mean of the last call."""
        return self._mean

    def of(self, batch: Batch, direction: int) -> Tensor:
        """See `Temperature.of`; those of all ranks' rows, attached to the network, are kept for `learn`."""
        embeddings = batch.queries(direction)
        sizes = distributed.gather_sizes(len(embeddings), embeddings.device)
        embeddings_all = distributed.gather_rows(embeddings, sizes)
        parameter = next(self.net[direction].parameters(), embeddings_all)  # a network may have none
        low, high = self.limits
        with torch.autocast(embeddings.device.type, enabled=False):
            raw = self.net[direction](embeddings_all.to(parameter.dtype)).reshape(-1)
        batch.kept[direction] = (low + (high - low) * raw.sigmoid()).to(embeddings.dtype)
        return batch.kept[direction][distributed.own_part(sizes)].detach()

    def learn(self, batch: Batch, sides: tuple[Side, ...], stats: tuple[SoftmaxStats, ...], loss: Tensor) -> Tensor:
        """See `Part.learn`."""
        if not torch.is_grad_enabled():
            return loss
        value = loss.detach()
        for direction, figures in enumerate(stats):
            gradient = _derivative(figures)
            everything = batch.kept[direction]  # not evaluated again: a network with dropout would draw other masks
            sizes = distributed.gather_sizes(len(gradient), gradient.device)
            term = (everything * distributed.gather_rows(gradient, sizes)).sum()
            loss = loss + term / (len(everything) * len(sides))
        self._mean = sum(batch.kept[direction].detach().mean().item() for direction in range(len(sides))) / len(sides)
        return loss - loss.detach() + value  # the network's terms have gradients, and no value of their own


def check_limits(limits: Range, initial: float) -> None:
    """Refuse a range that is empty or does not hold the first temperature."""
    low, high = limits
    if not 0 < low < high or not low <= initial <= high:
        raise AnybatchError(
            f"temperature_range is {limits} and the first temperature {initial}; expected 0 < low < high and a "
            "temperature between them."
        )


def _derivative(figures: SoftmaxStats) -> Tensor:
    """(B,) dF_i / d tau_i; 0 for a row of which the batch says nothing."""
    assert figures.temperature_gradient is not None
    return torch.where(figures.num_negatives > 0, figures.objective + figures.temperature_gradient, 0.0)
