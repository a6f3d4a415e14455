"""One temperature for all rows. Those of single rows, and a network's, are in the family."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor, nn

from anybatch.core.errors import AnybatchError
from anybatch.losses.base import Batch, Temperature
from anybatch.losses.engine import Side, SoftmaxStats

# Of a learned one: below, a cosine's float32 error is seen in the loss, and a step of its log doubles the gradient.
MIN_TEMPERATURE = 0.01


class GlobalTemperature(Temperature):
    """One temperature, fixed or trained through its logarithm, so that it stays positive.

    Args:
        initial: The first value, or the only one.
        learnable: Train it: `log_temperature`, a parameter for the caller's optimizer.
        limits: (low, high). A learned temperature is put back to them at the start of a training step, so that its
            gradient stays alive; what is read is never outside.
        rho: The loss is tau (mean_i objective_i + rho), whose factor has a derivative of its own; None for the loss as
            it is.
    """

    per_row = False

    def __init__(
        self,
        initial: float,
        *,
        learnable: bool = False,
        limits: tuple[float, float] = (MIN_TEMPERATURE, math.inf),
        rho: float | None = None,
    ) -> None:
        super().__init__()
        if not 0 < limits[0] < math.inf or (learnable and initial < limits[0]):
            raise AnybatchError(
                f"min_temperature is {limits[0]} and the first temperature {initial}; expected a positive floor, and a "
                "learned temperature above it. Set min_temperature lower, or begin higher."
            )
        if not initial > 0:
            raise AnybatchError(f"temperature is {initial}; expected a positive number such as 0.05.")
        check_rho(rho)
        self.initial, self.limits, self.rho = initial, limits, rho
        self.log_temperature = nn.Parameter(torch.tensor(math.log(initial))) if learnable else None

    @property
    def value(self) -> float:
        """See `Temperature.value`."""
        if self.log_temperature is None:
            return self.initial
        return min(max(math.exp(self.log_temperature.item()), self.limits[0]), self.limits[1])

    def of(self, batch: Batch, direction: int) -> Tensor:
        """See `Temperature.of`."""
        return self.like(batch.anchors, updating=batch.updating)

    def like(self, tensor: Tensor, *, updating: bool) -> Tensor:
        """The temperature as a scalar in the dtype and on the device of `tensor`, attached to autograd where it is
        learned.
        """
        if self.log_temperature is None:
            return tensor.new_tensor(self.initial)
        limited = self.log_temperature.detach().clamp(*(math.log(limit) for limit in self.limits))
        if (
            updating
        ):  # a projection, where the optimizer finds it: it need not come back from where its momentum had carried it
            self.log_temperature.data.copy_(limited)
        # The value of the projected one, and a derivative at the edge as well.
        return (self.log_temperature + (limited - self.log_temperature.detach())).to(tensor).exp()

    def ask(self, side: Side, batch: Batch, direction: int) -> Side:
        """See `Part.ask`."""
        return side if self.rho is None else times_temperature(side, self.rho, len(batch.anchors))

    def learn(self, batch: Batch, sides: tuple[Side, ...], stats: tuple[SoftmaxStats, ...], loss: Tensor) -> Tensor:
        """See `Part.learn`."""
        if self.rho is None or not torch.is_grad_enabled():
            return loss
        # The engine saw the factor tau as a constant; its own derivative is the mean of the objectives.
        temperature = sides[0].temperature
        return loss + (temperature - temperature.detach()) * (loss.detach() / temperature.detach())


def check_rho(rho: float | None) -> None:
    """Refuse a negative radius."""
    if rho is not None and rho < 0:
        raise AnybatchError(f"rho is {rho}; expected 0 or more (published: 6 to 16).")


def times_temperature(side: Side, rho: float, num_rows: int) -> Side:
    """The objective tau_i (objective_i + rho), the factor taken as a constant; of a rule that has a `constant`."""
    weight = side.temperature.detach().expand(num_rows)
    return replace(side, row_weight=weight, rule=replace(cast(Any, side.rule), constant=rho))
