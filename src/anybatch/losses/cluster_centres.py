"""InfoNCE over all data from small batches: the batch exactly, every cluster that is not in it by its centre."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from anybatch import distributed
from anybatch.errors import AnybatchError
from anybatch.losses.base import ContrastiveLoss, Direction
from anybatch.losses.engine import TILE_BYTES, Rule, SoftmaxStats, softmax_loss
from anybatch.losses.infonce import _WithPositive
from anybatch.losses.log_weights import IdMask, LogWeight, SumLogWeight, TensorLogWeight

CALIBRATION_ROWS = 256  # anchors of a batch whose exact cluster sums are compared with the centres' estimates
CALIBRATION_RATE = 0.02  # weight of a batch in the running comparison: about fifty batches


class ClusterCentreInfoNCE(ContrastiveLoss):
    """InfoNCE whose denominator covers the whole data set, with one remembered vector a cluster.

        log_denominator_i = log(1 + sum_{j in batch} exp(d_ij / tau) + sum_{c not in batch} K_c exp((a_i . mu_c - s_ip) / tau + offset))

    mu_c is the mean embedding of cluster c and K_c its number of members, both from the last batch that held it. A mined
    batch holds whole clusters, so mu_c is never averaged over time and is at most one epoch old. The exponential of a mean is
    less than the mean of exponentials; `offset` makes up for it, measured on the clusters of each batch, where both are known.
    Clusters not seen yet are stood for by those that were. Centres are constants: they push anchors, nothing pushes their members.

    Against importance weights (`RowTable(weights="inclusion")`), which let the few other clusters of the batch stand for all, this
    trades the noise of that draw for the error of the centres, which is smaller where clusters are tight.

    Args:
        cluster: (n,) int, each row's cluster; -1 for none (such rows count in their batch only). `BatchPlan.cluster`.
        dimensions: D, width of the embeddings.
        temperature, learnable_temperature, direction, normalize, tile_bytes: See `ContrastiveLoss`.

    Takes masks and ids, but no other log-weights: the centres are in their place. Updated once a call, in training mode
    with gradients enabled, and part of `state_dict`.

    Raises:
        AnybatchError: No clusters; in a call: `index` missing or out of range, another width, log-weights that are no masks.

    Cost: C * D numbers a direction for C clusters; a product of B x C x D a step beside the B x M x D of the batch. Collectives:
    two gathers and one sum beside those of the engine; each rank multiplies with its share of the centres.

    Reference: none; the far field by cluster means is that of N-body codes (Barnes and Hut 1986), with one level.
    """

    def __init__(
        self,
        cluster: np.ndarray | Tensor,
        *,
        dimensions: int,
        temperature: float = 0.05,
        learnable_temperature: bool = False,
        direction: Direction = "one_way",
        normalize: bool = True,
        tile_bytes: int = TILE_BYTES,
    ) -> None:
        super().__init__(
            temperature=temperature,
            learnable_temperature=learnable_temperature,
            direction=direction,
            normalize=normalize,
            tile_bytes=tile_bytes,
        )
        clusters = torch.as_tensor(cluster).long()
        num_clusters = int(clusters.max()) + 1 if len(clusters) else 0
        if num_clusters < 1:
            raise AnybatchError(
                "No row has a cluster; give the `cluster` of a mined plan, or row numbers divided by a size."
            )
        num_directions = 2 if direction == "both" else 1
        self.cluster: Tensor
        self.centre: Tensor
        self.count: Tensor
        self.mass: Tensor
        self.register_buffer("cluster", clusters, persistent=False)  # from the plan, which has its own file and digest
        self.register_buffer("centre", torch.zeros(num_directions, num_clusters, dimensions))
        self.register_buffer("count", torch.zeros(num_directions, num_clusters))  # members in the centre; 0: never seen
        self.register_buffer(
            "mass", torch.zeros(num_directions, 2)
        )  # running: exact, estimated, of clusters in batches

    @property
    def offset(self) -> Tensor:
        """(directions,) log of what the centres' sums must be multiplied by; 0 before anything is known."""
        known = (self.mass > 0).all(dim=1)
        return torch.where(known, self.mass[:, 0].log() - self.mass[:, 1].log(), 0.0)

    def _one_way(
        self,
        anchors: Tensor,
        candidates: Tensor,
        temperature: Tensor,
        weight: LogWeight | None,
        index: Tensor | None,
        *,
        direction: int,
    ) -> tuple[Tensor, SoftmaxStats]:
        own = self._check(index, anchors.shape[1])
        num_rows = len(anchors)
        sizes = distributed.gather_sizes(num_rows, anchors.device)
        present = distributed.gather_rows(own, sizes)
        update = self.training and torch.is_grad_enabled()
        positives = distributed.gather_rows(candidates[:num_rows], sizes) if update else None
        if positives is not None:
            self._remember(present, positives, direction)
        far, far_weight = self._far(present, anchors.dtype, direction)
        share = slice(distributed.rank(), None, distributed.world_size())  # the engine gathers what each rank brings
        columns = torch.cat([anchors.new_zeros(len(candidates)), far_weight[share]])
        total: LogWeight = TensorLogWeight(values=columns[None], normalised=False)
        if weight is not None:
            total = SumLogWeight(terms=(_widened(weight, len(far[share])), total))
        loss, stats = softmax_loss(
            anchors,
            torch.cat([candidates, far[share]]),
            temperature=temperature,
            rule=_WithPositive(),
            log_weight=total,
            tile_bytes=self.tile_bytes,
        )
        balance = self._balance(anchors.detach(), candidates, far, far_weight, temperature.detach(), stats)
        loss = loss + balance - balance.detach()
        if positives is not None:
            first = sum(sizes[: distributed.rank()])
            some = slice(0, max(0, min(num_rows, CALIBRATION_ROWS - first)))
            with torch.no_grad():
                own_score = (anchors[some] * candidates[:num_rows][some]).sum(dim=1) / temperature
                scaled = anchors[some] / temperature
                self._calibrate(
                    scaled, own_score + stats.log_denominator[some], own[some], positives, present, direction
                )
        return loss, stats

    def _rule(self, index: Tensor | None, *, direction: int, normalised: bool, dimensions: int) -> Rule:
        return _WithPositive()

    def _check(self, index: Tensor | None, dimensions: int) -> Tensor:
        """The cluster of each row of the batch."""
        if index is None:
            raise AnybatchError(
                "This loss knows each row's cluster: give index=, the row numbers of the batch in the data set."
            )
        if len(index) and (int(index.min()) < 0 or int(index.max()) >= len(self.cluster)):
            raise AnybatchError(
                f"index runs from {int(index.min())} to {int(index.max())}; expected rows 0 to {len(self.cluster) - 1}. "
                "Make the loss with the clusters of this data set."
            )
        if dimensions != self.centre.shape[2]:
            raise AnybatchError(
                f"The embeddings have {dimensions} dimensions, the centres {self.centre.shape[2]}. Make the loss with dimensions={dimensions}."
            )
        return self.cluster[index]

    def _balance(
        self,
        anchors: Tensor,
        candidates: Tensor,
        far: Tensor,
        far_weight: Tensor,
        temperature: Tensor,
        stats: SoftmaxStats,
    ) -> Tensor:
        """A term whose gradient takes the centres' share out of the pull on each positive.

        The anchor's pull on its positive balances what pushes positives away in the same loss. Centres push no positive, so
        their share must not pull one either: otherwise positives are drawn together by more than keeps them apart, and collapse.
        """
        share = anchors.new_empty(len(anchors))
        own = candidates[: len(anchors)]
        height = max(1, self.tile_bytes // (anchors.element_size() * max(1, len(far))))
        with torch.no_grad():
            reference = (anchors * own).sum(dim=1) / temperature + stats.log_denominator
            for start in range(0, len(anchors), height):
                rows = slice(start, start + height)
                logits = anchors[rows] @ far.T / temperature + far_weight - reference[rows, None]
                share[rows] = logits.exp_().sum(dim=1)
        total = sum(distributed.gather_sizes(len(anchors), anchors.device))
        push = distributed.sum_over_ranks(share @ anchors) / (temperature * total)
        return push @ own.sum(dim=0) * (distributed.world_size() / total)

    def _remember(self, present: Tensor, positives: Tensor, direction: int) -> None:
        """Put the means of the batch's clusters in place of what was known of them."""
        placed = present >= 0
        clusters, inverse = torch.unique(present[placed], return_inverse=True)
        count = torch.bincount(inverse, minlength=len(clusters)).to(self.count.dtype)
        total = self.centre.new_zeros(len(clusters), self.centre.shape[2])
        total.index_add_(0, inverse, positives[placed].to(total.dtype))
        self.centre[direction, clusters] = total / count[:, None]
        self.count[direction, clusters] = count

    def _far(self, present: Tensor, dtype: torch.dtype, direction: int) -> tuple[Tensor, Tensor]:
        """The centres of the clusters that are not in the batch, and their log-weights."""
        outside = torch.ones_like(self.count[direction], dtype=torch.bool)
        outside[present[present >= 0]] = False
        seen = torch.nonzero(outside & (self.count[direction] > 0))[:, 0]
        unseen = math.log(max(1, int(outside.sum())) / max(1, len(seen)))  # those seen stand for all
        weight = self.count[direction, seen].log() + self.offset[direction] + unseen
        return self.centre[direction, seen].to(dtype), weight.to(dtype)

    def _calibrate(
        self, scaled: Tensor, log_total: Tensor, own: Tensor, positives: Tensor, present: Tensor, direction: int
    ) -> None:
        """Compare the sums over the batch's other clusters with their centres' estimates, weighted by their share of the softmax.

        Args:
            scaled: (b, D) some anchors over the temperature.
            log_total: (b,) logarithm of their whole denominator.
            own: (b,) their clusters.
            positives: (B, D) of all ranks.
            present: (B,) clusters of `positives`.
            direction: Whose comparison is kept.
        """
        clusters, inverse = torch.unique(present, return_inverse=True)
        share = (scaled @ positives.T - log_total[:, None]).exp()
        exact = share.new_zeros(len(share), len(clusters)).index_add_(1, inverse, share)
        members = torch.bincount(inverse, minlength=len(clusters)).to(share.dtype)
        centre = share.new_zeros(len(clusters), positives.shape[1]).index_add_(0, inverse, positives)
        centre = centre / members[:, None]
        estimated = members * (scaled @ centre.T - log_total[:, None]).exp()
        others = (own[:, None] != clusters) & (clusters >= 0)
        mass = torch.stack([(exact * others).sum(), (estimated * others).sum()])
        mass = distributed.sum_over_ranks(mass).to(self.mass.dtype)
        if bool((mass > 0).all()):
            rate = CALIBRATION_RATE if bool((self.mass[direction] > 0).all()) else 1.0
            self.mass[direction] += rate * (mass - self.mass[direction])


def _widened(weight: LogWeight, extra: int) -> LogWeight:
    """A mask over the candidates, made to cover as many centres behind them."""
    if isinstance(weight, SumLogWeight):
        return SumLogWeight(terms=tuple(_widened(term, extra) for term in weight.terms))
    if isinstance(weight, IdMask):
        none = weight.column_id.new_full((extra,), -3)  # an id that no text has
        column_anchor = torch.cat([weight.column_anchor, none])
        return replace(weight, column_id=torch.cat([weight.column_id, none]), column_anchor=column_anchor)
    if isinstance(weight, TensorLogWeight) and not weight.normalised:
        values = weight.values.expand(-1, weight.values.shape[1])
        if values.shape[1] == 1:
            return weight
        return replace(weight, values=torch.cat([values, values.new_zeros(len(values), extra)], dim=1))
    raise AnybatchError(
        "This loss takes masks and ids, and no other log-weights: its centres stand for what is not in the batch. Use weights='none'."
    )
