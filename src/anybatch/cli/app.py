"""The verbs of the `anybatch` command."""

from __future__ import annotations

from typing import Annotated

import typer

from anybatch import __version__
from anybatch.cli import config, demo, doctor, evaluate, inspect_gradient, inspect_plan, mine, recommend, train

app = typer.Typer(
    name="anybatch",
    no_args_is_help=True,
    context_settings={"help_option_names": ["-h", "--help"]},
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


def _say_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"anybatch {__version__}")
        raise typer.Exit


@app.callback()
def command(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version and stop.", callback=_say_version, is_eager=True)
    ] = False,
) -> None:
    """Contrastive training at any batch size: choose the batch, grow it, outlive it."""


for verb in (demo, recommend, mine, train, evaluate, doctor, config):
    app.command(name=verb.__name__.rsplit(".", 1)[1])(verb.command)
inspect = typer.Typer(help="What is in a plan.", no_args_is_help=True, rich_markup_mode=None)
inspect.command(name="plan")(inspect_plan.command)
inspect.command(name="gradient")(inspect_gradient.command)
app.add_typer(inspect, name="inspect")
