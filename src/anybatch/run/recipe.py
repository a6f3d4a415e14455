"""What a run takes for "auto": the recommended recipe, by rule from the data, the batch and the teacher.

The rule, its evidence and where it loses are one page, docs/recipe.md.
"""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path

from anybatch.core import distributed
from anybatch.data.images import ImageColumn
from anybatch.data.pairs import PairData
from anybatch.losses.registry import AUTO
from anybatch.plans.plan import BatchPlan
from anybatch.run.config import RunConfig

logger = logging.getLogger("anybatch")
LARGEST_REMEMBERING = 256  # rows of a batch: larger ones change the model so much that what is remembered is old


def with_recipe(config: RunConfig, pairs: PairData) -> RunConfig:
    """The configuration with a method in place of each "auto", said aloud by the first rank.

    The same configuration and data give the same recipe, so that a run is resumed with it.

    Raises:
        AnybatchError: Settings given beside "auto" that what is chosen does not have.
    """
    reasons = []
    if config.plan is None and config.mining.method == AUTO:
        teacher = config.teacher.name is not None or config.teacher.embeddings is not None
        images = any(isinstance(side, ImageColumn) for side in (pairs.anchors, pairs.positives))
        method = "anybatch" if teacher and not images else "random"
        config = replace(config, mining=replace(config.mining, method=method))
        why = "no teacher is named"
        if teacher:
            why = "the teacher is not used: with images mined batches lost" if images else "a teacher is named"
        reasons.append(f"mining.method={method} ({why})")
    if config.loss.name == AUTO:
        small = config.batch_size <= LARGEST_REMEMBERING
        name = "cross_batch" if small else "count_corrected"
        config = replace(config, loss=config.loss.named(name, **_matching(config)))
        why = "recent pairs serve as further negatives" if small else "its negatives stand for all rows"
        reasons.append(f"loss.name={name} (batches of {config.batch_size}: {why})")
    if reasons and distributed.rank() == 0:
        logger.info("Recommended: %s. See docs/recipe.md.", "; ".join(reasons))
    return config


def _matching(config: RunConfig) -> dict[str, object]:
    """On mined batches the loss masks what mining suspects, and counts the rest as the plan draws it."""
    mined = (
        config.mining.method != "random" if config.plan is None else BatchPlan.load(Path(config.plan)).cluster_size > 1
    )
    return {"weights": "inclusion", "mask_suspects": True} if mined else {}
