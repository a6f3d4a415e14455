"""`anybatch inspect`: what is in a plan, and how near methods come to the gradient over all data."""

from __future__ import annotations

import typer

from anybatch.cli import inspect_gradient, inspect_plan

verbs = typer.Typer(help="What is in a plan.", no_args_is_help=True, rich_markup_mode=None)
verbs.command(name="plan")(inspect_plan.command)
verbs.command(name="gradient")(inspect_gradient.command)
