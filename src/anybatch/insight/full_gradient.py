"""Exact gradients of InfoNCE over a whole set of pairs, in closed form, for some rows: one direction, or both."""

from __future__ import annotations

import torch
from torch import Tensor

from anybatch.core.ids import known_positives, renumbered
from anybatch.losses.base import Direction
from anybatch.losses.engine import TILE_BYTES
from anybatch.losses.log_weights import ListedPairs, LogWeights, same_content
from anybatch.plans.examples import Examples


def full_gradient(
    anchors: Tensor,
    positives: Tensor,
    *,
    temperature: float,
    direction: Direction = "one_way",
    rows: Tensor | None = None,
    masks: LogWeights | None = None,
    tile_bytes: int = TILE_BYTES,
) -> Tensor:
    """The exact gradient of full-data InfoNCE with respect to the embeddings, in closed form.

        p_ij  = exp(s_ij / tau) / sum_k exp(s_ik / tau)       anchor i among all positives
        q_ij  = exp(s_ij / tau) / sum_k exp(s_kj / tau)       positive j among all anchors

        one way:  F = sum_i L_i,               L_i = -log p_ii
            dF/da_i = 1 / tau * (sum_j p_ij c_j - c_i)
        both:     F = sum_i (L_i + L'_i) / 2,  L'_i = -log q_ii
            dF/da_i = 1 / tau * (sum_j (p_ij + q_ij) / 2 c_j - c_i)
            dF/dc_j = 1 / tau * (sum_i (p_ij + q_ij) / 2 a_i - a_j)

    An anchor is a query in one direction and a candidate of every positive in the other; both parts are its gradient.

    Args:
        anchors, positives: (n, D) float, unit rows.
        temperature: tau.
        direction: "one_way", or "both" for both directions' losses.
        rows: (P,) int64, whose gradient; None for all.
        masks: Over all rows, such as `content_masks`; None if all texts differ.
        tile_bytes: Memory for scores at a time.

    Returns:
        (P, D) of the rows' anchors; of both directions (P, 2 D), then of their positives. Each without its component
        along the embedding, which never passes the normalisation, and not divided by n.

    Cost: two products of P x n x D; of both directions four, and one of n x n x D for the denominators. One tile of
        scores.

    Reference: van den Oord et al. 2018, arXiv 1807.03748, equation 4, and Radford et al. 2021, arXiv 2103.00020, figure
        3, with the whole data set as one batch.

    Example:
        >>> full_gradient(torch.eye(3), torch.eye(3), temperature=1.0)[0]
        tensor([0.0000, 0.2119, 0.2119])
    """
    rows = torch.arange(len(anchors)) if rows is None else rows
    height = max(1, tile_bytes // (len(positives) * anchors.element_size()))
    sides = [(anchors, positives, masks)]
    log_sums = [torch.empty(0)] * 2
    # 1. Both directions' denominators: log sum_k exp(s_ik / tau), and log sum_k exp(s_kj / tau) over the tiles so far.
    if direction == "both":
        sides.append((positives, anchors, None if masks is None else masks.reversed(len(anchors))))
        log_sums = [anchors.new_empty(len(anchors)), anchors.new_full((len(anchors),), -torch.inf)]
        for tile in torch.arange(len(anchors)).split(height):
            logits = _logits(anchors, positives, tile, temperature, masks)
            log_sums[0][tile] = logits.logsumexp(dim=1)
            log_sums[1] = torch.logaddexp(log_sums[1], logits.logsumexp(dim=0))
    # 2. The gradient of one side at a time, in tiles of rows.
    parts = []
    for side, (own, others, own_masks) in enumerate(sides):
        gradient = own.new_empty(len(rows), own.shape[1])
        for start in range(0, len(rows), height):
            tile = rows[start : start + height]
            logits = _logits(own, others, tile, temperature, own_masks)
            share = torch.softmax(logits, dim=1)
            if direction == "both":
                share = (share + (logits - log_sums[1 - side]).exp_()) / 2
            gradient[start : start + height] = (share @ others - others[tile]) / temperature
        parts.append(tangent(gradient, own[rows]))
    return torch.cat(parts, dim=1)


def tangent(gradient: Tensor, embeddings: Tensor) -> Tensor:
    """(P, D) the gradient without its component along the unit embeddings, which never passes the normalisation."""
    return gradient - (gradient * embeddings).sum(dim=1, keepdim=True) * embeddings


def content_masks(anchor_id: Tensor, positive_id: Tensor) -> LogWeights:
    """-inf for pairs of rows that are no negatives: the same anchor, the same positive, or a pair that another row has.

    Args:
        anchor_id, positive_id: (n,) int64 from 0 on; equal for identical texts.

    >>> content_masks(torch.tensor([0, 0, 1]), torch.tensor([0, 1, 2])).tile(slice(0, 1), slice(None)).tolist()
    [[-inf, -inf, 0.0]]
    """
    anchors, positives = (renumbered(ids.numpy()) for ids in (anchor_id, positive_id))  # large products do not fit
    width = int(positives.max()) + 1
    matching = ListedPairs(torch.from_numpy(known_positives(anchors, positives, width)), width, key="anchor_id")
    examples = Examples(anchor_id=torch.from_numpy(anchors), text_id=torch.from_numpy(positives))
    return LogWeights.of(examples, len(anchors), same_content, matching)


def _logits(queries: Tensor, candidates: Tensor, rows: Tensor, temperature: float, masks: LogWeights | None) -> Tensor:
    """(rows, n) scores over the temperature; a row's own pair is never masked."""
    logits = (queries[rows] @ candidates.T).mul_(1 / temperature)
    if masks is not None:
        own = torch.arange(len(rows)), rows
        kept = logits[own]
        logits += masks.tile(rows, slice(None))
        logits[own] = kept
    return logits
