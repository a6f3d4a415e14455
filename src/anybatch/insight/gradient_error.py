"""How far a batch's gradient in shared parameters is from the gradient over all data: its bias and its noise.

A model's parameters are shared by all rows, so errors of single anchors say little: independent ones cancel, common
ones add up, and which anchors are in the batch counts as well. So embeddings x that stand still go through one linear
map each, x -> W x, normalised, and all gradients are those in W at W = I: with a = W x of length 1, and g the loss's
gradient in a,

    G = sum_rows (g - (g . a) a) x^T                   (D, D) a side; one map for both sides adds the two

Over the batches b of a plan, relative to the length of the full-data gradient G*:

    bias        = |E G_b - G*|                         what no number of steps averages away
    noise       = rms_b |G_b - E G_b|                  of one batch, the choice of its anchors included
    cosine      = cos(E G_b, G*)                       1: no bias but in length, which the learning rate takes away
    epoch_error = min_s rms |s mean_b G_b - G*|        of the mean of M batches, as many as an epoch has, drawn
                                                       independently, at the best learning rate: the noise counts as
                                                       little as it does where steps average it away
"""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, get_args

import numpy as np
import torch
from torch import Tensor, nn

from anybatch.core.errors import AnybatchError
from anybatch.insight.full_gradient import content_masks, full_gradient, in_map
from anybatch.losses.base import Direction
from anybatch.losses.denominators import RunningDenominator
from anybatch.losses.rows import RowTable, Weights
from anybatch.mining.inputs import check_embeddings, compact_ids
from anybatch.plans.plan import BatchPlan

GROUPS = 10  # of the jackknife, in each half
NUM_BATCHES = 128  # measured in each half
STRAIGHT = 0.95  # cosine from which there is little bias to remove


@dataclass(frozen=True, kw_only=True)
class GradientError:
    """Errors of a method's gradient, relative to the length of the full-data gradient, with standard errors.

    Example:
        >>> from anybatch.losses import InfoNCE
        >>> embeddings = np.random.default_rng(0).normal(size=(2, 64, 8))
        >>> pairs = FrozenPairs.prepare(*embeddings, temperature=0.2)
        >>> small, large = (
        ...     gradient_error(pairs, InfoNCE(temperature=0.2), plan=BatchPlan.random(64, size), num_batches=16)
        ...     for size in (4, 32)
        ... )
        >>> small.noise > large.noise, small.bias > large.bias
        (True, True)
    """

    bias: float  # of the mean over batches; 0 where the noise hides it
    bias_se: float
    noise: float  # of one batch around that mean
    noise_se: float
    epoch_error: float  # of an epoch's batches together, at the best learning rate; 1 is no better than no gradient
    epoch_error_se: float
    cosine: float  # of the mean over batches with the full-data gradient
    cosine_se: float
    num_batches: int  # measured

    @property
    def bias_to_remove(self) -> bool:
        """Whether the mean over batches points elsewhere than the full-data gradient."""
        return not self.cosine + 2 * self.cosine_se >= STRAIGHT  # NaN, where noise hides the mean, counts as elsewhere


@dataclass(frozen=True, eq=False)
class FrozenPairs:
    """Embeddings of n pairs that stand still while gradients are compared, and the full-data gradient of InfoNCE.

    Example:
        >>> pairs = FrozenPairs.prepare(*np.random.default_rng(0).normal(size=(2, 32, 8)))
        >>> tuple(pairs.full.shape)
        (2, 1, 64)
    """

    anchors: Tensor  # (n, D) float32 or float64, unit rows
    positives: Tensor
    anchor_id: Tensor  # (n,) int64; equal for identical texts, which are never negatives of each other
    positive_id: Tensor
    temperature: float  # of the full-data objective, as direction, mask_margin and suspects
    direction: Direction
    mask_margin: float | None
    tied: bool  # whether one map is shared by both sides, as where one encoder embeds both
    suspects: np.ndarray | None
    # (2, groups, P) two estimates of the full-data gradient in the P parameters, by group of anchors. Equal and of one
    # group where all anchors were taken: then they are exact.
    full: Tensor

    @classmethod
    def prepare(
        cls,
        anchors: np.ndarray,
        positives: np.ndarray,
        *,
        temperature: float = 0.05,
        direction: Direction = "one_way",
        mask_margin: float | None = None,
        tied: bool = True,
        anchor_id: np.ndarray | None = None,
        positive_id: np.ndarray | None = None,
        suspects: np.ndarray | None = None,
        num_anchors: int | None = None,
        seed: int = 0,
    ) -> FrozenPairs:
        """Normalise, and take the gradient over all data.

        Args:
            anchors, positives: (n, D) float, of any length; all but float64 becomes float32.
            temperature, direction, mask_margin: Of the loss; "both" is the mean of both directions' losses.
            tied: See above.
            anchor_id, positive_id: (n,) int; None: all texts differ.
            suspects: (p, 2) int of a plan, where the loss masks them: no negatives in its objective either.
            num_anchors: Anchors whose losses (against all rows) stand for those of all; None for all, which is exact.
                Some are drawn twice, independently, so that their choice does not count as bias.
            seed: Of the draw.

        Raises:
            AnybatchError: Shapes that do not fit, rows that are zero, NaN or infinite, fewer than 3 rows, an unknown
                direction.

        Cost: three products of num_anchors x n x D, of two directions six; 2 * 10 * P numbers.
        """
        if direction not in get_args(Direction):
            raise AnybatchError(f"direction is {direction!r}; expected 'one_way' or 'both'.")
        if not 0 < temperature < np.inf:
            raise AnybatchError(f"temperature is {temperature}; expected a positive number such as 0.05.")
        num_rows = len(anchors)
        if anchors.ndim != 2 or anchors.shape != positives.shape or num_rows < 3:
            raise AnybatchError(
                f"Embeddings have shapes {anchors.shape} and {positives.shape}; expected (rows, D) twice, one row a "
                "pair, at least 3 rows."
            )
        check_embeddings("anchor", anchors)
        check_embeddings("positive", positives)
        sides = _unit(anchors), _unit(positives)
        ids = [torch.from_numpy(side) for side in compact_ids(num_rows, anchor_id=anchor_id, positive_id=positive_id)]
        repeated = any(len(side.unique()) < num_rows for side in ids)  # else only the own pair is no negative
        masks = content_masks(ids[0], ids[1], suspects) if repeated or suspects is not None else None

        def gradient(rows: Tensor) -> Tensor:
            of_loss: dict[str, Any] = {"temperature": temperature, "direction": direction, "mask_margin": mask_margin}
            parts = full_gradient(*sides, rows=rows, masks=masks, **of_loss)
            return _parameters(parts, tied)

        if num_anchors is None or num_anchors >= num_rows:
            full = gradient(torch.arange(num_rows)).expand(2, 1, -1)
        else:
            generator = np.random.default_rng(seed)
            size = max(1, num_anchors // (2 * GROUPS))
            halves = [generator.choice(num_rows, (GROUPS, size), replace=False) for _ in range(2)]
            full = torch.stack([torch.stack([gradient(torch.from_numpy(rows)) for rows in half]) for half in halves])
        return cls(*sides, ids[0], ids[1], temperature, direction, mask_margin, tied, suspects, full)

    def __len__(self) -> int:
        return len(self.anchors)


def gradient_error(
    pairs: FrozenPairs,
    loss: nn.Module,
    *,
    plan: BatchPlan,
    weights: Weights = "none",
    mask_suspects: bool = False,
    run_in: int | None = None,
    num_batches: int = NUM_BATCHES,
) -> GradientError:
    """Measure a method: its loss on the plan's batches, with its log-weights and masks.

    Two copies of the loss go through the plan under two seeds, independently, each against its own half of `pairs.full`
    where that was estimated. Products are taken between the halves, so that noise does not count as bias.

    Args:
        loss: Of the direction of `pairs`; copied, so its own state is where both copies start.
        plan: Its batches, combined anew every epoch, and its hard negatives.
        weights, mask_suspects: See `RowTable`.
        run_in: Epochs before measuring, in which what the loss remembers settles. None: 3 for denominators (gamma .9;
            about 3 / gamma), 1 for a queue, 0 for a loss that remembers nothing.
        num_batches: Batches measured in each copy; rounded up to whole epochs where an epoch has no more.

    Raises:
        AnybatchError: A plan for another number of rows; a loss of another direction than the full-data gradient's.

    Cost: 2 * (run_in epochs + num_batches) calls of the loss, and as many products of B x D x D a side; 20 * P numbers.
    """
    if plan.num_rows != len(pairs):
        raise AnybatchError(
            f"The plan has {plan.num_rows} rows, the embeddings {len(pairs)}. Give the embeddings of the data that "
            "the plan was made for."
        )
    direction = getattr(loss, "direction", pairs.direction)
    if direction != pairs.direction:
        raise AnybatchError(
            f"The loss has direction={direction!r}, the full-data gradient {pairs.direction!r}. Make both alike: "
            f"FrozenPairs.prepare(..., direction={direction!r}), or a loss with direction={pairs.direction!r}."
        )
    table, negatives = _table(pairs, plan, weights=weights, mask_suspects=mask_suspects)
    if num_batches >= plan.num_batches:
        num_batches = max(2, math.ceil(num_batches / plan.num_batches) * plan.num_batches)
    groups = min(GROUPS, num_batches)
    if run_in is None:
        remembers = any(True for _ in loss.buffers())
        run_in = 3 if any(isinstance(part, RunningDenominator) for part in loss.modules()) else int(remembers)
    halves, squares = [], torch.zeros(groups, dtype=torch.float64)
    counts = torch.bincount(torch.arange(num_batches) * groups // num_batches).double()
    for shift in (0, 1):
        copied = copy.deepcopy(loss).train()
        reseeded = replace(plan, seed=plan.seed + shift)
        batches = (torch.from_numpy(batch) for epoch in itertools.count() for batch in reseeded.epoch_batches(epoch))
        for batch in itertools.islice(batches, run_in * plan.num_batches):
            _batch_gradient(pairs, copied, batch, table, negatives)  # for what the loss remembers
        sums = torch.zeros(groups, pairs.full[0].shape[1], dtype=pairs.anchors.dtype)
        for number, batch in enumerate(itertools.islice(batches, num_batches)):
            gradient = _batch_gradient(pairs, copied, batch, table, negatives)
            group = number * groups // num_batches
            sums[group] += gradient
            squares[group] += float(gradient.square().sum(dtype=torch.float64)) / 2
        halves.append(sums)
    return _summarise(halves, squares, counts, pairs.full, plan.num_batches)


def _table(pairs: FrozenPairs, plan: BatchPlan, **settings: Any) -> tuple[RowTable, Tensor]:
    """Look-up of ids and weights, and the (n, h) rows of the plan's hard negatives, -1 where one is missing."""
    ids = pairs.anchor_id.numpy(), pairs.positive_id.numpy()
    rows = np.empty((plan.num_rows, 0), np.int64) if plan.negatives is None else plan.negatives.astype(np.int64)
    negative_id = np.where(rows < 0, -1, ids[1][rows]) if rows.shape[1] else None
    return RowTable(*ids, negative_id=negative_id, plan=plan, **settings), torch.from_numpy(rows)


def _batch_gradient(pairs: FrozenPairs, loss: nn.Module, batch: Tensor, table: RowTable, negatives: Tensor) -> Tensor:
    """(P,) the gradient of the loss of one batch; `negatives` (n, h) rows whose positives are candidates too."""
    explicit = negatives[batch].T.reshape(-1)
    rows = torch.cat([batch, explicit[explicit >= 0]])
    leaves = pairs.anchors[batch].requires_grad_(), pairs.positives[rows].requires_grad_()
    value = loss(*leaves, **table.arguments(batch, num_negatives=negatives.shape[1]))
    gradients = torch.autograd.grad(value, leaves)
    return _parameters([in_map(*pair) for pair in zip(gradients, leaves, strict=True)], pairs.tied)


def _parameters(maps: Sequence[Tensor], tied: bool) -> Tensor:
    """(P,) the gradient in one map for both sides, or in two."""
    return (maps[0] + maps[1]).flatten() if tied else torch.cat([side.flatten() for side in maps])


def _summarise(halves: list[Tensor], squares: Tensor, counts: Tensor, full: Tensor, per_epoch: int) -> GradientError:
    """All figures from inner products between the halves: two (groups, P), the sums of the batches' gradients, with the
    sum of their squared lengths (groups,), the mean of both halves, and the batches (groups,) of each half.
    """
    groups = len(counts)
    # A full-data gradient that is exact is the same in every group.
    parts = [*halves, *(half if len(half) == groups else half.mean(dim=0).expand(groups, -1) for half in full)]
    stacked = torch.cat([part.double() for part in parts])
    products = (stacked @ stacked.T).view(4, groups, 4, groups)

    def figures(kept: Tensor) -> Tensor:
        """Squares of bias, noise and epoch error; cosine."""
        of_batches, of_full = kept / (kept * counts).sum(), kept / kept.sum()
        weights = [of_batches, of_batches, of_full, of_full]

        def product(one: int, other: int) -> Tensor:
            return weights[one] @ products[one, :, other] @ weights[other]

        mean, along, whole = product(0, 1), (product(0, 3) + product(1, 2)) / 2, product(2, 3)
        square = (kept * squares).sum() / (kept * counts).sum()
        of_epoch = mean + (square - mean) / per_epoch
        errors = [mean - 2 * along + whole, square - mean, whole - along**2 / of_epoch]
        cosine = along / (mean * whole).sqrt()  # NaN where noise hides the mean
        return torch.stack([*(part / whole for part in errors), cosine])

    estimate = figures(torch.ones(groups, dtype=torch.float64))
    left_out = torch.stack([figures(one) for one in 1.0 - torch.eye(groups, dtype=torch.float64)])
    spread = ((left_out - left_out.mean(dim=0)).square().sum(dim=0) * (groups - 1) / groups).sqrt()
    values: dict[str, float] = {}
    for number, name in enumerate(("bias", "noise", "epoch_error")):
        values[name], values[f"{name}_se"] = _root(float(estimate[number]), float(spread[number]))
    values |= {"cosine": float(estimate[3]), "cosine_se": float(spread[3])}
    return GradientError(**values, num_batches=2 * int(counts.sum()))


def _root(square: float, spread: float) -> tuple[float, float]:
    """The root, 0 where negative, and its standard error (delta method)."""
    root = math.sqrt(max(0.0, square))
    # At 0 the root has no derivative; the root of the square's own error bounds it there.
    return root, min(spread / (2 * root), math.sqrt(spread)) if root > 0 else math.sqrt(spread)


def _unit(side: np.ndarray) -> Tensor:
    tensor = torch.as_tensor(np.array(side, dtype=np.float64 if side.dtype == np.float64 else np.float32))
    return tensor / tensor.norm(dim=1, keepdim=True)
