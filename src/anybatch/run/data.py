"""The data of a run: training pairs, one data set or several, and held-out data, read and checked before anything else."""

from __future__ import annotations

import importlib.util
from pathlib import Path

from anybatch.core.errors import AnybatchError
from anybatch.data.images import ImageColumn
from anybatch.data.pairs import (
    PairData,
    PairSet,
    RetrievalData,
    find_sets,
    join_pairs,
    read_pairs,
    read_retrieval,
)
from anybatch.mining import MiningSet
from anybatch.run.config import DataConfig, RunConfig, SetConfig, resolved


def read_training_pairs(config: RunConfig) -> PairData:
    """The training pairs of `config.data`, one data set or several, checked to be enough for one batch and to fit the prompts."""
    pairs = read_data(config.data)
    for side, column in (("anchor", pairs.anchors), ("positive", pairs.positives)):
        for owner in ("model", "teacher"):
            if isinstance(column, ImageColumn) and getattr(getattr(config, owner), f"{side}_prompt"):
                raise AnybatchError(
                    f"{owner}.{side}_prompt is set, and the {side}s are images. Prompts are put before texts: leave it out."
                )
    if len(pairs) < config.batch_size:
        raise AnybatchError(
            f"{pairs.source or config.data.path} has {len(pairs)} rows, fewer than one batch of {config.batch_size}. Set batch_size to {len(pairs)} or less."
        )
    return pairs


def check_sizes(config: RunConfig, pairs: PairData) -> None:
    """Refuse, on every rank and before any work, what mining could not make batches of. Nothing where the plan is given.

    Raises:
        AnybatchError: See `anybatch.mining.check_sizes`; a partitioner that is not installed; weights that the batches could not have.
    """
    from anybatch.mining import check_sizes as check_mining

    if config.plan is None:
        if config.loss.weights == "inclusion" and any(config.mining.random_shares):
            raise AnybatchError(
                f"loss.weights is 'inclusion', which needs clusters that stay together, and mining.random_shares {list(config.mining.random_shares)} takes "
                "some apart. Leave out one of the two."
            )
        if config.mining.partitioner == "kaminpar" and importlib.util.find_spec("kaminpar") is None:
            raise AnybatchError(
                "mining.partitioner is 'kaminpar', which is not installed: pip install 'anybatch[kaminpar]', or leave it at 'metis'."
            )
        check_mining(len(pairs), config=resolved(config).mining, sets=mining_sets(config, pairs))


def read_data(data: DataConfig) -> PairData:
    """The pairs of one data set, or of several, one after the other."""
    found = [(one, Path(one.path)) for one in training_sets(data)]
    parts = [
        read_pairs(
            path,
            anchor=one.anchor or data.anchor,
            positive=one.positive or data.positive,
            negatives=data.negatives,
            images=data.images,
            quoting=data.quoting,
            limit=data.limit if one.limit is None else one.limit,
        )
        for one, path in found
    ]
    if len(parts) == 1 and not data.sets:
        return parts[0]
    sets = [
        PairSet(
            name=one.name or path.name.split(".")[0],
            num_rows=len(part),
            anchor_prompt=one.anchor_prompt,
            positive_prompt=one.positive_prompt,
        )
        for (one, path), part in zip(found, parts, strict=True)
    ]
    return join_pairs(parts, sets)


def training_sets(data: DataConfig) -> list[SetConfig]:
    """The data sets that the configuration names, or that lie in the folder it names."""
    if data.sets:
        return list(data.sets)
    assert data.path is not None
    found = find_sets(data.path) or {"": Path(data.path)}
    return [SetConfig(path=str(path), name=name or None) for name, path in found.items()]


def mining_sets(config: RunConfig, pairs: PairData) -> list[MiningSet]:
    """The data sets of `pairs` with their windows and shares; none for one data set."""
    return [
        MiningSet(
            name=one.name,
            num_rows=one.num_rows,
            skip=given.skip,
            take=given.take,
            margin=given.margin,
            share=given.share,
        )
        for one, given in zip(pairs.sets, training_sets(config.data) if pairs.sets else [], strict=True)
    ]


def read_evaluation(config: RunConfig) -> PairData | RetrievalData | None:
    """The held-out data of the configuration, or None if it names none."""
    held_out = config.evaluation
    if held_out.corpus or held_out.queries or held_out.qrels:
        if not (held_out.corpus and held_out.queries and held_out.qrels):
            raise AnybatchError(
                "A retrieval set needs all of evaluation.corpus, evaluation.queries and evaluation.qrels."
            )
        files = (held_out.corpus, held_out.queries, held_out.qrels)
        return read_retrieval(*files, split=held_out.split, quoting=config.data.quoting)
    if held_out.path is None:
        return None
    data = config.data
    negatives = data.negatives or ()
    return read_pairs(
        held_out.path,
        anchor=data.anchor,
        positive=data.positive,
        negatives=(),
        images=data.images and [name for name in data.images if name not in negatives],
        quoting=data.quoting,
        limit=held_out.limit,
    )
