"""Exact gradients of InfoNCE over a whole set of pairs, in closed form, for some of its rows. One direction, or both.

Imports ids and losses.
"""

from __future__ import annotations

import torch
from torch import Tensor

from anybatch.core.ids import known_positives, renumbered
from anybatch.losses.engine import TILE_BYTES
from anybatch.losses.log_weights import ListedPairs, LogWeights, same_content
from anybatch.plans.examples import Examples


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
        anchor_id, positive_id: (n,) int64; a row whose anchor or positive has the anchor's own id is no negative, nor
            is a positive that the same anchor has in a third row. Both or none.
        tile_bytes: Memory for scores at a time.

    Returns:
        (P, D), of each anchor's own loss L_i (not divided by n).

    Cost: two products of P x n x D; one tile of scores.

    Reference: the gradient of van den Oord et al. 2018, arXiv 1807.03748, equation 4, with the whole data set as
    candidates.
    """
    rows = torch.arange(len(anchors)) if rows is None else rows
    masks = _masks(anchor_id, positive_id)
    gradient = anchors.new_empty(len(rows), anchors.shape[1])
    height = max(1, tile_bytes // (len(positives) * anchors.element_size()))
    for start in range(0, len(rows), height):
        tile = rows[start : start + height]
        logits = _logits(anchors, positives, tile, temperature, masks)
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
    known: tuple[Tensor, int] | None = None,
    tile_bytes: int = TILE_BYTES,
) -> Tensor:
    """The exact gradient of full-data InfoNCE in both directions, with respect to anchors and positives, in closed
    form.

        F     = sum_i (L_i + L'_i) / 2,    L_i = -log p_ii,   L'_i = -log q_ii
        p_ij  = exp(s_ij / tau) / sum_k exp(s_ik / tau)       anchor i among all positives
        q_ij  = exp(s_ij / tau) / sum_k exp(s_kj / tau)       positive j among all anchors
        dF/da_i = 1 / tau * (sum_j (p_ij + q_ij) / 2 c_j - c_i),    dF/dc_j = 1 / tau * (sum_i (p_ij + q_ij) / 2 a_i -
        a_j)

    An anchor is a query in one direction and a candidate of every positive in the other; both parts are its gradient.

    Args:
        anchors, positives, temperature, rows, anchor_id, positive_id, tile_bytes: See `full_gradient`.
        known: Ascending keys anchor_id * width + positive_id of pairs that match, and the width, if these rows are
            part of more; None: what the rows themselves tell.

    Returns:
        (P, 2 D): of the rows' anchors, then of their positives, each without its component along the embedding. Not
            divided by n.

    Cost: a product of n x n x D for the denominators, four of P x n x D; one tile of scores.

    Reference: Radford et al. 2021, "Learning Transferable Visual Models From Natural Language Supervision", arXiv
    2103.00020, figure 3, with the whole data set as one batch.
    """
    rows = torch.arange(len(anchors)) if rows is None else rows
    masks = _masks(anchor_id, positive_id, known)
    height = max(1, tile_bytes // (len(positives) * anchors.element_size()))
    of_anchor = anchors.new_empty(len(anchors))  # log sum_k exp(s_ik / tau)
    of_positive = anchors.new_full((len(anchors),), -torch.inf)  # log sum_k exp(s_kj / tau), over the tiles so far
    for tile in torch.arange(len(anchors)).split(height):
        logits = _logits(anchors, positives, tile, temperature, masks)
        of_anchor[tile] = logits.logsumexp(dim=1)
        of_positive = torch.logaddexp(of_positive, logits.logsumexp(dim=0))
    parts = []
    for own, others, own_log, others_log, own_masks in (
        (anchors, positives, of_anchor, of_positive, masks),
        (positives, anchors, of_positive, of_anchor, None if masks is None else masks.reversed(len(anchors))),
    ):
        gradient = own.new_empty(len(rows), own.shape[1])
        for start in range(0, len(rows), height):
            tile = rows[start : start + height]
            logits = _logits(own, others, tile, temperature, own_masks)
            share = (logits - own_log[tile, None]).exp_().add_((logits - others_log).exp_())
            gradient[start : start + height] = (share @ others / 2 - others[tile]) / temperature
        parts.append(tangent(gradient, own[rows]))
    return torch.cat(parts, dim=1)


def tangent(gradient: Tensor, embeddings: Tensor) -> Tensor:
    """(P, D) the gradient without its component along the unit embeddings, which never passes the normalisation."""
    return gradient - (gradient * embeddings).sum(dim=1, keepdim=True) * embeddings


def known_pairs(anchor_id: Tensor, positive_id: Tensor) -> tuple[Tensor, int]:
    """Keys anchor_id * width + positive_id of what other rows know to match (`ids.known_positives`), and the width."""
    width = int(positive_id.max()) + 1
    return torch.from_numpy(known_positives(anchor_id.numpy(), positive_id.numpy(), width)), width


def _masks(
    anchor_id: Tensor | None, positive_id: Tensor | None, known: tuple[Tensor, int] | None = None
) -> LogWeights | None:
    """-inf for texts that are the same, or known to match."""
    if anchor_id is None or positive_id is None:
        return None
    if known is None:  # products of large ids would not fit
        anchor_id, positive_id = (torch.from_numpy(renumbered(ids.numpy())) for ids in (anchor_id, positive_id))
        known = known_pairs(anchor_id, positive_id)
    examples = Examples(anchor_id=anchor_id, text_id=positive_id)
    return LogWeights.of(examples, len(anchor_id), same_content, ListedPairs(*known, key="anchor_id"))


def _logits(queries: Tensor, candidates: Tensor, rows: Tensor, temperature: float, masks: LogWeights | None) -> Tensor:
    """(rows, n) scores over the temperature; -inf for other rows' texts that are the same or known to match."""
    own = torch.arange(len(rows))
    logits = (queries[rows] @ candidates.T).mul_(1 / temperature)
    kept = logits[own, rows]
    if masks is not None:
        logits += masks.tile(rows, slice(None))
    logits[own, rows] = kept
    return logits
