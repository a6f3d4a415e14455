"""The verbs of the `anybatch` command."""

from __future__ import annotations

import typer

from anybatch.cli import demo, doctor, evaluate, inspect, mine, train

app = typer.Typer(
    name="anybatch",
    help="Contrastive training at any batch size: choose the batch, grow it, outlive it.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
for verb in (demo, mine, train, evaluate, doctor):
    app.command(name=verb.__name__.rsplit(".", 1)[1])(verb.command)
app.add_typer(inspect.verbs, name="inspect")
