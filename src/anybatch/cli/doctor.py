"""`anybatch doctor`: whether caching is exact for a model, its data and a loss."""

from __future__ import annotations

from dataclasses import replace
from typing import Annotated

import typer
from rich.table import Table

from anybatch.cli.options import RunOptions, with_run_options
from anybatch.cli.progress import console
from anybatch.insight.doctor import examine
from anybatch.insight.verify import Verification


@with_run_options
def command(
    options: RunOptions,
    rows: Annotated[int, typer.Option("--rows", help="Rows of the batch that is taken both ways.")] = 16,
    show_all: Annotated[bool, typer.Option("--all", help="Show every parameter, not the worst ten.")] = False,
) -> None:
    """Take one small batch plainly and cached, compare the gradients, and name what breaks exactness. Exit code 1 if not exact."""
    if options.config is None:  # nothing is written, so no folder need be named, and no batch of the run need be filled
        options = replace(options, output=options.output or "unused", batch_size=options.batch_size or rows)
    settings = options.resolve()
    result = examine(settings, num_rows=rows)
    if result.errors:
        console.print(_table(result, len(result.errors) if show_all else 10))
        console.print(
            f"All parameters together: relative error {result.error:.1e} (tolerance {result.tolerance:.0e}); loss {result.loss_error:.1e}.",
            highlight=False,
        )
    for finding in result.findings:
        console.print(f"! {finding}", highlight=False, markup=False)
    console.print(
        "Exact: the cached step gives the plain step's gradient." if result.exact else "NOT exact.", highlight=False
    )
    if not result.exact:
        raise typer.Exit(1)


def _table(result: Verification, shown: int) -> Table:
    worst = sorted(result.errors.items(), key=lambda item: -item[1])
    table = Table(title="Relative error of the gradient", title_justify="left")
    table.add_column("parameter")
    table.add_column("error", justify="right")
    for name, error in worst[:shown]:
        table.add_row(name, f"{error:.1e}")
    if len(worst) > shown:
        table.add_row(f"{len(worst) - shown} more, at most", f"{worst[shown][1]:.1e}")
    return table
