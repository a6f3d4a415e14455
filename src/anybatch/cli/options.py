"""Options that verbs share: a configuration file, overrides, and short cuts for the values most people set.

Nothing of the library is imported before a verb is called, so that `--help` answers at once.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_type_hints

import typer
import yaml

from anybatch.core.errors import AnybatchError

if TYPE_CHECKING:
    from anybatch.run.config import RunConfig

ConfigOption = Annotated[
    Path | None, typer.Option("--config", help="A YAML file; `anybatch train --show-config` prints every key.")
]
SetOption = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Override one value, such as loss.name=sogclr. Repeatable."),
]
OutputOption = Annotated[
    str | None, typer.Option("--output", help="Folder of the run. Must be new, or hold the run to resume.")
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
ModelOption = Annotated[str | None, typer.Option("--model", help="The model to train: a folder or a hub name.")]
TeacherOption = Annotated[str | None, typer.Option("--teacher", help="The model that ranks the data for mining.")]
BatchSizeOption = Annotated[int | None, typer.Option("--batch-size", help="The contrastive batch, over all processes.")]
RecipeOption = Annotated[
    str | None,
    typer.Option("--recipe", help="A published run's settings where you set none: b3 (B3 on MMEB)."),
]
ResumeOption = Annotated[bool, typer.Option("--resume", help="Go on with the run in the output folder.")]


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
    model: ModelOption = None
    teacher: TeacherOption = None
    batch_size: BatchSizeOption = None
    recipe: RecipeOption = None

    def resolve(self, *, resume: bool = False, plan: str | None = None) -> RunConfig:
        """The configuration from file, `--set` and short cuts (which win).

        Args:
            resume: Without `--config`, take the configuration kept in the run's folder.
            plan: The short cut of `train` alone.
        """
        from anybatch.core.yaml_files import load_config
        from anybatch.run.config import RunConfig
        from anybatch.run.recipes import RECIPES

        if self.recipe is not None and self.recipe not in RECIPES:
            raise AnybatchError(f"--recipe is {self.recipe!r}; expected one of: {', '.join(RECIPES)}.")
        config = resumed(self.output) if resume and self.config is None else self.config
        short_cuts: dict[str, Any] = {
            "output": self.output,
            "data.path": self.data,
            "data.anchor": self.anchor,
            "data.positive": self.positive,
            "data.negatives": self.negative,
            "data.images": self.images,
            "data.views": self.views,
            "model.name": self.model,
            "teacher.name": self.teacher,
            "batch_size": self.batch_size,
            "plan": plan,
        }
        overrides = list(self.sets or [])
        for key, value in short_cuts.items():
            if value not in (None, []):
                text = yaml.safe_dump(value, default_flow_style=True).removesuffix("...\n").strip()
                overrides.append(f"{key}={text}")
        return load_config(RunConfig, config, overrides, RECIPES[self.recipe] if self.recipe is not None else dict)


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
