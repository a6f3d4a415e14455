"""Quality against batch size, from several seeds: what differs by more than noise, and what does not."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

ERRORS = 2.0  # standard errors of a difference, from which it is no noise
NOISE = "within noise"


@dataclass(frozen=True, kw_only=True)
class Curves:
    """Figures of some methods at some batch sizes.

    Three seeds tell little of their own spread, so the standard error is of the standard deviation pooled over all
    methods and sizes.

    Attributes:
        figures: For each method and each batch size the figure of every seed, in the same order; at least two.

    Example:
        >>> curves = Curves(figures={"a": {16: [0.30, 0.31], 64: [0.40, 0.41]}, "b": {16: [0.41, 0.42]}})
        >>> curves.verdict(("b", 16), ("a", 16)), curves.verdict(("b", 16), ("a", 64))
        ('+.110', 'within noise')
    """

    figures: Mapping[str, Mapping[int, Sequence[float]]]

    @property
    def means(self) -> dict[str, dict[int, float]]:
        """The mean over the seeds."""
        return {
            method: {size: statistics.fmean(figures) for size, figures in sizes.items()}
            for method, sizes in self.figures.items()
        }

    @property
    def error(self) -> float:
        """The standard error of a mean."""
        cells = [figures for sizes in self.figures.values() for figures in sizes.values()]
        return math.sqrt(statistics.fmean(map(statistics.variance, cells)) / len(cells[0]))

    def verdict(self, one: tuple[str, int], other: tuple[str, int]) -> str:
        """How much higher one mean is than another, each given by method and size; or that they differ by noise."""
        difference = self.means[one[0]][one[1]] - self.means[other[0]][other[1]]
        if abs(difference) <= ERRORS * math.sqrt(2) * self.error:
            return NOISE
        return _short(difference, "+.3f")

    def rows(self, method: str, baseline: str) -> tuple[list[str], list[list[str]]]:
        """A table, a line for each size: both means with their error, and the difference."""
        header = ["batch size", baseline, method, "difference"]
        lines = [
            [
                f"{size:,}",
                *(
                    f"{_short(self.means[name][size], '.3f')} ± {_short(self.error, '.3f')}"
                    for name in (baseline, method)
                ),
                self.verdict((method, size), (baseline, size)),
            ]
            for size in self.figures[method]
        ]
        return header, lines

    def sentences(self, method: str, baseline: str) -> list[str]:
        """What the figures say in words, and no more."""
        sizes = sorted(self.figures[method])
        small, large = sizes[0], sizes[-1]
        sentences = []
        for name in (baseline, method):
            change = self.verdict((name, small), (name, large))
            words = {"+": "higher", "-": "lower"}.get(change[0])
            sentences.append(
                f"{name}: batches of {small:,} and {large:,} differ {NOISE}."
                if words is None
                else f"{name}: {change[1:]} {words} in batches of {small:,} than in batches of {large:,}."
            )
        verdicts = {size: self.verdict((method, size), (baseline, size)) for size in sizes}
        for sign, words in (("+", "above"), ("-", "below")):
            found = [f"{size:,} ({verdict})" for size, verdict in verdicts.items() if verdict.startswith(sign)]
            if found:
                sentences.append(f"{method} is {words} {baseline} at batches of {', '.join(found)}.")
        even = [f"{size:,}" for size, verdict in verdicts.items() if verdict == NOISE]
        if even:
            sentences.append(f"{method} and {baseline} differ {NOISE} at batches of {', '.join(even)}.")
        return sentences


def _short(value: float, form: str) -> str:
    """Without the zero before the point."""
    return format(value, form).replace("0.", ".", 1)
