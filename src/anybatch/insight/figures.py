"""A figure with its pass mark: a figure that decides nothing is not shown."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

VERDICTS = {True: "good", False: "not good", None: "within noise"}


@dataclass(frozen=True, kw_only=True)
class Figure:
    """What was measured, what is good, and why.

    Attributes:
        name, value: As they are shown.
        good: The pass mark, in words.
        passed: Whether the value meets it; None where noise hides it.
        why: What the figure is, and what follows where it is not good.
        beside: The same figure of random batches, where that is what it is compared with.

    Example:
        >>> Figure(name="own positive first", value="54%", good="40% or more", passed=True, why="...").verdict
        'good'
    """

    name: str
    value: str
    good: str
    passed: bool | None
    why: str
    beside: str = ""

    @property
    def verdict(self) -> str:
        """In words, for those who see no colours."""
        return VERDICTS[self.passed]


def figure_lines(figures: Sequence[Figure]) -> tuple[list[str], list[list[str]]]:
    """Header and lines of a table; a column for random batches where a figure has them."""
    with_random = any(figure.beside for figure in figures)
    header = ["", "value", *(["random batches"] if with_random else []), "good is", ""]
    lines = [
        [figure.name, figure.value, *([figure.beside] if with_random else []), figure.good, figure.verdict]
        for figure in figures
    ]
    return header, lines
