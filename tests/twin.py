"""The test of a method without state: its formula for one row; shapes, masks, tiles, directions, ranks are done here.

def formula(positive, negatives, drawn): ...  # logits s / tau: a scalar, (k,) kept by masks; how many drawn
def test_equals_its_formula(): twin.check(Method, formula, temperature=0.5)
def test_ranks(): twin.check_ranks(Method, temperature=0.5)
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from tests import reference
from tests.ranks import on_ranks

Formula = Callable[[Tensor, Tensor, int], Tensor]
SHAPES = [(1, 0), (2, 0), (5, 3), (9, 0), (6, 7)]  # rows, explicit negatives
SHARES = [slice(0, 4), slice(4, 4), slice(4, 9)]  # of three ranks, one of them without a row
EXTRA = [2, 1, 0]  # and their explicit negatives


def expected(
    formula: Formula,
    anchors: Tensor,
    candidates: Tensor,
    temperature: float,
    allowed: Tensor,
    weight: Tensor,
    margin: float | None = None,
):
    """The mean of the formula over the rows, a loop with plain autograd."""
    scores = reference.unit(anchors) @ reference.unit(candidates).T / temperature
    if margin is not None:
        allowed = allowed & (scores * temperature <= scores.diagonal()[:, None] * temperature + margin)
    rows = [
        formula(scores[i, i], (scores[i] + weight[i])[allowed[i]], len(candidates) - 1) for i in range(len(anchors))
    ]
    return torch.stack(rows).mean()


def draw(rows: int, extra: int, *, near: float, seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Sides and ids, some of them repeated; positives that are `near` to their anchors."""
    generator = torch.Generator().manual_seed(seed)
    anchors, candidates = (torch.randn(n, 5, generator=generator, dtype=torch.float64) for n in (rows, rows + extra))
    candidates[:rows] += near * anchors
    ids = [torch.randint(max(2, rows), (n,), generator=generator) for n in (rows, rows + extra)]
    return anchors, candidates, ids[0], ids[1]


def check(make: Callable[..., Any], formula: Formula, *, temperature: float, **options: Any) -> None:
    """Value and gradients of `make(temperature=..., direction=..., tile_bytes=...)` are those of the formula."""
    margin = options.get("mask_margin")
    forms = itertools.product(SHAPES, (1, 150, 10**7), (False, True), (False, True), (0.0, 3.0))
    for seed, ((rows, extra), tile_bytes, ids, both, near) in enumerate(forms):
        anchors, candidates, anchor_id, candidate_id = draw(rows, extra, near=near, seed=seed)
        known = {"anchor_id": anchor_id, "candidate_id": candidate_id} if ids else {}
        weight = torch.randn(rows, rows + extra, dtype=torch.float64) * (ids and not both)
        allowed = reference.pairs_allowed(rows, rows + extra, **known)
        sides = [side.requires_grad_() for side in (anchors, candidates)]
        loss = make(temperature=temperature, direction="both" if both else "one_way", tile_bytes=tile_bytes, **options)
        value = loss(*sides, log_weight=weight if ids and not both else None, **known)
        wanted = expected(formula, *sides, temperature, allowed, weight, margin)
        if both:
            back = reference.pairs_allowed(rows, rows, *((candidate_id[:rows], anchor_id) if ids else ()))
            none = torch.zeros(rows, rows, dtype=torch.float64)
            reverse = expected(formula, candidates[:rows], anchors, temperature, back, none, margin)
            wanted = (wanted + reverse) / 2
        torch.testing.assert_close(value, wanted, rtol=1e-10, atol=1e-12)
        ours, theirs = (torch.autograd.grad(scalar, sides, allow_unused=True) for scalar in (value, wanted))
        for mine, other in zip(ours, theirs, strict=True):
            torch.testing.assert_close(mine, torch.zeros_like(mine) if other is None else other, rtol=1e-9, atol=1e-10)


Known = Callable[[slice, slice], dict[str, Any]]  # from a share of the rows and of the explicit negatives


def on_rank(
    rank: int, world_size: int, make: Callable[..., Any], cases: list[dict[str, Any]], known: Known | None
) -> list[list[Tensor]]:
    """Value and gradients of a rank's share, of each case; alone, of everything."""
    anchors, candidates, anchor_id, candidate_id = draw(9, 3, near=1.0, seed=0)
    own = SHARES[rank] if world_size > 1 else slice(0, 9)
    first = 9 + sum(EXTRA[:rank])
    explicit = slice(first, first + EXTRA[rank]) if world_size > 1 else slice(9, 12)
    ids = {"anchor_id": anchor_id[own], "candidate_id": torch.cat([candidate_id[own], candidate_id[explicit]])}
    results = []
    for arguments in cases:
        mine = anchors[own].clone(), torch.cat([candidates[own], candidates[explicit]])
        sides = [side.requires_grad_() for side in mine]
        value = make(**arguments)(*sides, **(ids if known is None else known(own, explicit)))
        value.backward()
        gradients = [torch.zeros_like(side) if side.grad is None else side.grad for side in sides]
        results.append([value.detach(), *gradients])
    return results


def check_ranks(make: Callable[..., Any], *, temperature: float, known: Known | None = None, **options: Any) -> None:
    """Three ranks, one without a row, give what one process does.

    `make` and `known` must pickle; `known` takes the place of ids.
    """
    forms = itertools.product(("one_way", "both"), (1, 10**7))
    cases = [
        {"temperature": temperature, "direction": direction, "tile_bytes": tile_bytes, **options}
        for direction, tile_bytes in forms
    ]
    alone, on_each = on_rank(0, 1, make, cases, known), on_ranks(on_rank, 3, make, cases, known)
    for (value, d_anchors, d_candidates), *ranks in zip(alone, *on_each, strict=True):
        numbers = [len(rank[1]) for rank in ranks]
        together = torch.cat([rank[1] for rank in ranks]) / 3
        torch.testing.assert_close(together, d_anchors, rtol=1e-10, atol=1e-12)
        parts = [rank[2][:number] for rank, number in zip(ranks, numbers, strict=True)]
        parts += [rank[2][number:] for rank, number in zip(ranks, numbers, strict=True)]
        torch.testing.assert_close(torch.cat(parts) / 3, d_candidates, rtol=1e-10, atol=1e-12)
        for rank in ranks:
            torch.testing.assert_close(rank[0], value, rtol=1e-12, atol=1e-12)
