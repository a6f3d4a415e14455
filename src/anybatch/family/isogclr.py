"""iSogCLR and TempNet: a temperature for each example."""

from __future__ import annotations

from torch import nn

from anybatch.family.robust import RobustSogCLR
from anybatch.family.temperatures import TemperatureNet
from anybatch.losses.base import Direction
from anybatch.losses.engine import TILE_BYTES
from anybatch.losses.example_values import ExampleValues, Range
from anybatch.losses.schedule import GammaSchedule


class ISogCLR(RobustSogCLR):
    """SogCLR with a temperature for each example and direction, from the dual of a distributionally robust loss.

        F          = mean_i tau_i (log(eps + u_i) + rho)
        dF/d tau_i = log(eps + u_i) + rho - sum_j p_ij d_ij / tau_i      (times 1/B; rho - KL(p_i, uniform) at gamma = 1, eps = 0)

    The factor tau_i is part of the objective, because it is what makes tau_i learnable: at temperatures that stand still the gradient is tau times
    that of `SogCLR(eps=0)`. With SGD take a learning rate larger by one over the temperature; Adam does not notice.

    Temperatures and their momentum are buffers: saved in `state_dict`, updated once a call in training mode with gradients
    enabled, by their own rate, after the gradient of the embeddings was taken at the old temperatures.

    Args:
        num_rows: n, rows of the data set.
        rho: Radius: larger lets an example's pull concentrate on fewer negatives, and lowers its temperature. Published: 6 to 8.
        gamma: Weight of the new batch, or a `GammaSchedule`.
        eps: Added to u_i; 0 is the published objective, None is 1 / (n - 1).
        temperature: The first temperature.
        temperature_range: Temperatures are kept in it.
        temperature_lr: Published: .01 to .03.
        temperature_momentum: Weight of the old velocity. Released: .5 for two modalities, .1 for one.
        temperature_clip: Limit of a derivative. Released: 5 and 3.
        direction, normalize, tile_bytes: See `ContrastiveLoss`.

    Raises:
        AnybatchError: Numbers out of range; in a call as `SogCLR`.

    Cost: 12 bytes a row and direction; three collectives more a direction. Reference: Qiu et al. 2023, "Not All Semantics are
    Created Equal: Contrastive Self-supervised Learning with Automatic Temperature Individualization", arXiv 2305.11965, algorithm 1.
    """

    def __init__(
        self,
        num_rows: int,
        *,
        rho: float = 7.0,
        gamma: float | GammaSchedule = 0.8,
        eps: float | None = 0.0,
        temperature: float = 0.05,
        temperature_range: Range = (0.005, 1.0),
        temperature_lr: float = 0.01,
        temperature_momentum: float = 0.5,
        temperature_clip: float = 5.0,
        direction: Direction = "one_way",
        normalize: bool = True,
        tile_bytes: int = TILE_BYTES,
    ) -> None:
        super().__init__(
            num_rows,
            rho=rho,
            source=ExampleValues(
                num_rows,
                2 if direction == "both" else 1,
                initial=temperature,
                limits=temperature_range,
                lr=temperature_lr,
                momentum=temperature_momentum,
                clip=temperature_clip,
            ),
            temperature_range=temperature_range,
            gamma=gamma,
            eps=eps,
            temperature=temperature,
            learnable_temperature=False,
            direction=direction,
            normalize=normalize,
            tile_bytes=tile_bytes,
        )


class TempNet(RobustSogCLR):
    """iSogCLR whose temperatures come from the embedding, so that they are defined for rows never seen.

        tau_i     = low + (high - low) sigmoid(net(embedding_i)),     the embedding taken as a constant
        F         = mean_i tau_i (log(eps + u_i) + rho)
        dF/d theta = mean_i (log(eps + u_i) + rho - sum_j p_ij d_ij / tau_i) d tau_i / d theta

    Args:
        num_rows: n, rows of the data set.
        dimensions: Width of the embeddings.
        rho, gamma, eps, temperature, temperature_range: See `ISogCLR`.
        hidden: Width of the default network's hidden layer.
        net: Own networks, one module a direction that takes (B, D) to (B, 1). The published one pools over 256 prototypes,
            which is reproduced by giving it here; the default has two layers and starts at `temperature` everywhere.
        direction, normalize, tile_bytes: See `ContrastiveLoss`.

    The networks' parameters are the loss's own, for the caller's optimizer.

    Raises:
        AnybatchError: Numbers out of range; in a call as `SogCLR`.

    Cost: 4 bytes a row and direction, and the networks. Reference: Qiu et al. 2024, "To Cool or not to Cool? Temperature Network
    Meets Large Foundation Models via DRO", arXiv 2404.04575, section 4.
    """

    def __init__(
        self,
        num_rows: int,
        dimensions: int,
        *,
        rho: float = 7.0,
        gamma: float | GammaSchedule = 0.8,
        eps: float | None = 0.0,
        temperature: float = 0.05,
        temperature_range: Range = (0.005, 0.1),
        hidden: int = 64,
        net: nn.ModuleList | None = None,
        direction: Direction = "one_way",
        normalize: bool = True,
        tile_bytes: int = TILE_BYTES,
    ) -> None:
        super().__init__(
            num_rows,
            rho=rho,
            source=TemperatureNet(
                dimensions,
                2 if direction == "both" else 1,
                initial=temperature,
                limits=temperature_range,
                hidden=hidden,
                net=net,
            ),
            temperature_range=temperature_range,
            gamma=gamma,
            eps=eps,
            temperature=temperature,
            learnable_temperature=False,
            direction=direction,
            normalize=normalize,
            tile_bytes=tile_bytes,
        )
