"""Retrieval figures of a model on held-out data, and those that a run began with."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from anybatch.core.errors import AnybatchError
from anybatch.core.files import write_json
from anybatch.core.progress import Progress, counter, no_progress
from anybatch.data.candidates import CandidateSets
from anybatch.data.images import ImageColumn
from anybatch.data.inputs import Column, check_images
from anybatch.data.pairs import PairData
from anybatch.data.records import column_names
from anybatch.data.sets import files_of
from anybatch.evaluation.classes import class_metrics
from anybatch.evaluation.retrieval import pair_metrics, retrieval_metrics
from anybatch.evaluation.zero_shot import hit_at_1, two_way_recall, zero_shot_metrics
from anybatch.integrations.sentence_transformers.embed import check_content, embed_texts, weights_digest
from anybatch.integrations.sentence_transformers.model import Side
from anybatch.run.config import read_config
from anybatch.run.folder import read_record, run_digest
from anybatch.run.make_plan import existing_plan
from anybatch.run.read_data import HeldOut, read_held_out, read_training_pairs, split_for_plan
from anybatch.vision.read_images import LabelledImages, NamedClasses

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer


def evaluate_model(
    model: SentenceTransformer, data: HeldOut | None, *, progress: Progress = no_progress
) -> dict[str, float]:
    """Figures of a model, with its own prompts and routes: recall@1, MRR@10, nDCG@10 and so on.

    See `pair_metrics`, `two_way_recall` for images with captions, `class_metrics` and `zero_shot_metrics` for images
    with classes, `hit_at_1` for queries with candidates of their own, of each set and their mean. None without data.
    """

    def embed(stage: str, texts: Column, side: Side) -> np.ndarray:
        report = counter(progress, f"embedding: {stage}", len(texts))
        return embed_texts(model, texts, side=side, batch_size=128, progress=report)

    if data is None:
        return {}
    if isinstance(data, CandidateSets):
        hits = {}
        for name, part in data.sets.items():
            queries = embed(f"{name}, queries", part.queries, "query")
            candidates = embed(f"{name}, candidates", part.candidates, "document")
            hits[f"hit@1 {name}"] = hit_at_1(queries, candidates, query=part.query, of_row=part.of_row)
        return {"hit@1": sum(hits.values()) / len(hits), **hits}
    if isinstance(data, NamedClasses):
        images = embed("images", data.images.images, "query")
        texts = embed("class names", [text for of_class in data.prompts.values() for text in of_class], "document")
        parts = np.split(texts, np.cumsum([len(of_class) for of_class in data.prompts.values()])[:-1])
        return zero_shot_metrics(images, data.images.labels, dict(zip(data.prompts, parts, strict=True)))
    if isinstance(data, LabelledImages):
        known, test = (embed(f"{name} images", part.images, "query") for name, part in vars(data).items())
        return class_metrics(known, data.known.labels, test, data.test.labels)
    if isinstance(data, PairData):
        anchors = embed("anchors", data.anchors, "query")
        positives = embed("positives", data.positives, "document")
        figures = pair_metrics(anchors, positives, anchor_id=data.anchor_id, positive_id=data.positive_id)
        sides = [(anchors, data.anchor_id), (positives, data.positive_id)]
        are_images = [isinstance(column, ImageColumn) for column in (data.anchors, data.positives)]
        if are_images[0] == are_images[1]:
            return figures
        (images, image_id), (texts, text_id) = sides if are_images[0] else sides[::-1]
        return figures | two_way_recall(images, texts, image_id=image_id, text_id=text_id)
    queries = embed("queries", data.query_texts, "query")
    corpus = embed("documents", data.corpus_texts, "document")
    return retrieval_metrics(queries, corpus, data.relevance, query_ids=data.query_ids, corpus_ids=data.corpus_ids)


def check_held_out(model: SentenceTransformer, data: HeldOut | None) -> None:
    """Refuse, before any work, held-out images that are broken, all at once, and what the model does not read."""
    columns: list[Column] = []
    if isinstance(data, PairData):
        columns = [data.anchors, data.positives]
    elif isinstance(data, CandidateSets):
        columns = [column for part in data.sets.values() for column in (part.queries, part.candidates)]
    elif isinstance(data, LabelledImages):
        columns = [data.known.images, data.test.images]
    elif isinstance(data, NamedClasses):
        columns = [data.images.images]
    for column in columns:
        check_images(column)
        check_content(model, column)


def held_out_of(folder: Path) -> HeldOut:
    """The held-out data of a run: what its configuration names, or what it held out itself."""
    config = replace(read_config(folder), output=str(folder))
    held_out = read_held_out(config) or split_for_plan(config, read_training_pairs(config), existing_plan(config))[1]
    if held_out is None:
        raise AnybatchError(f"The run in {folder} held out nothing to measure on. Give --data.")
    return held_out


def columns_of(folder: Path, data: str, quoting: Literal["standard", "raw"] | None) -> dict[str, Any]:
    """The columns that a run was trained on, by name, where `data` has all of them; else none."""
    named = read_config(folder).data
    chosen = {"anchor": named.anchor, "positive": named.positive}
    chosen = {side: (names,) if isinstance(names, str) else names for side, names in chosen.items() if names}
    present = set(column_names(next(iter(files_of(Path(data)))), quoting)) if chosen else set()
    return chosen if all(present.issuperset(names) for names in chosen.values()) else {}


def model_of(name: str) -> str:
    """The folder or hub name of a model; of the folder of a run its trained model."""
    folder = Path(name)
    if not (folder / "config.yaml").exists() or (folder / "modules.json").exists():
        return name
    if not (folder / "model").exists():
        raise AnybatchError(
            f"The run in {folder} has no model yet. Go on with it: anybatch train --resume --output {folder}"
        )
    return str(folder / "model")


def evaluate_tasks(model: SentenceTransformer, names: Sequence[str]) -> dict[str, dict[str, float]]:
    """The main score of each task of MTEB, by its name, with the model's own prompts. Needs the package mteb.

    Raises:
        AnybatchError: A task that MTEB does not know, or whose data cannot be had.
    """
    import mteb

    scores = {}
    for name in names:
        try:
            task = mteb.get_task(name)
        except KeyError as error:
            raise AnybatchError(f"MTEB has no such task: {str(error.args[0]).removeprefix('KeyError: ')}") from error
        try:  # without the cache of results, which knows a model by its folder's name
            result = mteb.evaluate(model, task, cache=None, co2_tracker=False, show_progress_bar=False)
        except (OSError, ValueError) as error:  # no connection, no such data set
            raise AnybatchError(
                f"Cannot measure the task {name} of MTEB: {next(iter(str(error).splitlines()), '')} Its data come from "
                "the Hugging Face hub: check the connection (and HF_HUB_OFFLINE)."
            ) from error
        scores[name] = {task.metadata.main_score: float(result.task_results[0].get_score())}
    return scores


def untrained_figures(
    folder: Path,
    model: SentenceTransformer,
    held_out: HeldOut | None,
    evaluate: Callable[[SentenceTransformer], dict[str, float]],
) -> dict[str, float]:
    """The figures that the run began with: measured once on `held_out` by `evaluate`, kept in its folder."""
    path, run = folder / "metrics_untrained.json", run_digest(folder)
    made_from = {"the weights of model.name": weights_digest(model)}
    if held_out is not None:
        made_from["the held-out data"] = held_out.digest
    if not path.exists():
        write_json(path, {"run": run, "made_from": made_from, "untrained": evaluate(model)})
    kept = read_record(path, run, "made_from", "untrained")
    changed = [name for name, digest in made_from.items() if kept["made_from"].get(name) != digest]
    if changed:
        raise AnybatchError(
            f"The run in {folder} began with others than it has now: {' and '.join(changed)} changed since. Put back "
            "what it began with, or start a new run in another output folder."
        )
    return kept["untrained"]
