"""FastCLIP: SogCLR in both directions, with a schedule for gamma and four ways to have a temperature."""

from __future__ import annotations

from typing import ClassVar, Literal

from anybatch.core.errors import AnybatchError
from anybatch.family.robust import RobustSogCLR
from anybatch.losses.base import Direction
from anybatch.losses.engine import TILE_BYTES
from anybatch.losses.example_values import ExampleValues, Range
from anybatch.losses.schedule import GammaSchedule

Version = Literal["v0", "v1", "v2", "v3"]


class FastCLIP(RobustSogCLR):
    """The global contrastive objective of two modalities.

        v0   mean_i log(eps + u_i)                       one learned tau
        v1   tau mean_i log(eps + u_i)                   fixed tau
        v2   mean_i tau_i (log(eps + u_i) + rho)         tau_i learned for each example and direction, in buffers
        v3   tau (mean_i log(eps + u_i) + rho)           one learned tau

    and the mean over the two directions. `u_i` is SogCLR's. The published loss is the sum of the directions, twice this:
    "2 rho tau" there is "rho tau" here. Derivatives in tau are exact for u_i held fixed, see `RobustSogCLR`. The released code of v3
    counts the derivative through the similarities twice against the other two terms, and divides v2's Adam step by the second
    moment in place of its root; neither is reproduced. v2 here steps with momentum, as iSogCLR does.

    Args:
        num_rows: n, rows of the data set.
        version: "v0" to "v3".
        gamma: Weight of the new batch, or a `GammaSchedule`; published: `GammaSchedule(0.2, num_steps=half of all, steps_per_epoch=...)`.
        rho: v2, v3: published 6.5 (3 million pairs), 8.5 (12 million), 16 (400 million).
        eps: Added to u_i; None for 1 / (n - 1).
        temperature: The first (v1: the only) temperature; None for .07 (v0, v3) or .03 (v1, v2).
        temperature_range: Range of a learned temperature.
        temperature_lr, temperature_momentum: v2: step of each example's temperature, see `ExampleValues`.
        direction, normalize, tile_bytes: See `ContrastiveLoss`.

    v0 and v3 learn `log_temperature`, a parameter for the caller's optimizer. Published for v3: a third of the learning
    rate once tau is below .03.

    Raises:
        AnybatchError: An unknown version, numbers out of range; in a call as `SogCLR`.

    Cost: 4 bytes a row and direction; v2 12. Reference: Wei et al. 2024, "FastCLIP: A Suite of Optimization Techniques to
    Accelerate CLIP Training with Limited Resources", arXiv 2407.01445, table 1 and algorithm 1.
    """

    unused: ClassVar = {
        "version": {
            "v0": ("rho", "temperature_lr"),
            "v1": ("rho", "temperature_lr", "temperature_range"),
            "v2": (),
            "v3": ("temperature_lr",),
        }
    }

    def __init__(
        self,
        num_rows: int,
        *,
        version: Version = "v3",
        gamma: float | GammaSchedule = 0.2,
        rho: float = 6.5,
        eps: float | None = 1e-14,
        temperature: float | None = None,
        temperature_range: Range = (0.01, 1.0),
        temperature_lr: float = 0.01,
        temperature_momentum: float = 0.5,
        direction: Direction = "both",
        normalize: bool = True,
        tile_bytes: int = TILE_BYTES,
    ) -> None:
        if version not in ("v0", "v1", "v2", "v3"):
            raise AnybatchError(f"version is {version!r}; expected 'v0', 'v1', 'v2' or 'v3'.")
        if temperature is None:
            temperature = 0.07 if version in ("v0", "v3") else 0.03
        source = None
        if version == "v2":
            source = ExampleValues(
                num_rows,
                2 if direction == "both" else 1,
                initial=temperature,
                limits=temperature_range,
                lr=temperature_lr,
                momentum=temperature_momentum,
                clip=5.0,
            )
        super().__init__(
            num_rows,
            rho={"v0": None, "v1": 0.0}.get(version, rho),
            source=source,
            temperature_range=temperature_range,
            gamma=gamma,
            eps=eps,
            temperature=temperature,
            learnable_temperature=version in ("v0", "v3"),
            direction=direction,
            normalize=normalize,
            tile_bytes=tile_bytes,
        )
        self.version = version
