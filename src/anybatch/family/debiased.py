"""Debiased InfoNCE: the share of unlabelled positives among the negatives is taken off their sum."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated, ClassVar, Unpack, final

import torch
from torch import Tensor

from anybatch.core.configuration import Positive, Range
from anybatch.core.errors import AnybatchError
from anybatch.losses.base import Scoring, SoftmaxLoss
from anybatch.losses.engine import Answer, Rule
from anybatch.losses.parts import Batch, Denominator, GlobalTemperature


@final
class DebiasedInfoNCE(SoftmaxLoss):
    """InfoNCE whose sum over negatives is corrected for the false ones among them.

        g_i  = max( (sum_j exp(s_ij / tau) / N - tau_plus exp(s_ip / tau)) / (1 - tau_plus),  exp(-1 / tau) )
        loss = mean_i log(1 + N g_i / exp(s_ip / tau))

    over the N candidates but the positive: if a share `tau_plus` of them have the anchor's class, and the positive
    stands for that class, g_i is the mean over the others. Where the estimate is clamped the negatives receive no
    gradient, and the positive that of the clamped term. A masked candidate is one of the N and adds nothing, so
    `tau_plus` is the share of false negatives that no mask removes. A row without any negative contributes 0.

    When: a known share of the negatives is false, and no ids tell which. Evidence: the formula is tested; no training
    of ours.

    Args:
        tau_plus: Share of false negatives, 0 for InfoNCE. Published: .1 on CIFAR-10, .01 to .05 where classes are many.
        temperature: Fixed, because the clamp has a derivative by it that the engine does not take. Published: .5.
        scoring: See `Scoring`.

    Log-weights are added to the logits as they are.

    Cost: no state. Reference: Chuang et al. 2020, "Debiased Contrastive Learning", arXiv 2007.00224, equations 7 and 8
    with one positive (M = 1).

    Example:
        >>> import torch
        >>> anchors = torch.randn(8, 16, requires_grad=True)
        >>> DebiasedInfoNCE(tau_plus=0.1)(anchors, torch.randn(8, 16)).backward()
        >>> anchors.grad.shape
        torch.Size([8, 16])
    """

    lacks: ClassVar = {"normalize": "normalises in any case, as its clamp supposes"}

    def __init__(
        self, *, tau_plus: Annotated[float, Range(0, 1)] = 0.1, temperature: Positive = 0.5, **scoring: Unpack[Scoring]
    ) -> None:
        if not 0 <= tau_plus < 1:
            raise AnybatchError(f"tau_plus is {tau_plus}; expected the share of false negatives, from 0 to below 1.")
        super().__init__(GlobalTemperature(temperature), Debiased(tau_plus, temperature), **scoring)


class Debiased(Denominator):
    """The batch's sum without the expected part of its false negatives, clamped to what is possible."""

    over_data = False

    def __init__(self, tau_plus: float, temperature: float) -> None:
        super().__init__()
        self.tau_plus, self.temperature = tau_plus, temperature

    def rule(self, batch: Batch, direction: int, *, normalised: bool) -> Rule:
        """See `Denominator.rule`."""
        return _DebiasedRule(tau_plus=self.tau_plus, least=(-1 - batch.similarity(direction)) / self.temperature)


@dataclass(frozen=True, kw_only=True)
class _DebiasedRule:
    """Relative to the positive, whose logit is 0; `least` (B,) are the logits of a similarity of -1."""

    tau_plus: float
    least: Tensor
    row_wise: bool = True

    def __call__(self, log_sum: Tensor, num_drawn: Tensor, rows: slice) -> Answer:
        log_drawn, log_kept = num_drawn.log(), math.log1p(-self.tau_plus)
        share = self.tau_plus * (log_drawn - log_sum).exp()  # of the sum, that is taken off
        estimate = log_sum + torch.log1p(-share.clamp(max=1.0)) - log_kept
        floor = torch.where(log_sum.isneginf(), -torch.inf, self.least[rows].to(log_sum.dtype) + log_drawn)
        clamped = (estimate <= floor) | log_sum.isneginf()  # NaN stays NaN
        log_negatives = torch.where(clamped, floor, estimate)
        objective = torch.logaddexp(log_negatives, torch.zeros_like(log_negatives))
        log_denominator = torch.where(clamped, torch.inf, objective + log_kept)
        of_sum = (log_sum - log_denominator).exp()  # what the negatives receive together, 0 where clamped
        positive_weight = torch.where(clamped, -(log_negatives - objective).exp(), -of_sum)
        return Answer(log_denominator, objective, positive_weight)
