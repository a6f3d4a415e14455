"""Naive float64 twins: loops over pairs, written from the papers' formulas and from nothing of the library's."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def pairs_allowed(num_rows, num_columns, anchor_id=None, candidate_id=None, removed=None):
    """(B, M) bool: which candidates are negatives of which anchor."""
    allowed = torch.ones(num_rows, num_columns, dtype=torch.bool)
    for i in range(num_rows):
        for j in range(num_columns):
            if j == i:
                allowed[i, j] = False
            if candidate_id is not None and candidate_id[j] == candidate_id[i]:
                allowed[i, j] = False
            if anchor_id is not None and j < num_rows and anchor_id[j] == anchor_id[i]:
                allowed[i, j] = False
            if removed is not None and removed[i, j]:
                allowed[i, j] = False
    return allowed


def unit(embeddings: Tensor) -> Tensor:
    return embeddings / embeddings.norm(dim=1, keepdim=True)


def infonce(anchors, candidates, tau, allowed, log_weight=None):
    """Mean cross-entropy, by plain autograd."""
    scores = unit(anchors) @ unit(candidates).T / tau
    total = 0.0
    for i in range(len(anchors)):
        terms = [scores[i, i]]
        terms += [
            scores[i, j] + (0.0 if log_weight is None else log_weight[i, j])
            for j in range(len(candidates))
            if allowed[i, j]
        ]
        total = total + torch.logsumexp(torch.stack(terms), 0) - scores[i, i]
    return total / len(anchors)


def decoupled(anchors, candidates, tau, allowed):
    scores = unit(anchors) @ unit(candidates).T / tau
    total = 0.0
    for i in range(len(anchors)):
        terms = [scores[i, j] for j in range(len(candidates)) if allowed[i, j]]
        if terms:
            total = total + torch.logsumexp(torch.stack(terms), 0) - scores[i, i]
    return total / len(anchors)


def count_corrected(anchors, candidates, tau, allowed, num_rows):
    scores = unit(anchors) @ unit(candidates).T / tau
    total = 0.0
    for i in range(len(anchors)):
        negatives = [j for j in range(len(candidates)) if allowed[i, j]]
        estimate = sum((scores[i, j] - scores[i, i]).exp() for j in negatives) * (
            (num_rows - 1) / max(1, len(candidates) - 1)
        )
        total = total + torch.log(1 + estimate) if negatives else total
    return total / len(anchors)


class NaiveSogCLR:
    """SogCLR in the linear domain, one Python float an example."""

    def __init__(self, num_rows, gamma, eps):
        self.u, self.gamma, self.eps = {}, gamma, eps if eps is not None else 1 / (num_rows - 1)

    def step(self, anchors, candidates, tau, allowed, index, weight=None):
        """The surrogate whose gradient is SogCLR's (without the factor tau), and the objective's value."""
        scores = unit(anchors) @ unit(candidates).T / tau
        batch: dict[int, list[float]] = {}
        for i, row in enumerate(index):
            negatives = [j for j in range(len(candidates)) if allowed[i, j]]
            if len(candidates) > 1:
                g = sum(
                    (scores[i, j] - scores[i, i]).exp().item()
                    * (1 / (len(candidates) - 1) if weight is None else weight[i, j])
                    for j in negatives
                )
                batch.setdefault(row, []).append(g)
        for row, values in batch.items():
            mean = sum(values) / len(values)
            new = (1 - self.gamma) * self.u[row] + self.gamma * mean if row in self.u else mean
            if new:
                self.u[row] = new
            else:  # nothing but masked candidates so far: as if never visited
                self.u.pop(row, None)
        surrogate, objective = 0.0, 0.0
        for i, row in enumerate(index):
            negatives = [j for j in range(len(candidates)) if allowed[i, j]]
            u = self.u.get(row, 0.0)
            objective += math.log(self.eps + u) if self.eps + u > 0 else 0.0
            for j in negatives:
                d = scores[i, j] - scores[i, i]
                w = d.detach().exp() * (1 / (len(candidates) - 1) if weight is None else weight[i, j]) / (self.eps + u)
                surrogate = surrogate + w * d
        return surrogate / len(index), objective / len(index)


def dense_softmax_loss(anchors, candidates, side):
    """The engine (`anybatch.losses.engine.softmax_loss`) on one rank, in one direction: the whole matrix, plain
    autograd.

    The rule's answer is treated as a constant, and the surrogate `sum_j stop_grad(weight_ij) s_ij / tau_i`, the
    positive
    included, is added with value zero: its derivative is the gradient that the engine has in closed form.
    """
    num_rows, everything = len(anchors), slice(0, len(anchors))
    temperature = side.temperature.expand(num_rows)
    scores = anchors @ candidates.T
    relative = (scores - scores.diagonal()[:, None]) / temperature[:, None]
    with torch.no_grad():
        logits = relative.detach().clone()
        if side.log_weight is not None:
            logits = logits + side.log_weight.tile(everything, slice(0, len(candidates)))
        logits.fill_diagonal_(-torch.inf)
        if side.adjust is not None:
            logits = side.adjust(everything, scores.detach(), logits)
        num_drawn = logits.new_full((num_rows,), len(candidates) - 1)
        log_denominator, objective, *said = side.rule(logits.logsumexp(dim=1), num_drawn, everything)
        log_denominator = log_denominator.masked_fill(log_denominator.isneginf(), 0.0)
        negative_weight = (logits - log_denominator[:, None]).exp()
    surrogate = (negative_weight * relative).sum(dim=1)
    if any(weight is not None for weight in said):  # what the positive receives beyond minus the sum of the negatives'
        surplus = said[0] + negative_weight.sum(dim=1)
        surrogate = surrogate + surplus * scores.diagonal() / temperature
    weight = torch.ones_like(objective) if side.row_weight is None else side.row_weight.detach()
    return (weight * (objective + surrogate - surrogate.detach())).mean()
