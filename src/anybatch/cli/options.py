"""Options that verbs share: a configuration file, overrides, and short cuts for the values most people set.

Nothing of the library is imported before a verb is called, so that `--help` answers at once.
"""

from __future__ import annotations

import inspect
import os
import re
from collections.abc import Callable
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, get_type_hints

import typer

from anybatch.cli.progress import say
from anybatch.core.errors import AnybatchError

if TYPE_CHECKING:
    from anybatch.run.config import RunConfig

ConfigOption = Annotated[Path | None, typer.Option("--config", help="A YAML file; `anybatch config` prints every key.")]
SetOption = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Override one value, such as loss.name=sogclr. Repeatable."),
]
OutputOption = Annotated[
    str | None,
    typer.Option("--output", help="Folder of the run, new or of the run to resume; by default runs/NAME of the data."),
]
DataOption = Annotated[
    str | None,
    typer.Option("--data", help="Pairs: JSONL(.gz), CSV, TSV, Parquet, a folder of `datasets`, or hf://OWNER/NAME."),
]
AnchorOption = Annotated[
    list[str] | None,
    typer.Option("--anchor", help="Name of the anchor column; twice for a text and its image."),
]
PositiveOption = Annotated[
    list[str] | None, typer.Option("--positive", help="Name of the positive column; twice for a text and its image.")
]
NegativeOption = Annotated[
    list[str] | None, typer.Option("--negative", help="Name of a column with explicit negatives. Repeatable.")
]
ImagesOption = Annotated[
    str | None, typer.Option("--images", help='Folder that paths of images start from; "" where there are none.')
]
ViewsOption = Annotated[
    int | None,
    typer.Option("--views", help="2: the data are images without labels, of which two random views are made."),
]
LimitOption = Annotated[int | None, typer.Option("--limit", help="Use only the first pairs.")]
DeviceOption = Annotated[
    Literal["cpu", "cuda", "mps"] | None, typer.Option("--device", help="By default a GPU if there is one.")
]
SeedOption = Annotated[int | None, typer.Option("--seed", help="Fixes batches, initialisation and dropout.")]
LossOption = Annotated[str | None, typer.Option("--loss", help="Its name, such as infonce; by default recommended.")]
EpochsOption = Annotated[int | None, typer.Option("--epochs", help="Passes over the data.")]
RateOption = Annotated[float | None, typer.Option("--learning-rate", help="Of the optimiser, at its peak.")]
EvaluationOption = Annotated[
    str | None, typer.Option("--eval", help="Held-out pairs; by default a part of --data (evaluation.path=null: none).")
]
PlanOption = Annotated[
    str | None, typer.Option("--plan", help="A plan made by `anybatch mine`; without one it is made here.")
]
ModelOption = Annotated[str | None, typer.Option("--model", help="The model to train: a folder or a hub name.")]
TeacherOption = Annotated[str | None, typer.Option("--teacher", help="The model that ranks the data for mining.")]
BatchSizeOption = Annotated[int | None, typer.Option("--batch-size", help="The contrastive batch, over all processes.")]
RecipeOption = Annotated[
    str | None,
    typer.Option("--recipe", help="A published run's settings where you set none: b3 (B3 on MMEB)."),
]
ResumeOption = Annotated[bool, typer.Option("--resume", help="Go on with the run in the output folder.")]


SHORT_CUTS = {  # options and the settings that they stand for
    "output": "output",
    "data": "data.path",
    "anchor": "data.anchor",
    "positive": "data.positive",
    "negative": "data.negatives",
    "images": "data.images",
    "views": "data.views",
    "limit": "data.limit",
    "model": "model.name",
    "device": "model.device",
    "teacher": "teacher.name",
    "batch_size": "batch_size",
    "seed": "seed",
    "loss": "loss.name",
    "epochs": "train.epochs",
    "learning_rate": "train.learning_rate",
    "eval": "evaluation.path",
    "plan": "plan",
}


@dataclass(frozen=True, kw_only=True)
class RunOptions:
    """The options of every verb that works from a run's configuration; None where one was not given."""

    config: ConfigOption = None
    sets: SetOption = None
    output: OutputOption = None
    data: DataOption = None
    anchor: AnchorOption = None
    positive: PositiveOption = None
    negative: NegativeOption = None
    images: ImagesOption = None
    views: ViewsOption = None
    limit: LimitOption = None
    model: ModelOption = None
    device: DeviceOption = None
    teacher: TeacherOption = None
    batch_size: BatchSizeOption = None
    seed: SeedOption = None
    loss: LossOption = None
    recipe: RecipeOption = None

    def resolve(self, *, resume: bool = False) -> RunConfig:
        """The configuration from file, `--set` and short cuts (which win); a new run without a folder gets a free one.

        `resume` without `--config` takes the configuration kept in the run's folder.
        """
        from anybatch.core.yaml_files import load_config
        from anybatch.run.config import RunConfig
        from anybatch.run.recipes import RECIPES

        if self.recipe is not None and self.recipe not in RECIPES:
            raise AnybatchError(f"--recipe is {self.recipe!r}; expected one of: {', '.join(RECIPES)}.")
        config = resumed(self.output) if resume and self.config is None else self.config
        values = ((key, getattr(self, option, None)) for option, key in SHORT_CUTS.items())
        overrides = [*(self.sets or []), *((key, value) for key, value in values if value not in (None, []))]

        def complete(tree: dict[str, Any]) -> dict[str, Any]:
            tree = RECIPES[self.recipe](tree) if self.recipe is not None else tree
            alone = int(os.environ.get("WORLD_SIZE", "1")) == 1  # several processes could choose different folders
            if "output" not in tree and tree.get("data") and alone and not resume:
                tree["output"] = str(free_name(Path("runs") / _data_name(tree)))
                say(f"Everything goes into {tree['output']} (--output names another folder).")
            return tree

        return load_config(RunConfig, config, overrides, complete)


@dataclass(frozen=True, kw_only=True)
class TrainOptions(RunOptions):
    """The options of a run that trains."""

    epochs: EpochsOption = None
    learning_rate: RateOption = None
    eval: EvaluationOption = None
    plan: PlanOption = None


def free_name(folder: Path) -> Path:
    """The folder, or the first of folder-2, folder-3 and so on that does not exist."""
    number, free = 2, folder
    while free.exists():
        free, number = folder.with_name(f"{folder.name}-{number}"), number + 1
    return free


def _data_name(tree: dict[str, Any]) -> str:
    """What to call a run on these data: as the file, the folder, or the data set of the hub."""
    data = tree.get("data")
    path = str((data.get("path") if isinstance(data, dict) else None) or "run")
    parts = [part for part in Path(path).parts if part not in ("/", "..")]
    name = parts[2] if parts[:1] == ["hf:"] and len(parts) > 2 else (parts or ["run"])[-1]
    return re.sub(r"[^\w.-]+", "-", name.split(".")[0]).strip("-") or "run"


def with_options(command: Callable[..., None]) -> Callable[..., None]:
    """Give a verb the options that are the fields of its first argument, a dataclass, before its own options.

    Typer reads a function's signature, so the wrapper states the joined one.
    """
    first, *own = inspect.signature(command, eval_str=True).parameters.values()
    hints = get_type_hints(first.annotation, include_extras=True)
    shared = [
        inspect.Parameter(
            field.name,
            inspect.Parameter.KEYWORD_ONLY,
            default=inspect.Parameter.empty if field.default is MISSING else field.default,
            annotation=hints[field.name],
        )
        for field in fields(first.annotation)
    ]
    joined = [*shared, *(parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY) for parameter in own)]

    def verb(**values: Any) -> None:
        options = first.annotation(**{parameter.name: values.pop(parameter.name) for parameter in shared})
        command(options, **values)

    verb.__signature__ = inspect.Signature(joined)  # pyright: ignore[reportFunctionMemberAccess]
    verb.__annotations__ = {parameter.name: parameter.annotation for parameter in joined}
    verb.__doc__ = command.__doc__
    return verb


def resumed(output: str | None) -> Path | None:
    """The configuration kept in a run's folder, for `--resume` without `--config`."""
    from anybatch.run.config import read_config

    if output is None:
        return None
    path = Path(output) / "config.yaml"
    if not path.exists():
        raise AnybatchError(f"{output} holds no run to resume (no config.yaml). Start it without --resume.")
    read_config(path.parent)
    return path


def check_new(file: Path | None, option: str) -> None:
    """Refuse a file that is to be written and exists, or that has no folder to lie in, before any work."""
    if file is not None and file.exists():
        raise AnybatchError(f"{file} exists. Choose another file for {option}.")
    if file is not None and not file.absolute().parent.is_dir():
        raise AnybatchError(f"There is no folder {file.absolute().parent} for {option}. Make it, or choose another.")
