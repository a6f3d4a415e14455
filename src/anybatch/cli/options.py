"""Options that verbs share: a configuration file, overrides, and short cuts for the values most people set."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from typing import Annotated, Any, get_type_hints

import typer
import yaml

from anybatch.core.configuration import load_config
from anybatch.core.errors import AnybatchError
from anybatch.run.config import RunConfig, read_config

ConfigOption = Annotated[
    Path | None,
    typer.Option("--config", help="A YAML file; `anybatch train --show-config --output x --data x` prints every key."),
]
SetOption = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Override one value, such as loss.name=sogclr. Repeatable."),
]
OutputOption = Annotated[
    str | None, typer.Option("--output", help="Folder of the run. Must be new, or hold the run to resume.")
]
DataOption = Annotated[
    str | None, typer.Option("--data", help="Pairs: JSONL(.gz), CSV, TSV, Parquet, or a folder saved by `datasets`.")
]
AnchorOption = Annotated[str | None, typer.Option("--anchor", help="Name of the anchor column.")]
PositiveOption = Annotated[str | None, typer.Option("--positive", help="Name of the positive column.")]
NegativeOption = Annotated[
    list[str] | None, typer.Option("--negative", help="Name of a column with explicit negatives. Repeatable.")
]
ImageOption = Annotated[
    list[str] | None,
    typer.Option(
        "--image", help='Name of a column that holds paths of images (`data.images`); "" for none. Repeatable.'
    ),
]
ModelOption = Annotated[str | None, typer.Option("--model", help="The model to train: a folder or a hub name.")]
TeacherOption = Annotated[str | None, typer.Option("--teacher", help="The model that ranks the data for mining.")]
BatchSizeOption = Annotated[int | None, typer.Option("--batch-size", help="The contrastive batch, over all processes.")]


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
    model: ModelOption = None
    teacher: TeacherOption = None
    batch_size: BatchSizeOption = None

    def resolve(self, *, resume: bool = False, plan: str | None = None) -> RunConfig:
        """The configuration from file, `--set` and short cuts (which win).

        Args:
            resume: Without `--config`, take the configuration kept in the run's folder.
            plan: The short cut of `train` alone.
        """
        config = resumed(self.output) if resume and self.config is None else self.config
        short_cuts: dict[str, Any] = {
            "output": self.output,
            "data.path": self.data,
            "data.anchor": self.anchor,
            "data.positive": self.positive,
            "data.negatives": self.negative,
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
        return load_config(RunConfig, config, overrides)


def with_run_options(command: Callable[..., None]) -> Callable[..., None]:
    """Give a verb the options of `RunOptions`, which it receives as its first argument, before its own options.

    Typer reads a function's signature, so the wrapper states the joined one.
    """
    own = list(inspect.signature(command, eval_str=True).parameters.values())[1:]
    hints = get_type_hints(RunOptions, include_extras=True)
    shared = [
        inspect.Parameter(
            entry.name,
            inspect.Parameter.KEYWORD_ONLY,
            default=inspect.Parameter.empty if entry.default is MISSING else entry.default,
            annotation=hints[entry.name],
        )
        for entry in fields(RunOptions)
    ]
    joined = [*shared, *(parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY) for parameter in own)]

    def verb(**given: Any) -> None:
        options = RunOptions(**{parameter.name: given.pop(parameter.name) for parameter in shared})
        command(options, **given)

    verb.__signature__ = inspect.Signature(joined)  # pyright: ignore[reportFunctionMemberAccess]
    verb.__annotations__ = {parameter.name: parameter.annotation for parameter in joined}
    verb.__doc__ = command.__doc__
    return verb


def resumed(output: str | None) -> Path | None:
    """The configuration kept in a run's folder, for `--resume` without `--config`."""
    if output is None:
        return None
    path = Path(output) / "config.yaml"
    if not path.exists():
        raise AnybatchError(f"{output} holds no run to resume (no config.yaml). Start it without --resume.")
    read_config(path.parent)
    return path
