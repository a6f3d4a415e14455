"""Results as tables: on the terminal (rich) and as Markdown. Worse than the baseline is said in words and sign."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from rich.table import Table

SHOWN = {"recall@1": "recall@1", "recall@10": "recall@10", "mrr@10": "MRR@10", "ndcg@10": "nDCG@10"}
OF_CLASSES = {"knn": "k-NN", "linear": "linear probe", "top1": "top-1", "top5": "top-5"}
OF_CAPTIONS = {f"{way}@{k}": f"{way} R@{k}" for way in ("i2t", "t2i") for k in (1, 5, 10)}


@dataclass(frozen=True, kw_only=True)
class MethodResult:
    """One row of a comparison.

    Attributes:
        name: What was run.
        description: In a sentence.
        metrics: Figures by name.
        seconds: Wall time of training; None where nothing was trained.
        peak_bytes: Peak resident memory while training.
        loss: (pairs seen, training loss) along the way.

    Example:
        >>> metrics = {"recall@1": 0.5, "recall@10": 0.8, "mrr@10": 0.6, "ndcg@10": 0.65}
        >>> result = MethodResult(name="base", description="InfoNCE", metrics=metrics, seconds=10.0)
        >>> comparison_rows([result], baseline="base")[1][0][:3]
        ['base', '0.5000', '0.8000']
    """

    name: str
    description: str
    metrics: Mapping[str, float]
    seconds: float | None = None
    peak_bytes: int | None = None
    loss: Sequence[tuple[float, float]] = ()


def metrics_table(results: Mapping[str, Mapping[str, float]]) -> Table:
    """Figures of several models, one line each."""
    shown = {"hit@1": "hit@1"} | SHOWN | OF_CLASSES | OF_CAPTIONS
    names = [name for name in shown if any(name in metrics for metrics in results.values())]
    lines = [
        [label, *(f"{metrics[name]:.4f}" if name in metrics else "" for name in names)]
        for label, metrics in results.items()
    ]
    return rich_table(["", *(shown[name] for name in names)], lines, left=(0,))


def comparison_rows(results: Sequence[MethodResult], baseline: str) -> tuple[list[str], list[list[str]]]:
    """Header and lines of a comparison: figures, each with its difference to the baseline where it is worse or better.

    Args:
        results: The methods, in order.
        baseline: The name of the one the others are compared with.
    """
    base = next(result for result in results if result.name == baseline)
    header = ["method", *SHOWN.values(), "against baseline", "seconds", "peak memory"]
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
    return rich_table(header, lines, left=(0, 5))


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
