"""Small charts as SVG text: bars, lines with error bars; for light and dark, narrow windows and screen readers."""

from __future__ import annotations

import math
import zlib
from collections.abc import Mapping, Sequence
from html import escape

COLOURS = ("#2f6fde", "#d9730d", "#2a9d62", "#b5489a", "#7a6ff0", "#c0392b", "#4b8f9a", "#8a7a2b")
METHODS = ("InfoNCE", "recommended", "count-corrected", "cross-batch", "memory")  # each with a colour of its own
NAMES = {"infonce": "InfoNCE", "count_corrected": "count-corrected", "cross_batch": "cross-batch"}
WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 480, 330, 54, 8, 62, 54
BAR = 46  # height of a bar with its label above it
LONG = 52  # characters that fit into the width
STYLE = (
    "<style>:root{color-scheme:light dark;--ink:#1c1e21;--line:#d9dde1;--paper:#fff}"
    "@media (prefers-color-scheme:dark){:root{--ink:#e7e9ea;--line:#3a3f44;--paper:#16181a}}"
    "text{font:16px system-ui,sans-serif;fill:var(--ink)}.grid{stroke:var(--line)}"
    ".paper{fill:var(--paper)}</style>"
    '<rect class="paper" width="100%" height="100%"/>'
)


def colour_of(method: str) -> str:
    """The colour of a method, the same on every page; what stands behind a comma is how it was set."""
    name = method.partition(",")[0]
    name = NAMES.get(name, name)
    if name in METHODS:
        return COLOURS[METHODS.index(name)]
    rest = COLOURS[len(METHODS) :]
    return rest[zlib.crc32(name.encode()) % len(rest)]


def bar_chart(title: str, bars: Sequence[tuple[str, str, float]]) -> str:
    """Horizontal bars, one a line, each with its label above it.

    Args:
        title: For screen readers.
        bars: Label, method (which decides the colour) and value of each.
    """
    height = BAR * len(bars) + 8
    scale = (WIDTH - 110) / (max(value for _, _, value in bars) or 1.0)
    parts = []
    for number, (label, method, value) in enumerate(bars):
        y, length = number * BAR + 22, max(0.0, value * scale)
        parts += [
            _text(0, y - 6, label),
            f'<rect x="0" y="{y}" width="{length:.1f}" height="{BAR - 28}" fill="{colour_of(method)}"/>',
            _text(length + 6, y + 15, f"{value:.4g}"),
        ]
    return _drawing(title, height, parts)


def error_chart(
    title: str, x_title: str, y_title: str, series: Mapping[str, Mapping[int, float]], *, error: float
) -> str:
    """Lines over a few numbers at equal distances, such as batch sizes, with an error bar at every point.

    Args:
        title: For screen readers.
        x_title, y_title: What the axes are.
        series: For each method the value at each number.
        error: Of every value; the bars go from one below to one above.
    """
    numbers = sorted({number for points in series.values() for number in points})
    values = [value for points in series.values() for value in points.values()]
    low, high = min(values) - 2 * error, max(values) + 2 * error
    right, bottom, span = WIDTH - RIGHT, HEIGHT - BOTTOM, (high - low) or 1.0
    step = (right - LEFT) / len(numbers)

    def across(number: int) -> float:
        return LEFT + step * (numbers.index(number) + 0.5)

    def down(value: float) -> float:
        return bottom - (value - low) / span * (bottom - TOP)

    parts = [_text(4, 18, y_title)]
    for value, label in _round_values(low, high):
        y = f"{down(value):.1f}"
        parts.append(f'<line x1="{LEFT:.1f}" y1="{y}" x2="{right:.1f}" y2="{y}" class="grid"/>')
        parts.append(_text(LEFT - 6, down(value) + 5, label, "end"))
    parts += [_text(across(number), bottom + 20, f"{number:,}", "middle") for number in numbers]
    parts.append(_text((LEFT + right) / 2, HEIGHT - 8, x_title, "middle"))
    place = LEFT
    for row, (method, points) in enumerate(series.items()):
        colour, aside = colour_of(method), 6 * row - 3 * (len(series) - 1)  # so that no error bar hides another
        path = " ".join(f"{across(number) + aside:.1f},{down(points[number]):.1f}" for number in sorted(points))
        parts.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="3"/>')
        for number, value in points.items():
            x = across(number) + aside
            parts += [
                f'<path d="M{x:.1f} {down(value - error):.1f}V{down(value + error):.1f}" stroke="{colour}" '
                'stroke-width="2"/>',
                _mark(row, x, down(value), colour),
            ]
        parts += [_mark(row, place + 8, TOP - 24, colour), _text(place + 20, TOP - 18, method)]
        place += 50 + 9 * len(method)
    return _drawing(title, HEIGHT, parts)


def as_file(drawing: str) -> str:
    """A chart that stands alone, with the colours and the paper that a page gives to those in it."""
    head, _, rest = drawing.partition("</title>")
    return f"{head}</title>{STYLE}{rest}\n"


def _round_values(low: float, high: float) -> list[tuple[float, str]]:
    """A few round numbers from `low` to `high`, and how they are written."""
    power = math.floor(math.log10((high - low) or 1.0)) - 1
    part = next(part for part in (1, 2, 5, 10, 20) if high - low <= 6 * part * 10.0**power)  # 20: the span is below 100
    step, digits = part * 10.0**power, max(0, -power - (part >= 10))
    values = [step * place for place in range(math.ceil(low / step), math.floor(high / step) + 1)]
    return [(value, f"{value:.{digits}f}".removeprefix("0") or "0") for value in values]


def _mark(row: int, x: float, y: float, colour: str) -> str:
    """A point of a line: circles and squares by turns, as colours are not seen alike by all."""
    if row % 2:
        return f'<rect x="{x - 5:.1f}" y="{y - 5:.1f}" width="10" height="10" fill="{colour}"/>'
    return f'<circle cx="{x:.1f}" cy="{y:.1f}" r="6" fill="{colour}"/>'


def _drawing(title: str, height: float, parts: Sequence[str]) -> str:
    opening = f'<svg viewBox="0 0 {WIDTH} {height}" role="img" xmlns="http://www.w3.org/2000/svg">'
    return "".join([opening, f"<title>{escape(title)}</title>", *parts, "</svg>"])


def _text(x: float, y: float, text: str, anchor: str = "start") -> str:
    squeezed = f' textLength="{WIDTH}" lengthAdjust="spacingAndGlyphs"' if len(text) > LONG else ""
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}"{squeezed}>{escape(text)}</text>'
