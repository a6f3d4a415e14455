"""How far a batch's gradient is from the exact gradient over all data, and which random InfoNCE batch is as far.

For unit embeddings a_i (anchors) and c_j (positives) that stand still, the gradient of anchor i is

    g*_i = d L_i / d a_i = 1 / tau * sum_{j != i} p_ij (c_j - c_i),     p_ij = exp(s_ij / tau) / sum_k exp(s_ik / tau)

over all n rows. A batch gives g_i = B * d loss / d a_i for each of its anchors. Both are projected onto the tangent
space at a_i: the rest never passes the normalisation. Over anchors i and over draws of the batch in which i sits,
relative to rms_i |g*_i|:

    bias        = rms_i |E g_i - g*_i|                   what no number of steps averages away
    rmse        = rms_i,draw |g_i - g*_i|                one batch; rmse^2 = bias^2 + noise^2
    scaled_rmse = min_s rms_i,draw |s g_i - g*_i|        at the best learning rate: sqrt(1 - cosine^2)

Parameters are shared, and so an error that all anchors have in common adds up where independent ones cancel. The third
kind of figure is that of a linear map shared by all anchors, G = mean_i g_i a_i^T, after averaging over batches: its
cosine with the exact one, and its bias. In training, this is the figure that told
(docs/log.md).

The effective batch size is the size of the random batch for which plain InfoNCE has the same error.

For two-way losses the gradients of anchor i and of positive i stand side by side as one vector of 2 D numbers, of the
exact objective (the mean of both directions' losses) and of a batch: all figures are of both together. There are two
linear maps then, one shared by all anchors and one by all positives.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import get_args

import numpy as np
import torch
from torch import Tensor, nn

from anybatch.core.errors import AnybatchError
from anybatch.insight.full_gradient import content_masks, full_gradient, tangent
from anybatch.losses.base import Direction
from anybatch.losses.engine import TILE_BYTES
from anybatch.losses.log_weights import LogWeights
from anybatch.losses.rows import RowTable
from anybatch.mining.inputs import check_embeddings, compact_ids
from anybatch.plans.plan import BatchPlan

JACKKNIFE = 20  # groups of anchors
CURVE_CHUNK = 256  # anchors that share one random batch in `infonce_curve`


@dataclass(frozen=True, kw_only=True)
class GradientError:
    """Errors of a method's gradient relative to the exact one's root mean square; each with its standard error over
    anchors.

    Attributes:
        bias, bias_se: Of the mean over batches. 0 where the noise hides it.
        rmse, rmse_se: Of one batch.
        scaled_rmse, scaled_rmse_se: Of one batch after the best common factor.
        scale: That factor; above 1 where the method's gradient is too short.
        shared_bias, shared_bias_se: |E G - G*| / |G*| of a linear map shared by all anchors (two-way: and of one shared
            by all positives).
        shared_cosine, shared_cosine_se: Of E G with G*; 1 if only the length is wrong.
        num_anchors: Anchors measured.
        num_draws: Batches seen for each anchor, on average.

    Example:
        >>> from anybatch.losses import InfoNCE
        >>> embeddings = np.random.default_rng(0).normal(size=(2, 64, 8))
        >>> pairs = FrozenPairs.prepare(*embeddings, temperature=0.2)
        >>> small, large = (
        ...     gradient_error(pairs, InfoNCE(temperature=0.2), plan=BatchPlan.random(64, size), epochs=4)
        ...     for size in (4, 32)
        ... )
        >>> small.rmse > large.rmse
        True
    """

    bias: float
    bias_se: float
    rmse: float
    rmse_se: float
    scaled_rmse: float
    scaled_rmse_se: float
    scale: float
    shared_bias: float
    shared_bias_se: float
    shared_cosine: float
    shared_cosine_se: float
    num_anchors: int
    num_draws: float

    @property
    def noise(self) -> float:
        """What one batch adds to the bias: sqrt(rmse^2 - bias^2)."""
        return math.sqrt(max(0.0, self.rmse**2 - self.bias**2))


@dataclass(frozen=True, kw_only=True, eq=False)
class FrozenPairs:
    """Embeddings of n pairs that stand still while gradients are compared, and the exact gradient of some anchors.

    Attributes:
        anchors, positives: (n, D) float32 or float64, unit rows.
        anchor_id, positive_id: (n,) int64; equal for identical texts, which are never negatives of each other.
        masks: -inf for pairs of rows that are no negatives of each other; None if all texts differ.
        temperature: Of the exact objective.
        probes: (P,) int64 rows whose gradient is compared, ascending.
        exact: (P, D), their exact gradients; two-way (P, 2 D), those of the rows' anchors, then those of their
            positives.
        direction: Of the objective.

    Example:
        >>> pairs = FrozenPairs.prepare(*np.random.default_rng(0).normal(size=(2, 32, 8)), num_probes=5)
        >>> tuple(pairs.exact.shape)
        (5, 8)
    """

    anchors: Tensor
    positives: Tensor
    anchor_id: Tensor
    positive_id: Tensor
    masks: LogWeights | None
    temperature: float
    probes: Tensor
    exact: Tensor
    direction: Direction = "one_way"

    @classmethod
    def prepare(
        cls,
        anchors: np.ndarray,
        positives: np.ndarray,
        *,
        temperature: float = 0.05,
        direction: Direction = "one_way",
        anchor_id: np.ndarray | None = None,
        positive_id: np.ndarray | None = None,
        num_probes: int | None = None,
        seed: int = 0,
        tile_bytes: int = TILE_BYTES,
    ) -> FrozenPairs:
        """Normalise, choose the probes, and take their exact gradients.

        Args:
            anchors, positives: (n, D) float; rows need not be of unit length. float64 is kept, all else becomes
                float32.
            temperature: Similarities are divided by it.
            direction: "one_way" for the anchors' gradient of their own losses, "both" for that of anchors and positives
                in both directions' losses.
            anchor_id, positive_id: (n,) int; None: all texts differ.
            num_probes: Anchors (two-way: pairs) to compare, drawn at random; None for all.
            seed: Of the draw.
            tile_bytes: Memory for scores.

        Raises:
            AnybatchError: Shapes that do not fit, rows that are zero, NaN or infinite, fewer than 3 rows, an unknown
                direction.

        Cost: see `full_gradient`, plus P * D or P * 2 D numbers.
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
        sides = [_unit(anchors), _unit(positives)]
        count = num_rows if num_probes is None else min(num_probes, num_rows)
        probes = torch.from_numpy(np.sort(np.random.default_rng(seed).choice(num_rows, count, replace=False)))
        ids = [torch.from_numpy(side) for side in compact_ids(num_rows, anchor_id=anchor_id, positive_id=positive_id)]
        repeated = any(len(side.unique()) < num_rows for side in ids)  # else only the own pair is no negative
        masks = content_masks(*ids) if repeated else None
        exact = full_gradient(
            *sides, temperature=temperature, direction=direction, rows=probes, masks=masks, tile_bytes=tile_bytes
        )
        return cls(
            anchors=sides[0],
            positives=sides[1],
            anchor_id=ids[0],
            positive_id=ids[1],
            masks=masks,
            temperature=temperature,
            probes=probes,
            exact=exact,
            direction=direction,
        )

    def __len__(self) -> int:
        return len(self.anchors)

    @property
    def trained(self) -> list[Tensor]:
        """The embeddings that `exact` is the gradient of: anchors, or anchors and positives."""
        return [self.anchors] if self.direction == "one_way" else [self.anchors, self.positives]


def gradient_error(
    pairs: FrozenPairs,
    loss: nn.Module,
    *,
    plan: BatchPlan,
    table: RowTable | None = None,
    run_in: int = 0,
    epochs: int = 8,
) -> GradientError:
    """Measure a method: its loss, the plan's batches, its log-weights.

    Two copies of the loss go through the plan under two seeds, independently: `run_in` epochs to bring the memory to
    its stationary state, then `epochs` that count. The square of the bias is the mean over anchors of the inner product
    of the two copies' mean errors, so that noise, which is independent in the two, does not count as bias.

    Args:
        pairs: The embeddings and their exact gradient.
        loss: Any loss of the library's contract in the direction of `pairs`; copied, so its own state is where both
            copies start.
        plan: Its batches; regrouped every epoch.
        table: Gives log-weights and masks; None for the ids of `pairs` and no weights.
        run_in: Epochs before measuring. A memory that forgets at rate gamma needs about 3 / gamma.
        epochs: Epochs measured, in each copy.

    Raises:
        AnybatchError: A plan for another number of rows; a loss of another direction than the exact gradient's.

    Cost: 2 * (run_in + epochs) * n / B calls of the loss, fewer if batches without probes can be skipped; 2 * P * D
        numbers (two-way: 4 * P * D).
    """
    if plan.num_rows != len(pairs):
        raise AnybatchError(
            f"The plan has {plan.num_rows} rows, the embeddings {len(pairs)}. Give the embeddings of the data that "
            "the plan was made for."
        )
    direction = getattr(loss, "direction", pairs.direction)
    if direction != pairs.direction:
        raise AnybatchError(
            f"The loss has direction={direction!r}, the exact gradient {pairs.direction!r}. Make both alike: "
            f"FrozenPairs.prepare(..., direction={direction!r}), or a loss with direction={pairs.direction!r}."
        )
    if table is None:
        table = RowTable(pairs.anchor_id.numpy(), pairs.positive_id.numpy())
    sums = [
        _run(pairs, copy.deepcopy(loss), replace(plan, seed=plan.seed + shift), table, run_in, epochs)
        for shift in (0, 1)
    ]
    return _summarise(pairs, *sums)


def infonce_curve(
    pairs: FrozenPairs, *, batch_sizes: Sequence[int] | None = None, epochs: int = 2, seed: int = 0
) -> dict[int, GradientError]:
    """The error of plain InfoNCE, in the direction of `pairs`, on random batches of each size, which effective batch
    sizes are read from.

    An anchor's gradient depends on the batch's candidates alone, so up to 256 probes at a time are put through each
    random batch. Two-way it depends on the whole batch, of which as many are probes, or an eighth.

    Args:
        pairs: The embeddings and their exact gradient.
        batch_sizes: Sizes from 2 to n; None for 8, 16, 32, ... up to half the rows. At n the error is 0.
        epochs: Draws for each probe, in each of two independent halves.
        seed: Of the batches.

    Cost: 2 * epochs * P * B * D multiplications a size, three times over; two-way four times, and B * B * D for each
        256 probes (B / 8 where that is more).
    """
    num_rows = len(pairs)
    if batch_sizes is None:
        batch_sizes = [2**power for power in range(3, num_rows.bit_length()) if 2 ** (power + 1) <= num_rows]
        if not batch_sizes:
            raise AnybatchError(f"{num_rows} rows are too few for a curve of batch sizes; expected at least 16.")
    for size in batch_sizes:
        if not 2 <= size <= num_rows:
            raise AnybatchError(f"batch_sizes holds {size}; expected sizes from 2 to the number of rows, {num_rows}.")
    curve: dict[int, GradientError] = {}
    for size in batch_sizes:
        at_once = min(size, max(CURVE_CHUNK, size // 8) if pairs.direction == "both" else CURVE_CHUNK)
        sums = [_Sums(pairs), _Sums(pairs)]
        for number, half in enumerate(sums):
            generator = np.random.default_rng([seed, size, number])
            for _ in range(epochs):
                for chosen in torch.from_numpy(generator.permutation(len(pairs.probes))).split(at_once):
                    first = pairs.probes[chosen]
                    free = np.ones(num_rows, bool)
                    free[first] = False
                    rest = generator.choice(np.flatnonzero(free), size - len(first), replace=False)
                    half.add(chosen, _of_random_batch(pairs, torch.cat([first, torch.from_numpy(rest)]), len(first)))
        curve[size] = _summarise(pairs, *sums)
    return curve


def effective_batch_size(error: float, curve: dict[int, float]) -> float:
    """The random InfoNCE batch with this error, by interpolation of log error over log size.

    Args:
        error: Any of the errors of `GradientError`.
        curve: The same error of InfoNCE by batch size, at least two sizes, falling.

    Returns:
        A size; 0 where even the smallest batch of the curve is better, infinity where the largest is worse.
    """
    sizes = sorted(curve)
    values = np.minimum.accumulate([curve[size] for size in sizes])  # noise must not make the curve rise
    if error > values[0]:
        return 0.0
    if error < values[-1]:
        return math.inf
    # np.interp wants ascending abscissae: walk the curve from its right end.
    logs = np.log(np.maximum(values[::-1], 1e-30))
    return float(np.exp(np.interp(math.log(max(error, 1e-30)), logs, np.log(sizes[::-1]))))


class _Sums:
    """What is added up for each probe over its draws."""

    def __init__(self, pairs: FrozenPairs) -> None:
        self.pairs = pairs
        self.gradient = torch.zeros_like(pairs.exact)
        self.count = torch.zeros(len(pairs.probes), dtype=torch.float64)
        self.figures = torch.zeros(3, len(pairs.probes), dtype=torch.float64)  # |g - g*|^2, g . g*, |g|^2

    def add(self, probes: Tensor, gradient: Tensor) -> None:
        """Count one draw of these probes (positions in `pairs.probes`, all different)."""
        exact = self.pairs.exact[probes]
        self.gradient[probes] += gradient
        self.count[probes] += 1
        products = (gradient - exact).square(), gradient * exact, gradient.square()
        self.figures[:, probes] += torch.stack([product.sum(dim=1).double() for product in products])


def _run(pairs: FrozenPairs, loss: nn.Module, plan: BatchPlan, table: RowTable, run_in: int, epochs: int) -> _Sums:
    sums = _Sums(pairs)
    place = torch.full((len(pairs),), -1)
    place[pairs.probes] = torch.arange(len(pairs.probes))
    loss.train()
    remembers = any(True for _ in loss.buffers())  # then batches without a probe leave something behind as well
    for epoch in range(run_in + epochs):
        for batch in torch.from_numpy(plan.epoch_batches(epoch)):
            probes = place[batch]
            present = probes >= 0
            if not present.any() and not remembers:
                continue
            gradient = _batch_gradient(pairs, loss, batch, table)
            if epoch >= run_in and present.any():
                sums.add(probes[present], gradient[present])
    return sums


def _batch_gradient(pairs: FrozenPairs, loss: nn.Module, batch: Tensor, table: RowTable) -> Tensor:
    """B times the gradient of the batch's mean loss with respect to its anchors; two-way also to its positives."""
    leaves = [pairs.anchors[batch], pairs.positives[batch]]
    trained = [leaf.requires_grad_() for leaf in leaves[: len(pairs.trained)]]
    gradients = torch.autograd.grad(loss(*leaves, **table.arguments(batch)), trained)
    parts = [tangent(part * len(batch), leaf.detach()) for part, leaf in zip(gradients, trained, strict=True)]
    return torch.cat(parts, dim=1)


def _of_random_batch(pairs: FrozenPairs, batch: Tensor, num_first: int) -> Tensor:
    """The gradient of plain InfoNCE on one batch, which is its whole data set, for its first rows."""
    masks = pairs.masks
    if masks is not None:
        masks = LogWeights.of(masks.candidates.take(batch), len(batch), *masks.terms)
    return full_gradient(
        pairs.anchors[batch],
        pairs.positives[batch],
        temperature=pairs.temperature,
        direction=pairs.direction,
        rows=torch.arange(num_first),
        masks=masks,
    )


def _summarise(pairs: FrozenPairs, first: _Sums, second: _Sums) -> GradientError:
    # 1. Of each anchor that both copies saw: what was added up, per draw.
    seen = (first.count > 0) & (second.count > 0)
    if int(seen.sum()) < 2:
        raise AnybatchError("Fewer than two anchors were in a batch; measure more epochs or more probes.")
    exact, units = pairs.exact[seen], [side[pairs.probes[seen]] for side in pairs.trained]
    squared = exact.square().sum(dim=1).double()
    count = (first.count + second.count)[seen]
    error, along, length = (first.figures + second.figures)[:, seen] / count
    # 2. The copies' mean errors on the two sides of a product, so that noise does not count as bias.
    means = [half.gradient[seen] / half.count[seen, None].to(exact.dtype) - exact for half in (first, second)]
    bias, bias_se = _root_ratio((means[0] * means[1]).sum(dim=1).double(), squared)
    shared, shared_se = _shared((*means, exact), units, num_rows=len(pairs))
    # 3. One batch, and one batch after the best common factor.
    rmse, rmse_se = _root_ratio(error, squared)
    scale = float(along.sum() / length.sum()) if length.sum() > 0 else 0.0
    scaled_rmse, scaled_rmse_se = _root_ratio(scale**2 * length - 2 * scale * along + squared, squared)
    return GradientError(
        bias=bias,
        bias_se=bias_se,
        rmse=rmse,
        rmse_se=rmse_se,
        scaled_rmse=scaled_rmse,
        scaled_rmse_se=scaled_rmse_se,
        scale=scale,
        shared_bias=shared[0],
        shared_bias_se=shared_se[0],
        shared_cosine=shared[1],
        shared_cosine_se=shared_se[1],
        num_anchors=int(seen.sum()),
        num_draws=float(count.mean()),
    )


def _shared(sides: Sequence[Tensor], units: Sequence[Tensor], *, num_rows: int) -> tuple[list[float], list[float]]:
    """Bias and cosine of the mean gradient of a shared linear map, with standard errors by a jackknife over anchors.

    Two-way there are two maps, of anchors and of positives, taken as one vector of parameters.

    |mean_i e_i a_i^T|^2 over all n rows is the mean of (e_i . e_j)(a_i . a_j) over i and j; of P rows drawn from them,
    pairs with i = j have weight 1 / n, not 1 / P, or the scatter of the draw would count. The two halves' errors stand
    on the two sides, so that noise does not count either.

    Args:
        sides: (P, D) mean errors of the two halves and the exact gradient; two-way (P, 2 D).
        units: (P, D) the embeddings, of each side that is trained.
        num_rows: n.
    """
    count = len(units[0])
    groups = torch.arange(count) % min(JACKKNIFE, count)
    parts = []
    for group in range(int(groups.max()) + 1):
        rows = groups == group
        gradients = [side[rows].chunk(len(units), dim=1) for side in sides]
        matrices = [
            torch.cat([part.T @ unit[rows] for part, unit in zip(side, units, strict=True)]).double()
            for side in gradients
        ]
        own = [[float((a[rows] * b[rows]).sum()) for b in sides] for a in sides]
        parts.append((matrices, torch.tensor(own, dtype=torch.float64), int(rows.sum())))
    total = [torch.stack([part[0][side] for part in parts]).sum(dim=0) for side in range(3)]
    own_total = torch.stack([part[1] for part in parts]).sum(dim=0)

    def figures(matrices: list[Tensor], own: Tensor, count: int) -> list[float]:
        def product(a: int, b: int) -> float:
            mine = float(own[a, b])
            others = (float((matrices[a] * matrices[b]).sum()) - mine) / (count * (count - 1))
            return mine / count / num_rows + others * (1 - 1 / num_rows)

        whole = product(2, 2)
        if whole <= 0:
            return [math.nan, math.nan]
        along = (product(0, 2) + product(1, 2)) / 2 + whole
        length = product(0, 1) + product(0, 2) + product(1, 2) + whole
        cosine = along / math.sqrt(length * whole) if length > 0 else math.nan
        return [math.sqrt(max(0.0, product(0, 1)) / whole), cosine]

    estimate = figures(total, own_total, count)
    left_out = torch.tensor(
        [
            figures([t - m for t, m in zip(total, matrices, strict=True)], own_total - own, count - size)
            for matrices, own, size in parts
            if count - size > 1
        ],
        dtype=torch.float64,
    )
    spread = (left_out - left_out.mean(dim=0)).square().sum(dim=0) * (len(left_out) - 1) / max(1, len(left_out))
    return estimate, spread.sqrt().tolist()


def _root_ratio(part: Tensor, whole: Tensor) -> tuple[float, float]:
    """sqrt(sum part / sum whole), 0 where negative, and its standard error (ratio estimator, delta method)."""
    ratio = float(part.sum() / whole.sum())
    residual = part - ratio * whole
    ratio_se = float(residual.std() / whole.mean()) / math.sqrt(len(part))
    root = math.sqrt(max(0.0, ratio))
    # At a ratio of 0 the root has no derivative; the root of the ratio's own error bounds it there.
    return root, min(ratio_se / (2 * root), math.sqrt(ratio_se)) if root > 0 else math.sqrt(ratio_se)


def _unit(side: np.ndarray) -> Tensor:
    tensor = torch.as_tensor(np.array(side, dtype=np.float64 if side.dtype == np.float64 else np.float32))
    return tensor / tensor.norm(dim=1, keepdim=True)
