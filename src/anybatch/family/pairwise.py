"""Losses without a denominator: every pair is judged alone; the batch size is no more than a number of pairs."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Unpack, final

import torch
from torch import Tensor, nn

from anybatch.core.errors import AnybatchError
from anybatch.family.pair_engine import PairMethod, PairOutcome, pair_loss
from anybatch.losses.base import ContrastiveLoss, OneTemperature, Scoring
from anybatch.losses.parts import Batch, GlobalTemperature


class PairwiseLoss(ContrastiveLoss):
    """Abstract: a method supplies its parameters and f, g and h of `pair_engine`. Same call as every `ContrastiveLoss`.

    There is one direction: a pair counts the same seen from either side. `log_weight` multiplies a pair's term by
    exp(b_ij).
    """

    lacks: ClassVar[Mapping[str, str]] = {
        "direction": "judges pairs, which have one direction",
        "ring": "gathers the candidates of all ranks",
        "joint": "judges pairs, and has no softmax",
        "positives_by": "judges pairs, of which each has one positive",
        "hardness": "judges each pair on its own",
        "mask_margin": "judges each pair on its own, with no own positive beside it",
    }
    _last: tuple[Tensor, float] | None = None

    @property
    def last_stats(self) -> dict[str, float]:
        """Figures of the last call: objective, negatives per anchor, temperature, bias. Empty before it."""
        if self._last is None:
            return {}
        loss, num_negatives = self._last
        own = {name: value.item() for name, value in self.named_parameters(recurse=False)}
        return {"objective": loss.item(), "num_negatives": num_negatives, "temperature": self.temperature, **own}

    def _of(self, batch: Batch) -> Tensor:
        parameters = self._parameters_for(batch)
        loss, num_negatives = pair_loss(
            batch.anchors,
            batch.candidates,
            parameters=parameters,
            method=self._method(parameters.detach()),
            log_weight=batch.log_weight,
            tile_bytes=self.tile_bytes,
        )
        self._last = loss.detach(), num_negatives
        return loss

    @abstractmethod
    def _parameters_for(self, batch: Batch) -> Tensor:
        """(P,) the method's parameters in the dtype and on the device of the batch, attached to autograd."""
        raise NotImplementedError

    @abstractmethod
    def _method(self, parameters: Tensor) -> PairMethod:
        raise NotImplementedError


@final
class SigLIP(PairwiseLoss):
    """Each pair is a yes-or-no question: do the two belong together?

        x_ij = s_ij / tau + bias
        loss = (1 / B) sum_i [softplus(-x_ip(i)) + sum_{j != p(i)} exp(b_ij) softplus(x_ij)]

    The paper's t is 1 / tau, trained through its logarithm, t' = log 10 at first; the bias starts at -10, because
    almost all pairs are negatives. Both are parameters of this Module: see that your optimizer trains them.

    Args:
        bias: The bias at first; trained.
        scoring: See `OneTemperature`; `temperature` is tau at first.

    Cost: no state. Reference: Zhai et al. 2023, "Sigmoid Loss for Language Image Pre-Training", arXiv 2303.15343,
    equation 1 and algorithm 1.

    Example:
        >>> import torch
        >>> round(SigLIP(bias=0.0)(torch.eye(2), torch.eye(2)).item(), 4)  # softplus(-10) + softplus(0)
        0.6932
    """

    defaults: ClassVar[OneTemperature] = {"temperature": 0.1, "learnable_temperature": True}

    def __init__(self, *, bias: float = -10.0, **scoring: Unpack[OneTemperature]) -> None:
        super().__init__(**scoring)
        self.bias = nn.Parameter(torch.tensor(float(bias)))

    def _parameters_for(self, batch: Batch) -> Tensor:
        return torch.stack([self.temperatures.of(batch, 0), self.bias.to(batch.anchors)])

    def _method(self, parameters: Tensor) -> PairMethod:
        return _Sigmoid(temperature=parameters[0], bias=parameters[1])


@final
class AUCCL(PairwiseLoss):
    """Every positive should outscore every negative by a margin: the square surrogate of the area under the ROC curve.

        loss = mean over positives i and negative pairs (k, l) of (margin - s_ip(i) + s_kl)^2
             = Var(s+) + Var(s-) + (margin - mean s+ + mean s-)^2

    The second line is the min-max form of the AUC literature with its three inner variables (the two means, and the
    multiplier margin - mean s+ + mean s-) at their exact optimum for the batch, so there are no extra parameters and no
    second optimizer. A mean over negative pairs does not grow with the batch, which is why its optimum moves little
    with the batch size. Log-weights weigh the mean.

    Args:
        margin: Wanted lead of a positive, in units of cosine similarity.
        scoring: See `Scoring`.

    Cost: no state. Reference: the square AUC loss of Ying et al. 2016, "Stochastic Online AUC Maximization", theorem 1,
    on pairs of embeddings as proposed by Sharma et al. 2024, "AUC-CL" (ICLR); that paper follows the inner variables by
    stochastic steps instead.

    Example:
        >>> import torch
        >>> AUCCL(margin=1.0)(torch.eye(2), torch.eye(2)).item()  # every positive leads by 1
        0.0
    """

    lacks: ClassVar = {**PairwiseLoss.lacks, "temperature": "has no temperature, but loss.margin"}

    weighs_pairs = True  # log-weights weigh the mean

    def __init__(self, *, margin: float = 1.0, **scoring: Unpack[Scoring]) -> None:
        super().__init__(GlobalTemperature(1.0), **scoring)
        if not margin > 0:
            raise AnybatchError(f"margin is {margin}; expected a positive number such as 1.0.")
        self.margin = margin

    def _parameters_for(self, batch: Batch) -> Tensor:
        return batch.anchors.new_zeros(0)

    def _method(self, parameters: Tensor) -> PairMethod:
        return _SquareLead(margin=self.margin)


@dataclass(frozen=True, kw_only=True)
class _Sigmoid:
    """Sums: the value, d / d x times s, d / d x."""

    temperature: Tensor
    bias: Tensor

    def of_positives(self, scores: Tensor) -> Tensor:
        x = scores / self.temperature + self.bias
        slope = -torch.sigmoid(-x)
        return torch.stack([nn.functional.softplus(-x).sum(), (slope * scores).sum(), slope.sum()])

    def of_negatives(self, scores: Tensor, weight: Tensor, positive_means: Tensor) -> tuple[Tensor, Tensor]:
        x = scores / self.temperature + self.bias
        slope = torch.sigmoid(x).mul_(weight)
        sums = torch.stack([(nn.functional.softplus(x) * weight).sum(), (slope * scores).sum(), slope.sum()])
        return sums, slope.div_(self.temperature)

    def finish(
        self, scores: Tensor, positive_sums: Tensor, negative_sums: Tensor, total_weight: Tensor, num_rows: int
    ) -> PairOutcome:
        value, by_score, by_bias = ((positive_sums + negative_sums) / num_rows).unbind()
        slope = -torch.sigmoid(-(scores / self.temperature + self.bias))
        return PairOutcome(
            loss=value,
            d_positive=slope / (self.temperature * num_rows),
            negative_scale=scores.new_tensor(1.0 / num_rows),
            d_parameters=torch.stack([-by_score / self.temperature**2, by_bias]),
        )


@dataclass(frozen=True, kw_only=True)
class _SquareLead:
    """Sums: s and s^2, from which mean and variance follow."""

    margin: float

    def of_positives(self, scores: Tensor) -> Tensor:
        return torch.stack([scores.sum(), scores.square().sum()])

    def of_negatives(self, scores: Tensor, weight: Tensor, positive_means: Tensor) -> tuple[Tensor, Tensor]:
        weighted = scores * weight
        sums = torch.stack([weighted.sum(), (weighted * scores).sum()])
        # d / d s_kl of the mean over i of (margin - s_ip + s_kl)^2: only the positives' mean enters.
        return sums, (scores + (self.margin - positive_means[0])).mul_(weight).mul_(2.0)

    def finish(
        self, scores: Tensor, positive_sums: Tensor, negative_sums: Tensor, total_weight: Tensor, num_rows: int
    ) -> PairOutcome:
        mean_positive, square_positive = (positive_sums / num_rows).unbind()
        some = total_weight > 0  # a batch without any negative says nothing
        scale = torch.where(some, 1.0 / total_weight, 0.0)
        mean_negative, square_negative = (negative_sums * scale).unbind()
        lead = self.margin - mean_positive + mean_negative
        variances = square_positive - mean_positive**2 + square_negative - mean_negative**2
        return PairOutcome(
            loss=(variances + lead**2) * some,
            d_positive=2.0 * (scores - self.margin - mean_negative) / num_rows * some,
            negative_scale=scale,
            d_parameters=scores.new_zeros(0),
        )
