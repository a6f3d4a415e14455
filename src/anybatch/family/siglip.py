"""The sigmoid loss, which has no denominator: every pair is judged alone."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, Unpack, final

import torch
from torch import Tensor, nn

from anybatch.core import distributed
from anybatch.losses.base import ContrastiveLoss, OneTemperature
from anybatch.losses.engine import with_gradients
from anybatch.losses.engine.candidates import Gathered, Layout
from anybatch.losses.parts import Batch


@final
class SigLIP(ContrastiveLoss):
    """Each pair is a yes-or-no question: do the two belong together?

        x_ij = s_ij / tau + bias
        loss = (1 / B) sum_i [softplus(-x_ip(i)) + sum_{j != p(i)} exp(b_ij) softplus(x_ij)]

    The paper's t is 1 / tau, trained through its logarithm, t' = log 10 at first; the bias starts at -10, because
    almost all pairs are negatives. Both are parameters of this Module: see that your optimizer trains them.

    When: image-text pairs, as published. Evidence: one small run in docs/log.md, what training says.

    Args:
        bias: The bias at first; trained.
        scoring: See `OneTemperature`; `temperature` is tau at first.

    Cost: no state; three matrix products of B x M x D; `tile_bytes` of scores at a time and a few tensors of that size.
    With W ranks a gather of the candidates, a sum of their gradient, the collectives of the log-weights, and two sums
    of three numbers, all in the forward pass. Reference: Zhai et al. 2023, "Sigmoid Loss for Language Image
    Pre-Training", arXiv 2303.15343, equation 1 and algorithm 1.

    Example:
        >>> import torch
        >>> round(SigLIP(bias=0.0)(torch.eye(2), torch.eye(2)).item(), 4)  # softplus(-10) + softplus(0)
        0.6932
    """

    defaults: ClassVar[OneTemperature] = {"temperature": 0.1, "learnable_temperature": True}
    lacks: ClassVar[Mapping[str, str]] = {
        "direction": "judges pairs, which have one direction",
        "joint": "judges pairs, and has no softmax",
        "positives_by": "judges pairs, of which each has one positive",
        "hardness": "judges each pair on its own",
        "mask_margin": "judges each pair on its own, with no own positive beside it",
    }
    _last: tuple[Tensor, float] | None = None

    def __init__(self, *, bias: float = -10.0, **scoring: Unpack[OneTemperature]) -> None:
        super().__init__(**scoring)
        self.bias = nn.Parameter(torch.tensor(float(bias)))

    @property
    def last_stats(self) -> dict[str, float]:
        """Figures of the last call: objective, negatives per anchor, temperature, bias. Empty before it."""
        if self._last is None:
            return {}
        figures = {"objective": self._last[0].item(), "num_negatives": self._last[1]}
        return {**figures, "temperature": self.temperature, "bias": self.bias.item()}

    def _of(self, batch: Batch) -> Tensor:
        parameters = torch.stack([self.temperatures.of(batch, 0), self.bias.to(batch.anchors)])
        wanted = torch.is_grad_enabled()
        with torch.no_grad(), torch.autocast(batch.anchors.device.type, enabled=False):
            loss, gradients, num_negatives = self._solve(batch, *parameters.detach(), wanted=wanted)
        self._last = loss, num_negatives
        return with_gradients(loss, (batch.anchors, batch.candidates, parameters), gradients)

    def _solve(
        self, batch: Batch, tau: Tensor, bias: Tensor, *, wanted: bool
    ) -> tuple[Tensor, tuple[Tensor, ...], float]:
        """The loss over all ranks, its gradients, and the mean number of negatives of this rank's anchors.

        Embeddings receive world_size times the gradient, which the averaging of DDP takes away; parameters all of it.
        """
        # 1. The candidates of all ranks; of positives and of negatives the sums of the value, d / d x times s, d / d x.
        anchors, candidates, log_weight = batch.anchors, batch.candidates, batch.log_weight
        layout = Layout.of(len(anchors), len(candidates), anchors.device)
        source = Gathered(candidates, layout, gradients=wanted)
        if distributed.is_active() and log_weight is not None:
            log_weight = log_weight.gathered(layout.row_sizes, layout.column_sizes)
        num_rows, num_rows_all, num_columns = len(anchors), sum(layout.row_sizes), len(source.candidates)
        own_positive = candidates[:num_rows]
        positive = (anchors * own_positive).sum(dim=1)
        x = positive / tau + bias
        slope = -torch.sigmoid(-x)
        parts = [nn.functional.softplus(-x).sum(), (slope * positive).sum(), slope.sum()]
        positive_sums, d_positive = distributed.sum_over_ranks(torch.stack(parts)), slope / (tau * num_rows_all)
        # 2. A tile of negatives at a time.
        d_anchors, negative_sums, num_negatives = torch.zeros_like(anchors), anchors.new_zeros(3), 0
        height = max(1, self.tile_bytes // max(1, num_columns * anchors.element_size()))
        for start in range(0, num_rows, height):
            rows = slice(start, min(start + height, num_rows))
            local = torch.arange(rows.start, rows.stop, device=anchors.device)
            weight = anchors.new_ones((len(local), num_columns))
            if log_weight is not None:
                weight = weight * log_weight.tile(layout.shifted(rows), slice(0, num_columns)).to(weight.dtype).exp()
            weight[local - start, layout.own_columns.start + local] = 0.0
            scores = anchors[rows] @ source.candidates.T
            x = scores / tau + bias
            slope = torch.sigmoid(x).mul_(weight)
            parts = [(nn.functional.softplus(x) * weight).sum(), (slope * scores).sum(), slope.sum()]
            negative_sums = negative_sums + torch.stack(parts)
            num_negatives += int((weight > 0).sum())
            if wanted:
                slope.div_(tau)
                d_anchors[rows] = slope @ source.candidates
                source.d_candidates.addmm_(slope.T, anchors[rows])
        # 3. The loss of all ranks and the gradients of its mean.
        negative_sums = distributed.sum_over_ranks(negative_sums)
        value, by_score, by_bias = ((positive_sums + negative_sums) / num_rows_all).unbind()
        d_candidates = source.gradient() if wanted else torch.zeros_like(candidates)
        scale = anchors.new_tensor(1.0 / num_rows_all)
        d_anchors.mul_(scale).add_(d_positive[:, None] * own_positive)
        d_candidates.mul_(scale)
        d_candidates[:num_rows] += d_positive[:, None] * anchors
        d_parameters, world_size = torch.stack([-by_score / tau**2, by_bias]), distributed.world_size()
        gradients = (d_anchors * world_size, d_candidates * world_size, d_parameters)
        return value, gradients, num_negatives / max(1, num_rows)
