"""Exact gradients of InfoNCE over a whole set of pairs, in closed form, for some of its rows. One direction, or both.

Imports losses (for the size of a tile).
"""

from __future__ import annotations

import torch
from torch import Tensor

from anybatch.losses.engine import TILE_BYTES


def full_gradient(
    anchors: Tensor,
    positives: Tensor,
    *,
    temperature: float,
    rows: Tensor | None = None,
    anchor_id: Tensor | None = None,
    positive_id: Tensor | None = None,
    tile_bytes: int = TILE_BYTES,
) -> Tensor:
    """The exact gradient of full-data InfoNCE with respect to anchors, in closed form.

        g*_i = 1 / tau * sum_{j != i} p_ij (c_j - c_i), without its component along a_i

    Args:
        anchors, positives: (n, D) float, unit rows.
        temperature: tau.
        rows: (P,) int64, whose gradient; None for all.
        anchor_id, positive_id: (n,) int; a row whose anchor or positive has the anchor's own id is no negative. Both or none.
        tile_bytes: Memory for scores at a time.

    Returns:
        (P, D), of each anchor's own loss L_i (not divided by n).

    Cost: two products of P x n x D; one tile of scores.

    Reference: the gradient of van den Oord et al. 2018, arXiv 1807.03748, equation 4, with the whole data set as candidates.
    """
    rows = torch.arange(len(anchors)) if rows is None else rows
    gradient = anchors.new_empty(len(rows), anchors.shape[1])
    height = max(1, tile_bytes // (len(positives) * anchors.element_size()))
    for start in range(0, len(rows), height):
        tile = rows[start : start + height]
        logits = _logits(anchors, positives, tile, temperature, anchor_id, positive_id)
        share = torch.softmax(logits, dim=1)
        gradient[start : start + height] = (share @ positives - positives[tile]) / temperature
    return tangent(gradient, anchors[rows])


def full_gradient_both(
    anchors: Tensor,
    positives: Tensor,
    *,
    temperature: float,
    rows: Tensor | None = None,
    anchor_id: Tensor | None = None,
    positive_id: Tensor | None = None,
    tile_bytes: int = TILE_BYTES,
) -> Tensor:
    """The exact gradient of full-data InfoNCE in both directions, with respect to anchors and positives, in closed form.

        F     = sum_i (L_i + L'_i) / 2,    L_i = -log p_ii,   L'_i = -log q_ii
        p_ij  = exp(s_ij / tau) / sum_k exp(s_ik / tau)       anchor i among all positives
        q_ij  = exp(s_ij / tau) / sum_k exp(s_kj / tau)       positive j among all anchors
        dF/da_i = 1 / tau * (sum_j (p_ij + q_ij) / 2 c_j - c_i),    dF/dc_j = 1 / tau * (sum_i (p_ij + q_ij) / 2 a_i - a_j)

    An anchor is a query in one direction and a candidate of every positive in the other; both parts are its gradient.

    Args:
        anchors, positives, temperature, rows, anchor_id, positive_id, tile_bytes: See `full_gradient`.

    Returns:
        (P, 2 D): of the rows' anchors, then of their positives, each without its component along the embedding. Not divided by n.

    Cost: a product of n x n x D for the denominators, four of P x n x D; one tile of scores.

    Reference: Radford et al. 2021, "Learning Transferable Visual Models From Natural Language Supervision", arXiv 2103.00020, figure 3, with the whole
    data set as one batch.
    """
    rows = torch.arange(len(anchors)) if rows is None else rows
    ids = (anchor_id, positive_id)
    height = max(1, tile_bytes // (len(positives) * anchors.element_size()))
    of_anchor = anchors.new_empty(len(anchors))  # log sum_k exp(s_ik / tau)
    of_positive = anchors.new_full((len(anchors),), -torch.inf)  # log sum_k exp(s_kj / tau), over the tiles so far
    for tile in torch.arange(len(anchors)).split(height):
        logits = _logits(anchors, positives, tile, temperature, *ids)
        of_anchor[tile] = logits.logsumexp(dim=1)
        of_positive = torch.logaddexp(of_positive, logits.logsumexp(dim=0))
    parts = []
    for own, others, own_log, others_log in (
        (anchors, positives, of_anchor, of_positive),
        (positives, anchors, of_positive, of_anchor),
    ):
        gradient = own.new_empty(len(rows), own.shape[1])
        for start in range(0, len(rows), height):
            tile = rows[start : start + height]
            logits = _logits(own, others, tile, temperature, *ids)  # masks are the same from either side
            share = (logits - own_log[tile, None]).exp_().add_((logits - others_log).exp_())
            gradient[start : start + height] = (share @ others / 2 - others[tile]) / temperature
        parts.append(tangent(gradient, own[rows]))
    return torch.cat(parts, dim=1)


def tangent(gradient: Tensor, embeddings: Tensor) -> Tensor:
    """(P, D) the gradient without its component along the unit embeddings, which never passes the normalisation."""
    return gradient - (gradient * embeddings).sum(dim=1, keepdim=True) * embeddings


def _logits(
    queries: Tensor,
    candidates: Tensor,
    rows: Tensor,
    temperature: float,
    anchor_id: Tensor | None,
    positive_id: Tensor | None,
) -> Tensor:
    """(rows, n) scores over the temperature; -inf for identical texts of other rows."""
    own = torch.arange(len(rows))
    logits = (queries[rows] @ candidates.T).mul_(1 / temperature)
    kept = logits[own, rows]
    if anchor_id is not None and positive_id is not None:
        logits.masked_fill_(anchor_id[rows, None] == anchor_id[None], -torch.inf)
        logits.masked_fill_(positive_id[rows, None] == positive_id[None], -torch.inf)
    logits[own, rows] = kept
    return logits
