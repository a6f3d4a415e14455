"""How much a row's running denominator listens to the newest batch."""

from __future__ import annotations

import math
from abc import abstractmethod

import torch
from torch import Tensor

from anybatch.core.errors import AnybatchError
from anybatch.losses.state import State


class Gamma(State):
    """Abstract: a weight of the new batch that is not one number."""

    @abstractmethod
    def log_shares(self, old: Tensor) -> tuple[float | Tensor, float | Tensor]:
        """Log gamma and log(1 - gamma) for rows whose log-means are `old`, (R,)."""

    def advance(self) -> None:
        """Count one step, a call of the loss in training mode with gradients enabled: a hook."""


class GammaSchedule(Gamma):
    """gamma as a function of the number of steps taken, with its position in `state_dict`.

        gamma_t = gamma + (1 - gamma) (1 + cos(pi e / E)) / 2 for e < E, then gamma

    with e = t / steps_per_epoch rounded down and E = num_steps / steps_per_epoch: it starts at 1, where the
    denominators still hold what an untrained encoder said, and goes down as the encoder slows.

    Args:
        gamma: The final weight of a new batch, in (0, 1].
        num_steps: Steps that the cosine takes; published: half of all.
        steps_per_epoch: gamma changes only after so many steps; published: one epoch.

    Cost: nothing. Reference: Wei et al. 2024, FastCLIP, arXiv 2407.01445, section 4.

    Example:
        >>> schedule = GammaSchedule(0.2, num_steps=2)
        >>> schedule.advance()
        >>> round(schedule.value, 6)
        0.6
    """

    position: Tensor

    def __init__(self, gamma: float, *, num_steps: int, steps_per_epoch: int = 1) -> None:
        super().__init__()
        if not 0 < gamma <= 1:
            raise AnybatchError(f"gamma is {gamma}; expected a number above 0 and at most 1.")
        if num_steps < 1 or steps_per_epoch < 1:
            raise AnybatchError(
                f"num_steps is {num_steps} and steps_per_epoch {steps_per_epoch}; expected the steps that gamma takes "
                f"from 1 to {gamma} (half of all is a good choice), and those after which it changes, at least 1 each."
            )
        self.gamma, self.num_steps, self.steps_per_epoch = gamma, num_steps, steps_per_epoch
        self.register_buffer("position", torch.tensor(0))

    @property
    def value(self) -> float:
        """Gamma at this moment."""
        steps = int(self.position) // self.steps_per_epoch * self.steps_per_epoch
        if steps >= self.num_steps:
            return self.gamma
        return self.gamma + (1 - self.gamma) * (1 + math.cos(math.pi * steps / self.num_steps)) / 2

    def log_shares(self, old: Tensor) -> tuple[float, float]:
        """See `Gamma.log_shares`."""
        return log_shares(self.value)

    def advance(self) -> None:
        """See `Gamma.advance`."""
        self.position += 1


def log_shares(gamma: float) -> tuple[float, float]:
    """Log gamma and log(1 - gamma)."""
    return math.log(gamma), math.log1p(-gamma) if gamma < 1 else -math.inf
