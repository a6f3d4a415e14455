"""`anybatch inspect`: what is in a plan or a run."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from anybatch.cli import inspect_gradient, inspect_plan
from anybatch.cli.progress import say, show
from anybatch.core.errors import AnybatchError

verbs = typer.Typer(help="What is in a plan or a run.", no_args_is_help=True, rich_markup_mode=None)
verbs.command(name="plan")(inspect_plan.command)
verbs.command(name="gradient")(inspect_gradient.command)


@verbs.command(name="run")
def command(path: Annotated[Path, typer.Argument(metavar="RUN", help="The folder of a run.")]) -> None:
    """Show what a run holds: its plan, what mining measured, results."""
    from anybatch.core.files import read_json
    from anybatch.insight.tables import metrics_table
    from anybatch.plans.plan import BatchPlan

    config, plan, mining, metrics = (
        path / name for name in ("config.yaml", "plan.safetensors", "mining.json", "metrics.json")
    )
    if not config.exists() and not plan.exists():
        raise AnybatchError(
            f"{path} holds no run (no config.yaml, no plan.safetensors). Give the folder that `anybatch mine` or "
            "`anybatch train` wrote; for a plan alone: anybatch inspect plan."
        )
    if plan.exists():
        _show(f"Plan {plan}", BatchPlan.load(plan).stats())
    if mining.exists():
        _show("Mining", read_json(mining, "Mine anew in another folder.", "plan", "audit"))
    if metrics.exists():
        result = read_json(metrics, "Delete it; anybatch train --resume makes it anew.", "num_steps")
        if result["metrics"]:
            show(metrics_table({"untrained": result["metrics_untrained"], "trained": result["metrics"]}))
        peak = result["train_peak_bytes"] / 2**30
        say(f"{result['num_steps']} steps in {result['train_seconds']:.0f} s, peak memory {peak:.2f} GiB")


def _show(title: str, figures: dict[str, Any]) -> None:
    table = Table(title=title, show_header=False, title_justify="left")
    for name, value in _flat(figures):
        table.add_row(name, value)
    show(table)


def _flat(figures: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    for name, value in figures.items():
        if isinstance(value, list) and value and isinstance(value[0], dict):
            value = {str(number): item for number, item in enumerate(value, start=1)}
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{name}.")
        elif isinstance(value, list) and len(value) > 12:
            yield prefix + name, f"{len(value)} values"
        else:
            yield prefix + name, f"{value:.4g}" if isinstance(value, float) else str(value)
