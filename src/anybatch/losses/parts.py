"""What a loss is composed of. A part owns what it remembers, and none knows of another:

    temperature    what similarities are divided by: a number, one per row, one from the embedding
    denominator    what stands for the log-sum over all negatives: the batch's, corrected, running, a chain
    others         what changes the logits: a margin per candidate, a threshold per anchor

Temperatures of single rows, and a network's, are in the family; denominators are in `denominators`.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from dataclasses import dataclass, field, replace
from typing import Any, cast

import torch
from torch import Tensor, nn

from anybatch.core.errors import AnybatchError
from anybatch.losses.engine import Rule, Side, SoftmaxStats
from anybatch.losses.log_weights import LogWeights
from anybatch.losses.state import State

# Of a learned temperature: below, a cosine's float32 error is seen in the loss, and a step of its log doubles the
# gradient.
MIN_TEMPERATURE = 0.01
SLOW = 0.03  # the temperature from which on FastCLIP takes a third of its rate


@dataclass(frozen=True, kw_only=True, eq=False)
class Batch:
    """The arguments of one call, checked and normalised."""

    anchors: Tensor  # (B, D) float32 or float64
    candidates: Tensor  # (M, D)
    index: Tensor | None  # (B,) int64 rows of the data set
    log_weight: LogWeights | None  # log-weights and masks from the anchors to the candidates; None for 0
    updating: bool = False  # whether this call may change state
    kept: dict[int, Tensor] = field(default_factory=dict)  # by direction, what a part needs again at the call's end

    @property
    def rows(self) -> Tensor:
        """The index, of a part that needs one."""
        assert self.index is not None
        return self.index

    def queries(self, direction: int) -> Tensor:
        """(B, D) what is scored against the others: the anchors (direction 0), or the positives (1)."""
        return self.anchors if direction == 0 else self.candidates[: len(self.anchors)]

    def others(self, direction: int) -> Tensor:
        """What the queries are scored against: the candidates, or the anchors."""
        return self.candidates if direction == 0 else self.anchors

    def similarity(self, direction: int) -> Tensor:
        """(B,) of each query with its positive, a constant."""
        queries = self.queries(direction)
        return (queries * self.others(direction)[: len(queries)]).sum(dim=1).detach()

    def log_weight_of(self, direction: int) -> LogWeights | None:
        """The log-weights as this direction sees them."""
        if direction == 0 or self.log_weight is None:
            return self.log_weight
        return self.log_weight.reversed(len(self.anchors))


class Part(State):
    """Abstract: a part of a loss. Both methods are hooks, which do nothing here."""

    def ask(self, side: Side, batch: Batch, direction: int) -> Side:
        """Change what the engine is asked in one direction: log-weights, logits, the weight of rows."""
        return side

    def learn(self, batch: Batch, sides: tuple[Side, ...], stats: tuple[SoftmaxStats, ...], loss: Tensor) -> Tensor:
        """Learn from the engine's answer; returns the loss, to which terms of value 0 may be added."""
        return loss


class Temperature(Part):
    """Abstract: what similarities are divided by.

    Attributes:
        limits: (low, high) of one that is learned.
        per_row: Whether rows differ.
    """

    limits: tuple[float, float]
    per_row = True

    @property
    @abstractmethod
    def value(self) -> float:
        """At this moment; where rows differ a mean."""

    @abstractmethod
    def of(self, batch: Batch, direction: int) -> Tensor:
        """A scalar, attached to autograd if it is learned there, or (B,) one per row."""


class GlobalTemperature(Temperature):
    """One temperature, fixed or trained through its logarithm, so that it stays positive.

    Args:
        initial: The first value, or the only one.
        learnable: Train it: `log_temperature`, a parameter for the caller's optimizer.
        limits: (low, high). A learned temperature is put back to them at the start of a training step.
        rho: The loss is tau (mean_i objective_i + rho), whose factor has a derivative of its own; None for the loss as
            it is.
        lr: A learning rate of its own, constant, and a third of it at a temperature of .03 and less (FastCLIP, as
            published): for whoever makes the optimizer, as our Trainer does. None for that of the encoder.
    """

    per_row = False

    def __init__(
        self,
        initial: float,
        *,
        learnable: bool = False,
        limits: tuple[float, float] = (MIN_TEMPERATURE, math.inf),
        rho: float | None = None,
        lr: float | None = None,
    ) -> None:
        super().__init__()
        if not 0 < limits[0] < math.inf or (learnable and initial < limits[0]):
            raise AnybatchError(
                f"min_temperature is {limits[0]} and the first temperature {initial}; expected a positive floor, and a "
                "learned temperature above it. Begin higher, or in Python give a lower min_temperature."
            )
        if not initial > 0:
            raise AnybatchError(f"temperature is {initial}; expected a positive number such as 0.05.")
        check_rho(rho)
        self.initial, self.limits, self.rho, self.lr = initial, limits, rho, lr
        self.log_temperature = nn.Parameter(torch.tensor(math.log(initial))) if learnable else None

    @property
    def value(self) -> float:
        """See `Temperature.value`."""
        if self.log_temperature is None:
            return self.initial
        value = math.exp(min(self.log_temperature.item(), 700.0))  # finite, though it may have diverged
        return min(max(value, self.limits[0]), self.limits[1])

    @property
    def current_lr(self) -> float | None:
        """Of the next step; None without a rate of its own."""
        return self.lr if self.lr is None or self.value > SLOW else self.lr / 3

    def of(self, batch: Batch, direction: int) -> Tensor:
        """See `Temperature.of`."""
        if self.log_temperature is None:
            return batch.anchors.new_tensor(self.initial)
        limited = self.log_temperature.detach().clamp(*(math.log(limit) for limit in self.limits))
        if batch.updating:
            # A projection, where the optimizer finds it, which need not come back from where its momentum carried it.
            self.log_temperature.data.copy_(limited)
        # The value of the projected one, and a derivative at the edge as well.
        return (self.log_temperature + (limited - self.log_temperature.detach())).to(batch.anchors).exp()

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


class Denominator(Part):
    """Abstract: what a method takes for the log-sum over all negatives, given what the batch says.

    Attributes:
        over_data: Whether it stands for all rows of the data set, and not for those of the batch.
    """

    over_data = True

    @abstractmethod
    def rule(self, batch: Batch, direction: int, *, normalised: bool) -> Rule:
        """The rule for one call and direction (1: positives against anchors).

        `normalised`: the log-weights already make the log-sum an estimate of the log-mean over the data.
        """
