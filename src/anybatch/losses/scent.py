"""SCENT: SogCLR whose forgetting follows from a proximal step in the log domain."""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor

from anybatch.errors import AnybatchError
from anybatch.losses.base import Direction
from anybatch.losses.engine import TILE_BYTES, Rule
from anybatch.losses.sogclr import Remembering, SogCLR


class SCENT(SogCLR):
    """SogCLR with a step on nu_i = log u_i that cannot overshoot, in place of a fixed moving average.

        nu_i <- argmin over nu of  exp(L_i - nu) + nu + D(nu, nu_i) / alpha,     L_i = log of the batch's mean
              = nu_i + log(1 + alpha exp(L_i)) - log(1 + alpha exp(nu_i))

    where D is the Bregman divergence of exp(-nu). Written as an average of exp(nu), it is SogCLR's with a gamma for each example:

        gamma_i = alpha exp(nu_i) / (1 + alpha exp(nu_i)),    u_i <- (1 - gamma_i) u_i + gamma_i exp(L_i)

    so an example with a large denominator, whose batches vary most, follows them faster. The loss and its gradient are those of `SogCLR`.

    Args:
        num_rows: n, rows of the data set.
        alpha: Step, above 0: gamma is one half where u_i = 1 / alpha.
        eps: Added to u_i in the loss; 0 is the published objective, None is 1 / (n - 1).
        temperature, learnable_temperature, direction, normalize, tile_bytes: See `ContrastiveLoss`.

    A row's first visit takes the batch's value whole; that is a flag of its own (the released code takes nu = 0 for it).

    Raises:
        AnybatchError: alpha or eps out of range; in a call as `SogCLR`.

    Cost: that of `SogCLR`. Reference: "SCENT", stochastic optimization of compositional entropic risks, arXiv 2602.02877.
    """

    def __init__(
        self,
        num_rows: int,
        *,
        alpha: float = 1.0,
        eps: float | None = 0.0,
        temperature: float = 0.05,
        learnable_temperature: bool = False,
        direction: Direction = "one_way",
        normalize: bool = True,
        tile_bytes: int = TILE_BYTES,
    ) -> None:
        if not 0 < alpha < math.inf:
            raise AnybatchError(f"alpha is {alpha}; expected a positive number.")
        super().__init__(
            num_rows,
            eps=eps,
            temperature=temperature,
            learnable_temperature=learnable_temperature,
            direction=direction,
            normalize=normalize,
            tile_bytes=tile_bytes,
        )
        self.alpha = alpha

    def _rule(self, index: Tensor | None, *, direction: int, normalised: bool, dimensions: int) -> Rule:
        rule = super()._rule(index, direction=direction, normalised=normalised, dimensions=dimensions)
        assert isinstance(rule, Remembering)
        return replace(rule, gamma=self._log_gamma)

    def _log_gamma(self, old: Tensor) -> tuple[Tensor, Tensor]:
        """Log gamma and log(1 - gamma) for states `old`."""
        shifted = old + math.log(self.alpha)
        return torch.nn.functional.logsigmoid(shifted), torch.nn.functional.logsigmoid(-shifted)
