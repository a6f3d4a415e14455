"""`anybatch doctor`: whether caching is exact for a model, its data and a loss."""

from __future__ import annotations

from dataclasses import replace
from typing import Annotated

import typer

from anybatch.cli.options import RunOptions, with_options
from anybatch.cli.progress import say, show


@with_options
def command(
    options: RunOptions,
    rows: Annotated[int, typer.Option("--rows", help="Rows of the batch that is taken both ways.")] = 16,
    show_all: Annotated[bool, typer.Option("--all", help="Show every parameter, not the worst ten.")] = False,
) -> None:
    """Take one small batch plainly and cached, compare the gradients, and name what breaks exactness.

    Exit code 1 if not exact.
    """
    from anybatch.insight.doctor import examine
    from anybatch.insight.tables import rich_table

    options = replace(options, output=options.output or "unused")  # nothing is written
    if options.config is None:  # no batch of a run need be filled
        options = replace(options, batch_size=options.batch_size or rows)
    result = examine(options.resolve(), num_rows=rows)
    if result.errors:
        worst = sorted(result.errors.items(), key=lambda item: -item[1])
        shown = len(worst) if show_all else 10
        lines = [(name, f"{error:.1e}") for name, error in worst[:shown]]
        if worst[shown:]:
            lines.append((f"{len(worst) - shown} more, at most", f"{worst[shown][1]:.1e}"))
        title = "Relative error of the gradient"
        show(rich_table(["parameter", "error"], lines, left=(0,), title=title), whole=True)
        together = f"relative error {result.error:.1e} (tolerance {result.tolerance:.0e}); loss {result.loss_error:.1e}"
        say(f"All parameters together: {together}.")
    for finding in result.findings:
        say(f"! {finding}")
    say("Exact: the cached step gives the plain step's gradient." if result.exact else "NOT exact.")
    if not result.exact:
        raise typer.Exit(1)
