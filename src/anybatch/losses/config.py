"""Which loss, with which numbers: the part of a run's configuration that the losses own."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from torch import nn

from anybatch.errors import AnybatchError


@dataclass(frozen=True, kw_only=True)
class LossConfig:
    """A loss by name.

    Attributes:
        name: "infonce", "decoupled" (no positive in the denominator), "count_corrected" (the batch's negatives stand for the
            whole data set; no memory), "sogclr" (a running denominator for each example).
        temperature: Similarities are divided by it. 0.01 to 0.07 for text, 0.07 to 0.1 for images.
        learnable_temperature: Train it as a parameter.
        direction: "one_way" (anchor to candidates), or "both" (also positive to anchors).
        gamma: SogCLR: weight of the new batch in an example's running denominator; 1 forgets everything else.
        eps: SogCLR: added to the running denominator; None for 1 / (rows - 1), which makes it an estimate of full-data InfoNCE.
        weights: "inclusion" corrects for mined batches not being a uniform sample; "none" leaves them as they are.
        weight_cap: Upper limit on the weight of another cluster's row relative to one of the own; None for the exact weight.
    """

    name: Literal["infonce", "decoupled", "count_corrected", "sogclr"] = "infonce"
    temperature: float = 0.05
    learnable_temperature: bool = False
    direction: Literal["one_way", "both"] = "one_way"
    gamma: float = 0.9
    eps: float | None = None
    weights: Literal["none", "inclusion"] = "none"
    weight_cap: float | None = None

    def __post_init__(self) -> None:
        if not 0 < self.temperature < math.inf:  # nan is neither
            raise AnybatchError(f"loss.temperature is {self.temperature}; expected a positive number such as 0.05.")
        if not 0 < self.gamma <= 1:
            raise AnybatchError(f"loss.gamma is {self.gamma}; expected a number above 0 and at most 1.")
        if self.eps is not None and not 0 <= self.eps < math.inf:
            raise AnybatchError(
                f"loss.eps is {self.eps}; expected 0 or a positive number, or nothing for 1 / (rows - 1)."
            )
        if self.weight_cap is not None and not self.weight_cap >= 1:
            raise AnybatchError(
                f"loss.weight_cap is {self.weight_cap}; expected at least 1 (a row of another cluster weighs no less than one of the own), "
                "or nothing for the exact weight."
            )
        if self.weights == "inclusion" and self.name in ("infonce", "decoupled"):
            raise AnybatchError(
                f"loss.weights is 'inclusion', which '{self.name}' does not define: its denominator is the batch's own. "
                "Use loss.name=count_corrected (no memory) or sogclr."
            )


def build_loss(config: LossConfig, *, num_rows: int) -> nn.Module:
    """The Module that `config` names, for a data set of `num_rows` rows."""
    from anybatch.losses import CountCorrectedInfoNCE, DecoupledInfoNCE, InfoNCE, SogCLR

    shared = {
        "temperature": config.temperature,
        "learnable_temperature": config.learnable_temperature,
        "direction": config.direction,
    }
    if config.name == "infonce":
        return InfoNCE(**shared)
    if config.name == "decoupled":
        return DecoupledInfoNCE(**shared)
    if config.name == "count_corrected":
        return CountCorrectedInfoNCE(num_rows, **shared)
    eps = 1.0 / (num_rows - 1) if config.eps is None else config.eps
    return SogCLR(num_rows, gamma=config.gamma, eps=eps, **shared)
