"""Losses without a denominator: every pair is judged alone; the batch size is no more than a number of pairs.

For scores s_ij = <anchor_i, candidate_j> and weights w_ij = exp(b_ij), 0 for the anchor's own positive and for removed
pairs:

    positive sums  P = sum_i f(s_ip(i))
    negative sums  N = sum_ij w_ij g(s_ij; P / B),   and W = sum_ij w_ij
    loss           = h(P, N, W, B)

and the gradient in closed form, from tiles of scores. A method is f, g and h.

Cost: three matrix products of B x M x D; `tile_bytes` of scores at a time and a few tensors of that size. Collectives:
those of `candidates.Gathered` and of the log-weights, and two sums of a few numbers, all in the forward pass.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from typing import ClassVar, NamedTuple, Unpack, final

import torch
from torch import Tensor, nn

from anybatch.core import distributed
from anybatch.core.errors import AnybatchError
from anybatch.losses.base import ContrastiveLoss, OneTemperature, Scoring
from anybatch.losses.engine import with_gradients
from anybatch.losses.engine.candidates import Gathered, Layout
from anybatch.losses.parts import Batch, GlobalTemperature


class Outcome(NamedTuple):
    """What a method makes of the sums over all ranks: the loss, and derivatives of it."""

    loss: Tensor
    d_positive: Tensor  # (B,) by this rank's positive scores
    negative_scale: Tensor  # by which what `_of_negatives` gave is multiplied
    d_parameters: Tensor  # (P,) by the method's parameters


class PairwiseLoss(ContrastiveLoss):
    """Abstract: a method supplies its parameters and f, g and h. Same call as every `ContrastiveLoss`.

    There is one direction: a pair counts the same seen from either side. `log_weight` multiplies a pair's term by
    exp(b_ij).
    """

    lacks: ClassVar[Mapping[str, str]] = {
        "direction": "judges pairs, which have one direction",
        "joint": "judges pairs, and has no softmax",
        "positives_by": "judges pairs, of which each has one positive",
        "hardness": "judges each pair on its own",
        "mask_margin": "judges each pair on its own, with no own positive beside it",
    }
    _last: tuple[Tensor, float] | None = None

    @abstractmethod
    def _parameters_for(self, batch: Batch) -> Tensor:
        """(P,) the method's parameters in the dtype and on the device of the batch, attached to autograd."""

    @abstractmethod
    def _of_positives(self, parameters: Tensor, scores: Tensor) -> Tensor:
        """The sums (J,) over the positives' scores (B,)."""

    @abstractmethod
    def _of_negatives(
        self, parameters: Tensor, scores: Tensor, weight: Tensor, positive_means: Tensor
    ) -> tuple[Tensor, Tensor]:
        """The weighted sums (K,) over a tile of negatives; the unscaled derivative by each score, weight included."""

    @abstractmethod
    def _outcome(
        self, parameters: Tensor, scores: Tensor, positives: Tensor, negatives: Tensor, weight: Tensor, num_rows: int
    ) -> Outcome:
        """From this rank's positive scores (B,), and of all ranks: the sums (J,) and (K,), the weight, the rows."""

    @property
    def last_stats(self) -> dict[str, float]:
        """Figures of the last call: objective, negatives per anchor, temperature, bias. Empty before it."""
        if self._last is None:
            return {}
        loss, num_negatives = self._last
        own = {name: value.item() for name, value in self.named_parameters(recurse=False)}
        return {"objective": loss.item(), "num_negatives": num_negatives, "temperature": self.temperature, **own}

    def _of(self, batch: Batch) -> Tensor:
        parameters, wanted = self._parameters_for(batch), torch.is_grad_enabled()
        with torch.no_grad(), torch.autocast(batch.anchors.device.type, enabled=False):
            loss, gradients, num_negatives = self._solve(batch, parameters.detach(), wanted)
        self._last = loss, num_negatives
        return with_gradients(loss, (batch.anchors, batch.candidates, parameters), gradients)

    def _solve(self, batch: Batch, parameters: Tensor, wanted: bool) -> tuple[Tensor, tuple[Tensor, ...], float]:
        """The loss over all ranks, its gradients, and the mean number of negatives of this rank's anchors.

        Embeddings receive world_size times the gradient, which the averaging of DDP takes away; parameters all of it.
        """
        # 1. The candidates of all ranks, and the sums over positives, on which a negative's term may depend.
        anchors, candidates, log_weight = batch.anchors, batch.candidates, batch.log_weight
        layout = Layout.of(len(anchors), len(candidates), anchors.device)
        source = Gathered(candidates, layout, gradients=wanted)
        if distributed.is_active() and log_weight is not None:
            log_weight = log_weight.gathered(layout.row_sizes, layout.column_sizes)
        num_rows, num_rows_all, num_columns = len(anchors), sum(layout.row_sizes), len(source.candidates)
        own_positive = candidates[:num_rows]
        positive = (anchors * own_positive).sum(dim=1)
        positive_sums = distributed.sum_over_ranks(self._of_positives(parameters, positive))
        # 2. A tile of negatives at a time; at least one tile, so that a rank without rows takes part in the sums.
        d_anchors = torch.zeros_like(anchors)
        negative_sums: Tensor | float = 0.0
        total_weight, num_negatives = anchors.new_zeros(()), 0
        height = max(1, self.tile_bytes // max(1, num_columns * anchors.element_size()))
        for start in range(0, max(1, num_rows), height):
            rows = slice(start, min(start + height, num_rows))
            local = torch.arange(rows.start, rows.stop, device=anchors.device)
            weight = anchors.new_ones((len(local), num_columns))
            if log_weight is not None:
                weight = weight * log_weight.tile(layout.shifted(rows), slice(0, num_columns)).to(weight.dtype).exp()
            weight[local - start, layout.own_columns.start + local] = 0.0
            scores = anchors[rows] @ source.candidates.T
            sums, slope = self._of_negatives(parameters, scores, weight, positive_sums / num_rows_all)
            negative_sums = negative_sums + sums
            total_weight = total_weight + weight.sum()
            num_negatives += int((weight > 0).sum())
            if wanted:
                d_anchors[rows] = slope @ source.candidates
                source.d_candidates.addmm_(slope.T, anchors[rows])
        # 3. The loss of all ranks, and with it what the derivatives are multiplied by.
        assert isinstance(negative_sums, Tensor)
        totals = distributed.sum_over_ranks(torch.cat([negative_sums, total_weight[None]]))
        outcome = self._outcome(parameters, positive, positive_sums, totals[:-1], totals[-1], num_rows_all)
        d_candidates = source.gradient() if wanted else torch.zeros_like(candidates)
        d_anchors.mul_(outcome.negative_scale).add_(outcome.d_positive[:, None] * own_positive)
        d_candidates.mul_(outcome.negative_scale)
        d_candidates[:num_rows] += outcome.d_positive[:, None] * anchors
        world_size = distributed.world_size()
        gradients = (d_anchors * world_size, d_candidates * world_size, outcome.d_parameters)
        return outcome.loss, gradients, num_negatives / max(1, num_rows)


@final
class SigLIP(PairwiseLoss):
    """Each pair is a yes-or-no question: do the two belong together?

        x_ij = s_ij / tau + bias
        loss = (1 / B) sum_i [softplus(-x_ip(i)) + sum_{j != p(i)} exp(b_ij) softplus(x_ij)]

    The paper's t is 1 / tau, trained through its logarithm, t' = log 10 at first; the bias starts at -10, because
    almost all pairs are negatives. Both are parameters of this Module: see that your optimizer trains them.

    When: image-text pairs, as published. Evidence: one small run in docs/log.md, what training says.

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

    # The sums are the value, d / d x times s, and d / d x.

    def _of_positives(self, parameters: Tensor, scores: Tensor) -> Tensor:
        x = scores / parameters[0] + parameters[1]
        slope = -torch.sigmoid(-x)
        return torch.stack([nn.functional.softplus(-x).sum(), (slope * scores).sum(), slope.sum()])

    def _of_negatives(
        self, parameters: Tensor, scores: Tensor, weight: Tensor, positive_means: Tensor
    ) -> tuple[Tensor, Tensor]:
        x = scores / parameters[0] + parameters[1]
        slope = torch.sigmoid(x).mul_(weight)
        sums = torch.stack([(nn.functional.softplus(x) * weight).sum(), (slope * scores).sum(), slope.sum()])
        return sums, slope.div_(parameters[0])

    def _outcome(
        self, parameters: Tensor, scores: Tensor, positives: Tensor, negatives: Tensor, weight: Tensor, num_rows: int
    ) -> Outcome:
        value, by_score, by_bias = ((positives + negatives) / num_rows).unbind()
        slope = -torch.sigmoid(-(scores / parameters[0] + parameters[1]))
        return Outcome(
            loss=value,
            d_positive=slope / (parameters[0] * num_rows),
            negative_scale=scores.new_tensor(1.0 / num_rows),
            d_parameters=torch.stack([-by_score / parameters[0] ** 2, by_bias]),
        )


@final
class AUCCL(PairwiseLoss):
    """Every positive should outscore every negative by a margin: the square surrogate of the area under the ROC curve.

        loss = mean over positives i and negative pairs (k, l) of (margin - s_ip(i) + s_kl)^2
             = Var(s+) + Var(s-) + (margin - mean s+ + mean s-)^2

    The second line is the min-max form of the AUC literature with its three inner variables (the two means, and the
    multiplier margin - mean s+ + mean s-) at their exact optimum for the batch: no extra parameters, no second
    optimizer. A mean over negative pairs does not grow with the batch. Log-weights weigh the mean.

    When: to study it. Evidence: the formula is tested; no training of ours.

    Args:
        margin: Wanted lead of a positive, in units of cosine similarity.
        scoring: See `Scoring`.

    Cost: no state. Reference: the square AUC loss of Ying et al. 2016, "Stochastic Online AUC Maximization", theorem 1,
    on pairs of embeddings as in Sharma et al. 2024, "AUC-CL" (ICLR), which follows the inner variables stochastically.

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

    # The sums are s and s^2, from which mean and variance follow.

    def _of_positives(self, parameters: Tensor, scores: Tensor) -> Tensor:
        return torch.stack([scores.sum(), scores.square().sum()])

    def _of_negatives(
        self, parameters: Tensor, scores: Tensor, weight: Tensor, positive_means: Tensor
    ) -> tuple[Tensor, Tensor]:
        weighted = scores * weight
        sums = torch.stack([weighted.sum(), (weighted * scores).sum()])
        # d / d s_kl of the mean over i of (margin - s_ip + s_kl)^2: only the positives' mean enters.
        return sums, (scores + (self.margin - positive_means[0])).mul_(weight).mul_(2.0)

    def _outcome(
        self, parameters: Tensor, scores: Tensor, positives: Tensor, negatives: Tensor, weight: Tensor, num_rows: int
    ) -> Outcome:
        mean_positive, square_positive = (positives / num_rows).unbind()
        some = weight > 0  # a batch without any negative says nothing
        scale = torch.where(some, 1.0 / weight, 0.0)
        mean_negative, square_negative = (negatives * scale).unbind()
        lead = self.margin - mean_positive + mean_negative
        variances = square_positive - mean_positive**2 + square_negative - mean_negative**2
        return Outcome(
            loss=(variances + lead**2) * some,
            d_positive=2.0 * (scores - self.margin - mean_negative) / num_rows * some,
            negative_scale=scale,
            d_parameters=scores.new_zeros(0),
        )
