"""Which loss, with which numbers: the part of a run's configuration that the losses own."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import nn

from anybatch.errors import AnybatchError

WITH_MEMORY = ("sogclr",)


@dataclass(frozen=True, kw_only=True)
class LossConfig:
    """A loss by name.

    Attributes:
        name: "infonce", "decoupled" (no positive in the denominator), "count_corrected" (the batch's negatives stand for the
            whole data set; no memory), "sogclr" (a running denominator for each example), "siglip" (a yes-or-no question a pair; published with
            temperature 0.1, learned), "auc_cl" (positives outscore negatives by a margin).
        temperature: Similarities are divided by it. 0.01 to 0.07 for text, 0.07 to 0.1 for images.
        learnable_temperature: Train it as a parameter.
        direction: "one_way" (anchor to candidates), or "both" (also positive to anchors).
        gamma: SogCLR: weight of the new batch in an example's running denominator; 1 forgets everything else.
        eps: SogCLR: added to the running denominator; None for 1 / (rows - 1), which makes it an estimate of full-data InfoNCE.
        bias: SigLIP: the bias at first; it is learned.
        margin: AUC-CL: wanted lead of a positive, in cosine similarity.
        weights: "inclusion" corrects for mined batches not being a uniform sample; "none" leaves them as they are.
        weight_cap: Upper limit on the weight of another cluster's row relative to one of the own; None for the exact weight.
        warm_start: Methods with a running denominator: fill it before the first step, from all rows encoded once (docs/memory.md).
        warm_start_steps: Fill it anew every so many steps as well.
        warm_start_sample: Fill it from so many targets drawn at random instead of all.
        probe_steps: Every so many steps compare it with the truth on a few rows; the figures go into the log.
    """

    name: Literal["infonce", "decoupled", "count_corrected", "sogclr", "siglip", "auc_cl"] = "infonce"
    temperature: float = 0.05
    learnable_temperature: bool = False
    direction: Literal["one_way", "both"] = "one_way"
    gamma: float = 0.9
    eps: float | None = None
    bias: float = -10.0
    margin: float = 1.0
    weights: Literal["none", "inclusion"] = "none"
    weight_cap: float | None = None
    warm_start: bool = False
    warm_start_steps: int | None = None
    warm_start_sample: int | None = None
    probe_steps: int | None = None

    def __post_init__(self) -> None:
        if self.temperature <= 0:
            raise AnybatchError(f"loss.temperature is {self.temperature}; expected a positive number such as 0.05.")
        if not 0 < self.gamma <= 1:
            raise AnybatchError(f"loss.gamma is {self.gamma}; expected a number above 0 and at most 1.")
        if self.weights == "inclusion" and self.name in ("infonce", "decoupled", "siglip"):
            raise AnybatchError(
                f"loss.weights is 'inclusion', which '{self.name}' does not define: its denominator is the batch's own. "
                "Use loss.name=count_corrected (no memory) or sogclr."
            )
        for name in ("warm_start", "warm_start_steps", "warm_start_sample", "probe_steps"):
            value = getattr(self, name)
            if value and self.name not in WITH_MEMORY:
                raise AnybatchError(
                    f"loss.{name} is {value}, but '{self.name}' has no running denominator. It is for {', '.join(WITH_MEMORY)}."
                )
            if value is not None and value is not False and value < 1:
                raise AnybatchError(f"loss.{name} is {value}; expected at least 1, or nothing.")
        if self.name in ("siglip", "auc_cl") and self.direction == "both":
            raise AnybatchError(
                f"loss.direction is 'both'; '{self.name}' judges pairs and has one direction. Leave it at 'one_way'."
            )
        if self.name == "auc_cl" and (self.temperature != 0.05 or self.learnable_temperature):
            raise AnybatchError("loss.name 'auc_cl' has no temperature; set loss.margin instead.")


def build_loss(config: LossConfig, *, num_rows: int) -> nn.Module:
    """The Module that `config` names, for a data set of `num_rows` rows."""
    from anybatch.losses import AUCCL, CountCorrectedInfoNCE, DecoupledInfoNCE, InfoNCE, SigLIP, SogCLR

    if config.name == "siglip":
        return SigLIP(
            temperature=config.temperature, learnable_temperature=config.learnable_temperature, bias=config.bias
        )
    if config.name == "auc_cl":
        return AUCCL(margin=config.margin)
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
