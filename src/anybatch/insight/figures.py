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
        beside: What it is compared with, such as the same figure of random batches.

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
    """Header and lines of a table."""
    lines = [[figure.name, figure.value, figure.beside, figure.good, figure.verdict] for figure in figures]
    return ["", "value", "compared with", "good is", ""], lines
