"""The library's methods side by side before training: each one's gradient error on a teacher's embeddings, and which to choose.

Imports errors, losses, plan and rows.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
from torch import nn

from anybatch.core.errors import AnybatchError
from anybatch.insight.gradient_error import (
    FrozenPairs,
    GradientError,
    effective_batch_size,
    gradient_error,
    infonce_curve,
)
from anybatch.losses import CountCorrectedInfoNCE, CrossBatchInfoNCE, DecoupledInfoNCE, InfoNCE, SogCLR
from anybatch.losses.base import Direction
from anybatch.losses.rows import RowTable
from anybatch.plans.plan import BatchPlan

CLOSE = 0.05  # further from the best cosine is worse, however uncertain: few anchors must not recommend what they measured badly
CURVE_PROBES = 512  # anchors that the curve of random InfoNCE is measured on


@dataclass(frozen=True, kw_only=True)
class GradientMethod:
    """A loss with its log-weights, by the words of the configuration.

    Attributes:
        name: `loss.name`, with what else has to be set.
        make: The loss from the number of rows, the temperature and the direction.
        weights: `loss.weights`.
        run_in: Epochs until its memory has settled.
    """

    name: str
    make: Callable[[int, float, Direction], nn.Module]
    weights: Literal["none", "inclusion"] = "none"
    run_in: int = 0


# The simplest first: of methods that are equally good the first is recommended.
METHODS: tuple[GradientMethod, ...] = (
    GradientMethod(name="infonce", make=lambda n, tau, way: InfoNCE(temperature=tau, direction=way)),
    GradientMethod(name="decoupled", make=lambda n, tau, way: DecoupledInfoNCE(temperature=tau, direction=way)),
    GradientMethod(
        name="count_corrected", make=lambda n, tau, way: CountCorrectedInfoNCE(n, temperature=tau, direction=way)
    ),
    GradientMethod(
        name="count_corrected, weights=inclusion",
        make=lambda n, tau, way: CountCorrectedInfoNCE(n, temperature=tau, direction=way),
        weights="inclusion",
    ),
    GradientMethod(
        name="cross_batch",
        make=lambda n, tau, way: CrossBatchInfoNCE(n, temperature=tau, direction=way),
        run_in=1,
    ),
    GradientMethod(
        name="cross_batch, weights=inclusion",
        make=lambda n, tau, way: CrossBatchInfoNCE(n, temperature=tau, direction=way),
        weights="inclusion",
        run_in=1,
    ),
    GradientMethod(
        name="sogclr, gamma=0.9",
        make=lambda n, tau, way: SogCLR(n, gamma=0.9, temperature=tau, direction=way),
        run_in=3,
    ),
    GradientMethod(
        name="sogclr, gamma=0.9, weights=inclusion",
        make=lambda n, tau, way: SogCLR(n, gamma=0.9, temperature=tau, direction=way),
        weights="inclusion",
        run_in=3,
    ),
)


@dataclass(frozen=True, kw_only=True)
class MethodError:
    """A line of the comparison.

    Attributes:
        method: Name of the method.
        batches: "plan" or "random".
        error: What was measured.
        effective: The random InfoNCE batch with the same error after the best common factor (a tuned learning rate finds that
            factor); 0 below the smallest measured, infinity above the largest.
    """

    method: str
    batches: Literal["plan", "random"]
    error: GradientError
    effective: float


@dataclass(frozen=True, kw_only=True)
class GradientComparison:
    """All lines, best first, and the measure.

    Attributes:
        lines: By `error.shared_cosine`, the best first.
        curve: `scaled_rmse` of random InfoNCE by batch size.
        batch_size: Of the plan.
        num_rows: n.
        temperature: Of the objective.
        direction: Of the objective.
    """

    lines: tuple[MethodError, ...]
    curve: dict[int, float]
    batch_size: int
    num_rows: int
    temperature: float
    direction: Direction = "one_way"

    @property
    def recommended(self) -> MethodError:
        """The simplest of the methods whose shared cosine is within two standard errors of the best, and within `CLOSE`.

        Not the least error of single anchors: errors that anchors have in common add up in parameters, the others cancel.
        """
        best = self.lines[0].error
        order = [method.name for method in METHODS]

        def close(line: MethodError) -> bool:
            spread = math.hypot(line.error.shared_cosine_se, best.shared_cosine_se)
            gap = best.shared_cosine - line.error.shared_cosine
            return line.error is best or gap <= min(2 * spread, CLOSE)  # no NaN is close

        candidates = [line for line in self.lines if close(line)]
        return min(candidates, key=lambda line: (order.index(line.method), line.batches == "plan"))

    def size_in_words(self, effective: float) -> str:
        """An effective batch size, with the ends of the curve said as such."""
        if math.isinf(effective):
            return f"over {max(self.curve):,}"
        return f"{effective:,.0f}" if effective else f"under {min(self.curve)}"


def compare_methods(
    pairs: FrozenPairs,
    plan: BatchPlan,
    *,
    methods: Sequence[GradientMethod] = METHODS,
    epochs: int = 2,
    progress: Callable[[int, int], None] | None = None,
) -> GradientComparison:
    """Measure every method, in the direction of `pairs`, on the plan's batches and on random ones of the same size.

    Args:
        pairs: The embeddings and their exact gradient.
        plan: Made for these rows.
        methods: What to compare. On random batches inclusion weights change nothing and are left out.
        epochs: See `gradient_error`.
        progress: Called with (done, total).

    Raises:
        AnybatchError: A plan over several data sets, whose exact gradients are not one; too few rows.

    Cost: see `gradient_error`, once a line: seconds a line for 20,000 rows; it grows with `len(pairs.probes)`, not with the rows,
        once there are more batches than probes, but for cross_batch, whose memory is of all batches.
    """
    if plan.task is not None and len(plan.task_names) > 1:
        raise AnybatchError(
            f"The plan is over the data sets {', '.join(plan.task_names)}, each with an exact gradient of its own. Mine one of them by itself, and compare the "
            "methods on that plan."
        )
    random = BatchPlan.random(plan.num_rows, plan.batch_size, seed=plan.seed)
    wanted = [("random", random, method) for method in methods if method.weights == "none"]
    if plan.cluster_size > 1:
        # A batch of one cluster never meets the others: no weight can stand for that.
        weighable = plan.clusters_per_batch > 1
        wanted += [("plan", plan, method) for method in methods if method.weights == "none" or weighable]
    few = _fewer(pairs, CURVE_PROBES)
    curve = {size: error.scaled_rmse for size, error in infonce_curve(few, epochs=1).items()}
    lines = []
    for number, (batches, chosen, method) in enumerate(wanted, start=1):
        table = RowTable(pairs.anchor_id.numpy(), pairs.positive_id.numpy(), plan=chosen, weights=method.weights)
        error = gradient_error(
            pairs,
            method.make(len(pairs), pairs.temperature, pairs.direction),
            plan=chosen,
            table=table,
            run_in=method.run_in,
            epochs=epochs,
        )
        lines.append(
            MethodError(
                method=method.name,
                batches="plan" if batches == "plan" else "random",
                error=error,
                effective=effective_batch_size(error.scaled_rmse, curve),
            )
        )
        if progress is not None:
            progress(number, len(wanted))
    return GradientComparison(
        lines=tuple(sorted(lines, key=lambda line: (math.isnan(line.error.shared_cosine), -line.error.shared_cosine))),
        curve=curve,
        batch_size=plan.batch_size,
        num_rows=len(pairs),
        temperature=pairs.temperature,
        direction=pairs.direction,
    )


def comparison_rows(comparison: GradientComparison) -> tuple[list[str], list[list[str]]]:
    """Header and lines, for a table on the terminal or on a page."""
    header = [
        "method",
        "batches",
        "shared direction",
        "error",
        "error, best factor",
        "bias",
        "factor",
        "effective batch",
    ]
    lines = [
        [
            line.method,
            line.batches,
            f"{line.error.shared_cosine:.2f} ± {line.error.shared_cosine_se:.2f}",
            f"{line.error.rmse:.3f} ± {line.error.rmse_se:.3f}",
            f"{line.error.scaled_rmse:.3f} ± {line.error.scaled_rmse_se:.3f}",
            f"{line.error.bias:.3f} ± {line.error.bias_se:.3f}",
            f"{line.error.scale:.2f}",
            comparison.size_in_words(line.effective),
        ]
        for line in comparison.lines
    ]
    return header, lines


def recommendation(comparison: GradientComparison) -> list[str]:
    """What follows from the comparison, and what does not, in sentences."""
    chosen = comparison.recommended
    if math.isnan(chosen.error.shared_cosine):
        return [
            "The exact gradient has no direction on these embeddings (are all positives alike?), so nothing can be recommended. Look at the embeddings "
            "with `anybatch inspect plan`."
        ]
    plain = next(line for line in comparison.lines if (line.method, line.batches) == ("infonce", "random"))
    where = "the plan's batches" if chosen.batches == "plan" else "random batches"
    single = "single anchors" if comparison.direction == "one_way" else "single pairs, anchor and positive together,"
    sentences = [
        f"Closest to the gradient over all {comparison.num_rows:,} rows: loss.name={chosen.method} on {where} (of what is no worse within two standard "
        f"errors, the simplest). Its direction for shared parameters has cosine {chosen.error.shared_cosine:.2f} with the exact one; plain InfoNCE on random "
        f"batches of {comparison.batch_size} has {plain.error.shared_cosine:.2f}. The error of {single} is {chosen.error.scaled_rmse:.2f}, that of plain "
        f"InfoNCE on a random batch of {comparison.size_in_words(chosen.effective)}."
    ]
    if chosen.batches == "random" and any(line.batches == "plan" for line in comparison.lines):
        sentences.append("The plan's batches do not bring the gradient nearer than random ones.")
    sentences.append(
        "This compares gradients on embeddings that stand still. It does not know that a model moves, that hard negatives may be false, or that memory "
        "grows stale: take it for a first choice, and measure the two best on held-out data."
    )
    return sentences


def _fewer(pairs: FrozenPairs, count: int) -> FrozenPairs:
    """The same pairs with evenly spaced probes."""
    if count >= len(pairs.probes):
        return pairs
    chosen = np.linspace(0, len(pairs.probes) - 1, count).round().astype(np.int64)
    return replace(pairs, probes=pairs.probes[chosen], exact=pairs.exact[chosen])
