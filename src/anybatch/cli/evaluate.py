"""`anybatch evaluate`: retrieval figures of any model."""

from __future__ import annotations

import json
from dataclasses import dataclass, fields
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from anybatch.cli.options import (
    AnchorOption,
    DataOption,
    DeviceOption,
    ImagesOption,
    LimitOption,
    PositiveOption,
    check_new,
    with_options,
)
from anybatch.cli.progress import Bars, say, show, show_metrics
from anybatch.core.errors import AnybatchError

if TYPE_CHECKING:
    from anybatch.run.read_data import HeldOut

# What --data and the others name: in words, and the options that it has.
KINDS = {
    "mteb": ("--mteb (tasks of MTEB)", ("mteb",)),
    "labelled": ("--labelled (images with classes, told by others)", ("data", "labelled", "anchor", "limit")),
    "template": ("--template (classes of images, by name)", ("data", "template", "class_names", "anchor", "limit")),
    "candidates": ("--data (queries with candidates of their own)", ("data", "images", "recipe")),
    "beir": ("--data (a folder in BEIR's layout)", ("data", "split", "quoting")),
    "data": ("--data (pairs)", ("data", "anchor", "positive", "images", "limit", "quoting")),
}


@dataclass(frozen=True, kw_only=True)
class EvaluateOptions:
    """A model, what to measure it on (None where nothing is said), and how it is loaded."""

    model: Annotated[
        str,
        typer.Argument(
            help="A model, a folder or a hub name; or the folder of a run, by default on the run's own held-out data."
        ),
    ]
    data: DataOption = None
    anchor: AnchorOption = None
    positive: PositiveOption = None
    images: ImagesOption = None
    labelled: Annotated[
        str | None,
        typer.Option(help="Images with classes (folders, or a column 'label') from which those of --data are told."),
    ] = None
    template: Annotated[
        list[str] | None,
        typer.Option(
            help='Tell the classes of the images of --data by their names: such as "a photo of a {}.". Repeatable.'
        ),
    ] = None
    class_names: Annotated[
        Path | None, typer.Option(help="For --template: a YAML file with the name of each class, label: name.")
    ] = None
    recipe: Annotated[
        Literal["b3"] | None, typer.Option(help="b3: MMEB's candidates with the prompts that B3 trains with.")
    ] = None
    limit: LimitOption = None
    split: Annotated[str | None, typer.Option(help="Of a folder in BEIR's layout: judgements qrels/SPLIT.tsv.")] = None
    mteb: Annotated[
        list[str] | None, typer.Option(metavar="TASK", help="A task of MTEB, such as NFCorpus. Repeatable.")
    ] = None
    device: DeviceOption = None
    max_length: Annotated[int | None, typer.Option(help="Tokens a text is cut at.")] = None
    anchor_prompt: Annotated[
        str | None, typer.Option(help="Text put before each anchor or query, in place of the model's own.")
    ] = None
    positive_prompt: Annotated[
        str | None, typer.Option(help="Text put before each positive or document, in place of the model's own.")
    ] = None
    quoting: Annotated[
        Literal["standard", "raw"] | None,
        typer.Option(help="Of CSV and TSV: standard, or raw where quotes are plain characters."),
    ] = None
    sets: Annotated[
        list[str] | None,
        typer.Option(
            "--set", metavar="KEY=VALUE", help="A setting of the model: 'model.kwargs={dtype: bfloat16}'. Repeatable."
        ),
    ] = None
    output: Annotated[Path | None, typer.Option(help="Also write the figures to this new JSON file.")] = None


@with_options
def command(options: EvaluateOptions) -> None:
    """Measure a model: recall, MRR, nDCG on held-out pairs or a retrieval set; classes of images; MMEB; MTEB."""
    from anybatch.core.files import write_text
    from anybatch.core.yaml_files import load_config
    from anybatch.insight.tables import rich_table
    from anybatch.integrations.sentence_transformers.model import ModelConfig, load_model
    from anybatch.run.evaluate_model import check_held_out, evaluate_model, evaluate_tasks, model_of

    check_new(options.output, "--output")
    others = [setting for setting in options.sets or () if not setting.startswith("model.")]
    if others:
        raise AnybatchError(f"Got --set {others[0]}; expected a setting of the model here, model.NAME=VALUE.")
    further = [setting.removeprefix("model.") for setting in options.sets or ()]
    if options.mteb and find_spec("mteb") is None:
        raise ModuleNotFoundError(name="mteb")
    held_out = _held_out(options)
    of_model = ("device", "max_length", "anchor_prompt", "positive_prompt")
    given = [("name", model_of(options.model)), *((name, getattr(options, name)) for name in of_model)]
    loaded = load_model(load_config(ModelConfig, None, [*given, *further]))
    check_held_out(loaded, held_out)
    if options.mteb:
        metrics: dict[str, Any] = evaluate_tasks(loaded, options.mteb)
        lines = [[task, name, f"{score:.4f}"] for task, scores in metrics.items() for name, score in scores.items()]
        show(rich_table(["task", "figure", ""], lines, left=(0, 1)))
    else:
        with Bars() as bars:
            metrics = evaluate_model(loaded, held_out, progress=bars)
        by_task = "hit@1 "
        tasks = {key.removeprefix(by_task): {"hit@1": hit} for key, hit in metrics.items() if key.startswith(by_task)}
        say(f"On {_measured_on(options, held_out)}:")
        show_metrics({**tasks, ("mean" if tasks else options.model): metrics})
    if options.output is not None:
        write_text(options.output, json.dumps(metrics, indent=2))


def _measured_on(options: EvaluateOptions, held_out: HeldOut | None) -> str:
    """The data in words, as they were named."""
    from anybatch.data.pairs import PairData

    if isinstance(held_out, PairData):
        return f"{len(held_out):,} {'' if options.data else 'held-out '}pairs of {options.data or options.model}"
    return options.data or f"the held-out data of {options.model}"


def _held_out(given: EvaluateOptions) -> HeldOut | None:
    """The data that the options name, or a run's own; None for tasks of MTEB, which bring their data."""
    from anybatch.core.yaml_files import read_yaml
    from anybatch.data.candidates import find_candidates
    from anybatch.data.reading import read_pairs
    from anybatch.data.retrieval import find_retrieval, read_retrieval
    from anybatch.run.evaluate_model import columns_of, held_out_of, model_of
    from anybatch.run.read_data import read_candidate_sets
    from anybatch.vision.mmeb import TARGET_PROMPTS
    from anybatch.vision.read_images import LabelledImages, NamedClasses, prompts_of, read_images

    # 1. The kind, and its options.
    names = {name for _, known in KINDS.values() for name in known}
    values = {field.name: getattr(given, field.name) for field in fields(given) if field.name in names}
    options: dict[str, Any] = {name: value for name, value in values.items() if value not in (None, [])}
    run = Path(given.model) if model_of(given.model) != given.model else None
    if not options and run is not None:
        return held_out_of(run)
    kind = next((name for name in ("mteb", "labelled", "template", "data") if name in options), None)
    anchor, limit = options.get("anchor"), options.get("limit")
    if kind is None or (kind != "mteb" and "data" not in options):
        raise AnybatchError(f"Nothing to measure on: {given.model} is no folder of a run. Give --data or --mteb TASK.")
    judged = find_retrieval(options["data"], options.get("split")) if kind == "data" else None
    tasks = find_candidates(options["data"]) if kind == "data" and judged is None else {}
    what, known = KINDS["beir" if judged else "candidates" if tasks else kind]
    unfit = [f"--{name.replace('_', '-')}" for name in options if name not in known]
    if unfit:
        fitting = ", ".join(f"--{name.replace('_', '-')}" for name in known)
        raise AnybatchError(f"Got {unfit[0]} and {what}, which has the options {fitting}. Leave one of them out.")

    # 2. Read it.
    if kind == "mteb":
        return None
    if judged is not None:
        return read_retrieval(*judged, quoting=options.get("quoting"))
    if kind in ("labelled", "template"):
        test = read_images(options["data"], column=anchor, limit=limit)
        if kind == "labelled":
            return LabelledImages(known=read_images(options["labelled"], column=anchor, limit=limit), test=test)
        names = read_yaml(options["class_names"]) if "class_names" in options else None
        prompts = prompts_of(sorted({*test.labels.tolist()}), options["template"], names)
        return NamedClasses(images=test, prompts=prompts)
    if tasks:
        prompts = TARGET_PROMPTS if "recipe" in options else {}
        return read_candidate_sets(tasks, options.get("images"), prompts=prompts)
    if run is not None and not {"anchor", "positive"} & options.keys():
        options |= columns_of(run, options["data"], options.get("quoting"))
    return read_pairs(options.pop("data"), negatives=(), **options)
