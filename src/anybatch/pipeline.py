"""The main job from one configuration: data, teacher, plan, training, evaluation, all in one run folder.

The command line calls this; everything here can be called from Python as well. Imports every room but report and cli.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import numpy as np

from anybatch.configuration import differences, load_config, to_yaml
from anybatch.data import PairData, RetrievalData, read_pairs, read_retrieval
from anybatch.errors import AnybatchError
from anybatch.files import write_text
from anybatch.integrations.sentence_transformers.model import ModelConfig, load_model
from anybatch.plan import BatchPlan
from anybatch.resources import Measure
from anybatch.run_config import RunConfig, RunResult

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer


class Progress(Protocol):
    """How long work tells where it is: `progress(stage, done, total, figures)`; None figures when there are none."""

    def __call__(self, stage: str, done: int, total: int, figures: dict[str, float] | None = None) -> None:
        """Work in `stage` is at `done` of `total`."""
        ...


def no_progress(stage: str, done: int, total: int, figures: dict[str, float] | None = None) -> None:
    """Say nothing."""


def read_training_pairs(config: RunConfig) -> PairData:
    """The training pairs of `config.data`, checked to be enough for one batch."""
    pairs = read_pairs(
        config.data.path,
        anchor=config.data.anchor,
        positive=config.data.positive,
        negatives=config.data.negatives,
        limit=config.data.limit,
    )
    if len(pairs) < config.batch_size:
        raise AnybatchError(
            f"{config.data.path} has {len(pairs)} rows, fewer than one batch of {config.batch_size}. Set batch_size to {len(pairs)} or less."
        )
    return pairs


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
        return _read_embeddings(str(files[0]), len(pairs)), _read_embeddings(str(files[1]), len(pairs))
    if teacher.name is None:
        raise AnybatchError(
            f"mining.method is '{config.mining.method}', which needs a teacher: set teacher.name to a sentence-transformers model, or "
            "teacher.anchor_embeddings and teacher.positive_embeddings to .npy files, or mining.method to 'random'."
        )
    from anybatch.integrations.sentence_transformers.embed import embed_to_file

    model = load_model(ModelConfig(name=teacher.name, max_length=teacher.max_length, device=config.model.device))
    folder = Path(config.output)
    identity = {"model": teacher.name, "max_length": model.max_seq_length, "data": pairs.digest}
    columns = []
    for side, texts, prompt in (
        ("anchor", pairs.anchors, teacher.anchor_prompt),
        ("positive", pairs.positives, teacher.positive_prompt),
    ):
        report = _counter(progress, f"teacher: {side}s", len(texts))
        path = folder / f"teacher_{side}.npy"
        columns.append(
            embed_to_file(
                model, texts, path, identity=identity, batch_size=teacher.batch_size, prompt=prompt, progress=report
            )
        )
    return columns[0], columns[1]


def make_plan(config: RunConfig, pairs: PairData, progress: Progress = no_progress) -> BatchPlan:
    """The plan of the run: the one given, the one already in the folder, or a new one, saved there.

    Raises:
        AnybatchError: A plan made for other data or another batch size.
    """
    from anybatch.mining import mine_plan

    folder = Path(config.output)
    path = Path(config.plan) if config.plan is not None else folder / "plan.safetensors"
    if config.plan is not None or path.exists():
        plan = BatchPlan.load(path)
        plan.check(num_rows=len(pairs), data_digest=pairs.digest)
        if plan.batch_size != config.batch_size:
            raise AnybatchError(
                f"{path} has batches of {plan.batch_size}; the configuration says batch_size {config.batch_size}. Make them equal."
            )
        return plan
    if config.mining.method == "random":
        plan = BatchPlan.random(len(pairs), config.batch_size, seed=config.seed, data_digest=pairs.digest)
    else:
        anchors, positives = teacher_embeddings(config, pairs, progress)
        mining = replace(config.mining, batch_size=config.batch_size, seed=config.seed)
        result = mine_plan(
            anchors,
            positives,
            config=mining,
            anchor_id=pairs.anchor_id,
            positive_id=pairs.positive_id,
            data_digest=pairs.digest,
            progress=lambda stage, fraction: progress(f"mining: {stage}", round(100 * fraction), 100),
        )
        plan = result.plan
        write_text(folder / "mining.json", json.dumps(result.report.as_dict(), indent=2))
    plan.save(path)
    return plan


def with_mined_negatives(pairs: PairData, plan: BatchPlan) -> PairData:
    """The pairs with the plan's hard negatives (B3++) as further negative columns; the pairs themselves if it has none.

    Where a window had too few, the next row's positive stands in: an ordinary candidate, and no negative if it is identical.
    """
    if plan.negatives is None or plan.negatives.shape[1] == 0:
        return pairs
    stand_in = (np.arange(len(pairs)) + 1) % len(pairs)
    rows = np.where(plan.negatives >= 0, plan.negatives, stand_in[:, None])
    mined = [[pairs.positives[int(row)] for row in column] for column in rows.T]
    return replace(pairs, negatives=(*pairs.negatives, *mined))


def evaluate_model(
    model: SentenceTransformer,
    data: PairData | RetrievalData,
    *,
    prompts: tuple[str, str] = ("", ""),
    batch_size: int = 128,
) -> dict[str, float]:
    """Retrieval figures of a model: recall@1, recall@10, MRR@10, nDCG@10 and so on.

    Args:
        model: Any sentence-transformers model.
        data: Pairs (each anchor must find its positive among all distinct ones) or a retrieval set.
        prompts: Text put before each anchor (query) and each positive (document).
        batch_size: Texts per forward pass.
    """
    from anybatch.evaluation.retrieval import pair_metrics, retrieval_metrics
    from anybatch.integrations.sentence_transformers.embed import embed_texts

    if isinstance(data, PairData):
        anchors = embed_texts(model, data.anchors, batch_size=batch_size, prompt=prompts[0])
        positives = embed_texts(model, data.positives, batch_size=batch_size, prompt=prompts[1])
        return pair_metrics(anchors, positives, anchor_id=data.anchor_id, positive_id=data.positive_id)
    queries = embed_texts(model, data.query_texts, batch_size=batch_size, prompt=prompts[0])
    corpus = embed_texts(model, data.corpus_texts, batch_size=batch_size, prompt=prompts[1])
    return retrieval_metrics(queries, corpus, data.relevance, query_ids=data.query_ids, corpus_ids=data.corpus_ids)


def read_evaluation(config: RunConfig) -> PairData | RetrievalData | None:
    """The held-out data of the configuration, or None if it names none."""
    held_out = config.evaluation
    if held_out.corpus or held_out.queries or held_out.qrels:
        if not (held_out.corpus and held_out.queries and held_out.qrels):
            raise AnybatchError(
                "A retrieval set needs all of evaluation.corpus, evaluation.queries and evaluation.qrels."
            )
        return read_retrieval(held_out.corpus, held_out.queries, held_out.qrels, split=held_out.split)
    if held_out.path is None:
        return None
    return read_pairs(held_out.path, anchor=config.data.anchor, positive=config.data.positive, limit=held_out.limit)


def _read_embeddings(path: str, num_rows: int) -> np.ndarray:
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise AnybatchError(
            f"Cannot read the embeddings {path}: {error}. Expected a .npy file of shape (rows, dimensions)."
        ) from error
    if array.ndim != 2 or len(array) != num_rows or not np.issubdtype(array.dtype, np.floating):
        raise AnybatchError(
            f"{path} holds a {array.dtype} array of shape {array.shape}; expected floats of shape ({num_rows}, dimensions), one row for each row "
            "of the data, in its order. Embed this very file, or set data.limit to what was embedded."
        )
    return array


def _counter(progress: Progress, stage: str, total: int) -> Callable[[int], None]:
    done = 0

    def add(count: int) -> None:
        nonlocal done
        done += count
        progress(stage, done, total)

    return add


def open_run(config: RunConfig, *, resume: bool = False) -> Path:
    """Make the run's folder and write the resolved configuration into it; with `resume`, check that it is this configuration's.

    Raises:
        AnybatchError: The folder holds a run (and `resume` is off), holds something else, or holds a run of another configuration.
    """
    folder = Path(config.output)
    written = folder / "config.yaml"
    if written.exists():
        if not resume:
            raise AnybatchError(
                f"{folder} already holds a run. Choose another output folder, or add --resume to go on with it."
            )
        changed = [
            line for line in differences(load_config(RunConfig, written), config) if not line.startswith("output:")
        ]
        if changed:
            raise AnybatchError(
                f"{folder} holds a run of another configuration; it differs in {'; '.join(changed)}. Resume with the configuration in "
                f"{written}, or choose another output folder."
            )
        return folder
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise AnybatchError(
            f"{folder} exists and is not empty, and is no run of anybatch. Choose another output folder."
        )
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise AnybatchError(
            f"Cannot make the folder {folder}: {error.strerror}. Choose another output folder."
        ) from error
    write_text(written, to_yaml(config))
    return folder


def train(config: RunConfig, *, resume: bool = False, progress: Progress = no_progress) -> RunResult:
    """The whole run: read, mine, train, save, evaluate.

    Leaves in `config.output`: config.yaml, plan.safetensors, mining.json (if mined), log.jsonl, checkpoints/, model/, metrics.json.

    Args:
        config: The run.
        resume: Go on with the run in the folder; a finished one is only read.
        progress: Told where the work is.

    Raises:
        AnybatchError: See `open_run`, `read_training_pairs`, `make_plan`.
    """
    from anybatch.integrations.sentence_transformers.loss import CachedLoss
    from anybatch.integrations.sentence_transformers.training import train_model
    from anybatch.losses.config import build_loss
    from anybatch.rows import RowTable

    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise AnybatchError(
            "`anybatch train` runs in one process so far. Under torchrun use sentence-transformers' Trainer with CachedLoss, PlanBatches and "
            "LossStateCallback (docs/sentence_transformers.md); the plan that `anybatch mine` makes serves any number of processes."
        )
    pairs = read_training_pairs(config)  # before the folder: bad data leaves nothing behind
    held_out = read_evaluation(config)
    model = load_model(config.model)
    folder = open_run(config, resume=resume)
    if (folder / "metrics.json").exists():
        return RunResult(**json.loads((folder / "metrics.json").read_text(encoding="utf-8")))
    plan = make_plan(config, pairs, progress)
    pairs = with_mined_negatives(pairs, plan)
    prompts = (config.model.anchor_prompt, config.model.positive_prompt)

    def evaluate(current: SentenceTransformer) -> dict[str, float]:
        return {} if held_out is None else evaluate_model(current, held_out, prompts=prompts)

    untrained = _remember(folder / "metrics_untrained.json", lambda: evaluate(model))
    rows = RowTable(
        pairs.anchor_id,
        pairs.positive_id,
        negative_id=pairs.negative_id,
        plan=plan,
        weights=config.loss.weights,
        weight_cap=config.loss.weight_cap,
    )
    loss = CachedLoss(
        model,
        build_loss(config.loss, num_rows=len(pairs)),
        rows=rows.to(model.device),
        micro_batch=config.train.micro_batch,
        max_tokens=config.train.max_tokens,
        keep_graphs=config.train.keep_graphs,
        memory=config.train.memory,
    )
    dataset = pairs.to_dataset()
    with Measure() as measure:
        log = train_model(
            model,
            loss,
            dataset,
            plan,
            config.train,
            output=folder,
            seed=config.seed,
            prompts=_column_prompts(config, dataset.column_names) or None,
            resume=resume,
            evaluate=evaluate if held_out is not None else None,
            progress=lambda done, total, figures: progress("training", done, total, figures),
        )
    model.eval()
    save_model(model, folder / "model")
    result = RunResult(
        metrics=evaluate(model),
        metrics_untrained=untrained,
        log=log,
        train_seconds=measure.seconds,
        train_peak_bytes=measure.peak_bytes,
        num_steps=log[-1]["step"] if log else 0,
    )
    write_text(
        folder / "metrics.json", json.dumps(asdict(result), indent=2)
    )  # last: its presence says that the run is finished
    return result


def save_model(model: SentenceTransformer, folder: Path) -> None:
    """Save a model so that `folder` is either whole or absent."""
    temporary = folder.with_name(folder.name + ".tmp")
    if temporary.exists():
        shutil.rmtree(temporary)
    try:
        model.save_pretrained(str(temporary))
    except Exception as error:  # disk full comes as OSError or as the SafetensorError of the writer
        if not isinstance(error, OSError) and type(error).__name__ != "SafetensorError":
            raise
        raise AnybatchError(
            f"Cannot save the model to {folder}: {error}. Free some space, then run again with --resume."
        ) from error
    if folder.exists():
        shutil.rmtree(folder)
    os.replace(temporary, folder)


def _remember(path: Path, compute: Callable[[], dict[str, float]]) -> dict[str, float]:
    if not path.exists():
        write_text(path, json.dumps(compute(), indent=2))
    return json.loads(path.read_text(encoding="utf-8"))


def _column_prompts(config: RunConfig, columns: list[str]) -> dict[str, str]:
    prompts = {"anchor": config.model.anchor_prompt}
    for name in columns[1:]:
        prompts[name] = config.model.positive_prompt
    return {name: prompt for name, prompt in prompts.items() if prompt}
