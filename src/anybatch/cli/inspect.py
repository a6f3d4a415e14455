"""`anybatch inspect`: what is in a plan or a run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from anybatch.cli.progress import console
from anybatch.errors import AnybatchError
from anybatch.plan import BatchPlan
from anybatch.report.tables import metrics_table


def command(
    path: Annotated[Path, typer.Argument(help="A plan (.safetensors) or the folder of a run.")],
) -> None:
    """Show what a plan or a run holds: batches, clusters, mining figures, results."""
    if path.is_dir():
        if not any((path / name).exists() for name in ("config.yaml", "plan.safetensors")):
            raise AnybatchError(f"{path} holds neither a run (config.yaml) nor a plan (plan.safetensors).")
        plan_path = path / "plan.safetensors"
    else:
        plan_path = path
    if plan_path.exists() or not path.is_dir():
        _show(f"Plan {plan_path}", BatchPlan.load(plan_path).stats())
    folder = plan_path.parent
    for name, title in (("mining.json", "Mining"),):
        if (folder / name).exists():
            _show(title, json.loads((folder / name).read_text(encoding="utf-8")))
    if path.is_dir() and (path / "metrics.json").exists():
        result = json.loads((path / "metrics.json").read_text(encoding="utf-8"))
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
        elif isinstance(value, float):
            rows.append((prefix + name, f"{value:.4g}"))
        elif isinstance(value, list) and len(value) > 12:
            rows.append((prefix + name, f"{len(value)} values"))
        else:
            rows.append((prefix + name, str(value)))
    return rows
