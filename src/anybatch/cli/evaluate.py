"""`anybatch evaluate`: retrieval figures of any model."""

from __future__ import annotations

import json
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
)
from anybatch.cli.progress import Bars, say, show
from anybatch.core.errors import AnybatchError

if TYPE_CHECKING:
    from anybatch.run.read_data import HeldOut

# What --data and the others name: in words, and the options that it has.
KINDS = {
    "mteb": ("--mteb (tasks of MTEB)", ("mteb",)),
    "labelled": ("--labelled (images with classes, told by others)", ("data", "labelled", "anchor", "limit")),
    "template": (
        "--template (images with classes, told by their names)",
        ("data", "template", "class_names", "anchor", "limit"),
    ),
    "candidates": ("--data (queries with candidates of their own)", ("data", "images", "recipe")),
    "beir": ("--data (a folder in BEIR's layout)", ("data", "split", "quoting")),
    "data": ("--data (pairs)", ("data", "anchor", "positive", "images", "limit", "quoting")),
}


def command(
    model: Annotated[
        str,
        typer.Argument(
            help="A model, a folder or a hub name; or the folder of a run, by default on the run's own held-out data."
        ),
    ],
    data: DataOption = None,
    anchor: AnchorOption = None,
    positive: PositiveOption = None,
    images: ImagesOption = None,
    labelled: Annotated[
        str | None,
        typer.Option(help="Images with classes (folders, or a column 'label') from which those of --data are told."),
    ] = None,
    template: Annotated[
        list[str] | None,
        typer.Option(
            help='Tell the classes of the images of --data by their names: such as "a photo of a {}.". Repeatable.'
        ),
    ] = None,
    class_names: Annotated[
        Path | None, typer.Option(help="For --template: a YAML file with the name of each class, label: name.")
    ] = None,
    recipe: Annotated[
        Literal["b3"] | None, typer.Option(help="b3: MMEB's candidates with the prompts that B3 trains with.")
    ] = None,
    limit: LimitOption = None,
    split: Annotated[str | None, typer.Option(help="Of a folder in BEIR's layout: judgements qrels/SPLIT.tsv.")] = None,
    mteb: Annotated[
        list[str] | None, typer.Option(metavar="TASK", help="A task of MTEB, such as NFCorpus. Repeatable.")
    ] = None,
    device: DeviceOption = None,
    max_length: Annotated[int | None, typer.Option(help="Tokens a text is cut at.")] = None,
    anchor_prompt: Annotated[
        str | None, typer.Option(help="Text put before each anchor or query, in place of the model's own.")
    ] = None,
    positive_prompt: Annotated[
        str | None, typer.Option(help="Text put before each positive or document, in place of the model's own.")
    ] = None,
    quoting: Annotated[
        Literal["standard", "raw"] | None,
        typer.Option(help="Of CSV and TSV: standard, or raw where quotes are plain characters."),
    ] = None,
    sets: Annotated[
        list[str] | None,
        typer.Option(
            "--set", metavar="KEY=VALUE", help="A setting of the model: 'model.kwargs={dtype: bfloat16}'. Repeatable."
        ),
    ] = None,
    output: Annotated[
        Path | None, typer.Option(help="Also write the figures to this JSON file; it must be new.")
    ] = None,
) -> None:
    """Measure a model: recall, MRR, nDCG on held-out pairs or a retrieval set; classes of images; MMEB; MTEB."""
    from anybatch.core.files import write_text
    from anybatch.core.yaml_files import load_config
    from anybatch.insight.tables import metrics_table, rich_table, what_is_open
    from anybatch.integrations.sentence_transformers.model import ModelConfig, load_model
    from anybatch.run.evaluate_model import check_held_out, evaluate_model, evaluate_tasks, model_of

    check_new(output, "--output")
    others = [setting for setting in sets or () if not setting.startswith("model.")]
    if others:
        raise AnybatchError(f"Got --set {others[0]}; expected a setting of the model here, model.NAME=VALUE.")
    further = [setting.removeprefix("model.") for setting in sets or ()]
    if mteb and find_spec("mteb") is None:
        raise ModuleNotFoundError(name="mteb")
    held_out = _held_out(
        model,
        mteb=mteb,
        data=data,
        anchor=anchor,
        positive=positive,
        images=images,
        labelled=labelled,
        template=template,
        class_names=class_names,
        recipe=recipe,
        limit=limit,
        split=split,
        quoting=quoting,
    )
    given = {
        "name": model_of(model),
        "device": device,
        "max_length": max_length,
        "anchor_prompt": anchor_prompt,
        "positive_prompt": positive_prompt,
    }
    config = load_config(ModelConfig, None, [*given.items(), *further])
    loaded = load_model(config)
    check_held_out(loaded, held_out)
    if mteb:
        metrics: dict[str, Any] = evaluate_tasks(loaded, mteb)
        show(
            rich_table(
                ["task", "figure", ""],
                [[task, name, f"{score:.4f}"] for task, of_task in metrics.items() for name, score in of_task.items()],
                left=(0, 1),
            )
        )
    else:
        with Bars() as bars:
            metrics = evaluate_model(loaded, held_out, progress=bars)
        name, by_task = Path(model).name or model, "hit@1 "
        tasks = {key.removeprefix(by_task): {"hit@1": hit} for key, hit in metrics.items() if key.startswith(by_task)}
        measured = {**tasks, ("mean" if tasks else name): metrics}
        show(metrics_table(measured))
        if doubt := what_is_open(measured):
            say(doubt)
    if output is not None:
        write_text(output, json.dumps(metrics, indent=2))


def _held_out(model: str, **options: Any) -> HeldOut | None:
    """The data to measure on, of the kind that the options name, or a run's own; options of another kind are refused.

    None for tasks of MTEB, which bring their data.
    """
    from anybatch.core.yaml_files import read_yaml
    from anybatch.data.candidates import find_candidates
    from anybatch.data.reading import read_pairs
    from anybatch.data.retrieval import find_retrieval, read_retrieval
    from anybatch.run.evaluate_model import columns_of, held_out_of, model_of
    from anybatch.run.read_data import read_candidate_sets
    from anybatch.vision.mmeb import TASKS
    from anybatch.vision.read_images import LabelledImages, NamedClasses, prompts_of, read_images

    # 1. The kind, and its options.
    options = {name: value for name, value in options.items() if value not in (None, [])}
    if not options and model_of(model) != model:
        return held_out_of(Path(model))
    kind = next((name for name in ("mteb", "labelled", "template", "data") if name in options), None)
    anchor, limit = options.get("anchor"), options.get("limit")
    if kind is None or (kind != "mteb" and "data" not in options):
        raise AnybatchError(f"Nothing to measure on: {model} is no folder of a run. Give --data or --mteb TASK.")
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
    if kind == "labelled":
        learned, test = (
            read_images(path, column=anchor, limit=limit) for path in (options["labelled"], options["data"])
        )
        return LabelledImages(known=learned, test=test)
    if kind == "template":
        test = read_images(options["data"], column=anchor, limit=limit)
        names = read_yaml(options["class_names"]) if "class_names" in options else None
        return NamedClasses(
            images=test, prompts=prompts_of(sorted({*test.labels.tolist()}), options["template"], names)
        )
    if tasks:
        prompts = {name: task.target_prompt for name, task in TASKS.items()} if "recipe" in options else {}
        return read_candidate_sets(tasks, options.get("images"), prompts=prompts)
    if model_of(model) != model and not {"anchor", "positive"} & options.keys():
        options |= columns_of(Path(model), options["data"], options.get("quoting"))
    return read_pairs(options.pop("data"), negatives=(), **options)
