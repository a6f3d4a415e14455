"""Small charts as SVG text: bars and lines; readable in light and dark, titled for screen readers.

No charting library was found that draws these without a script, fits both colour schemes and is permissive and light
(docs/log.md).
"""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

COLOURS = ("#2f6fde", "#d9730d", "#2a9d62", "#b5489a", "#7a6ff0", "#c0392b", "#4b8f9a", "#8a7a2b")
WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 760, 300, 64, 190, 16, 40
LABELS, BAR = 250, 28  # of a bar chart: width of the labels, height of a line


def bar_chart(title: str, labels: Sequence[str], values: Sequence[float], *, baseline: float | None = None) -> str:
    """Horizontal bars, one a label; a dashed line marks the baseline."""
    height = BAR * len(labels) + 12
    scale = (WIDTH - LABELS - 70) / (max([*values, baseline or 0.0]) or 1.0)
    parts = []
    for number, (label, value) in enumerate(zip(labels, values, strict=True)):
        y, length = number * BAR + 8, value * scale
        colour = COLOURS[number % len(COLOURS)]
        parts += [
            _text(LABELS - 8, y + 14, label, "end"),
            f'<rect x="{LABELS}" y="{y}" width="{max(0.0, length):.1f}" height="{BAR - 10}" fill="{colour}"/>',
            _text(LABELS + length + 6, y + 14, f"{value:.4g}"),
        ]
    if baseline is not None:
        x = LABELS + baseline * scale
        parts.append(_line(x, 0, x, height, "baseline"))
    return _drawing(title, WIDTH, height, parts)


def line_chart(title: str, x_title: str, series: Sequence[tuple[str, Sequence[tuple[float, float]]]]) -> str:
    """Lines through (x, y) points, one a series, with a legend.

    Series without points are left out; without any, the chart is "".
    """
    shown = [(COLOURS[number % len(COLOURS)], name, points) for number, (name, points) in enumerate(series) if points]
    if not shown:
        return ""
    xs, ys = zip(*(point for _, _, points in shown for point in points), strict=True)
    low_x, low_y = min(xs), min(ys)
    span_x, span_y = (max(xs) - low_x) or 1.0, (max(ys) - low_y) or 1.0
    right, bottom = WIDTH - RIGHT, HEIGHT - BOTTOM

    def across(x: float) -> float:
        return LEFT + (x - low_x) / span_x * (right - LEFT)

    def down(y: float) -> float:
        return bottom - (y - low_y) / span_y * (bottom - TOP)

    parts = []
    for y in (low_y + span_y * step / 4 for step in range(5)):
        parts += [_line(LEFT, down(y), right, down(y), "grid"), _text(LEFT - 6, down(y) + 4, f"{y:.3g}", "end")]
    for x in (low_x, (low_x + max(xs)) / 2, max(xs)):
        parts.append(_text(across(x), HEIGHT - 22, f"{x:,.0f}", "middle"))
    parts.append(_text((LEFT + right) / 2, HEIGHT - 5, x_title, "middle"))
    for row, (colour, name, points) in enumerate(shown):
        path = " ".join(f"{across(x):.1f},{down(y):.1f}" for x, y in points)
        y = TOP + 6 + row * 20
        parts += [
            f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="2"/>',
            f'<rect x="{right + 12}" y="{y - 4}" width="12" height="4" fill="{colour}"/>',
            _text(right + 30, y + 3, name),
        ]
    return _drawing(title, WIDTH, HEIGHT, parts)


def _drawing(title: str, width: float, height: float, parts: Sequence[str]) -> str:
    opening = f'<svg viewBox="0 0 {width} {height}" role="img" xmlns="http://www.w3.org/2000/svg">'
    return "".join([opening, f"<title>{escape(title)}</title>", *parts, "</svg>"])


def _text(x: float, y: float, text: str, anchor: str = "start") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>'


def _line(x1: float, y1: float, x2: float, y2: float, kind: str) -> str:
    return f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" class="{kind}"/>'
