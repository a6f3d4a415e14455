"""Results as tables: on the terminal (rich) and as Markdown. Worse than the baseline is said in words and sign."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from rich.table import Table

SHOWN = ("recall@1", "recall@10", "mrr@10", "ndcg@10")
TITLES = {"recall@1": "recall@1", "recall@10": "recall@10", "mrr@10": "MRR@10", "ndcg@10": "nDCG@10"}


@dataclass(frozen=True, kw_only=True)
class MethodResult:
    """One row of a comparison.

    Attributes:
        name: What was run.
        description: In a sentence.
        metrics: Figures by name.
        seconds: Wall time of training; None where nothing was trained.
        peak_bytes: Peak resident memory while training.
        curve: (pairs seen, value) of a held-out figure along the way.
        loss: (pairs seen, training loss) along the way.
    """

    name: str
    description: str
    metrics: Mapping[str, float]
    seconds: float | None = None
    peak_bytes: int | None = None
    curve: Sequence[tuple[float, float]] = field(default_factory=tuple)
    loss: Sequence[tuple[float, float]] = field(default_factory=tuple)


def metrics_table(results: Mapping[str, Mapping[str, float]]) -> Table:
    """Figures of several models, one line each."""
    table = Table()
    table.add_column("")
    for name in SHOWN:
        table.add_column(TITLES[name], justify="right")
    for label, metrics in results.items():
        table.add_row(label, *(f"{metrics[name]:.4f}" if name in metrics else "" for name in SHOWN))
    return table


def comparison_rows(results: Sequence[MethodResult], baseline: str) -> tuple[list[str], list[list[str]]]:
    """Header and lines of a comparison: figures, each with its difference to the baseline where it is worse or better.

    Args:
        results: The methods, in order.
        baseline: The name of the one the others are compared with.
    """
    base = next(result for result in results if result.name == baseline)
    header = ["method", *(TITLES[name] for name in SHOWN), "against baseline", "seconds", "peak memory"]
    lines = []
    for result in results:
        difference = result.metrics["ndcg@10"] - base.metrics["ndcg@10"]
        if result is base:
            verdict = "baseline"
        elif result.seconds is None:
            verdict = ""
        else:
            verdict = f"{difference:+.4f} {'better' if difference > 0 else 'worse' if difference < 0 else 'equal'}"
        slower = result.seconds is not None and base.seconds is not None and result.seconds > 1.1 * base.seconds
        seconds = "" if result.seconds is None else f"{result.seconds:.0f}{' (slower)' if slower else ''}"
        memory = "" if result.peak_bytes is None else f"{result.peak_bytes / 2**20:.0f} MiB"
        lines.append([result.name, *(f"{result.metrics[name]:.4f}" for name in SHOWN), verdict, seconds, memory])
    return header, lines


def comparison_table(results: Sequence[MethodResult], baseline: str) -> Table:
    """The comparison for the terminal."""
    header, lines = comparison_rows(results, baseline)
    table = Table()
    for number, title in enumerate(header):
        table.add_column(title, justify="left" if number in (0, 5) else "right")
    for line in lines:
        table.add_row(*line)
    return table


def markdown_table(header: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """A Markdown table; bars in cells are escaped."""
    rows = [header, ["---"] * len(header), *lines]
    return "".join("| " + " | ".join(str(cell).replace("|", "\\|") for cell in row) + " |\n" for row in rows)
