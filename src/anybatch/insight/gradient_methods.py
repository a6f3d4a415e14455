"""Methods side by side before training: their parameter-gradient errors on frozen embeddings, beside plain InfoNCE."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from anybatch.core.errors import AnybatchError
from anybatch.data.inputs import kind_of
from anybatch.data.pairs import PairData
from anybatch.insight.gradient_error import NUM_BATCHES, STRAIGHT, FrozenPairs, GradientError, gradient_error
from anybatch.insight.tables import Figure
from anybatch.losses.registry import LossConfig, build_loss, first_temperature, options_of
from anybatch.plans.plan import BatchPlan

OTHER_OBJECTIVES = ("joint", "positives_by", "hardness")


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


def comparable(loss: LossConfig) -> tuple[LossConfig, list[str]]:
    """The loss without the options that make its objective another than InfoNCE over all rows; a sentence that says so,
    if it has some.
    """
    default = {name: option.default for name, option in options_of(loss.name).items() if name in OTHER_OBJECTIVES}
    default["matryoshka"] = None
    others = [f"loss.{name}" for name in default if getattr(loss, name) != default[name]]
    said = [f"{', '.join(others)}: the gradient over all data is that of plain InfoNCE."] if others else []
    return replace(loss, **default), said


def frozen_pairs(
    vectors: Sequence[np.ndarray],
    pairs: PairData | None,
    plan: BatchPlan,
    loss: LossConfig,
    *,
    temperature: float | None = None,
    num_anchors: int | None = None,
) -> FrozenPairs:
    """Embeddings of both sides of a plan's rows with the gradient over all data that the loss of a run is for: its
    temperature (or another), direction and masks; in one map for both sides, unless one is texts and one is images.
    Without `pairs` all rows count as different.
    """
    return FrozenPairs.prepare(
        *vectors,
        temperature=first_temperature(loss) if temperature is None else temperature,
        direction=getattr(loss.example(), "direction", "one_way"),
        tied=pairs is None or {kind_of(pairs.anchors), kind_of(pairs.positives)} != {"text", "image"},
        num_anchors=num_anchors,
        mask_margin=loss.options.get("mask_margin"),
        suspects=plan.suspects if loss.mask_suspects is True else None,
        **({} if pairs is None else pairs.ids),
    )


def beside_plain(loss: LossConfig, plan: BatchPlan) -> list[LossConfig]:
    """Plain InfoNCE with the masks of a loss, and that loss where it is another; see `comparable`."""
    masks = loss.mask_suspects is True and plan.suspects is not None
    plain = LossConfig(name="infonce", mask_suspects=masks, mask_margin=loss.options.get("mask_margin"))
    loss = replace(comparable(loss)[0], mask_suspects=masks)
    return [plain] if name_of(loss) == name_of(plain) else [plain, loss]


@dataclass(frozen=True, kw_only=True)
class GradientComparison:
    """What was measured of each method on "random" batches and on those of the "plan"; the methods as they were given.

    Example:
        >>> pairs = FrozenPairs.prepare(*np.random.default_rng(0).normal(size=(2, 32, 8)))
        >>> list(compare_methods(pairs, BatchPlan.random(32, 8), methods=[LossConfig(name="infonce")]).errors)
        [('infonce', 'random')]
    """

    errors: dict[tuple[str, str], GradientError]
    order: tuple[str, ...]

    def of(self, method: str, batches: str) -> GradientError | None:
        """What was measured of a method on one kind of batches; None where it was not."""
        return self.errors.get((method, batches))

    @property
    def plain(self) -> GradientError:
        """Of the first method on random batches."""
        return self.errors[self.order[0], "random"]


def compare_methods(
    pairs: FrozenPairs,
    plan: BatchPlan,
    *,
    methods: Sequence[LossConfig],
    num_batches: int = NUM_BATCHES,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> GradientComparison:
    """Measure every method, in the direction of `pairs`, on the plan's batches and on random ones of the same size.

    Args:
        pairs: The embeddings and their full-data gradient; where the methods mask suspects, prepared without them too.
        methods: What to compare, plain InfoNCE first. On random batches inclusion weights have no meaning: the method
            is taken without, unless that is listed too. Suspects are masked there as on the plan's.

    Raises:
        AnybatchError: A plan over several data sets, whose full-data gradients are not one, or for other rows; suspects
            masked by a method and not in the full-data gradient, or the other way round.

    Cost: see `gradient_error`, once a line.
    """
    # 1. What can be compared.
    if len(plan.task_names) > 1:
        raise AnybatchError(
            f"The plan is over the data sets {', '.join(plan.task_names)}, each with a full-data gradient of its own. "
            "Mine one of them by itself, and compare the methods on that plan."
        )
    for method in methods:
        masks = method.mask_suspects is True and plan.suspects is not None
        if masks != (pairs.suspects is not None):
            raise AnybatchError(
                f"The loss has mask_suspects={method.mask_suspects}, and the full-data gradient is "
                f"{'with' if masks else 'without'} the suspects. Make both alike: FrozenPairs.prepare(..., "
                f"suspects={'plan.suspects' if masks else None})."
            )
    # 2. The lines. A batch of one cluster never meets the others: no weight can stand for that.
    random = replace(BatchPlan.random(plan.num_rows, plan.batch_size, seed=plan.seed), suspects=plan.suspects)
    names, wanted = [name_of(method) for method in methods], []
    for method, name in zip(methods, names, strict=True):
        bare = replace(method, weights="none")
        if name_of(bare) == name or name_of(bare) not in names:
            wanted.append(("random", random, bare, name))
    if plan.cluster_size > 1 or plan.negatives_per_row:
        weighable = plan.clusters_per_batch > 1
        wanted += [
            ("plan", plan, method, name)
            for method, name in zip(methods, names, strict=True)
            if method.weights != "inclusion" or weighable
        ]
    # 3. Measure.
    names_of_objective = ("temperature", "direction", "mask_margin")
    errors, objective = {}, {name: getattr(pairs, name) for name in names_of_objective}
    for number, (batches, chosen, method, name) in enumerate(wanted, start=1):
        settings = {key: value for key, value in objective.items() if key in method.options}
        errors[name, batches] = gradient_error(
            pairs,
            build_loss(replace(method, matryoshka=None, **settings), num_rows=len(pairs)),
            plan=chosen,
            weights="inclusion" if method.weights == "inclusion" else "none",
            mask_suspects=method.mask_suspects is True,
            num_batches=num_batches,
        )
        progress(number, len(wanted))
    return GradientComparison(errors=errors, order=tuple(names))


def gradient_figures(name: str, error: GradientError, other_name: str, other: GradientError) -> list[Figure]:
    """A method's figures beside those of another, against which it is to hold its own."""
    difference = error.epoch_error - other.epoch_error
    nearer = None if not abs(difference) > _noise(error, other) else difference < 0
    return [
        Figure(
            name=f"gradient, error of an epoch: {name}",
            value=_cell(error.epoch_error, error.epoch_error_se),
            beside=f"{other_name}: {_cell(other.epoch_error, other.epoch_error_se)}",
            good=f"lower than {other_name}",
            passed=nearer,
            why="How far the mean gradient of an epoch's batches is from the gradient over all rows, at the best "
            "learning rate, in shared parameters; 1 is no better than no gradient. Within a loss its order was that of "
            "training.",
        ),
        Figure(
            name=f"gradient, direction: {name}",
            value=_cell(error.cosine, error.cosine_se),
            beside=f"{other_name}: {_cell(other.cosine, other.cosine_se)}",
            good=f"{STRAIGHT:g} or more",
            passed=error.cosine > STRAIGHT if abs(error.cosine - STRAIGHT) > 2 * error.cosine_se else None,
            why="Cosine of the mean gradient over batches with the gradient over all rows. What is missing to 1 is "
            "bias: no number of steps averages it away, a correction or a memory does.",
        ),
    ]


def is_further(error: GradientError, other: GradientError) -> bool:
    """Whether an epoch's error is higher than another, by two standard errors."""
    return error.epoch_error - other.epoch_error > _noise(error, other)


def _noise(one: GradientError, other: GradientError) -> float:
    """Two standard errors of the difference of two errors of an epoch: what is less is no difference."""
    return 2 * math.hypot(one.epoch_error_se, other.epoch_error_se)


def _cell(value: float, se: float) -> str:
    return f"{value:.2f} ± {se:.2f}" if math.isfinite(value + se) else "hidden by noise"


def bias_sentence(plain: GradientError, batch_size: int) -> str:
    """Whether there is bias to remove, which is what a correction or a memory is for."""
    cosine = _cell(plain.cosine, plain.cosine_se)
    figures = (
        f"the mean gradient over random batches of {batch_size} has cosine {cosine} with the gradient over all rows; 1 "
        "is the same direction"
    )
    if plain.bias_to_remove:
        return (
            f"Small batches change what plain InfoNCE learns here: {figures}. A correction or a memory (loss.name) is "
            "for this difference, the bias."
        )
    return (
        f"Small batches hardly change what plain InfoNCE learns here: {figures}. They add noise, and larger batches or "
        "more steps lower that."
    )
