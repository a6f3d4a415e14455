"""`anybatch config`: every setting."""

from __future__ import annotations

from typing import Annotated

import typer

from anybatch.core.errors import AnybatchError


def command(
    section: Annotated[str, typer.Argument(metavar="[SECTION]", help="Such as train, or a part of a key.")] = "",
) -> None:
    """Print every setting with what it may be, its default and its meaning: for a file of --config, and for --set."""
    from anybatch.run.settings import listing, settings_of

    settings = [setting for setting in settings_of() if section in setting.key]
    if not settings:
        raise AnybatchError(f"No setting has {section!r} in its name. `anybatch config` prints all.")
    typer.echo(listing(settings).strip())
