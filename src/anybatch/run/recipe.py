"""What a run takes for "auto": the recommended recipe, by rule. Its evidence, and where it loses: docs/recipe.md."""

from __future__ import annotations

import logging
from dataclasses import fields, replace
from typing import NamedTuple

from anybatch.core import distributed
from anybatch.data.pairs import PairData
from anybatch.losses.registry import AUTO, recommended
from anybatch.plans.plan import BatchPlan
from anybatch.run.config import RunConfig

logger = logging.getLogger("anybatch")


def with_recipe(config: RunConfig, pairs: PairData, plan: BatchPlan | None, *, pretrained: bool) -> RunConfig:
    """The configuration with what is known for each "auto", said aloud by the first rank. See `recipe`."""
    config, choices = recipe(config, pairs, plan, pretrained=pretrained)
    if choices and distributed.rank() == 0:
        said = "; ".join(f"{name}={value} ({reason})" for name, value, reason in choices)
        logger.info("Recommended: %s. See docs/recipe.md.", said)
    return config


class Choice(NamedTuple):
    """A setting, its value, and why."""

    name: str
    value: str
    reason: str


def recipe(
    config: RunConfig, pairs: PairData, plan: BatchPlan | None = None, *, pretrained: bool
) -> tuple[RunConfig, list[Choice]]:
    """The configuration with a method in place of each "auto", and what was chosen.

    `plan` is the one that the configuration names; `pretrained` tells of the model, see `is_pretrained`. With a teacher
    "auto" stays where the mined plan's figures decide, on the loss too: see `with_batches`. The same configuration and
    data give the same recipe, so that a run is resumed with it.

    Raises:
        AnybatchError: Settings given beside "auto" that what is chosen does not have.
    """
    choices = []
    if config.plan is None and config.mining.method == AUTO:
        teacher = config.teacher.is_named
        method, why = "random", "no teacher is named"
        if config.mining.num_negatives:
            method, why = "anybatch", "hard negatives are mined, by a teacher"
        elif teacher and pairs.has_images:
            why = "the teacher is not used: with images mined batches lost"
        elif teacher and config.loss.name == AUTO and not pretrained:
            why = "the teacher is not used: under the loss that is recommended here mined batches gained little or lost"
        elif teacher:
            method, why = AUTO, "a teacher is named: mined batches if all their figures are good, else random ones"
        config = replace(config, mining=replace(config.mining, method=method))
        choices.append(Choice("mining.method", method, why))
    mined = plan is not None and plan.cluster_size > 1
    if config.plan is None:
        mined = None if config.mining.method == AUTO else config.mining.method != "random"
    loss = config.loss
    if loss.name == AUTO and mined is None and loss.weights != "inclusion":
        choices.append(Choice("loss.name", AUTO, "a transformer: infonce on mined batches, else count_corrected"))
    elif loss.name == AUTO:
        plain = bool(mined) and loss.weights != "inclusion"  # which InfoNCE does not define
        name, why = recommended(config.batch_size, len(pairs), pretrained=pretrained, mined=plain)
        loss = loss.named(name)
        choices.append(Choice("loss.name", loss.name, f"batches of {config.batch_size}: {why}"))
    config, asked = replace(config, loss=loss), loss
    if mined is not None:
        config = with_batches(config, mined=mined)
        if asked.weights == AUTO and config.loss.weights == "inclusion":
            choices.append(Choice("loss.weights", "inclusion", "mined batches are no uniform sample"))
        if asked.mask_suspects == AUTO and mined:
            choices.append(Choice("loss.mask_suspects", "true", "what mining suspects is no negative"))
    return config, choices


def with_batches(config: RunConfig, *, mined: bool) -> RunConfig:
    """The configuration with what follows from its batches being mined or random, where "auto" still stands."""
    loss, mining = config.loss, config.mining
    if mining.method == AUTO:
        mining = replace(mining, method="anybatch" if mined else "random")
    if loss.name == AUTO:  # of a transformer, see `recipe`
        loss = loss.named(recommended(config.batch_size, 0, pretrained=True, mined=mined)[0])
    if loss.weights == AUTO:
        loss = replace(loss, weights="inclusion" if mined and loss.example().over_data else "none")
    if loss.mask_suspects == AUTO:
        loss = replace(loss, mask_suspects=mined)
    return replace(config, loss=loss, mining=mining)


def recipe_line(asked: RunConfig, chosen: RunConfig) -> str:
    """What a model card says of the settings that make the method: by rule or given, with the loss's own options."""

    def shown(setting: str, value: str, given: str) -> str:
        return f"{setting}={value} ({'recommended' if given == AUTO else 'given'})"

    plan = chosen.plan is not None
    batches = "a plan (given)" if plan else shown("mining.method", chosen.mining.method, asked.mining.method)
    told_elsewhere = ("name", "temperature", "weights", "mask_suspects")
    options = [
        f"loss.{field.name}={getattr(chosen.loss, field.name)}"
        for field in fields(chosen.loss)
        if field.name not in told_elsewhere and getattr(chosen.loss, field.name) != field.default
    ]
    return ", ".join([shown("loss.name", chosen.loss.name, asked.loss.name), *options, batches])
