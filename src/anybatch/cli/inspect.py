"""`anybatch inspect`: what is in a plan or a run."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from anybatch.cli import inspect_gradient, inspect_plan
from anybatch.cli.progress import say, show
from anybatch.core.errors import AnybatchError

verbs = typer.Typer(help="What is in a plan or a run.", no_args_is_help=True, rich_markup_mode=None)
verbs.command(name="plan")(inspect_plan.command)
verbs.command(name="gradient")(inspect_gradient.command)


@verbs.command(name="run")
def command(path: Annotated[Path, typer.Argument(metavar="RUN", help="The folder of a run.")]) -> None:
    """Show what a run holds: its plan, what mining warned of, results."""
    from anybatch.core.files import read_json
    from anybatch.insight.plan_figures import plan_sentence, stored_warnings
    from anybatch.insight.tables import metrics_table
    from anybatch.plans.plan import BatchPlan

    config, plan, metrics = (path / name for name in ("config.yaml", "plan.safetensors", "metrics.json"))
    if not config.exists() and not plan.exists():
        raise AnybatchError(
            f"{path} holds no run (no config.yaml, no plan.safetensors). Give the folder that `anybatch mine` or "
            "`anybatch train` wrote; for a plan alone: anybatch inspect plan."
        )
    if plan.exists():
        chosen = BatchPlan.load(plan)
        say(f"{plan}: {plan_sentence(chosen)}")
        for warning in stored_warnings(path, chosen):
            say(f"Warning: {warning}")
    if metrics.exists():
        result = read_json(metrics, "Delete it; anybatch train --resume makes it anew.", "num_steps")
        if result["metrics"]:
            show(metrics_table({"untrained": result["metrics_untrained"], "trained": result["metrics"]}))
        peak = result["train_peak_bytes"] / 2**30
        say(f"{result['num_steps']} steps in {result['train_seconds']:.0f} s, peak memory {peak:.2f} GiB")
