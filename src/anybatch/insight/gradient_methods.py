"""Methods side by side before training: their parameter-gradient errors on frozen embeddings, and what follows."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from anybatch.core.errors import AnybatchError
from anybatch.insight.gradient_error import NUM_BATCHES, FrozenPairs, GradientError, gradient_error
from anybatch.losses.registry import METHODS, LossConfig, build_loss, options_of
from anybatch.plans.plan import BatchPlan

CLOSE = 0.05  # further from the best is worse, however uncertain: a bad measurement recommends nothing


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
    if method.weights == "inclusion":
        given["weights"] = method.weights
    if method.mask_suspects is True:
        given["mask_suspects"] = True
    return ", ".join([method.name, *(f"{name}={value}" for name, value in given.items())])


@dataclass(frozen=True, kw_only=True)
class MethodError:
    """A line of the comparison.

    Attributes:
        method: Name of the method.
        batches: "plan" or "random".
        error: What was measured.
    """

    method: str
    batches: str
    error: GradientError


@dataclass(frozen=True, kw_only=True)
class GradientComparison:
    """All lines, best first.

    Attributes:
        lines: By `error.epoch_error`, the best first.
        order: Names of the methods, the simplest first.
        batch_size, num_rows, temperature, direction: Of the plan, and of the objective.

    Example:
        >>> import numpy as np
        >>> pairs = FrozenPairs.prepare(*np.random.default_rng(0).normal(size=(2, 32, 8)))
        >>> compare_methods(pairs, BatchPlan.random(32, 8), methods=[LossConfig(name="infonce")]).recommended.method
        'infonce'
    """

    lines: tuple[MethodError, ...]
    order: tuple[str, ...]
    batch_size: int
    num_rows: int
    temperature: float
    direction: str

    @property
    def recommended(self) -> MethodError:
        """The simplest line whose error is within two standard errors of the best, and within `CLOSE`."""
        best = self.lines[0].error

        def close(line: MethodError) -> bool:
            spread = math.hypot(line.error.epoch_error_se, best.epoch_error_se)
            difference = line.error.epoch_error - best.epoch_error
            return line.error is best or difference <= min(2 * spread, CLOSE)  # no NaN is close

        candidates = [line for line in self.lines if close(line)]
        return min(candidates, key=lambda line: (self.order.index(line.method), line.batches == "plan"))

    @property
    def plain(self) -> MethodError:
        """Plain InfoNCE on random batches."""
        return next(line for line in self.lines if (line.method, line.batches) == ("infonce", "random"))


def method_error(
    pairs: FrozenPairs, plan: BatchPlan, method: LossConfig, *, num_batches: int = NUM_BATCHES
) -> GradientError:
    """The gradient error of a method by name, at the temperature and in the direction of `pairs`.

    Raises:
        AnybatchError: See `gradient_error`; a plan over several data sets, whose full-data gradients are not one.
    """
    if len(plan.task_names) > 1:
        raise AnybatchError(
            f"The plan is over the data sets {', '.join(plan.task_names)}, each with a full-data gradient of its own. "
            "Mine one of them by itself, and compare the methods on that plan."
        )
    objective = {"temperature": pairs.temperature, "direction": pairs.direction}
    chosen = {name: value for name, value in objective.items() if name in method.options}
    loss = build_loss(replace(method, matryoshka=None, **chosen), num_rows=len(pairs))
    return gradient_error(
        pairs,
        loss,
        plan=plan,
        weights="inclusion" if method.weights == "inclusion" else "none",
        weight_cap=method.weight_cap,
        mask_suspects=method.mask_suspects is True,
        num_batches=num_batches,
    )


def on_random_batches(
    pairs: FrozenPairs, plan: BatchPlan, method: LossConfig, *, num_batches: int = NUM_BATCHES
) -> GradientError:
    """The same on random batches of the same size, where weights and masks have no meaning."""
    random = BatchPlan.random(plan.num_rows, plan.batch_size, seed=plan.seed)
    plain = replace(method, weights="none", weight_cap=None, mask_suspects=False)
    return method_error(pairs, random, plain, num_batches=num_batches)


def compare_methods(
    pairs: FrozenPairs,
    plan: BatchPlan,
    *,
    methods: Sequence[LossConfig] | None = None,
    num_batches: int = NUM_BATCHES,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> GradientComparison:
    """Measure every method, in the direction of `pairs`, on the plan's batches and on random ones of the same size.

    Args:
        pairs: The embeddings and their full-data gradient.
        plan: Made for these rows.
        methods: What to compare, the simplest first, InfoNCE among them; None for the core's. On random batches
            inclusion weights change nothing and are left out.
        num_batches: See `gradient_error`.
        progress: Called with (done, total).

    Raises:
        AnybatchError: A plan over several data sets, or for other rows.

    Cost: see `gradient_error`, once a line.
    """
    # A batch of one cluster never meets the others: no weight can stand for that.
    methods = core_methods() if methods is None else methods
    wanted = [("random", method) for method in methods if method.weights != "inclusion"]
    if plan.cluster_size > 1:
        weighable = plan.clusters_per_batch > 1
        wanted += [("plan", method) for method in methods if method.weights != "inclusion" or weighable]
    lines = []
    for number, (batches, method) in enumerate(wanted, start=1):
        measure = method_error if batches == "plan" else on_random_batches
        error = measure(pairs, plan, method, num_batches=num_batches)
        lines.append(MethodError(method=name_of(method), batches=batches, error=error))
        progress(number, len(wanted))
    return GradientComparison(
        lines=tuple(sorted(lines, key=lambda line: (math.isnan(line.error.epoch_error), line.error.epoch_error))),
        order=tuple(map(name_of, methods)),
        batch_size=plan.batch_size,
        num_rows=len(pairs),
        temperature=pairs.temperature,
        direction=pairs.direction,
    )


def comparison_rows(comparison: GradientComparison) -> tuple[list[str], list[list[str]]]:
    """Header and lines, for a table on the terminal or on a page."""
    lines = [[line.method, line.batches, *error_cells(line.error)] for line in comparison.lines]
    return ["method", "batches", *ERRORS], lines


ERRORS = {
    "error of an epoch": "Of the mean gradient of an epoch's batches, at the best learning rate. Low is good; 1 is no "
    "better than no gradient. The methods are ordered by it.",
    "direction": "Cosine of the mean gradient over batches with the full-data gradient; 1: no bias but in length.",
    "bias": "Of that mean, in length and direction. No number of steps averages it away.",
    "noise": "Of one batch around its mean, the choice of its anchors included. Steps average it away.",
}


def error_cells(error: GradientError) -> list[str]:
    """The figures of `ERRORS`, with their standard errors."""
    figures = [
        (getattr(error, name), getattr(error, f"{name}_se")) for name in ("epoch_error", "cosine", "bias", "noise")
    ]
    return [f"{value:.2f} ± {se:.2f}" if math.isfinite(value + se) else "hidden by noise" for value, se in figures]


def recommendation(comparison: GradientComparison) -> list[str]:
    """What follows from the comparison, and what does not, in sentences."""
    chosen, plain = comparison.recommended, comparison.plain.error
    if math.isnan(chosen.error.epoch_error):
        return [
            "The full-data gradient has no direction on these embeddings (are all positives alike?), so nothing can be "
            "recommended. Look at the embeddings with `anybatch inspect plan`."
        ]
    where = "the plan's batches" if chosen.batches == "plan" else "random batches"
    sentences = [
        bias_sentence(plain, comparison.batch_size),
        f"Nearest to the gradient over all {comparison.num_rows:,} rows: loss.name={chosen.method} on {where} (of "
        f"what is no worse within two standard errors, the simplest). Error of an epoch {chosen.error.epoch_error:.2f};"
        f" plain InfoNCE on random batches {plain.epoch_error:.2f}.",
    ]
    if chosen.batches == "random" and any(line.batches == "plan" for line in comparison.lines):
        sentences.append("The plan's batches do not bring the gradient nearer than random ones.")
    sentences.append(
        "This compares gradients on embeddings that stand still. It does not know that a model moves, that hard "
        "negatives may be false, or that memory grows stale: take it for a first choice, and measure the two best on "
        "held-out data."
    )
    return sentences


def bias_sentence(plain: GradientError, batch_size: int) -> str:
    """Whether there is bias to remove, which is what a correction or a memory is for."""
    figures = (
        f"the mean gradient of plain InfoNCE on random batches of {batch_size} has cosine {plain.cosine:.2f} with the "
        f"full-data gradient (bias {plain.bias:.2f}, noise {plain.noise:.2f} a batch)"
    )
    if plain.bias_to_remove:
        return f"There is bias to remove: {figures}. That is what a correction or a memory is for (loss.name)."
    return f"There is little bias to remove: {figures}. What is left is noise: larger batches and more steps lower it."
