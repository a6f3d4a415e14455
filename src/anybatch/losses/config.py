"""Which loss, with which numbers: the part of a run's configuration that the losses own."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Annotated, Any, ClassVar, Literal

from torch import nn

from anybatch.core.configuration import (
    Configuration,
    Count,
    CountOrZero,
    Fraction,
    NotNegative,
    Positive,
    Range,
    Seed,
    Share,
)
from anybatch.core.errors import AnybatchError

_LEARNED = frozenset({"learnable_temperature", "min_temperature"})
_GLOBAL = frozenset({"gamma", "gamma_steps", "gamma_steps_per_epoch"})
_MEMORY = frozenset({"memory_sharded"})
_OWN_TEMPERATURES = frozenset({"rho", "eps", "temperature_range", *_GLOBAL, *_MEMORY})
# What each method knows besides temperature, direction, weights and weight_cap.
KNOWN: dict[str, frozenset[str]] = {
    "infonce": frozenset({*_LEARNED, "ring"}),
    "decoupled": frozenset({*_LEARNED, "ring"}),
    "count_corrected": frozenset({*_LEARNED, "ring"}),
    "cross_batch": frozenset({*_LEARNED, "memory_size", "corrected", "centred", "mean_rows", "max_staleness"}),
    "sogclr": frozenset({*_LEARNED, "ring", "eps", *_GLOBAL, *_MEMORY}),
    "fastclip": frozenset({"version", "temperature_lr", *_OWN_TEMPERATURES}),
    "isogclr": frozenset({"temperature_lr", *_OWN_TEMPERATURES}),
    "tempnet": frozenset({"dimensions", *_OWN_TEMPERATURES}),
    "nuclr": frozenset({"margin", "margin_lr", "margin_start", *_GLOBAL}),
    "glofnd": frozenset({*_LEARNED, "eps", "alpha", "threshold_lr", "threshold_start", *_GLOBAL}),
    "emc2": frozenset({*_LEARNED, "dimensions", "burn_in", "seed"}),
    "scent": frozenset({*_LEARNED, "eps", "alpha", *_MEMORY}),
    "siglip": frozenset({*_LEARNED, "bias"}),
    "auc_cl": frozenset({"margin"}),
}
# What fastclip's versions do without.
_FASTCLIP_IGNORES = {
    "v0": ("rho", "temperature_lr"),
    "v1": ("rho", "temperature_lr", "temperature_range"),
    "v2": (),
    "v3": ("temperature_lr",),
}
# Denominators that a warm start can fill, and a probe can check.
WITH_MEMORY = ("sogclr", "fastclip", "isogclr", "tempnet", "scent")
# Denominators that are the batch's own, which inclusion weights would turn into something else.
_WITHOUT_WEIGHTS = ("infonce", "decoupled", "siglip")


@dataclass(frozen=True, kw_only=True)
class LossConfig(Configuration):
    """A loss by name. What is None takes the method's default; what the method does not know is refused.

    Attributes:
        name: "infonce", "decoupled" (no positive in the denominator), "count_corrected" (the batch's negatives stand for the
            whole data set; no memory), "cross_batch" (the same with the embeddings of recent batches), "sogclr" (a running denominator for each example), "fastclip" (the same in both directions,
            with a temperature of four kinds), "isogclr" (a temperature for each example), "tempnet" (a temperature from the embedding),
            "nuclr" (a margin for each candidate), "glofnd" (drops likely false negatives), "emc2" (a chain of negatives for each
            example), "scent" (forgetting by a proximal step), "siglip" (a yes-or-no question a pair; published with temperature 0.1, learned),
            "auc_cl" (positives outscore negatives by a margin).
        temperature: Similarities are divided by it; where it is learned, the first one. 0.01 to 0.07 for text, 0.07 to 0.1 for images. None for the
            method's own: 0.1 for siglip, 0.07 for fastclip (v1, v2: 0.03), 0.05 for the others.
        learnable_temperature: Train it as a parameter; None for what the method does (siglip: yes, all others: no).
        min_temperature: Where it is learned, it goes no lower; None for .01. fastclip, isogclr, tempnet: see temperature_range.
        direction: "one_way" (anchor to candidates), or "both" (also positive to anchors); None for "both" with fastclip, else "one_way".
        gamma: Methods with a running denominator: weight of the new batch in it; 1 forgets everything else.
        gamma_steps: Let gamma fall from 1 along a cosine of so many steps; None to keep it constant.
        gamma_steps_per_epoch: With `gamma_steps`: gamma changes only after so many steps.
        eps: Added to the running denominator; None for the method's own (sogclr: 1 / (rows - 1), an estimate of full-data InfoNCE).
        version: fastclip: "v0" to "v3"; None for "v3".
        rho: fastclip v2 and v3, isogclr, tempnet: radius of the robust objective.
        temperature_range: fastclip but for v1, isogclr, tempnet: lowest and highest temperature.
        temperature_lr: fastclip v2, isogclr: step of an example's temperature.
        dimensions: tempnet: width of the embeddings. emc2: likewise, to keep the embeddings of the chains' states.
        memory_size: cross_batch: pairs remembered.
        corrected: cross_batch: weight negatives to stand for all rows, as count_corrected does.
        centred: cross_batch: take the common drift of the embeddings away.
        mean_rows: cross_batch: rows that the mean is of, by which the drift is known.
        max_staleness: cross_batch: leave out what is remembered once negatives of its age have moved away by more than this, a logarithm; 100 to use all.
        margin: nuclr: the first margin of every row. auc_cl: wanted lead of a positive.
        bias: siglip: the bias at first; it is learned.
        margin_lr, margin_start: nuclr: step of the margins, and steps before they are learned.
        alpha: glofnd: share of negatives to drop. scent: step, near one over a typical denominator; None for rows - 1.
        threshold_lr, threshold_start: glofnd: step of the thresholds, and steps before they are used.
        burn_in: emc2: share of a visit's steps that do not count.
        seed: emc2: of the chains.
        memory_sharded: Each process stores its share of the rows instead of all.
        weights: "inclusion" corrects for mined batches not being a uniform sample; "none" leaves them as they are.
        weight_cap: Upper limit on the weight of another cluster's row relative to one of the own; None for the exact weight.
        ring: infonce, decoupled, count_corrected, sogclr: under torchrun let candidates travel from rank to rank, where all would not fit on one.
        matryoshka: Widths of prefixes of the embeddings that must be good embeddings themselves: the loss is the sum over them, each with a
            memory and a learned temperature of its own. The full width is among them only if given. None for the embeddings as they are.
        matryoshka_weights: One weight a prefix; None for 1 each.
        mask_suspects: Pairs that the plan suspects of being false negatives are no negatives.
        warm_start: Methods with a running denominator: fill it before the first step, from all rows encoded once (docs/memory.md).
        warm_start_steps: Fill it anew every so many steps as well.
        warm_start_sample: Fill it from so many targets drawn at random instead of all.
        probe_steps: Every so many steps compare it with the truth on a few rows; the figures go into the log.
    """

    name: Literal[
        "infonce",
        "decoupled",
        "count_corrected",
        "cross_batch",
        "sogclr",
        "fastclip",
        "isogclr",
        "tempnet",
        "nuclr",
        "glofnd",
        "emc2",
        "scent",
        "siglip",
        "auc_cl",
    ] = "infonce"
    temperature: Positive | None = None
    learnable_temperature: bool | None = None
    min_temperature: Positive | None = None
    direction: Literal["one_way", "both"] | None = None
    gamma: Share | None = None
    gamma_steps: Count | None = None
    gamma_steps_per_epoch: Count | None = None
    eps: NotNegative | None = None
    version: Literal["v0", "v1", "v2", "v3"] | None = None
    rho: NotNegative | None = None
    temperature_range: tuple[Positive, ...] | None = None
    temperature_lr: NotNegative | None = None
    dimensions: Count | None = None
    memory_size: Count | None = None
    corrected: bool | None = None
    centred: bool | None = None
    mean_rows: Count | None = None
    max_staleness: Positive | None = None
    margin: float | None = None
    bias: float | None = None
    margin_lr: NotNegative | None = None
    margin_start: CountOrZero | None = None
    alpha: Positive | None = None
    threshold_lr: NotNegative | None = None
    threshold_start: CountOrZero | None = None
    burn_in: Fraction | None = None
    seed: Seed | None = None
    memory_sharded: bool = False
    weights: Literal["none", "inclusion"] = "none"
    weight_cap: Annotated[float, Range(1)] | None = None
    ring: bool = False
    matryoshka: tuple[Count, ...] | None = None
    matryoshka_weights: tuple[NotNegative, ...] | None = None
    mask_suspects: bool = False
    warm_start: bool = False
    warm_start_steps: Count | None = None
    warm_start_sample: Count | None = None
    probe_steps: Count | None = None

    section: ClassVar[str] = "loss"

    def __post_init__(self) -> None:
        super().__post_init__()
        learned = self.name == "siglip" if self.learnable_temperature is None else self.learnable_temperature
        if self.min_temperature is not None and not learned:
            raise AnybatchError(
                f"loss.min_temperature is {self.min_temperature}, and the temperature is not learned, so that it stays as it is. Set "
                "loss.learnable_temperature=true, or leave loss.min_temperature out."
            )
        if self.temperature_range is not None and len(self.temperature_range) != 2:
            raise AnybatchError(
                f"loss.temperature_range is {self.temperature_range}; expected two numbers, the lowest and the highest temperature."
            )
        if self.gamma_steps_per_epoch is not None and self.gamma_steps is None:
            raise AnybatchError("loss.gamma_steps_per_epoch needs loss.gamma_steps, the length of the cosine.")
        self._check_matryoshka()
        if self.name == "tempnet" and self.dimensions is None and self.matryoshka is None:
            raise AnybatchError("loss.dimensions is missing; tempnet needs the width of the embeddings, such as 384.")
        unknown = sorted(set(self._given()) - KNOWN[self.name])
        if unknown:
            knowing = sorted(name for name, known in KNOWN.items() if unknown[0] in known)
            raise AnybatchError(
                f"loss.{unknown[0]} is given, which '{self.name}' does not know: it is for {', '.join(knowing)}. Remove it, or change loss.name."
            )
        version = "v3" if self.version is None else self.version
        for name in _FASTCLIP_IGNORES[version] if self.name == "fastclip" else ():
            if getattr(self, name) is not None:
                using = ", ".join(other for other, ignored in _FASTCLIP_IGNORES.items() if name not in ignored)
                raise AnybatchError(
                    f"loss.{name} is given, which fastclip's {version} does not use: it is for {using}. Remove it, or change loss.version."
                )
        if self.weights == "inclusion" and self.name in _WITHOUT_WEIGHTS:
            raise AnybatchError(
                f"loss.weights is 'inclusion', which '{self.name}' does not define: its denominator is the batch's own. "
                "Use loss.name=count_corrected (no memory) or sogclr."
            )
        for name in ("warm_start", "warm_start_steps", "warm_start_sample", "probe_steps"):
            value = getattr(self, name)
            if value and self.name not in WITH_MEMORY:
                raise AnybatchError(
                    f"loss.{name} is {value}, but '{self.name}' has no running denominator. It is for {', '.join(WITH_MEMORY)}."
                )
        if self.name in ("siglip", "auc_cl") and self.direction == "both":
            raise AnybatchError(
                f"loss.direction is 'both'; '{self.name}' judges pairs and has one direction. Leave it at 'one_way'."
            )
        if self.name == "auc_cl" and self.temperature not in (None, 0.05):  # what earlier files say of every loss
            raise AnybatchError("loss.name 'auc_cl' has no temperature; set loss.margin instead.")

    def _check_matryoshka(self) -> None:
        widths = self.matryoshka
        if self.matryoshka_weights is not None and (widths is None or len(widths) != len(self.matryoshka_weights)):
            raise AnybatchError(
                f"loss.matryoshka_weights is {list(self.matryoshka_weights)} and loss.matryoshka {widths and list(widths)}; expected one weight a prefix."
            )
        if widths is None:
            return
        if not widths or len(set(widths)) < len(widths):
            raise AnybatchError(
                f"loss.matryoshka is {list(widths)}; expected different positive widths such as [384, 128, 64], or nothing."
            )
        for name in ("warm_start", "warm_start_steps", "probe_steps"):
            if getattr(self, name):
                raise AnybatchError(
                    f"loss.{name} is {getattr(self, name)} and loss.matryoshka {list(widths)}: a warm start and a probe are for one memory, and each prefix "
                    "has its own. Leave out one of the two."
                )
        if self.dimensions is not None:
            raise AnybatchError(
                f"loss.dimensions is {self.dimensions} and loss.matryoshka {list(widths)}, which says the widths already. Leave out loss.dimensions."
            )

    def _given(self) -> dict[str, Any]:
        """The settings of single methods that were given."""
        every = frozenset[str]().union(*KNOWN.values())
        given = {name: getattr(self, name) for name in sorted(every)}
        unset = ("ring", "memory_sharded")  # whose False says nothing; a temperature that is not to be learned does
        return {name: value for name, value in given.items() if value is not None and not (name in unset and not value)}


def first_temperature(config: LossConfig) -> float:
    """The temperature that training begins with; 0.05 for a loss without one, to look at data with."""
    if config.name == "auc_cl":
        return 0.05
    loss: Any = build_loss(config, num_rows=2)
    return float((loss if config.matryoshka is None else loss.losses[0]).temperature)


def build_loss(config: LossConfig, *, num_rows: int) -> nn.Module:
    """The Module that `config` names, for a data set of `num_rows` rows."""
    from anybatch import family, losses

    if config.matryoshka is not None:
        parts = []
        for width in config.matryoshka:
            own_width = width if config.name == "tempnet" else None
            of_prefix = replace(config, matryoshka=None, matryoshka_weights=None, dimensions=own_width)
            parts.append(build_loss(of_prefix, num_rows=num_rows))
        return losses.Matryoshka(parts, config.matryoshka, weights=config.matryoshka_weights)
    shared = {"temperature": config.temperature, "direction": config.direction}
    arguments: dict[str, Any] = {name: value for name, value in shared.items() if value is not None} | config._given()
    if arguments.pop("memory_sharded", False):
        arguments["sharded"] = True
    steps, per_epoch = arguments.pop("gamma_steps", None), arguments.pop("gamma_steps_per_epoch", 1)
    if steps is not None:
        arguments["gamma"] = losses.GammaSchedule(
            0.2 if config.gamma is None else config.gamma, num_steps=steps, steps_per_epoch=per_epoch
        )
    if config.name == "auc_cl":
        return family.AUCCL(**config._given())
    if config.name == "siglip":
        arguments.pop("direction", None)
        return family.SigLIP(**arguments)
    if config.name in ("infonce", "decoupled"):
        return {"infonce": losses.InfoNCE, "decoupled": losses.DecoupledInfoNCE}[config.name](**arguments)
    make = {
        "count_corrected": losses.CountCorrectedInfoNCE,
        "cross_batch": losses.CrossBatchInfoNCE,
        "sogclr": losses.SogCLR,
        "fastclip": family.FastCLIP,
        "isogclr": family.ISogCLR,
        "tempnet": family.TempNet,
        "nuclr": family.NUCLR,
        "glofnd": family.GloFND,
        "emc2": family.EMC2,
        "scent": family.SCENT,
    }[config.name]
    return make(num_rows, **arguments)
