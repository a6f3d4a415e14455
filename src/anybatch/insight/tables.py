"""Results as tables: on the terminal (rich) and as Markdown."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from rich.table import Table

SHOWN = {"recall@1": "recall@1", "recall@10": "recall@10", "mrr@10": "MRR@10", "ndcg@10": "nDCG@10"}


def metrics_table(results: Mapping[str, Mapping[str, float]]) -> Table:
    """Figures of several models, one line each."""
    lines = [
        [label, *(f"{metrics[name]:.4f}" if name in metrics else "" for name in SHOWN)]
        for label, metrics in results.items()
    ]
    return rich_table(["", *SHOWN.values()], lines, left=(0,))


def rich_table(
    header: Sequence[str], lines: Sequence[Sequence[str]], *, left: Sequence[int], title: str | None = None
) -> Table:
    """A table for the terminal; the columns numbered in `left` begin at the left, numbers end at the right."""
    table = Table(title=title, title_justify="left")
    for number, name in enumerate(header):
        table.add_column(name, justify="left" if number in left else "right")
    for line in lines:
        table.add_row(*line)
    return table


def markdown_table(header: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """A Markdown table; bars in cells are escaped."""
    rows = [header, ["---"] * len(header), *lines]
    return "".join("| " + " | ".join(str(cell).replace("|", "\\|") for cell in row) + " |\n" for row in rows)
