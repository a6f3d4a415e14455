"""Write the reference pages that are made from docstrings and from `--help`: what is said in the source, once.

    python tools/reference.py [--check]

methods.md and relatives.md are the losses, api.md the public names, commands.md the command line. With `--check`
nothing is written; exit code 1 if a page is not what would be written.
"""

from __future__ import annotations

import inspect
import re
import sys
import textwrap
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import typer.main

import anybatch
from anybatch.cli.app import app
from anybatch.integrations import sentence_transformers as integration
from anybatch.losses.base import OneTemperature, Scoring
from anybatch.losses.gamma import GammaSchedule
from anybatch.losses.matryoshka import Matryoshka
from anybatch.losses.registry import METHODS, method_of

DOCS = Path(__file__).parents[1] / "docs"
LISTS = ("Args", "Attributes", "Raises", "Warns")
TEXTS = ("Inputs", "Returns", "Relations", "Requirements")
LEADS = ("When", "When not", "Evidence", "Cost", "Reference")
HEADER = "Written by `python tools/reference.py` from the docstrings.\n"
CORE = ("infonce", "decoupled", "count_corrected", "cross_batch", "sogclr")
NOTATION = (
    "Notation: anchor i, candidate j, positive p(i) or p, similarity `s_ij`, `d_ij = s_ij - s_ip`, temperature `tau`, "
    "log-weight `b_ij` (a mask is -inf), n rows of data, B pairs in the batch, k candidates but the positive."
)
MORE_NAMES = ("LossStateCallback", "PlanBatches", "with_index", "last_whole_checkpoint")


def methods() -> str:
    """The losses of the core, a table of all, and the options that they share."""
    names = {method_of(name): name for name in METHODS}
    lines = ["# Losses", "", "This page lists every loss and explains those of the core.", HEADER]
    lines += ["`loss.name` is the name in a configuration file and of `anybatch train --loss`.", ""]
    lines += ["| class | `loss.name` | what it is |", "|---|---|---|"]
    for kind, name in names.items():
        page = "" if name in CORE else "relatives.md"
        summary = " ".join(next(_blocks(inspect.getdoc(kind) or ""))).rstrip(".:")
        lines.append(f"| [{kind.__name__}]({page}#{kind.__name__.lower()}) | `{name}` | {summary} |")
    lines += ["", *_wrapped(NOTATION), ""]
    for kind in (*map(method_of, CORE), GammaSchedule, Matryoshka):
        lines += _class(kind)
    lines += ["## Options of every loss", ""]
    for kind in (Scoring, OneTemperature):
        lines += _body(kind)
    return _page(lines)


def relatives() -> str:
    """The published relatives."""
    lines = ["# Further published losses", "", "This page explains the losses around SogCLR and InfoNCE.", HEADER]
    lines += ["Notation and shared options: [losses](methods.md).", ""]
    for name in METHODS:
        lines += _class(method_of(name)) if name not in CORE else []
    return _page(lines)


def api() -> str:
    """The public names but the losses."""
    losses = {method_of(name) for name in METHODS}
    things = {name: getattr(anybatch, name) for name in anybatch.__all__ if name != "sample"}
    things |= {name: getattr(integration, name) for name in MORE_NAMES}
    lines = ["# Public names", "", "This page lists what `anybatch` exports, but for the [losses](methods.md).", HEADER]
    named = ", ".join(f"`{name}`" for name in MORE_NAMES)
    lines += [*_wrapped(f"{named} are in `anybatch.integrations.sentence_transformers`."), ""]
    for thing in things.values():
        lines += _class(thing) if thing not in losses else []
    return _page(lines)


def commands() -> str:
    """`--help` of every verb."""
    lines = [
        "# Command line",
        "",
        "This page is the `--help` of every command.",
        HEADER.replace("from the docstrings", "from the command line"),
    ]
    for name, text in _helps(typer.main.get_command(app), "anybatch"):
        lines += [f"## {name}", "", "```text", *text.rstrip().splitlines(), "```", ""]
    return _page(lines)


def _helps(command: Any, name: str, parent: Any = None) -> Iterator[tuple[str, str]]:
    context = command.make_context(name, [], parent=parent, resilient_parsing=True, max_content_width=100)
    context.terminal_width = 100
    yield context.command_path, command.get_help(context)
    for verb, inner in getattr(command, "commands", {}).items():
        yield from _helps(inner, verb, context)


def _class(thing: Any) -> list[str]:
    """A heading, how it is called, and its docstring."""
    lines = [f"## {thing.__name__}", ""]
    if thing is not anybatch.AnybatchError:
        parameters = [str(each.replace(annotation=each.empty)) for each in inspect.signature(thing).parameters.values()]
        call = f"{thing.__name__}({', '.join(parameters)})"
        lines += ["```text", *textwrap.wrap(call, 110, subsequent_indent="    "), "```", ""]
    return lines + _body(thing)


def _body(thing: Any) -> list[str]:
    """A docstring as Markdown."""
    lines: list[str] = []
    for block in _blocks(inspect.getdoc(thing) or ""):
        title = block[0].removesuffix(":")
        if block[0].startswith(" "):
            lines += ["```text", *textwrap.dedent("\n".join(block)).splitlines(), "```"]
        elif block[0].startswith(">>>"):
            lines += ["```python", *block, "```"]
        elif title in LISTS:
            lines += [f"**{title}**", "", *_entries(block[1:])]
        else:
            text = " ".join(line.strip() for line in block)
            for lead in (*TEXTS, *LEADS):
                text = re.sub(rf"(^|(?<=[.)] )){lead}: ", f"\n\n**{lead}.** ", text)
            for paragraph in text.strip().split("\n\n"):
                paragraph = re.sub(
                    r"^(\*\*\w[\w ]*\.\*\* )([a-z])(?=[a-z]* )", lambda m: m[1] + m[2].upper(), paragraph.strip()
                )
                lines += [*_wrapped(paragraph), ""]
            lines.pop()
        lines.append("")
    return lines


def _blocks(text: str) -> Iterator[list[str]]:
    """Paragraphs, indented parts and whole lists of a docstring; what is under `Example:` is no longer indented."""
    block: list[str] = []
    example = False
    for line in [*text.splitlines(), ""]:
        example = (example or line == "Example:") and not (line and line[0] != " " and line != "Example:")
        line = line.removeprefix("    ") if example else line
        starts = line.endswith(":") and line.removesuffix(":") in (*LISTS, *TEXTS, "Example")
        inside = block and block[0].removesuffix(":") in (*LISTS, *TEXTS)
        if starts or not line or (block and (line[0] == " ") != (block[-1][0] == " ") and not inside):
            if block:
                yield block
            block = []
        if line and line != "Example:":
            block.append(line)


def _entries(lines: Iterable[str]) -> list[str]:
    """The items of a list, such as `name: meaning`, whose further lines are indented by eight."""
    items: list[str] = []
    for line in lines:
        if line.startswith(" " * 8):
            items[-1] += " " + line.strip()
        else:
            items.append(line.strip())
    return [line for item in items for line in _wrapped("* " + re.sub(r"^([^:]+):", r"`\1`:", item))]


def _wrapped(text: str) -> list[str]:
    text = re.sub(r"docs/([\w/]+\.md)", r"[\1](\1)", text)
    indent = "  " if text.startswith("* ") else ""
    return textwrap.wrap(text, 120, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False)


def _page(lines: Iterable[str]) -> str:
    return re.sub(r"\n{3,}", "\n\n", "\n".join(lines)).rstrip() + "\n"


PAGES: dict[str, Callable[[], str]] = {
    "methods.md": methods,
    "relatives.md": relatives,
    "api.md": api,
    "commands.md": commands,
}

if __name__ == "__main__":
    if "--check" in sys.argv:
        sys.exit(any((DOCS / name).read_text(encoding="utf-8") != page() for name, page in PAGES.items()))
    for name, page in PAGES.items():
        (DOCS / name).write_text(page(), encoding="utf-8")
