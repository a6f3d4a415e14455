"""Results as tables, on the terminal (rich) and as Markdown; figures with pass marks, without which none is shown."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from rich.table import Table

SHOWN = {"recall@1": "recall@1", "recall@10": "recall@10", "mrr@10": "MRR@10", "ndcg@10": "nDCG@10"}
OF_CLASSES = {"knn": "k-NN", "linear": "linear probe", "top1": "top-1", "top5": "top-5"}
OF_CAPTIONS = {f"{way}@{k}": f"{way} R@{k}" for way in ("i2t", "t2i") for k in (1, 5, 10)}
VERDICTS = {True: "good", False: "not good", None: "within noise"}


@dataclass(frozen=True, kw_only=True)
class Figure:
    """What was measured, what is good, and why.

    Example:
        >>> Figure(name="own positive first", value="54%", good="40% or more", passed=True, why="...").verdict
        'good'
    """

    name: str
    value: str
    good: str  # the pass mark, in words
    passed: bool | None  # whether the value meets it; None where noise hides it
    why: str  # what the figure is, and what follows where it is not good
    beside: str = ""  # what it is compared with, such as the same figure of random batches

    @property
    def verdict(self) -> str:
        """In words, for those who see no colours."""
        return VERDICTS[self.passed]


def figure_table(figures: Sequence[Figure], title: str) -> Table:
    """Figures beside their pass marks."""
    lines = [[figure.name, figure.value, figure.beside, figure.good, figure.verdict] for figure in figures]
    return rich_table(["", "value", "compared with", "good is", ""], lines, left=range(5), title=title)


def metrics_table(results: Mapping[str, Mapping[str, float]]) -> Table:
    """Figures of several models, one line each."""
    shown = {"hit@1": "hit@1"} | SHOWN | OF_CLASSES | OF_CAPTIONS
    names = [name for name in shown if any(name in metrics for metrics in results.values())]
    lines = [
        [label, *(f"{metrics[name]:.4f}" if name in metrics else "" for name in names)]
        for label, metrics in results.items()
    ]
    return rich_table(["", *(shown[name] for name in names)], lines, left=(0,))


def what_is_open(results: Mapping[str, Mapping[str, float]]) -> str:
    """How far chance may have moved retrieval figures, by the number of queries; "" for figures of another kind."""
    sizes = {metrics["num_queries"] for metrics in results.values() if metrics.get("num_queries")}
    means = [metrics[name] for metrics in results.values() for name in SHOWN if name in metrics]
    if len(sizes) != 1 or not means:
        return ""
    (size,) = sizes
    error = math.sqrt(max(mean * (1 - mean) for mean in means) / size)  # of what lies in [0, 1] the variance is less
    pairs = {metrics.get("num_pairs", size) for metrics in results.values()} - {size}
    of_pairs = f" of {max(pairs):,.0f} pairs (equal anchors are one query)" if pairs else ""
    return f"{size:,.0f} queries{of_pairs}; the standard error of a figure is at most {error:.3f}."


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
