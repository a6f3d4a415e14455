"""Read the data of a run, training pairs and held-out data, and check them before anything else."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from anybatch.core import distributed
from anybatch.core.errors import AnybatchError
from anybatch.data.candidates import CandidateSets, find_candidates, read_candidates
from anybatch.data.held_out import FEWEST, LARGEST_SHARE, held_out_rows, split_pairs
from anybatch.data.images import ImageColumn
from anybatch.data.inputs import check_images, instructed, row_keys
from anybatch.data.pairs import PairData, PairSet, join_pairs
from anybatch.data.reading import read_pairs
from anybatch.data.retrieval import RetrievalData, find_retrieval, read_retrieval
from anybatch.data.sets import find_sets
from anybatch.losses.registry import AUTO
from anybatch.mining import MiningSet
from anybatch.plans.plan import BatchPlan
from anybatch.run.config import SPLIT, DataConfig, RunConfig, SetConfig
from anybatch.vision.mmeb import TARGET_PROMPTS
from anybatch.vision.read_images import Images, LabelledImages, NamedClasses, read_images

logger = logging.getLogger("anybatch")
HeldOut = PairData | RetrievalData | LabelledImages | NamedClasses | CandidateSets


def read_training_pairs(config: RunConfig) -> PairData:
    """The training pairs of `config.data`, checked to be enough for one batch and to fit the prompts. Images are read
    once: those that are broken are refused here, all rows at once.
    """
    pairs = read_data(config.data)
    for column in (pairs.anchors, pairs.positives, *pairs.negatives):
        check_images(column)
    for side, column in (("anchor", pairs.anchors), ("positive", pairs.positives)):
        for section, settings in (("model", config.model), ("teacher", config.teacher)):
            if isinstance(column, ImageColumn) and getattr(settings, f"{side}_prompt"):
                raise AnybatchError(
                    f"{section}.{side}_prompt is set, and the {side}s are images. Prompts are put before texts: "
                    f"leave it out; an instruction of the data set, data.sets[].{side}_prompt, stands beside images."
                )
    check_one_batch(config, pairs)
    return pairs


def check_one_batch(config: RunConfig, pairs: PairData) -> None:
    """Refuse pairs that are fewer than one batch."""
    if len(pairs) < config.batch_size:
        raise AnybatchError(
            f"{pairs.source or config.data.path} has {len(pairs)} rows, fewer than one batch of {config.batch_size}. "
            f"Set batch_size (--batch-size) to {len(pairs)} or less."
        )


def read_data(data: DataConfig) -> PairData:
    """The pairs of one data set, or of several, one after the other; of views, images that are both sides."""
    if data.views is not None:
        images = _read_images(data).images
        return PairData(anchors=images, positives=images, source=images.where)
    sets = training_sets(data)
    parts = [
        read_pairs(
            of_set.path,
            anchor=of_set.anchor or data.anchor,
            positive=of_set.positive or data.positive,
            negatives=data.negatives,
            images=data.images if of_set.images is None else of_set.images,
            quoting=data.quoting,
            limit=data.limit,
            skip_bad=data.skip_bad,
        )
        for of_set in sets
    ]
    if len(parts) == 1 and not data.sets:
        return parts[0]
    named = [
        PairSet(
            name=of_set.name or Path(of_set.path).name.split(".")[0],
            num_rows=len(part),
            anchor_prompt=of_set.anchor_prompt,
            positive_prompt=of_set.positive_prompt,
        )
        for of_set, part in zip(sets, parts, strict=True)
    ]
    return join_pairs(parts, named)


def training_sets(data: DataConfig) -> list[SetConfig]:
    """The data sets that the configuration names, or that lie in the folder it names."""
    if data.sets:
        return list(data.sets)
    assert data.path is not None
    in_folder = find_sets(data.path) or {"": Path(data.path)}
    return [SetConfig(path=str(path), name=name or None) for name, path in in_folder.items()]


def mining_sets(config: RunConfig, pairs: PairData) -> list[MiningSet]:
    """The data sets of `pairs` as mining takes them; none for one data set."""
    configured = training_sets(config.data) if pairs.sets else []
    return [
        MiningSet(name=of_pairs.name, num_rows=of_pairs.num_rows, window=of_set.window)
        for of_pairs, of_set in zip(pairs.sets, configured, strict=True)
    ]


def _read_images(data: DataConfig) -> Images:
    assert data.path is not None
    return read_images(data.path, column=data.anchor, limit=data.limit, skip_bad=data.skip_bad)


def read_candidate_sets(tasks: Mapping[str, Path], images: str | None, *, prompts: Mapping[str, str]) -> CandidateSets:
    """Evaluation sets with candidates; `prompts`, by their names, are put before candidates as before positives."""
    sets = {}
    for name, path in tasks.items():
        data, prompt = read_candidates(path, images), prompts.get(name, "")
        sets[name] = replace(data, candidates=instructed(data.candidates, [prompt] * len(data.candidates)))
    return CandidateSets(sets=sets)


def hold_out(config: RunConfig, pairs: PairData, plan: BatchPlan | None) -> tuple[PairData, PairData | None]:
    """The pairs to train on and, with evaluation.path=auto, those held out of them. Said aloud by the first rank."""
    if not _holds_out(config):
        return pairs, None
    left, held_out = split_for_plan(config, pairs, plan)
    if distributed.rank() > 0:
        return left, held_out
    if held_out is not None:
        logger.info(
            "Held out for evaluation: %s of %s pairs, which share no text or image with the others. --eval FILE names "
            "other pairs, --set evaluation.path=null holds out none.",
            f"{len(held_out):,}", f"{len(pairs):,}",
        )  # fmt: skip
    else:
        bound = "the plan is" if plan is not None else "teacher.embeddings are" if config.teacher.embeddings else None
        enough = round(FEWEST / LARGEST_SHARE)
        few = f"too few of {len(pairs):,} pairs share no text with the others, it takes {FEWEST}"
        few = f"there are {len(pairs):,} pairs, it takes {enough}" if len(pairs) < enough else few
        why = f"{bound} of all pairs" if bound else few
        logger.info("Nothing is held out for evaluation: %s. --eval FILE names pairs.", why)
    return left, held_out


def warn_of_shared(pairs: PairData, held_out: HeldOut | None) -> None:
    """Warn of held-out pairs of texts that are training pairs as well."""
    if not isinstance(held_out, PairData) or pairs.has_images or held_out.has_images or distributed.rank() > 0:
        return
    asked, trained = (zip(row_keys(part.anchors), row_keys(part.positives), strict=True) for part in (held_out, pairs))
    asked = list(asked)
    known = set(asked).intersection(trained)
    shared = sum(pair in known for pair in asked)
    if shared:
        logger.warning(
            "%s of %s held-out pairs are training pairs as well: their figures say little of other data.",
            *(f"{shared:,}", f"{len(held_out):,}"),
        )


def split_for_plan(config: RunConfig, pairs: PairData, plan: BatchPlan | None) -> tuple[PairData, PairData | None]:
    """The pairs that a run trains on, and those that it holds out. A plan that exists decides, which is of all pairs or
    of those that are left; so a run is resumed with its own.
    """
    if not _holds_out(config) or config.teacher.embeddings is not None:
        return pairs, None
    rows = held_out_rows(pairs, config.batch_size, config.seed)
    if not len(rows) or (plan is not None and plan.num_rows != len(pairs) - len(rows)):
        return pairs, None
    return split_pairs(pairs, rows)


def _holds_out(config: RunConfig) -> bool:
    return config.evaluation.path == AUTO and config.data.views is None


def read_held_out(config: RunConfig) -> HeldOut | None:
    """The held-out data that the configuration names, or None if it names none."""
    data, held_out = config.data, config.evaluation
    images = data.images if held_out.images is None else held_out.images
    if held_out.path in (None, AUTO):
        return None
    judged = find_retrieval(held_out.path, held_out.split) if data.views is None else None
    if held_out.images is not None and (judged is not None or data.views is not None):
        raise AnybatchError(
            f"evaluation.images is given, where paths of images start from, and {held_out.path} holds no such paths. "
            "Leave it out."
        )
    if judged is not None:
        return read_retrieval(*judged, quoting=data.quoting)
    if held_out.split is not None:
        raise AnybatchError(SPLIT)
    if data.views is not None:
        return LabelledImages(
            known=_read_images(data), test=read_images(held_out.path, column=data.anchor, skip_bad=data.skip_bad)
        )
    tasks = find_candidates(held_out.path)
    if tasks:
        prompts = {of_set.name or "": of_set.positive_prompt for of_set in data.sets}
        known = TARGET_PROMPTS if any(prompts.values()) else {}
        return read_candidate_sets(tasks, images, prompts=known | prompts)
    return read_pairs(
        held_out.path,
        anchor=data.anchor,
        positive=data.positive,
        negatives=(),
        images=images,
        quoting=data.quoting,
        skip_bad=data.skip_bad,
    )
