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
    """SogCLR in the linear domain, one Python float an example.

    The state is a mean of exp(s_ij / tau) ("absolute") or of exp((s_ij - s_ii) / tau) ("relative"); the positive
    receives u / (eps + u) ("exact") or what the batch's negatives do ("batch").
    """

    def __init__(self, num_rows, gamma, eps, *, state="absolute", positive="batch"):
        self.u, self.gamma, self.absolute, self.exact = {}, gamma, state == "absolute", positive == "exact"
        self.eps = eps if eps is not None else 1 / (num_rows - 1)

    def step(self, anchors, candidates, tau, allowed, index, weight=None):
        """The surrogate whose gradient is SogCLR's (without the factor tau), and the objective's value."""
        scores = unit(anchors) @ unit(candidates).T / tau
        surrogate, objective, visits = 0.0, 0.0, {}
        for i, row in enumerate(index):
            drawn = len(candidates) - index.count(row)  # but for the row itself
            share = 1 / max(1, drawn)
            negatives = [j for j in range(len(candidates)) if allowed[i, j]]
            shares = [share if weight is None else float(weight[i, j]) for j in negatives]
            own = scores[i, i].detach().exp() if self.absolute else 1.0  # what makes the state relative at use
            terms = [w * (scores[i, j] - scores[i, i]).exp().item() for j, w in zip(negatives, shares, strict=True)]
            old = self.u.get(row)
            batch = sum(terms) * float(own)
            new = batch if old is None else (1 - self.gamma) * old + self.gamma * batch
            if not drawn:  # the batch says nothing
                new = old or 0.0
            else:
                visits.setdefault(row, []).append(new)
            u = new / float(own)
            objective += math.log(self.eps + u) if self.eps + u > 0 else 0.0
            pull = 0.0
            for j, term in zip(negatives, terms, strict=True):
                pull += term / (self.eps + u)
                surrogate = surrogate + term / (self.eps + u) * scores[i, j]
            if self.exact:
                pull = u / (self.eps + u) if u and drawn else 0.0
            surrogate = surrogate - pull * scores[i, i]
        for row, values in visits.items():
            self.u[row] = sum(values) / len(values)
            if not self.u[row]:  # nothing but masked candidates so far: as if never visited
                del self.u[row]
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
