"""How much an example's running denominator listens to the newest batch, over the course of training."""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor, nn

from anybatch.core.errors import AnybatchError


class GammaSchedule(nn.Module):
    """gamma as a function of the number of steps taken, with its position in `state_dict`.

        constant:  gamma_t = gamma
        cosine:    gamma_t = gamma + (1 - gamma) (1 + cos(pi e / E)) / 2 for e < E, then gamma

    with e = t / steps_per_epoch rounded down and E = num_steps / steps_per_epoch: it starts at 1, where memory still holds
    what an untrained encoder said, and goes down as the encoder slows. `steps_per_epoch=1` moves it at every step.

    Args:
        gamma: The final weight of a new batch, in (0, 1].
        kind: "constant" or "cosine".
        num_steps: Steps that the cosine takes; published: half of all.
        steps_per_epoch: gamma changes only after so many steps; published: one epoch.

    A step is one call of the loss in training mode with gradients enabled.

    Raises:
        AnybatchError: gamma out of range, a cosine without `num_steps`.

    Cost: nothing. Reference: Wei et al. 2024, FastCLIP, arXiv 2407.01445, section 4.
    """

    def __init__(
        self,
        gamma: float,
        kind: Literal["constant", "cosine"] = "cosine",
        *,
        num_steps: int | None = None,
        steps_per_epoch: int = 1,
    ) -> None:
        super().__init__()
        if not 0 < gamma <= 1:
            raise AnybatchError(f"gamma is {gamma}; expected a number above 0 and at most 1.")
        if kind not in ("constant", "cosine"):
            raise AnybatchError(f"The schedule is {kind!r}; expected 'constant' or 'cosine'.")
        if kind == "cosine" and (num_steps is None or num_steps < 1):
            raise AnybatchError(
                f"A cosine needs num_steps, the steps it takes from 1 to {gamma}; got {num_steps}. Half of all steps is a good choice."
            )
        if steps_per_epoch < 1:
            raise AnybatchError(f"steps_per_epoch is {steps_per_epoch}; expected at least 1.")
        self.gamma, self.kind = gamma, kind
        self.num_steps, self.steps_per_epoch = num_steps, steps_per_epoch
        self.position: Tensor
        self.register_buffer("position", torch.tensor(0))

    @property
    def value(self) -> float:
        """Gamma at this moment."""
        if self.kind == "constant" or self.num_steps is None:
            return self.gamma
        steps = int(self.position) // self.steps_per_epoch * self.steps_per_epoch
        if steps >= self.num_steps:
            return self.gamma
        return self.gamma + (1 - self.gamma) * (1 + math.cos(math.pi * steps / self.num_steps)) / 2

    def advance(self) -> None:
        """Count one step."""
        self.position += 1
