"""The methods side by side before training: their gradient errors on a teacher's embeddings, and which to choose."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

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
from anybatch.losses.base import Direction
from anybatch.losses.registry import METHODS, LossConfig, build_loss, options_of
from anybatch.losses.rows import RowTable
from anybatch.plans.plan import BatchPlan

CLOSE = 0.05  # further from the best cosine is worse, however uncertain: a bad measurement recommends nothing
CURVE_PROBES = 512  # anchors that the curve of random InfoNCE is measured on


def core_methods() -> list[LossConfig]:
    """The core's methods as they are by default, the simplest first; with inclusion weights too where they have any."""
    methods = []
    for name, path in METHODS.items():
        if path.startswith("anybatch.losses."):
            plain = LossConfig(name=name)
            methods += [plain, replace(plain, weights="inclusion")] if plain.example().inclusion else [plain]
    return methods


def name_of(method: LossConfig) -> str:
    """The method in the words of the configuration: `loss.name`, with what else has to be set."""
    known = options_of(method.name)
    given = {
        name: value
        for name, value in method.options.items()
        if value != known[name].default and name not in ("temperature", "direction")
    }
    if method.weights != "none":
        given["weights"] = method.weights
    return ", ".join([method.name, *(f"{name}={value}" for name, value in given.items())])


@dataclass(frozen=True, kw_only=True)
class MethodError:
    """A line of the comparison.

    Attributes:
        method: Name of the method.
        batches: "plan" or "random".
        error: What was measured.
        effective: The random InfoNCE batch with the same error after the best common factor (a tuned learning rate
            finds that factor); 0 below the smallest measured, infinity above the largest.
    """

    method: str
    batches: str
    error: GradientError
    effective: float


@dataclass(frozen=True, kw_only=True)
class GradientComparison:
    """All lines, best first, and the measure.

    Attributes:
        lines: By `error.shared_cosine`, the best first.
        order: Names of the methods, the simplest first.
        curve: `scaled_rmse` of random InfoNCE by batch size.
        batch_size: Of the plan.
        num_rows: n.
        temperature: Of the objective.
        direction: Of the objective.

    Example:
        >>> pairs = FrozenPairs.prepare(*np.random.default_rng(0).normal(size=(2, 32, 8)))
        >>> compare_methods(pairs, BatchPlan.random(32, 8), methods=[LossConfig()], epochs=1).recommended.method
        'infonce'
    """

    lines: tuple[MethodError, ...]
    order: tuple[str, ...]
    curve: dict[int, float]
    batch_size: int
    num_rows: int
    temperature: float
    direction: Direction = "one_way"

    @property
    def recommended(self) -> MethodError:
        """The simplest method whose shared cosine is within two standard errors of the best, and within `CLOSE`.

        Not the least error of single anchors: errors that anchors have in common add up in parameters, others cancel.
        """
        best = self.lines[0].error

        def close(line: MethodError) -> bool:
            spread = math.hypot(line.error.shared_cosine_se, best.shared_cosine_se)
            difference = best.shared_cosine - line.error.shared_cosine
            return line.error is best or difference <= min(2 * spread, CLOSE)  # no NaN is close

        candidates = [line for line in self.lines if close(line)]
        return min(candidates, key=lambda line: (self.order.index(line.method), line.batches == "plan"))

    def size_in_words(self, effective: float) -> str:
        """An effective batch size, with the ends of the curve said as such."""
        if math.isinf(effective):
            return f"over {max(self.curve):,}"
        return f"{effective:,.0f}" if effective else f"under {min(self.curve)}"


def compare_methods(
    pairs: FrozenPairs,
    plan: BatchPlan,
    *,
    methods: Sequence[LossConfig] | None = None,
    epochs: int = 2,
    progress: Callable[[int, int], None] | None = None,
) -> GradientComparison:
    """Measure every method, in the direction of `pairs`, on the plan's batches and on random ones of the same size.

    Args:
        pairs: The embeddings and their exact gradient.
        plan: Made for these rows.
        methods: What to compare, the simplest first; None for the core's. On random batches inclusion weights change
            nothing and are left out.
        epochs: See `gradient_error`.
        progress: Called with (done, total).

    Raises:
        AnybatchError: A plan over several data sets, whose exact gradients are not one; too few rows.

    Cost: see `gradient_error`, once a line: seconds a line for 20,000 rows. Of methods that remember nothing it grows
        with `len(pairs.probes)`, not with the rows, once there are more batches than probes.
    """
    if plan.task is not None and len(plan.task_names) > 1:
        raise AnybatchError(
            f"The plan is over the data sets {', '.join(plan.task_names)}, each with an exact gradient of its own. "
            "Mine one of them by itself, and compare the methods on that plan."
        )
    # 1. Which methods on which batches. A batch of one cluster never meets the others: no weight can stand for that.
    methods = core_methods() if methods is None else methods
    random = BatchPlan.random(plan.num_rows, plan.batch_size, seed=plan.seed)
    wanted = [("random", random, method) for method in methods if method.weights == "none"]
    if plan.cluster_size > 1:
        weighable = plan.clusters_per_batch > 1
        wanted += [("plan", plan, method) for method in methods if method.weights == "none" or weighable]
    # 2. The measure.
    few = _fewer(pairs, CURVE_PROBES)
    curve = {size: error.scaled_rmse for size, error in infonce_curve(few, epochs=1).items()}
    # 3. Each line.
    ids = pairs.anchor_id.numpy(), pairs.positive_id.numpy()
    objective = {"temperature": pairs.temperature, "direction": pairs.direction}
    lines = []
    for number, (batches, chosen, method) in enumerate(wanted, start=1):
        loss = build_loss(replace(method, **objective), num_rows=len(pairs))
        table = RowTable(*ids, plan=chosen, weights=method.weights)
        error = gradient_error(pairs, loss, plan=chosen, table=table, run_in=_run_in(loss), epochs=epochs)
        effective = effective_batch_size(error.scaled_rmse, curve)
        lines.append(MethodError(method=name_of(method), batches=batches, error=error, effective=effective))
        if progress is not None:
            progress(number, len(wanted))
    return GradientComparison(
        lines=tuple(sorted(lines, key=lambda line: (math.isnan(line.error.shared_cosine), -line.error.shared_cosine))),
        order=tuple(map(name_of, methods)),
        curve=curve,
        batch_size=plan.batch_size,
        num_rows=len(pairs),
        temperature=pairs.temperature,
        direction=pairs.direction,
    )


def plain_line(comparison: GradientComparison) -> MethodError:
    """That of plain InfoNCE on random batches."""
    return next(line for line in comparison.lines if (line.method, line.batches) == ("infonce", "random"))


def comparison_rows(comparison: GradientComparison) -> tuple[list[str], list[list[str]]]:
    """Header and lines, for a table on the terminal or on a page."""
    measures = ["shared direction", "error", "error, best factor", "bias", "factor", "effective batch"]
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
    return ["method", "batches", *measures], lines


def recommendation(comparison: GradientComparison) -> list[str]:
    """What follows from the comparison, and what does not, in sentences."""
    chosen = comparison.recommended
    if math.isnan(chosen.error.shared_cosine):
        return [
            "The exact gradient has no direction on these embeddings (are all positives alike?), so nothing can be "
            "recommended. Look at the embeddings with `anybatch inspect plan`."
        ]
    plain = plain_line(comparison)
    where = "the plan's batches" if chosen.batches == "plan" else "random batches"
    single = "single anchors" if comparison.direction == "one_way" else "single pairs, anchor and positive together,"
    sentences = [
        f"Closest to the gradient over all {comparison.num_rows:,} rows: loss.name={chosen.method} on {where} (of "
        "what is no worse within two standard errors, the simplest). Its direction for shared parameters has cosine "
        f"{chosen.error.shared_cosine:.2f} with the exact one; plain InfoNCE on random batches of "
        f"{comparison.batch_size} has {plain.error.shared_cosine:.2f}. The error of {single} is "
        f"{chosen.error.scaled_rmse:.2f}, that of plain InfoNCE on a random batch of "
        f"{comparison.size_in_words(chosen.effective)}."
    ]
    if chosen.batches == "random" and any(line.batches == "plan" for line in comparison.lines):
        sentences.append("The plan's batches do not bring the gradient nearer than random ones.")
    sentences.append(
        "This compares gradients on embeddings that stand still. It does not know that a model moves, that hard "
        "negatives may be false, or that memory grows stale: take it for a first choice, and measure the two best on "
        "held-out data."
    )
    return sentences


def _run_in(loss: nn.Module) -> int:
    """Epochs until what the loss remembers has settled: denominators after some visits of a row, a queue once full."""
    if getattr(loss, "running", None) is not None:
        return 3
    return 1 if any(True for _ in loss.buffers()) else 0


def _fewer(pairs: FrozenPairs, count: int) -> FrozenPairs:
    """The same pairs with evenly spaced probes."""
    if count >= len(pairs.probes):
        return pairs
    chosen = np.linspace(0, len(pairs.probes) - 1, count).round().astype(np.int64)
    return replace(pairs, probes=pairs.probes[chosen], exact=pairs.exact[chosen])
