"""An experiment: InfoNCE over all data, the batch exactly and every cluster that is not in it by its centre.

    log_denominator_i = log(1 + sum_{j in batch} exp(d_ij / tau)
                              + sum_{c not in batch} K_c exp((a_i . mu_c - s_ip) / tau + offset))

mu_c is the mean embedding of cluster c and K_c its number of members, both from the last batch that held it: a mined
batch holds whole clusters. The exponential of a mean is less than the mean of exponentials; `offset` makes up for it,
measured on the batch's own clusters, where both are known. Clusters not seen yet are stood for by those that were.

It is no loss of the library, because it fails where it matters. For single anchors, on embeddings that stand still, it
is far nearer to the full gradient than anything else of this cost (docs/benchmarks/global_loss.md). But its errors are
common to all anchors, so that they add up in shared parameters: it trains worse than plain InfoNCE
(docs/benchmarks/shared_direction.md), and from scratch, at usual rates, it collapses.

One process, one direction. Cost: C * D numbers for C clusters, and a product of B x C x D a step.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor, nn

from anybatch.losses import Examples, InfoNCE, LogWeights

RATE = 0.02  # weight of a batch in the running comparison that gives the offset: about fifty batches


class ClusterCentres(nn.Module):
    """See the module.

    Args:
        cluster: (n,) int, each row's cluster; -1 for none. `BatchPlan.cluster`.
        dimensions: D.
        temperature: tau.

    Call: `loss(anchors, candidates, *, index, anchor_id=None, candidate_id=None)`, (B, D) each and the rows' numbers,
    as for the library's losses. Texts with equal ids are not each other's negatives in the batch.
    """

    def __init__(self, cluster: np.ndarray, *, dimensions: int, temperature: float = 0.05) -> None:
        super().__init__()
        self.infonce = InfoNCE(temperature=temperature, normalize=False)  # a centre is shorter than 1, and must be
        self.temperature = temperature
        self.cluster = torch.as_tensor(cluster.astype(np.int64))
        num_clusters = int(cluster.max()) + 1
        self.centre = torch.zeros(num_clusters, dimensions)
        self.count = torch.zeros(num_clusters)  # members in the centre; 0: never seen
        self.mass = torch.zeros(2)  # running sums over the batches' clusters: exact, and estimated by their centres

    @property
    def offset(self) -> float:
        """Logarithm of what the centres' sums must be multiplied by; 0 before anything is known."""
        return math.log(self.mass[0] / self.mass[1]) if bool((self.mass > 0).all()) else 0.0

    def forward(
        self,
        anchors: Tensor,
        candidates: Tensor,
        *,
        index: Tensor,
        anchor_id: Tensor | None = None,
        candidate_id: Tensor | None = None,
    ) -> Tensor:
        """The mean loss of the batch."""
        anchors, candidates = (nn.functional.normalize(side, dim=1) for side in (anchors, candidates))
        own = self.cluster[index]
        with torch.no_grad():
            self._remember(own, candidates)
            outside = torch.ones(len(self.count), dtype=torch.bool)
            outside[own[own >= 0]] = False
            seen = torch.nonzero(outside & (self.count > 0))[:, 0]
            unseen = math.log(max(1, int(outside.sum())) / max(1, len(seen)))
            weight = torch.zeros(len(anchors), len(candidates) + len(seen))
            weight[:, len(candidates) :] = self.count[seen].log() + self.offset + unseen
            if anchor_id is not None and candidate_id is not None:
                same = (candidate_id[:, None] == candidate_id) | (anchor_id[:, None] == anchor_id)
                same.fill_diagonal_(False)
                weight[:, : len(candidates)].masked_fill_(same, -torch.inf)
        far = self.centre[seen].to(candidates.dtype)
        given = LogWeights(queries=Examples(), candidates=Examples(), pairs=weight)  # a count, no mean over the data
        loss = self.infonce(anchors, torch.cat([candidates, far]), log_weight=given)
        with torch.no_grad():
            self._calibrate(anchors / self.temperature, own, candidates)
        return loss

    def _remember(self, own: Tensor, positives: Tensor) -> None:
        placed = own >= 0
        clusters, inverse = torch.unique(own[placed], return_inverse=True)
        count = torch.bincount(inverse, minlength=len(clusters)).float()
        total = torch.zeros(len(clusters), positives.shape[1]).index_add_(0, inverse, positives[placed].float())
        self.centre[clusters], self.count[clusters] = total / count[:, None], count

    def _calibrate(self, scaled: Tensor, own: Tensor, positives: Tensor) -> None:
        """Compare the sums over the batch's other clusters with their centres' estimates, each anchor in proportion to
        its softmax.
        """
        clusters, inverse = torch.unique(own, return_inverse=True)
        share = torch.softmax(scaled @ positives.T, dim=1)
        top = (scaled @ positives.T).logsumexp(dim=1, keepdim=True)
        exact = share.new_zeros(len(share), len(clusters)).index_add_(1, inverse, share)
        members = torch.bincount(inverse, minlength=len(clusters)).to(share.dtype)
        centre = share.new_zeros(len(clusters), positives.shape[1]).index_add_(0, inverse, positives)
        estimated = members * (scaled @ (centre / members[:, None]).T - top).exp()
        others = (own[:, None] != clusters) & (clusters >= 0)
        mass = torch.stack([(exact * others).sum(), (estimated * others).sum()]).float()
        if bool((mass > 0).all()):
            self.mass += (RATE if bool((self.mass > 0).all()) else 1.0) * (mass - self.mass)
