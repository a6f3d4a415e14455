"""The gradient of InfoNCE over a whole set of pairs, in a linear map on frozen embeddings: one batch of all rows."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from anybatch.core.ids import known_positives, renumbered
from anybatch.losses.base import Direction
from anybatch.losses.log_weights import ListedPairs, LogWeights, same_content
from anybatch.losses.methods import InfoNCE
from anybatch.losses.rows import suspect_keys
from anybatch.plans.examples import Examples


def full_gradient(
    anchors: Tensor,
    positives: Tensor,
    *,
    temperature: float,
    direction: Direction = "one_way",
    mask_margin: float | None = None,
    rows: Tensor | None = None,
    masks: LogWeights | None = None,
) -> tuple[Tensor, Tensor]:
    """The gradient of full-data InfoNCE in two linear maps, W of the anchors and V of the positives, at the identity.

        a_i = W x_i / |W x_i|,  c_j = V y_j / |V y_j|
        dF / dW = sum_i (g_i - (g_i . a_i) a_i) x_i^T     with g_i = dF / d a_i; likewise V

    Args:
        anchors, positives: (n, D) float, unit rows.
        temperature: tau.
        direction: "one_way", or "both" for the mean of both directions' losses.
        mask_margin: See `Scoring`.
        rows: (P,) int64, whose losses are averaged, against all n candidates; None for all.
        masks: Over all rows, such as `content_masks`; None if all texts differ.

    Returns:
        Two (D, D), of W and of V. A map that both sides share has their sum.

    Cost: three products of P x n x D, of both directions six; tiles of scores as in the loss.

    Example:
        >>> full_gradient(torch.eye(3), torch.eye(3), temperature=1.0)[0]
        tensor([[0.0000, 0.0706, 0.0706],
                [0.0706, 0.0000, 0.0706],
                [0.0706, 0.0706, 0.0000]])
    """
    chosen = torch.arange(len(anchors)) if rows is None else rows
    others = torch.ones(len(anchors), dtype=torch.bool)
    others[chosen] = False
    order = torch.cat([chosen, others.nonzero()[:, 0]])  # the rows that are no queries are explicit negatives

    def one_way(queries: Tensor, candidates: Tensor, masks: LogWeights | None) -> list[Tensor]:
        leaves = queries[chosen].requires_grad_(), candidates[order].requires_grad_()
        if masks is not None:
            masks = replace(masks, queries=masks.queries.take(chosen), candidates=masks.candidates.take(order))
        value = InfoNCE(temperature=temperature, mask_margin=mask_margin)(*leaves, log_weight=masks)
        return [in_map(*pair) for pair in zip(torch.autograd.grad(value, leaves), leaves, strict=True)]

    forth = one_way(anchors, positives, masks)
    if direction == "one_way":
        return forth[0], forth[1]
    back = one_way(positives, anchors, None if masks is None else masks.reversed(len(anchors)))
    return (forth[0] + back[1]) / 2, (forth[1] + back[0]) / 2


def in_map(gradient: Tensor, embeddings: Tensor) -> Tensor:
    """(D, D) the gradient in a linear map of what is (n, D) the gradient in its normalised outputs, at the identity."""
    embeddings = embeddings.detach()
    along = (gradient * embeddings).sum(dim=1, keepdim=True)  # never passes the normalisation
    return (gradient - along * embeddings).T @ embeddings


def content_masks(anchor_id: Tensor, positive_id: Tensor, suspects: np.ndarray | None = None) -> LogWeights:
    """-inf for pairs of rows that are no negatives: the same anchor or positive, a pair that another row has, suspects.

    Args:
        anchor_id, positive_id: (n,) int64 from 0 on; equal for identical texts.
        suspects: (p, 2) int, see `BatchPlan`.

    >>> content_masks(torch.tensor([0, 0, 1]), torch.tensor([0, 1, 2])).tile(slice(0, 1), slice(None)).tolist()
    [[-inf, -inf, 0.0]]
    """
    anchors, positives = (renumbered(ids.numpy()) for ids in (anchor_id, positive_id))  # large products do not fit
    width = int(positives.max()) + 1
    matching = ListedPairs(torch.from_numpy(known_positives(anchors, positives, width)), width, key="anchor_id")
    ids = {"anchor_id": torch.from_numpy(anchors), "text_id": torch.from_numpy(positives)}
    terms = [same_content, matching]
    if suspects is not None:
        terms.append(ListedPairs(suspect_keys(suspects, positives, width), width))
    return LogWeights.of(Examples(**ids, row=torch.arange(len(anchors))), len(anchors), *terms)
