"""The plan of a run: given, kept in its folder, or mined with the teacher's embeddings; what follows from it for the pairs."""

from __future__ import annotations

import logging
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import numpy as np

from anybatch.core import distributed
from anybatch.core.errors import AnybatchError
from anybatch.core.files import digest_of, file_digest, write_json
from anybatch.core.progress import Progress, counter, no_progress
from anybatch.data.pairs import PairData
from anybatch.data.pictures import pick
from anybatch.integrations.sentence_transformers.model import ModelConfig, Side, lengths_of, load_model
from anybatch.plans.plan import BatchPlan
from anybatch.run.config import RunConfig, resolved
from anybatch.run.data import check_sizes, mining_sets

logger = logging.getLogger("anybatch")
STAND_INS = 1000  # rows looked at for one that can stand in for a missing hard negative


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
                for warning in part.statistics.warnings if part.statistics is not None else ():
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
        report = counter(progress, f"teacher: {name}s", len(texts))
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
