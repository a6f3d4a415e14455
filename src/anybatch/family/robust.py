"""FastCLIP, iSogCLR and TempNet: a running denominator, and temperatures learned from the dual of a robust loss."""

from __future__ import annotations

from typing import ClassVar, Literal, Unpack, final

from torch import nn

from anybatch.core.configuration import Count, NotNegative, Positive, Share
from anybatch.core.errors import AnybatchError
from anybatch.family.per_row import Range
from anybatch.family.temperatures import NetworkTemperature, PerRowTemperature, check_limits
from anybatch.losses.base import OneTemperature, Scoring, SoftmaxLoss
from anybatch.losses.denominators import Reference, RunningDenominator
from anybatch.losses.gamma import Gamma
from anybatch.losses.parts import GlobalTemperature

Version = Literal["v0", "v1", "v2", "v3"]


@final
class FastCLIP(SoftmaxLoss):
    """The global contrastive objective of two modalities.

        v0   mean_i log(eps + u_i)                       one learned tau
        v1   tau mean_i log(eps + u_i)                   fixed tau
        v2   mean_i tau_i (log(eps + u_i) + rho)         tau_i learned per row and direction, in buffers
        v3   tau (mean_i log(eps + u_i) + rho)           one learned tau

    and the mean over the two directions; the published loss is their sum: "2 rho tau" there is "rho tau" here. `u_i` is
    SogCLR's. Derivatives in tau are exact for u_i held fixed. The released code of v3 counts the derivative through the
    similarities twice, and divides v2's Adam step by the second moment in place of its root; neither is reproduced. v2
    here steps with momentum, as iSogCLR does.

    When: two modalities, or a temperature that is not known (v3). Evidence: small runs in docs/log.md, what training
    says.

    Args:
        num_rows: n, rows of the data set.
        version: "v0" to "v3".
        gamma: Weight of the new batch, or a `GammaSchedule`; published: `GammaSchedule(0.2, num_steps=half of all,
            steps_per_epoch=...)`.
        rho: v2, v3: published 6.5 (3 million pairs), 8.5 (12 million), 16 (400 million).
        eps, state: See `SogCLR`. Published: state "relative".
        temperature: The first (v1: the only) temperature; None for .07 (v0, v3) or .03 (v1, v2).
        temperature_range: Range of a learned temperature.
        temperature_lr: v2: step of each row's temperature, see `PerRowValues`; None for .01. v0, v3: a rate of the
            temperature's own, see `GlobalTemperature`; None for that of the encoder. Published for v3: 2e-4 (3 million
            pairs).
        temperature_momentum: v2: see `PerRowValues`.
        scoring: See `Scoring`.

    v0 and v3 learn a parameter, for the caller's optimizer.

    Cost: 8 bytes a row and direction; v1 4, v2 16. Reference: Wei et al. 2024, "FastCLIP: A Suite of Optimization
    Techniques to Accelerate CLIP Training with Limited Resources", arXiv 2407.01445, table 1 and algorithm 1.

    Example:
        >>> import torch
        >>> loss = FastCLIP(1000, version="v3")
        >>> loss(torch.randn(8, 16), torch.randn(8, 16), index=torch.arange(8)).backward()
        >>> [name for name, _ in loss.named_parameters()]
        ['temperatures.log_temperature']
    """

    defaults: ClassVar[OneTemperature] = {"direction": "both"}
    unused: ClassVar = {
        "version": {"v0": ("rho",), "v1": ("rho", "temperature_lr", "temperature_range"), "v2": (), "v3": ()}
    }
    denominator: RunningDenominator

    def __init__(
        self,
        num_rows: int,
        *,
        version: Version = "v3",
        gamma: Share | Gamma = 0.2,
        rho: NotNegative = 6.5,
        eps: NotNegative | None = 1e-14,
        state: Reference = "absolute",
        temperature: Positive | None = None,
        temperature_range: Range = (0.01, 1.0),
        temperature_lr: Positive | None = None,
        temperature_momentum: float = 0.5,
        **scoring: Unpack[Scoring],
    ) -> None:
        if version not in ("v0", "v1", "v2", "v3"):
            raise AnybatchError(f"version is {version!r}; expected 'v0', 'v1', 'v2' or 'v3'.")
        if temperature is None:
            temperature = 0.07 if version in ("v0", "v3") else 0.03
        directions, tau = self.num_directions(scoring), None
        if version == "v2":
            rate = 0.01 if temperature_lr is None else temperature_lr
            steps = {"rho": rho, "lr": rate, "momentum": temperature_momentum, "clip": 5.0}
            tau = PerRowTemperature(num_rows, directions, initial=temperature, limits=temperature_range, **steps)
        elif version == "v1":
            tau = GlobalTemperature(temperature, limits=temperature_range, rho=0.0)
        else:
            check_limits(temperature_range, temperature)
            times = rho if version == "v3" else None
            tau = GlobalTemperature(temperature, learnable=True, limits=temperature_range, rho=times, lr=temperature_lr)
        moving = version != "v1"
        running = RunningDenominator(num_rows, directions, gamma=gamma, eps=eps, state=state, moving=moving)
        super().__init__(tau, running, **scoring)


@final
class ISogCLR(SoftmaxLoss):
    """SogCLR with a temperature per row and direction, from the dual of a distributionally robust loss.

        F          = mean_i tau_i (log(eps + u_i) + rho)
        dF/d tau_i = log(eps + u_i) + rho - sum_j p_ij d_ij / tau_i      (times 1 / B)

    (with an absolute state the positive's p is u_i / (eps + u_i) in both the derivative and the gradient).

    The factor tau_i is what makes tau_i learnable: at temperatures that stand still the gradient is tau times that of
    `SogCLR(eps=0)`. With SGD take a learning rate larger by one over the temperature; Adam does not notice.
    Temperatures and their momentum are buffers, updated once a call in training, by their own rate.

    When: long-tailed data; an anchor with many close negatives gets a high temperature. Evidence: small runs in
    docs/log.md, what training says.

    Args:
        num_rows: n, rows of the data set.
        rho: Radius: larger lets a row's weight concentrate on fewer negatives, and lowers its temperature. Published: 6
            to 8.
        gamma, eps, state: See `SogCLR`. Published: eps 0.
        temperature: The first temperature.
        temperature_range: Temperatures are kept in it.
        temperature_lr: Published: .01 to .03.
        temperature_momentum: Weight of the old velocity. Released: .5 for two modalities, .1 for one.
        temperature_clip: Limit of a derivative. Released: 5 and 3.
        scoring: See `Scoring`.

    Cost: 16 bytes a row and direction; three collectives more a direction. Reference: Qiu et al. 2023, "Not All
    Semantics are Created Equal: Contrastive Self-supervised Learning with Automatic Temperature Individualization",
    arXiv 2305.11965, algorithm 1.

    Example:
        >>> import torch
        >>> loss = ISogCLR(1000)
        >>> value = loss(torch.randn(8, 16, requires_grad=True), torch.randn(8, 16), index=torch.arange(8))
        >>> int((loss.temperatures.rows.values != 0.05).sum())
        8
    """

    denominator: RunningDenominator

    def __init__(
        self,
        num_rows: int,
        *,
        rho: NotNegative = 7.0,
        gamma: Share | Gamma = 0.8,
        eps: NotNegative | None = 0.0,
        state: Reference = "absolute",
        temperature: Positive = 0.05,
        temperature_range: Range = (0.005, 1.0),
        temperature_lr: Positive = 0.01,
        temperature_momentum: float = 0.5,
        temperature_clip: float = 5.0,
        **scoring: Unpack[Scoring],
    ) -> None:
        directions = self.num_directions(scoring)
        steps = {"lr": temperature_lr, "momentum": temperature_momentum, "clip": temperature_clip}
        tau = PerRowTemperature(num_rows, directions, initial=temperature, limits=temperature_range, rho=rho, **steps)
        running = RunningDenominator(num_rows, directions, gamma=gamma, eps=eps, state=state, moving=True)
        super().__init__(tau, running, **scoring)


@final
class TempNet(SoftmaxLoss):
    """iSogCLR whose temperatures come from the embedding, so that they are defined for rows never seen.

        tau_i      = low + (high - low) sigmoid(net(embedding_i)),     the embedding taken as a constant
        F          = mean_i tau_i (log(eps + u_i) + rho)
        dF/d theta = mean_i (log(eps + u_i) + rho - sum_j p_ij d_ij / tau_i) d tau_i / d theta

    When: as `ISogCLR`, and temperatures are wanted for new rows. Evidence: small runs in docs/log.md, what training
    says.

    Args:
        num_rows: n, rows of the data set.
        dimensions: Width of the embeddings.
        rho, gamma, eps, state, temperature, temperature_range: See `ISogCLR`.
        hidden: Width of the default network's hidden layer.
        net: Own networks, one module a direction that takes (B, D) to (B, 1). The published one pools over 256
            prototypes, which is reproduced by giving it here; the default has two layers and starts at `temperature`
            everywhere.
        scoring: See `Scoring`.

    The networks' parameters are the loss's own, for the caller's optimizer.

    Cost: 8 bytes a row and direction, and the networks. Reference: Qiu et al. 2024, "To Cool or not to Cool?
    Temperature Network Meets Large Foundation Models via DRO", arXiv 2404.04575, section 4.

    Example:
        >>> import torch
        >>> loss = TempNet(1000, 16)
        >>> loss(torch.randn(8, 16), torch.randn(8, 16), index=torch.arange(8)).backward()
        >>> round(loss.temperature, 6)
        0.05
    """

    denominator: RunningDenominator

    def __init__(
        self,
        num_rows: int,
        dimensions: Count,
        *,
        rho: NotNegative = 7.0,
        gamma: Share | Gamma = 0.8,
        eps: NotNegative | None = 0.0,
        state: Reference = "absolute",
        temperature: Positive = 0.05,
        temperature_range: Range = (0.005, 0.1),
        hidden: int = 64,
        net: nn.ModuleList | None = None,
        **scoring: Unpack[Scoring],
    ) -> None:
        directions = self.num_directions(scoring)
        tau = NetworkTemperature(
            dimensions, directions, initial=temperature, limits=temperature_range, rho=rho, hidden=hidden, net=net
        )
        running = RunningDenominator(num_rows, directions, gamma=gamma, eps=eps, state=state, moving=True)
        super().__init__(tau, running, **scoring)
