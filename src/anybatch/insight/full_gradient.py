"""The gradient of InfoNCE over a whole set of pairs, in a linear map on frozen embeddings, in blocks of anchors."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from anybatch.core.ids import known_positives, renumbered
from anybatch.losses.base import Direction
from anybatch.losses.engine import TILE_BYTES
from anybatch.losses.log_weights import ListedPairs, LogWeights, same_content
from anybatch.losses.rows import suspect_keys
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
) -> tuple[Tensor, Tensor]:
    """The gradient of full-data InfoNCE in two linear maps, W of the anchors and V of the positives, at the identity.

        a_i = W x_i / |W x_i|,  c_j = V y_j / |V y_j|,  p_ij = exp(s_ij / tau) / sum_k exp(s_ik / tau)

        one way:  F = mean_i L_i,               L_i = -log p_ii               anchor i among all positives
        both:     F = mean_i (L_i + L'_i) / 2,  L'_i = -log q_ii              positive i among all anchors

        d L_i / d a_i = (sum_j p_ij c_j - c_i) / tau,     d L_i / d c_j = (p_ij - [i = j]) a_i / tau
        dF / dW = sum_i (g_i - (g_i . a_i) a_i) x_i^T     with g_i = dF / d a_i; likewise V

    Args:
        anchors, positives: (n, D) float, unit rows.
        temperature: tau.
        direction: "one_way", or "both" for both directions' losses.
        rows: (P,) int64, whose losses are averaged, against all n candidates; None for all.
        masks: Over all rows, such as `content_masks`; None if all texts differ.
        tile_bytes: Memory for scores at a time.

    Returns:
        Two (D, D), of W and of V. A map that both sides share has their sum.

    Cost: three products of P x n x D, of both directions six; one tile of scores.

    Reference: van den Oord et al. 2018, arXiv 1807.03748, equation 4, and Radford et al. 2021, arXiv 2103.00020, figure
        3, with the whole data set as one batch.

    Example:
        >>> full_gradient(torch.eye(3), torch.eye(3), temperature=1.0)[0]
        tensor([[0.0000, 0.0706, 0.0706],
                [0.0706, 0.0000, 0.0706],
                [0.0706, 0.0706, 0.0000]])
    """
    rows = torch.arange(len(anchors)) if rows is None else rows
    settings = {"temperature": temperature, "rows": rows, "tile_bytes": tile_bytes}
    forth = _one_way(anchors, positives, masks=masks, **settings)
    if direction == "one_way":
        return forth
    masks = None if masks is None else masks.reversed(len(anchors))
    back = _one_way(positives, anchors, masks=masks, **settings)
    return (forth[0] + back[1]) / 2, (forth[1] + back[0]) / 2


def in_map(gradient: Tensor, embeddings: Tensor) -> Tensor:
    """(D, D) the gradient in a linear map of what is (n, D) the gradient in its normalised outputs, at the identity."""
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


def _one_way(
    queries: Tensor,
    candidates: Tensor,
    *,
    rows: Tensor,
    temperature: float,
    masks: LogWeights | None,
    tile_bytes: int,
) -> tuple[Tensor, Tensor]:
    """The gradient of the mean loss of these queries, in the map of the queries and in that of the candidates."""
    of_queries = queries.new_zeros(queries.shape[1], queries.shape[1])
    of_candidates = torch.zeros_like(candidates)
    for tile in rows.split(max(1, tile_bytes // (len(candidates) * candidates.element_size()))):
        own = torch.arange(len(tile)), tile
        logits = (queries[tile] @ candidates.T).mul_(1 / temperature)
        if masks is not None:  # a row's own pair is never masked
            kept = logits[own]
            logits += masks.tile(tile, slice(None))
            logits[own] = kept
        share = torch.softmax(logits, dim=1)
        share[own] -= 1
        of_queries += in_map(share @ candidates, queries[tile])
        of_candidates.addmm_(share.T, queries[tile])
    factor = 1 / (temperature * len(rows))
    return of_queries * factor, in_map(of_candidates, candidates) * factor
