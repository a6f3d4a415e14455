"""SCENT: SogCLR whose forgetting follows from a proximal step in the log domain."""

from __future__ import annotations

import math
from typing import Unpack, final

import torch
from torch import Tensor

from anybatch.core.configuration import NotNegative, Positive
from anybatch.core.errors import AnybatchError
from anybatch.losses.base import OneTemperature, SoftmaxLoss
from anybatch.losses.denominators import RunningDenominator
from anybatch.losses.gamma import Gamma


class ProximalGamma(Gamma):
    """gamma_i = alpha u_i / (1 + alpha u_i), for each row its own.

    Args:
        num_rows: n.
        alpha: Step; None for n - 1.
    """

    def __init__(self, num_rows: int, alpha: float | None) -> None:
        super().__init__(num_rows)
        if alpha is not None and not 0 < alpha < math.inf:
            raise AnybatchError(f"alpha is {alpha}; expected a positive number, or None for num_rows - 1.")
        self._alpha = alpha

    @property
    def alpha(self) -> float:
        """The step."""
        assert self.num_rows is not None
        return self.num_rows - 1.0 if self._alpha is None else self._alpha

    def log_shares(self, old: Tensor) -> tuple[Tensor, Tensor]:
        """See `Gamma.log_shares`."""
        shifted = old + math.log(self.alpha)
        return torch.nn.functional.logsigmoid(shifted), torch.nn.functional.logsigmoid(-shifted)


@final
class SCENT(SoftmaxLoss):
    """SogCLR with a step on nu_i = log u_i that cannot overshoot, in place of a fixed moving average.

        nu_i <- argmin over nu of  exp(L_i - nu) + nu + D(nu, nu_i) / alpha,     L_i = log of the batch's mean
              = nu_i + log(1 + alpha exp(L_i)) - log(1 + alpha exp(nu_i))

    where D is the Bregman divergence of exp(-nu). Written as an average of exp(nu), it is SogCLR's with a gamma for
    each row:

        gamma_i = alpha exp(nu_i) / (1 + alpha exp(nu_i)),    u_i <- (1 - gamma_i) u_i + gamma_i exp(L_i)

    The loss and its gradient are those of `SogCLR`, absolute state and exact weight of the positive included; u_i in
    the step is relative to the positive.

    When: as `SogCLR`; rows with a large denominator follow their batches faster. Evidence: docs/log.md, what training
    says.

    Args:
        num_rows: n, rows of the data set.
        alpha: Step, above 0: gamma is one half where u_i = 1 / alpha. u_i has no natural scale: at temperature .05 it
            is e^-8 for a typical row of a trained encoder and 1 for a fresh one, so alpha must be near one over it. The
            released code takes e^10. None for n - 1: one half where the negatives of the whole data set weigh as much
            as the positive.
        eps: Added to u_i in the loss; None is 1 / (n - 1), the full-data InfoNCE; 0 is the published objective.
        scoring: See `OneTemperature`.

    An alpha far below 1 / u_i never moves what the first visit left: where that batch held only far negatives, the
    weight of a later near one is as large as 1 / gamma_i (alpha = 1 in docs/benchmarks/global_loss.md: gradients a
    hundred times too long). A row's first visit takes the batch's value whole (the released code takes nu = 0 for it).

    Cost: that of `SogCLR`. Reference: "SCENT", stochastic optimization of compositional entropic risks, arXiv
    2602.02877.

    Example:
        >>> import torch
        >>> loss = SCENT(1000)
        >>> loss.grow(2000)
        >>> loss(torch.randn(8, 16), torch.randn(8, 16), index=torch.arange(1992, 2000)).ndim
        0
    """

    denominator: RunningDenominator

    def __init__(
        self,
        num_rows: int,
        *,
        alpha: Positive | None = None,
        eps: NotNegative | None = None,
        **scoring: Unpack[OneTemperature],
    ) -> None:
        gamma, moving = ProximalGamma(num_rows, alpha), self.scoring(scoring)["learnable_temperature"]
        running = RunningDenominator(num_rows, self.num_directions(scoring), gamma=gamma, eps=eps, moving=moving)
        super().__init__(None, running, **scoring)
