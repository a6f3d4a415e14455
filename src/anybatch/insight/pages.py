"""HTML pages, each one file that needs nothing else: one skeleton (base.html), tables and charts shared by all."""

from __future__ import annotations

from importlib.resources import files
from typing import Any

import jinja2
from markupsafe import Markup


def render(template: str, **values: Any) -> str:
    """The page as text. Whatever is put into it is escaped; charts are given as (caption, SVG) pairs of `drawings`."""
    environment = jinja2.Environment(
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        loader=jinja2.FunctionLoader(lambda file: files("anybatch.insight").joinpath(file).read_text(encoding="utf-8")),
    )
    return environment.get_template(template).render(**values)


def drawings(*charts: tuple[str, str]) -> list[tuple[str, Markup]]:
    """Charts with their captions, as a page takes them; what could not be drawn is left out."""
    return [(caption, Markup(drawing)) for caption, drawing in charts if drawing]
