"""`anybatch inspect`: what is in a plan or a run."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from anybatch.cli import inspect_gradient, inspect_plan
from anybatch.cli.progress import console
from anybatch.core.errors import AnybatchError
from anybatch.core.files import read_json
from anybatch.insight.tables import metrics_table
from anybatch.plans.plan import BatchPlan


def command(path: Annotated[Path, typer.Argument(metavar="RUN", help="The folder of a run.")]) -> None:
    """Show what a run holds: its plan, what mining measured, results."""
    if not any((path / name).exists() for name in ("config.yaml", "plan.safetensors")):
        raise AnybatchError(
            f"{path} holds no run (no config.yaml, no plan.safetensors). Give the folder that `anybatch mine` or `anybatch train` wrote; "
            "for a plan alone: anybatch inspect plan."
        )
    if (path / "plan.safetensors").exists():
        _show(f"Plan {path / 'plan.safetensors'}", BatchPlan.load(path / "plan.safetensors").stats())
    if (path / "mining.json").exists():
        _show("Mining", read_json(path / "mining.json", "Mine anew in another folder.", "plan", "audit"))
    if (path / "metrics.json").exists():
        result = read_json(path / "metrics.json", "Delete it; anybatch train --resume makes it anew.", "num_steps")
        if result["metrics"]:
            console.print(metrics_table({"untrained": result["metrics_untrained"], "trained": result["metrics"]}))
        console.print(
            f"{result['num_steps']} steps in {result['train_seconds']:.0f} s, peak memory {result['train_peak_bytes'] / 2**30:.2f} GiB",
            highlight=False,
        )


def _show(title: str, figures: dict[str, Any], prefix: str = "") -> None:
    table = Table(title=title, show_header=False, title_justify="left")
    for name, value in _flat(figures, prefix):
        table.add_row(name, value)
    console.print(table)


def _flat(figures: dict[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    rows: list[tuple[str, str]] = []
    for name, value in figures.items():
        if isinstance(value, dict):
            rows += _flat(value, f"{prefix}{name}.")
        elif isinstance(value, list) and value and isinstance(value[0], dict):
            rows += _flat({str(number): one for number, one in enumerate(value, start=1)}, f"{prefix}{name}.")
        elif isinstance(value, float):
            rows.append((prefix + name, f"{value:.4g}"))
        elif isinstance(value, list) and len(value) > 12:
            rows.append((prefix + name, f"{len(value)} values"))
        else:
            rows.append((prefix + name, str(value)))
    return rows


verbs = typer.Typer(help="What is in a plan or a run.", no_args_is_help=True, rich_markup_mode=None)
verbs.command(name="plan")(inspect_plan.command)
verbs.command(name="run")(command)
verbs.command(name="gradient")(inspect_gradient.command)
