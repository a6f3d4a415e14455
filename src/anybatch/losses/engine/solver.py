"""The arithmetic of the engine: tiles of scores, log-sums of rows and columns, gradients in closed form.

A rank computes the block of its own rows against the candidates of all ranks, for both directions of a loss at once:

    pass 1   scores tile = anchors[rows] @ candidates.T       1 product; log-sums of rows, running ones of columns
    rules    log-denominators of rows and of columns
    pass 2   the tile again, then d anchors and d candidates  3 products

The passes are one when a single tile holds everything, or when there is one direction whose rule works row by row. No
tile is computed on two ranks. Workspaces are made once, and a pair has one exponential. Suffixes: see `directions`.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from anybatch.core import distributed
from anybatch.losses.engine.candidates import Gathered, Layout
from anybatch.losses.engine.directions import AnchorDirection, PositiveDirection, Workspace
from anybatch.losses.engine.sides import Side, SoftmaxStats


class Solution(NamedTuple):
    """The mean objective of all ranks, the same on every rank, its gradients, and figures, one a side.

    Attributes:
        gradients: By anchors (B, D), candidates (M, D) and each side's temperature, a scalar or (B,): the whole
            gradient by a scalar, world_size times it by others. None where there is none, or none was wanted.
    """

    loss: Tensor
    gradients: tuple[Tensor | None, ...]
    stats: tuple[SoftmaxStats, ...]


def solve(
    anchors: Tensor, candidates: Tensor, sides: tuple[Side, ...], *, tile_bytes: int, gradients: bool
) -> Solution:
    """Loss and gradients of one direction (one side), or of the mean of both (anchors first, then positives)."""
    # 1. Where the candidates of all ranks are.
    layout = Layout.of(len(anchors), len(candidates), anchors.device)
    source = Gathered(candidates, layout, gradients=gradients)

    # 2. The directions, and the tiles over both.
    own_BD = candidates[: len(anchors)]
    positive_B = (anchors * own_BD).sum(dim=1)
    forward = AnchorDirection(sides[0], layout, positive_B, alone=len(sides) == 1)
    back = PositiveDirection(sides[1], layout, positive_B) if len(sides) == 2 else None
    directions = (forward,) if back is None else (forward, back)
    tiles = _Tiles(anchors, source, forward, back, tile_bytes)

    # 3. Log-sums, the rules' answers, and the negatives' part of the gradients.
    if len(tiles.rows) == 1 or (back is None and sides[0].rule.row_wise):
        tiles.one_pass(gradients=gradients)
    else:
        tiles.two_passes(gradients=gradients)

    # 4. The loss.
    num_rows_all = sum(layout.row_sizes) * len(sides)
    sums = torch.stack([(side.objective * side.row_weight).sum() for side in directions])
    loss = distributed.sum_over_ranks(sums.sum()) / num_rows_all
    if not gradients:
        return Solution(loss, (None,) * (2 + len(sides)), tuple(side.stats(gradients=False) for side in directions))

    # 5. The positives' part of the gradients.
    d_anchors, d_candidates = tiles.d_anchors, source.gradient()
    for side in directions:
        total_B1 = side.total()[:, None]
        d_anchors -= total_B1 * own_BD
        d_candidates[: len(anchors)] -= total_B1 * anchors

    # 6. The temperatures.
    if back is None:
        # Scores are linear in the anchor: d / d tau_i = -(anchor_i . d / d anchor_i) / tau_i.
        forward.d_temperature_rows = -(anchors * d_anchors).sum(dim=1) / forward.temperature
    else:
        forward.d_temperature_rows = -(forward.difference - forward.total() * positive_B) / forward.temperature
    scale = distributed.world_size() / num_rows_all
    d_temperatures = [side.d_temperature(scale, num_rows_all) for side in directions]
    stats = tuple(side.stats(gradients=True) for side in directions)
    return Solution(loss, (d_anchors.mul_(scale), d_candidates.mul_(scale), *d_temperatures), stats)


class _Tiles:
    """This rank's rows, some at a time, against the candidates of all ranks.

    Attributes:
        rows: Which rows a tile has.
        d_anchors: (B, D) the negatives' part, after a pass with gradients.
    """

    def __init__(
        self,
        anchors: Tensor,
        source: Gathered,
        forward: AnchorDirection,
        back: PositiveDirection | None,
        tile_bytes: int,
    ) -> None:
        self.anchors, self.source, self.forward, self.back = anchors, source, forward, back
        self.d_anchors = torch.zeros_like(anchors)
        height = max(1, tile_bytes // max(1, len(source.candidates) * anchors.element_size()))
        self.rows = [slice(start, min(start + height, len(anchors))) for start in range(0, len(anchors), height)]
        size = min(height, len(anchors)) * len(source.candidates)
        self._scores, self._logits = Workspace(anchors, size), Workspace(anchors, size)
        self._keeping = back is not None or forward.side.rereads_scores

    def one_pass(self, *, gradients: bool) -> None:
        """Each tile's log-sums, answers and gradients while its scores are there."""
        forward, back = self.forward, self.back
        for rows in self.rows:
            scores_bm, workspace_bm = self._score(rows)
            exp_bm, peak_b = forward.measure(rows, scores_bm, workspace_bm)
            if back is not None:
                back.measure(rows, scores_bm)
            forward.answer(rows)
            if back is not None:
                back.answer()
            if gradients:
                self._add_gradient(rows, scores_bm, exp_bm, forward.factor(rows, peak_b))
        if not self.rows:  # a rank without rows still takes part in the rule's collectives
            forward.answer(slice(0, 0))

    def two_passes(self, *, gradients: bool) -> None:
        """All log-sums, then the answers, then all gradients from the scores anew."""
        forward, back = self.forward, self.back
        for rows in self.rows:
            scores_bm, workspace_bm = self._score(rows)
            if back is not None:
                back.measure(rows, scores_bm)
            forward.measure(rows, scores_bm, workspace_bm)
        forward.answer(slice(0, len(self.anchors)))
        if back is not None:
            back.answer()
        for rows in self.rows if gradients else ():
            scores_bm, workspace_bm = self._score(rows)
            self._add_gradient(rows, scores_bm, forward.weights(rows, scores_bm, workspace_bm), None)

    def _score(self, rows: slice) -> tuple[Tensor, Tensor]:
        """(b, m) scores, and where their logits may be put: over them if nobody needs the scores any more."""
        shape = (rows.stop - rows.start, len(self.source.candidates))
        scores_bm = self._scores.view(shape)
        torch.mm(self.anchors[rows], self.source.candidates.T, out=scores_bm)
        return scores_bm, self._logits.view(shape) if self._keeping else scores_bm

    def _add_gradient(self, rows: slice, scores_bm: Tensor, exp_bm: Tensor, factor_b: Tensor | None) -> None:
        """From exp * factor, the derivative of the rows' terms in the scores; `exp_bm` is consumed."""
        self.forward.add_sums(rows, scores_bm, exp_bm, factor_b)
        if factor_b is not None and (self.back is not None or self.forward.several):
            exp_bm.mul_(factor_b[:, None])
            factor_b = None
        if self.back is not None:
            exp_bm[:, self.source.layout.positive_columns] += self.back.weights(rows, scores_bm)
        if self.forward.several:
            exp_bm -= self.forward.further(rows) * self.forward.share()[rows, None]
        anchors_bD, candidates, d_candidates = self.anchors[rows], self.source.candidates, self.source.d_candidates
        if factor_b is None:
            self.d_anchors[rows].addmm_(exp_bm, candidates)
            d_candidates.addmm_(exp_bm.T, anchors_bD)
        else:
            self.d_anchors[rows] += (exp_bm @ candidates).mul_(factor_b[:, None])
            d_candidates.addmm_(exp_bm.T, anchors_bD * factor_b[:, None])
