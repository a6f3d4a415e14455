"""Options that verbs share. Of the library nothing is imported before a verb is called: `--help` answers at once."""

from __future__ import annotations

import inspect
import os
import re
from collections.abc import Callable
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, get_type_hints

import typer

from anybatch.core.errors import AnybatchError

if TYPE_CHECKING:
    from anybatch.run.config import RunConfig

# Each option, and the setting that it stands for.
DataOption = Annotated[
    str | None,
    typer.Option(help="Pairs: JSONL(.gz), CSV, TSV, Parquet, a folder of `datasets`, or hf://OWNER/NAME."),
    "data.path",
]
AnchorOption = Annotated[
    list[str] | None, typer.Option(help="Name of the anchor column; twice for a text and its image."), "data.anchor"
]
PositiveOption = Annotated[
    list[str] | None, typer.Option(help="Name of the positive column; twice for a text and its image."), "data.positive"
]
ImagesOption = Annotated[
    str | None, typer.Option(help='Folder that paths of images start from; "" where there are none.'), "data.images"
]
LimitOption = Annotated[int | None, typer.Option(help="Use only the first pairs."), "data.limit"]
DeviceOption = Annotated[
    Literal["cpu", "cuda", "mps"] | None, typer.Option(help="By default a GPU if there is one."), "model.device"
]
ResumeOption = Annotated[bool, typer.Option("--resume", help="Go on with the run in the output folder.")]


@dataclass(frozen=True, kw_only=True)
class RunOptions:
    """The options of every verb that works from a run's configuration; None where one was not given."""

    config: Annotated[Path | None, typer.Option(help="A YAML file; `anybatch config` prints every key.")] = None
    sets: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="Override one value, such as loss.name=sogclr. Repeatable."),
    ] = None
    output: Annotated[
        str | None,
        typer.Option(help="Folder of the run, new or of the run to resume; by default runs/NAME of the data."),
        "output",
    ] = None
    data: DataOption = None
    anchor: AnchorOption = None
    positive: PositiveOption = None
    negative: Annotated[
        list[str] | None, typer.Option(help="Name of a column with explicit negatives. Repeatable."), "data.negatives"
    ] = None
    images: ImagesOption = None
    views: Annotated[
        int | None,
        typer.Option(help="2: the data are images without labels, of which two random views are made."),
        "data.views",
    ] = None
    limit: LimitOption = None
    model: Annotated[str | None, typer.Option(help="The model to train: folder or hub name."), "model.name"] = None
    device: DeviceOption = None
    teacher: Annotated[str | None, typer.Option(help="The model that ranks data for mining."), "teacher.name"] = None
    batch_size: Annotated[int | None, typer.Option(help="The contrastive batch of all processes."), "batch_size"] = None
    seed: Annotated[int | None, typer.Option(help="Fixes batches, initialisation and dropout."), "seed"] = None
    loss: Annotated[str | None, typer.Option(help="Such as infonce; by default recommended."), "loss.name"] = None
    recipe: Annotated[
        str | None, typer.Option(help="A published run's settings where you set none: b3 (B3 on MMEB).")
    ] = None

    def resolve(self, *, resume: bool = False) -> RunConfig:
        """The configuration from file, `--set` and short cuts (which win); a new run without a folder gets a free one.

        `resume` without `--config` takes the configuration kept in the run's folder.
        """
        from anybatch.core.yaml_files import load_config
        from anybatch.run.config import RunConfig
        from anybatch.run.recipes import RECIPES

        if self.recipe is not None and self.recipe not in RECIPES:
            raise AnybatchError(f"--recipe is {self.recipe!r}; expected one of: {', '.join(RECIPES)}.")
        config = self.config
        if resume and config is None:
            named = (item.removeprefix("output=") for item in self.sets or [] if item.startswith("output="))
            config = resumed(self.output or next(named, None))
        overrides: list[Any] = [*(self.sets or [])]
        for name, option in get_type_hints(type(self), include_extras=True).items():
            keys = [key for key in option.__metadata__ if isinstance(key, str)]
            overrides += [(key, getattr(self, name)) for key in keys if getattr(self, name) not in (None, [])]

        def complete(tree: dict[str, Any]) -> dict[str, Any]:
            tree = RECIPES[self.recipe](tree) if self.recipe is not None else tree
            alone = int(os.environ.get("WORLD_SIZE", "1")) == 1  # several processes could choose different folders
            if "output" not in tree and resume:
                raise _no_run_named()
            if "output" not in tree and tree.get("data") and alone:
                tree["output"] = str(free_name(Path("runs") / _data_name(tree)))
            return tree

        return load_config(RunConfig, config, overrides, complete)


@dataclass(frozen=True, kw_only=True)
class TrainOptions(RunOptions):
    """The options of a run that trains."""

    epochs: Annotated[int | None, typer.Option(help="Passes over the data."), "train.epochs"] = None
    learning_rate: Annotated[float | None, typer.Option(help="At its peak."), "train.learning_rate"] = None
    eval: Annotated[
        str | None,
        typer.Option(help="Held-out pairs; by default a part of --data (evaluation.path=null: none)."),
        "evaluation.path",
    ] = None
    plan: Annotated[
        str | None, typer.Option(help="A plan made by `anybatch mine`; without one it is made here."), "plan"
    ] = None


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
    """Give a verb the fields of its first argument, a dataclass, as options: typer reads the joined signature."""
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


def resumed(output: str | None) -> Path:
    """The configuration kept in a run's folder, for `--resume` without `--config`."""
    from anybatch.run.config import read_config

    if output is None:
        raise _no_run_named()
    path = Path(output) / "config.yaml"
    if not path.exists():
        raise AnybatchError(f"{output} holds no run to resume (no config.yaml). Start it without --resume.")
    read_config(path.parent)
    return path


def _no_run_named() -> AnybatchError:
    begun = [path.parent for path in Path("runs").glob("*/config.yaml") if not (path.parent / "metrics.json").exists()]
    unfinished = f" Unfinished here: {', '.join(sorted(map(str, begun)))}." if begun else ""
    return AnybatchError(f"--resume needs --output FOLDER, the folder of the run to go on with.{unfinished}")


def check_new(file: Path | None, option: str) -> None:
    """Refuse a file that is to be written and exists, or that has no folder to lie in, before any work."""
    if file is not None and file.exists():
        raise AnybatchError(f"{file} exists. Choose another file for {option}.")
    if file is not None and not file.absolute().parent.is_dir():
        raise AnybatchError(f"There is no folder {file.absolute().parent} for {option}. Make it, or choose another.")
