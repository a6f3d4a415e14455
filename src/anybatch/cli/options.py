"""Options that `mine` and `train` share: a configuration file, overrides, and short cuts for the values most people set."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
import yaml

from anybatch.configuration import load_config
from anybatch.errors import AnybatchError
from anybatch.run_config import RunConfig

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
    str | None, typer.Option("--data", help="Pairs: JSONL(.gz), CSV, TSV, Parquet, or a folder saved by `datasets`.")
]
AnchorOption = Annotated[str | None, typer.Option("--anchor", help="Name of the anchor column.")]
PositiveOption = Annotated[str | None, typer.Option("--positive", help="Name of the positive column.")]
NegativeOption = Annotated[
    list[str] | None, typer.Option("--negative", help="Name of a column with explicit negatives. Repeatable.")
]
ModelOption = Annotated[str | None, typer.Option("--model", help="The model to train: a folder or a hub name.")]
TeacherOption = Annotated[str | None, typer.Option("--teacher", help="The model that ranks the data for mining.")]
BatchSizeOption = Annotated[int | None, typer.Option("--batch-size", help="The contrastive batch, over all processes.")]


def resolve(config: Path | None, sets: list[str] | None, **short_cuts: Any) -> RunConfig:
    """The configuration from file, `--set` and short cuts (which win).

    Args:
        config: The file, or None.
        sets: `--set` values.
        **short_cuts: Dotted key with `__` for the dot, and its value; None where the option was not given.
    """
    overrides = list(sets or [])
    for key, value in short_cuts.items():
        if value not in (None, []):
            overrides.append(
                f"{key.replace('__', '.')}={yaml.safe_dump(value, default_flow_style=True).removesuffix('...' + chr(10)).strip()}"
            )
    return load_config(RunConfig, config, overrides)


def resumed(output: str | None) -> Path | None:
    """The configuration kept in a run's folder, for `--resume` without `--config`."""
    if output is None:
        return None
    path = Path(output) / "config.yaml"
    if not path.exists():
        raise AnybatchError(f"{output} holds no run to resume (no config.yaml). Start it without --resume.")
    return path
