"""The main job from one configuration: data, teacher, plan, training, evaluation, all in one run folder.

The command line calls this; everything here can be called from Python as well. Imports every room but report and cli.
"""

from __future__ import annotations

import importlib.util
import logging
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, fields, replace
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, get_args

import numpy as np
import torch

from anybatch import distributed
from anybatch.configuration import differences, to_yaml
from anybatch.data import PairData, PairSet, RetrievalData, find_sets, join_pairs, read_pairs, read_retrieval
from anybatch.errors import AnybatchError
from anybatch.files import (
    CONTENTS,
    SEAL,
    digest_of,
    file_digest,
    locked,
    read_json,
    seal_folder,
    write_json,
    write_sealed,
)
from anybatch.integrations.sentence_transformers.model import (
    ModelConfig,
    Side,
    lengths_of,
    load_model,
    side_inputs,
    warn_of_instructions,
)
from anybatch.mining import MiningSet
from anybatch.pictures import Column, PictureColumn, pick
from anybatch.plan import BatchPlan
from anybatch.resources import Measure
from anybatch.run_config import DataConfig, RunConfig, RunResult, SetConfig, read_config, resolved

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer
    from transformers import TrainerCallback

    from anybatch.integrations.sentence_transformers.loss import CachedLoss

logger = logging.getLogger("anybatch")
LITTER = ("desktop.ini", "Thumbs.db")
TRIED_ROWS = 4  # of the step that is tried before mining
STAND_INS = 1000  # rows looked at for one that can stand in for a missing hard negative
BATCH_LOSSES = ("infonce", "decoupled", "siglip", "auc_cl")  # whose negatives are the batch's own


class Progress(Protocol):
    """How long work tells where it is: `progress(stage, done, total, figures)`; None figures when there are none."""

    def __call__(self, stage: str, done: int, total: int, figures: dict[str, float] | None = None) -> None:
        """Work in `stage` is at `done` of `total`."""
        ...


def no_progress(stage: str, done: int, total: int, figures: dict[str, float] | None = None) -> None:
    """Say nothing."""


def read_training_pairs(config: RunConfig) -> PairData:
    """The training pairs of `config.data`, one data set or several, checked to be enough for one batch and to fit the prompts."""
    pairs = read_data(config.data)
    for side, column in (("anchor", pairs.anchors), ("positive", pairs.positives)):
        for owner in ("model", "teacher"):
            if isinstance(column, PictureColumn) and getattr(getattr(config, owner), f"{side}_prompt"):
                raise AnybatchError(
                    f"{owner}.{side}_prompt is set, and the {side}s are pictures. Prompts are put before texts: leave it out."
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
            pictures=data.pictures,
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


def teacher_embeddings(
    config: RunConfig, pairs: PairData, progress: Progress = no_progress
) -> tuple[np.ndarray, np.ndarray]:
    """Teacher embeddings of anchors and positives, from files or computed into the run folder.

    Returns:
        Two float arrays (n, D), memory-mapped where they are files.

    Raises:
        AnybatchError: Neither a teacher nor both files; files that do not match the data.
    """
    teacher = config.teacher
    files = (teacher.anchor_embeddings, teacher.positive_embeddings)
    if any(files):
        if not all(files):
            raise AnybatchError(
                "Precomputed embeddings need both teacher.anchor_embeddings and teacher.positive_embeddings; one is missing."
            )
        return read_embeddings(str(files[0]), len(pairs)), read_embeddings(str(files[1]), len(pairs))
    if teacher.name is None:
        raise AnybatchError(
            f"mining.method is '{config.mining.method}', which needs a teacher: set teacher.name to a sentence-transformers model, or "
            "teacher.anchor_embeddings and teacher.positive_embeddings to .npy files, or mining.method to 'random'."
        )
    from anybatch.integrations.sentence_transformers.embed import embed_to_file

    model = load_model(
        ModelConfig(
            name=teacher.name,
            max_length=teacher.max_length,
            anchor_prompt=teacher.anchor_prompt,
            positive_prompt=teacher.positive_prompt,
            device=config.model.device,
        )
    )
    folder = Path(config.output)
    identity = {"model": teacher.name, "max_length": lengths_of(model), "data": pairs.digest}
    columns = []
    for name, side, texts in zip(("anchor", "positive"), get_args(Side), (pairs.anchors, pairs.positives), strict=True):
        report = _counter(progress, f"teacher: {name}s", len(texts))
        path = folder / f"teacher_{name}.npy"
        columns.append(
            embed_to_file(
                model,
                texts,
                path,
                identity=identity,
                side=side,
                batch_size=teacher.batch_size,
                precision=teacher.precision,
                progress=report,
            )
        )
    return columns[0], columns[1]


def make_plan(config: RunConfig, pairs: PairData, progress: Progress = no_progress) -> BatchPlan:
    """The plan of the run: the one given (copied into the folder), the one already in the folder, or a new one, saved there.

    Under torchrun every rank embeds and searches its share; rank 0 does the rest, and all return the same plan.

    Raises:
        AnybatchError: A plan made for other data or another batch size; another plan than the run was started with.
    """
    from anybatch.mining import mine_plan, mine_shared, random_plan

    folder = Path(config.output)
    path = folder / "plan.safetensors"
    exists = path.exists()
    distributed.barrier()  # before any rank can have written it
    if config.plan is not None:
        given = _load_plan(Path(config.plan), config, pairs)
        if not exists:
            with distributed.alone() as chosen:
                if chosen:
                    given.save(path)  # the run's own copy: the file given may change or go
        elif (digest := BatchPlan.load(path).digest) != given.digest:
            raise AnybatchError(
                f"{config.plan} is another plan than the one this run was started with, of which {path} is a copy (digest {given.digest[:12]}, "
                f"the run's {digest[:12]}). Put the old plan back, or start a new run in another output folder."
            )
        return given
    if exists:
        plan = _load_plan(path, config, pairs)
        with distributed.alone() as chosen:
            if chosen:
                _check_inputs(plan, path, mining_inputs(config, pairs))
        return plan
    if config.mining.method == "random":
        with distributed.alone() as chosen:
            if chosen:
                plan = random_plan(
                    len(pairs),
                    config=resolved(config).mining,
                    sets=mining_sets(config, pairs),
                    data_digest=pairs.digest,
                )
                _with_inputs(plan, mining_inputs(config, pairs)).save(path)
        return BatchPlan.load(path)
    check_sizes(config, pairs)
    anchors, positives = teacher_embeddings(config, pairs, progress)
    known: dict[str, Any] = {
        "config": resolved(config).mining,
        "anchor_id": pairs.anchor_id,
        "positive_id": pairs.positive_id,
        "sets": mining_sets(config, pairs),
    }
    on_cpu = config.model.device is None or config.model.device.startswith("cpu")  # where the compiled search is faster
    known |= {
        "folder": folder / "neighbors",
        "device": None if on_cpu else config.model.device,
        "progress": lambda stage, fraction: progress(f"mining: {stage}", round(100 * fraction), 100),
    }
    if distributed.is_active():
        mine_shared(anchors, positives, **known)
    with distributed.alone() as chosen:
        if chosen:
            inputs = mining_inputs(config, pairs)
            result = mine_plan(anchors, positives, data_digest=pairs.digest, **known)
            for name, part in {"": result.report, **result.report.sets}.items():
                for warning in part.outlook.warnings if part.outlook is not None else ():
                    logger.warning("Before you train%s: %s", name and f" on {name}", warning)  # not after
            report = {"plan": result.plan.digest, **result.report.as_dict()}
            write_json(folder / "mining.json", report)
            _with_inputs(result.plan, inputs).save(path)
            shutil.rmtree(folder / "neighbors", ignore_errors=True)  # larger than all else in the folder
    return BatchPlan.load(path)


def mining_inputs(config: RunConfig, pairs: PairData) -> dict[str, str]:
    """What decides the plan that a run mines, beside its data: digests of the settings and, of what there is, of the teacher's files."""
    digests = {"the settings": digest_of([repr((resolved(config).mining, mining_sets(config, pairs))).encode()])}
    if config.mining.method == "random":
        return digests
    teacher = config.teacher
    files = {
        "teacher.anchor_embeddings": [teacher.anchor_embeddings],
        "teacher.positive_embeddings": [teacher.positive_embeddings],
        "teacher.name": sorted(
            path
            for path in (Path(teacher.name).rglob("*") if teacher.name else ())  # a name on the hub has no files here
            if path.suffix in (".safetensors", ".bin")
        ),
    }
    for name, paths in files.items():
        present = [path for path in paths if path and Path(path).is_file()]
        if present:
            digests[name] = digest_of(file_digest(path).encode() for path in present)
    return digests


def _with_inputs(plan: BatchPlan, inputs: dict[str, str]) -> BatchPlan:
    return replace(plan, meta={**plan.meta, "inputs": inputs})


def _check_inputs(plan: BatchPlan, path: Path, inputs: dict[str, str]) -> None:
    """Refuse a plan of a run's folder that was mined from something else than what would be mined now."""
    known = plan.meta.get("inputs") or {}
    changed = [name for name, digest in inputs.items() if known.get(name) != digest]
    if changed:
        raise AnybatchError(
            f"{path} was made from other inputs than the run has now: {', '.join(changed)} changed since. Put back what the plan was made from, or mine "
            "anew in another output folder."
        )
    for name in sorted(known.keys() - inputs.keys()):
        logger.warning("%s is gone; %s, which was made from it, is kept.", name, path)


def _load_plan(path: Path, config: RunConfig, pairs: PairData) -> BatchPlan:
    plan = BatchPlan.load(path)
    plan.check(num_rows=len(pairs), data_digest=pairs.digest)
    if plan.batch_size != config.batch_size:
        raise AnybatchError(
            f"{path} has batches of {plan.batch_size}; the configuration says batch_size {config.batch_size}. Make them equal."
        )
    return plan


def check_start(config: RunConfig, pairs: PairData) -> None:
    """Refuse, before anything is written, what a new run could not mine from: no teacher, embeddings or a plan of other data."""
    teacher = config.teacher
    if config.plan is not None:
        _load_plan(Path(config.plan), config, pairs)
    elif config.mining.method != "random" and (
        teacher.anchor_embeddings or teacher.positive_embeddings or not teacher.name
    ):
        teacher_embeddings(config, pairs)


def try_batch(config: RunConfig, pairs: PairData, model: SentenceTransformer) -> None:
    """One training step on a few rows, forgotten at once: what caching refuses is refused before anything is mined or written.

    Raises:
        AnybatchError: The cached step refuses the model or the loss, on every rank.

    Cost: four forward and two backward passes of two rows, for each column.
    """
    from anybatch.integrations.sentence_transformers.loss import CachedLoss
    from anybatch.integrations.sentence_transformers.training import forgotten
    from anybatch.losses.config import build_loss

    with distributed.alone() as chosen, forgotten(model):
        if not chosen:
            return
        inputs = first_inputs(model, pairs, TRIED_ROWS)
        loss = CachedLoss(
            model.train(),
            build_loss(config.loss, num_rows=len(pairs)).to(model.device),
            micro_batch=TRIED_ROWS // 2,
            keep_graphs=0.0,
        )
        loss(inputs, torch.arange(min(TRIED_ROWS, len(pairs)), device=model.device)).backward()


def first_inputs(model: SentenceTransformer, pairs: PairData, num_rows: int) -> list[dict[str, Any]]:
    """What the model is given of the first rows: a dictionary of tensors on its device for each column."""
    columns = [
        [one if isinstance(one, str) else one.decode() for one in islice(column, num_rows)] for column in pairs.prompted
    ]
    return [
        {
            key: value.to(model.device) if isinstance(value, torch.Tensor) else value
            for key, value in side_inputs(model, column, "document" if place else "query").items()
        }
        for place, column in enumerate(columns)
    ]


def with_mined_negatives(pairs: PairData, plan: BatchPlan) -> PairData:
    """The pairs with the plan's hard negatives (B3++) as further negative columns; the pairs themselves if it has none.

    Where a window had too few, the positives of the next rows of the same data set stand in, all different: ordinary candidates. Where there are
    none, the row's own positive does, which is no negative of it.
    """
    if plan.negatives is None or plan.negatives.shape[1] == 0:
        return pairs
    rows = _with_stand_ins(pairs, plan)
    mined = [pick(pairs.positives, column) for column in rows.T]
    return replace(pairs, negatives=(*pairs.negatives, *mined))


def _with_stand_ins(pairs: PairData, plan: BatchPlan) -> np.ndarray:
    """(n, h) rows, none missing: the mined ones, and the next that are no suspects and share no text with the anchor or each other."""
    assert plan.negatives is not None
    rows = plan.negatives.astype(np.int64)
    lacking = np.any(rows < 0, axis=1)
    anchor_id, positive_id = pairs.anchor_id, pairs.positive_id
    suspects: dict[int, set[int]] = {}  # texts, of the rows that lack a negative
    if plan.suspects is not None:
        both = np.concatenate([plan.suspects, plan.suspects[:, ::-1]])
        for one, other in both[lacking[both[:, 0]]].tolist():
            suspects.setdefault(one, set()).add(int(positive_id[other]))
    task = np.zeros(len(rows), np.int64) if plan.task is None else plan.task
    members = [np.flatnonzero(task == number) for number in range(int(task.max(initial=0)) + 1)]
    for row in np.flatnonzero(lacking).tolist():
        own = members[task[row]]
        first = int(np.searchsorted(own, row))
        taken = {int(positive_id[row]), *positive_id[rows[row][rows[row] >= 0]].tolist(), *suspects.get(row, ())}
        found = []
        for step in range(1, min(len(own), STAND_INS)):
            other = int(own[(first + step) % len(own)])
            text = int(positive_id[other])
            if text in taken or anchor_id[other] == anchor_id[row]:
                continue
            taken.add(text)
            found.append(other)
            if len(found) == rows.shape[1]:
                break
        missing = np.flatnonzero(rows[row] < 0)
        rows[row, missing] = [*found, *[row] * len(missing)][: len(missing)]
    return rows


def evaluate_model(
    model: SentenceTransformer,
    data: PairData | RetrievalData,
    *,
    prompts: tuple[str | None, str | None] = (None, None),
    batch_size: int = 128,
    progress: Progress = no_progress,
) -> dict[str, float]:
    """Retrieval figures of a model: recall@1, recall@10, MRR@10, nDCG@10 and so on.

    Args:
        model: Any sentence-transformers model.
        data: Pairs (each anchor must find its positive among all distinct ones) or a retrieval set.
        prompts: Text put before each anchor (query) and each positive (document); None for the model's own, "" for none.
        batch_size: Texts per forward pass.
        progress: Told how many texts are embedded.
    """
    from anybatch.evaluation.retrieval import pair_metrics, retrieval_metrics
    from anybatch.integrations.sentence_transformers.embed import embed_texts

    def embed(stage: str, texts: Column, side: Side) -> np.ndarray:
        report = _counter(progress, f"embedding: {stage}", len(texts))
        prompt = prompts[side == "document"]
        return embed_texts(model, texts, side=side, batch_size=batch_size, prompt=prompt, progress=report)

    if isinstance(data, PairData):
        anchors = embed("anchors", data.anchors, "query")
        positives = embed("positives", data.positives, "document")
        return pair_metrics(anchors, positives, anchor_id=data.anchor_id, positive_id=data.positive_id)
    queries = embed("queries", data.query_texts, "query")
    corpus = embed("documents", data.corpus_texts, "document")
    return retrieval_metrics(queries, corpus, data.relevance, query_ids=data.query_ids, corpus_ids=data.corpus_ids)


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
        pictures=data.pictures and [name for name in data.pictures if name not in negatives],
        quoting=data.quoting,
        limit=held_out.limit,
    )


def read_embeddings(path: str, num_rows: int) -> np.ndarray:
    """Precomputed embeddings, memory-mapped; in memory where the file has another byte order than this machine.

    Args:
        path: A `.npy` file, (rows, dimensions) of floats of any width and byte order.
        num_rows: Rows of the data, which must be the file's.

    Raises:
        AnybatchError: No such file, no array, or another shape; a file that this library made and that is damaged.
    """
    from anybatch.integrations.sentence_transformers.embed import check_embedded

    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise AnybatchError(
            f"Cannot read the embeddings {path}: {error}. Expected a .npy file of shape (rows, dimensions)."
        ) from error
    if not isinstance(array, np.ndarray):
        array.close()
        raise AnybatchError(f"{path} is an archive of several arrays (.npz). Save the one of the embeddings as .npy.")
    if array.ndim != 2 or len(array) != num_rows or not np.issubdtype(array.dtype, np.floating):
        quantised = " Quantised embeddings have to be turned into floats first." if array.dtype.kind in "iu" else ""
        raise AnybatchError(
            f"{path} holds a {array.dtype} array of shape {array.shape}; expected floats of shape ({num_rows}, dimensions), one row for each row "
            f"of the data, in its order. Embed this very file, or set data.limit to what was embedded.{quantised}"
        )
    check_embedded(Path(path))
    native = np.dtype(np.float32) if array.dtype.itemsize > 8 else array.dtype.newbyteorder("=")
    return array.astype(native, copy=False)


def _counter(progress: Progress, stage: str, total: int) -> Callable[[int], None]:
    done = 0

    def add(count: int) -> None:
        nonlocal done
        done += count
        progress(stage, done, total)

    return add


@contextmanager
def open_run(config: RunConfig, *, resume: bool = False) -> Iterator[Path]:
    """The run's folder with the resolved configuration in it, for as long as this is open held against all others.

    A start that fails with nothing done leaves nothing: the folder can be used by the next.

    Args:
        config: The run.
        resume: The folder may hold this very run.

    Raises:
        AnybatchError: The folder holds a run (and `resume` is off), holds something else, holds a run of another configuration, or is in use.
    """
    folder = Path(config.output)
    with ExitStack() as stack:
        with distributed.alone() as chosen:
            if chosen:
                stack.enter_context(_held(folder, config, resume))
        yield folder


@contextmanager
def _held(folder: Path, config: RunConfig, resume: bool) -> Iterator[None]:
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise AnybatchError(
            f"Cannot make the folder {folder}: {error.strerror}. Choose another output folder."
        ) from error
    try:
        with locked(folder):
            _begin(folder, config, resume)
            try:
                yield
            except Exception:
                if not _names(folder) - {"config.yaml"} and not resume:
                    (folder / "config.yaml").unlink(missing_ok=True)
                raise
    finally:
        for path in made:  # those that are empty
            with suppress(OSError):
                path.rmdir()


def _names(folder: Path) -> set[str]:
    """What is in a run's folder but the lock, what a killed run was about to write, and what file managers leave."""
    return {
        path.name
        for path in folder.iterdir()
        if not path.name.startswith(".") and path.suffix != ".tmp" and path.name not in LITTER
    }


def _begin(folder: Path, config: RunConfig, resume: bool) -> None:
    written = folder / "config.yaml"
    if not written.exists() and _names(folder):
        raise AnybatchError(
            f"{folder} exists and is not empty, and is no run of anybatch. Choose another output folder."
        )
    for path in folder.glob(".*.tmp"):
        path.unlink()
    if _names(folder) - {"config.yaml"}:
        if not resume:
            raise AnybatchError(
                f"{folder} already holds a run. Choose another output folder, or add --resume to go on with it."
            )
        changed = [
            line
            for line in differences(resolved(read_config(folder)), resolved(config))
            if not line.startswith("output:")
        ]
        if changed:
            raise AnybatchError(
                f"{folder} holds a run of another configuration; it differs in {'; '.join(changed)}. Resume with the configuration in "
                f"{written}, or choose another output folder. To train the model further, start a new run from it: --model {folder / 'model'}."
            )
        return
    write_sealed(written, f"{to_yaml(resolved(config))}# {SEAL}\n".encode())


def train(config: RunConfig, *, resume: bool = False, progress: Progress = no_progress) -> RunResult:
    """The whole run: read, mine, train, save, evaluate.

    Leaves in `config.output`: config.yaml, plan.safetensors, mining.json (if mined), warm_start* (if asked for), log.jsonl, checkpoints/, model/, metrics.json.

    Under torchrun the ranks share each batch of `config.batch_size` rows; rank 0 mines, evaluates and writes, the others wait.
    `train_peak_bytes` is then rank 0's.

    Args:
        config: The run.
        resume: Go on with the run in the folder; a finished one is only read.
        progress: Told where the work is.

    Raises:
        AnybatchError: See `open_run`, `read_training_pairs`, `make_plan`.
    """
    with distributed.launched_ranks():
        return _train(config, resume, progress if distributed.rank() == 0 else no_progress)


def _train(config: RunConfig, resume: bool, progress: Progress) -> RunResult:
    from anybatch.integrations.sentence_transformers.training import check_shared_equally

    pairs = read_training_pairs(config)  # before the folder: bad data leaves nothing behind
    check_sizes(config, pairs)
    check_shared_equally(config.batch_size)
    held_out = read_evaluation(config)
    model = load_model(config.model)
    warn_of_instructions(model, pairs.sets)
    if not resume:
        check_start(config, pairs)
        try_batch(config, pairs, model)
    with open_run(config, resume=resume) as folder:
        if (folder / "metrics.json").exists():
            if not (folder / "model").exists():
                logger.warning("%s is gone. To train it again, delete metrics.json there and resume.", folder / "model")
            return _read_result(folder)
        return _train_in(folder, config, pairs, held_out, model, resume, progress)


def _train_in(
    folder: Path,
    config: RunConfig,
    pairs: PairData,
    held_out: PairData | RetrievalData | None,
    model: SentenceTransformer,
    resume: bool,
    progress: Progress,
) -> RunResult:
    from anybatch.integrations.sentence_transformers.loss import CachedLoss
    from anybatch.integrations.sentence_transformers.training import train_model
    from anybatch.losses.config import build_loss
    from anybatch.rows import RowTable

    run = _run_digest(folder)
    plan = make_plan(config, pairs, progress)
    if (
        plan.cluster_size > 1
        and config.loss.name not in BATCH_LOSSES
        and not plan.negatives_per_row
        and distributed.rank() == 0
    ):
        logger.warning(
            "Before you train: mined batches with a loss that stands for the whole data set ('%s') did no better than random ones in any of our "
            "measurements, and worse in half of them (docs/mining.md). Compare with mining.method=random, or use loss.name=infonce.",
            config.loss.name,
        )
    pairs = with_mined_negatives(pairs, plan)

    def evaluate(current: SentenceTransformer) -> dict[str, float]:
        return {} if held_out is None else evaluate_model(current, held_out)

    with distributed.alone() as chosen:
        untrained = _untrained(folder, run, model, held_out, evaluate) if chosen else {}
    rows = RowTable(
        pairs.anchor_id,
        pairs.positive_id,
        negative_id=pairs.negative_id,
        plan=plan,
        weights=config.loss.weights,
        weight_cap=config.loss.weight_cap,
        mask_suspects=config.loss.mask_suspects,
    )
    loss = CachedLoss(
        model,
        build_loss(config.loss, num_rows=len(pairs)),
        rows=rows.to(model.device),
        micro_batch=config.train.micro_batch,
        max_tokens=config.train.max_tokens,
        keep_graphs=config.train.keep_graphs,
        memory=config.train.memory,
        pad_to_multiple=config.train.pad_to_multiple,
    )
    callbacks = [
        *prepare_refresh(config, model, pairs, loss, resume=resume, progress=progress),
        *prepare_memory(config, model, pairs, loss, resume=resume, progress=progress),
    ]
    dataset = pairs.to_dataset()
    with Measure() as measure:
        trained = train_model(
            model,
            loss,
            dataset,
            plan,
            config.train,
            output=folder,
            seed=config.seed,
            resume=resume,
            evaluate=evaluate if held_out is not None else None,
            progress=lambda done, total, figures: progress("training", done, total, figures),
            callbacks=callbacks,
            run=run,
        )
    with distributed.alone() as chosen:
        if chosen:
            model.eval()
            save_model(model, folder / "model")
            result = RunResult(
                metrics=evaluate(model),
                metrics_untrained=untrained,
                log=trained.log,
                train_seconds=measure.seconds - trained.evaluation_seconds,
                train_peak_bytes=measure.peak_bytes,
                num_steps=trained.num_steps,
            )
            # Last: its presence says that the run is finished.
            write_json(folder / "metrics.json", {"run": run, **asdict(result)})
    return _read_result(folder)


def _untrained(
    folder: Path,
    run: str,
    model: SentenceTransformer,
    held_out: PairData | RetrievalData | None,
    evaluate: Callable[[SentenceTransformer], dict[str, float]],
) -> dict[str, float]:
    """The figures that the run began with, measured once; a resume with another model or other held-out data is refused."""
    from anybatch.integrations.sentence_transformers.embed import weights_digest

    path = folder / "metrics_untrained.json"
    made_from = {"the weights of model.name": weights_digest(model)}
    if held_out is not None:
        made_from["the held-out data"] = held_out.digest
    if not path.exists():
        write_json(path, {"run": run, "made_from": made_from, "untrained": evaluate(model)})
    kept = _of_run(path, run, "made_from", "untrained")
    changed = [name for name, digest in made_from.items() if kept["made_from"].get(name) != digest]
    if changed:
        raise AnybatchError(
            f"The run in {folder} began with others than it has now: {' and '.join(changed)} changed since. Put back what it began with, or start a new "
            "run in another output folder."
        )
    return kept["untrained"]


def _read_result(folder: Path) -> RunResult:
    names = [field.name for field in fields(RunResult)]
    return RunResult(**_of_run(folder / "metrics.json", _run_digest(folder), *names))


def _run_digest(folder: Path) -> str:
    """Tells a run from all others: the digest of its configuration."""
    return file_digest(folder / "config.yaml")


def _of_run(path: Path, run: str, *keys: str) -> dict[str, Any]:
    """Figures that a run left, as it left them, or a message."""
    remedy = f"Delete {path} and go on with --resume: it is made anew."
    kept = read_json(path, remedy, "run", *keys)
    if kept.pop("run") != run:
        raise AnybatchError(f"{path} belongs to another run. {remedy}")
    return kept


def prepare_refresh(
    config: RunConfig,
    model: SentenceTransformer,
    pairs: PairData,
    loss: CachedLoss,
    *,
    resume: bool = False,
    progress: Progress = no_progress,
) -> Sequence[TrainerCallback]:
    """The callback that mines anew with the student's embeddings, if `config.mining.refresh_epochs` asks for it."""
    from anybatch.integrations.sentence_transformers.embed import embed_texts
    from anybatch.integrations.sentence_transformers.refresh import RefreshPlan
    from anybatch.mining import mine_plan

    if not config.mining.refresh_epochs:
        return []
    if config.plan is not None:
        raise AnybatchError(
            "mining.refresh_epochs needs a plan that this run mines itself, with the settings of its own configuration; remove plan, or set "
            "mining.refresh_epochs to 0."
        )

    def make(current: BatchPlan) -> BatchPlan:
        sides = [
            embed_texts(model, texts, side=side, progress=_counter(progress, "refresh: embedding", len(texts)))
            for side, texts in zip(get_args(Side), pairs.prompted[:2], strict=True)
        ]
        result = mine_plan(
            *sides,
            config=resolved(config).mining,
            anchor_id=pairs.anchor_id,
            positive_id=pairs.positive_id,
            sets=mining_sets(config, pairs),
            data_digest=current.data_digest,
            start=current.partition_clusters,
            progress=lambda stage, fraction: progress(f"refresh: {stage}", round(100 * fraction), 100),
        )
        return result.plan

    return [RefreshPlan(loss, make, every=config.mining.refresh_epochs, folder=config.output, restart=resume)]


def prepare_memory(
    config: RunConfig,
    model: SentenceTransformer,
    pairs: PairData,
    loss: CachedLoss,
    *,
    resume: bool = False,
    progress: Progress = no_progress,
) -> Sequence[TrainerCallback]:
    """Fill the memory of the loss as `config.loss` asks, unless a checkpoint will bring it, and make the callback that refills and measures it.

    Returns:
        Callbacks for `train_model`; none if nothing is asked for while training.
    """
    from anybatch.integrations.sentence_transformers.memory import MemoryCallback, warm_start_from_model

    settings, folder = config.loss, Path(config.output)
    resumed = resume and any((folder / "checkpoints").glob(f"*/{CONTENTS}"))
    if settings.warm_start and not resumed:
        loss.to(model.device)
        warm_start_from_model(
            model,
            pairs,
            loss.loss,  # pyright: ignore[reportArgumentType] - one without memory is refused by name
            sample=settings.warm_start_sample,
            seed=config.seed,
            folder=folder,
            progress=progress,
        )
    if settings.warm_start_steps is None and settings.probe_steps is None:
        return []
    return [
        MemoryCallback(
            model,
            pairs,
            loss.loss,  # pyright: ignore[reportArgumentType]
            refill_steps=settings.warm_start_steps,
            sample=settings.warm_start_sample,
            probe_steps=settings.probe_steps,
        )
    ]


def save_model(model: SentenceTransformer, folder: Path) -> None:
    """Save a model so that `folder` is either whole or absent; the list of its contents lets `load_model` find damage."""
    temporary = folder.with_name(folder.name + ".tmp")
    try:
        if temporary.exists():
            shutil.rmtree(temporary)
        model.save_pretrained(str(temporary))
        seal_folder(temporary)
        if folder.exists():
            shutil.rmtree(folder)
        os.replace(temporary, folder)
    except Exception as error:  # disk full comes as OSError or as the SafetensorError of the writer
        if not isinstance(error, (OSError, AnybatchError)) and type(error).__name__ != "SafetensorError":
            raise
        raise AnybatchError(
            f"Cannot save the model to {folder}: {error}. Free some space, then run again with --resume."
        ) from error
