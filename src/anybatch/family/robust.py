"""SogCLR whose objective is multiplied by a temperature that is learned: the dual of a distributionally robust loss.

The worst-case mean of the similarity gaps d_ij over distributions p_i of negatives that stay within KL(p_i, uniform) <= rho is

    F_i = min over tau_i of  tau_i (log(eps + g_i(tau_i)) + rho),     g_i = mean_j exp(d_ij / tau_i)

so that an example whose negatives are many and close gets a high temperature, and a rare one a low one.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from anybatch.core import distributed
from anybatch.core.errors import AnybatchError
from anybatch.family.temperatures import TemperatureNet, check_limits
from anybatch.losses.base import Batch, Direction
from anybatch.losses.engine import TILE_BYTES, Rule, Side, SoftmaxStats
from anybatch.losses.example_values import ExampleValues, Range
from anybatch.losses.per_example import Keys
from anybatch.losses.schedule import GammaSchedule
from anybatch.losses.sogclr import Remembering, SogCLR


class RobustSogCLR(SogCLR):
    """The shared part of FastCLIP, iSogCLR and TempNet.

        u_i      <- (1 - gamma) u_i + gamma * mean over the batch's negatives of exp(d_ij / tau_i)
        F         = mean_i tau_i (log(eps + u_i) + rho)
        dF/d s_ij = p_ij / B,                   p_ij = exp(d_ij / tau_i) / (k_i (eps + u_i))
        dF/d tau_i = log(eps + u_i) + rho - sum_j p_ij d_ij / tau_i

    The last line, times B, is rho - KL(p_i, uniform) when gamma = 1 and eps = 0. Where d_ij = s_ij - s_ip, and "both"
    directions are the mean of two such F.

    Args:
        num_rows: n.
        rho: Radius of the ball of distributions. None: the objective is mean_i log(eps + u_i) without the temperature's factor.
        source: Temperatures of single examples; None for one global temperature, fixed or learnable.
        temperature_range: Of a learnable global temperature, in place of `ContrastiveLoss`'s floor.
        gamma, eps, temperature, learnable_temperature, direction, normalize, tile_bytes: See `SogCLR`.
    """

    def __init__(
        self,
        num_rows: int,
        *,
        rho: float | None,
        source: ExampleValues | TemperatureNet | None = None,
        temperature_range: Range,
        gamma: float | GammaSchedule,
        eps: float | None,
        temperature: float,
        learnable_temperature: bool,
        direction: Direction,
        normalize: bool,
        tile_bytes: int = TILE_BYTES,
    ) -> None:
        if learnable_temperature or source is not None:
            # before anything is learned, so that a range that excludes the first temperature is not silently applied
            check_limits(temperature_range, temperature)
        super().__init__(
            num_rows,
            gamma=gamma,
            eps=eps,
            temperature=temperature,
            learnable_temperature=learnable_temperature,
            min_temperature=temperature_range[0],
            direction=direction,
            normalize=normalize,
            tile_bytes=tile_bytes,
        )
        if rho is not None and rho < 0:
            raise AnybatchError(f"rho is {rho}; expected 0 or more (published: 6 to 16).")
        self.rho = rho
        self.source = source
        self.temperature_range = temperature_range

    def grow(self, num_rows: int, *, keys: Keys | None = None) -> None:
        """See `ContrastiveLoss.grow`."""
        super().grow(num_rows, keys=keys)
        if isinstance(self.source, ExampleValues):
            self.source.grow_buffers(num_rows)

    @property
    def temperature(self) -> float:
        """The temperature at this moment; with one a row their mean, with a network that of the last call."""
        if isinstance(self.source, ExampleValues):
            return self.source.values.mean().item()
        return super().temperature if self.source is None else self._temperature

    def _rule(self, index: Tensor | None, *, direction: int, normalised: bool, dimensions: int) -> Rule:
        rule = super()._rule(index, direction=direction, normalised=normalised, dimensions=dimensions)
        assert isinstance(rule, Remembering)
        return replace(rule, constant=self.rho or 0.0)

    def _temperatures(self, batch: Batch, *, direction: int) -> Tensor:
        if isinstance(self.source, ExampleValues):
            assert batch.index is not None  # the rule was made first, and it checks
            return self.source.of(batch.index, direction=direction, dtype=batch.anchors.dtype)
        if isinstance(self.source, TemperatureNet):
            everything, own = self.source.of(batch.queries(direction), direction=direction)
            batch.kept[direction] = everything
            return everything[own].detach()
        return super()._temperatures(batch, direction=direction)

    def _side(self, batch: Batch, *, direction: int) -> Side:
        side = super()._side(batch, direction=direction)
        if self.rho is None:
            return side
        return replace(side, row_weight=side.temperature.detach().expand(len(batch.anchors)))

    def _finish(self, batch: Batch, sides: tuple[Side, ...], stats: tuple[SoftmaxStats, ...], loss: Tensor) -> Tensor:
        loss = super()._finish(batch, sides, stats, loss)
        if self.rho is None or not torch.is_grad_enabled():
            return loss
        if self.source is None:
            # The engine saw the factor tau as a constant; its own derivative is the mean of the objectives.
            temperature = sides[0].temperature
            return loss + (temperature - temperature.detach()) * (loss.detach() / temperature.detach())
        value, means = loss.detach(), []
        for direction, figures in enumerate(stats):
            assert figures.temperature_gradient is not None
            gradient = figures.objective + figures.temperature_gradient
            gradient = torch.where(figures.num_negatives > 0, gradient, 0.0)
            if isinstance(self.source, TemperatureNet):
                everything = batch.kept[direction]  # not evaluated again: a network with dropout would draw other masks
                sizes = distributed.gather_sizes(len(gradient), gradient.device)
                term = (everything * distributed.gather_rows(gradient, sizes)).sum()
                loss = loss + term / (len(everything) * len(sides))
                means.append(everything.detach().mean().item())
            elif self._updating:
                assert batch.index is not None
                said = figures.num_negatives > 0
                self.source.update(batch.index[said], gradient[said], direction=direction)
        if means:
            self._temperature = sum(means) / len(means)
            loss = loss - loss.detach() + value  # the network's term has a gradient, and no value of its own
        return loss
