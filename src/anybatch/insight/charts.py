"""Small charts as SVG text: bars and lines, readable in light and dark, with a title for screen readers."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

COLOURS = ("#2f6fde", "#d9730d", "#2a9d62", "#b5489a", "#7a6ff0", "#c0392b", "#4b8f9a", "#8a7a2b")
WIDTH, LEFT, RIGHT, TOP, BOTTOM = 760, 64, 190, 16, 40


def bar_chart(title: str, labels: Sequence[str], values: Sequence[float], *, baseline: float | None = None) -> str:
    """Horizontal bars, one a label; a dashed line marks the baseline."""
    line, left, right = 28, 250, 70
    height = line * len(labels) + 12
    top = max([*values, baseline or 0.0]) or 1.0
    scale = (WIDTH - left - right) / top
    parts = [_open(title, height)]
    for number, (label, value) in enumerate(zip(labels, values, strict=True)):
        y = number * line + 8
        parts.append(f'<text x="{left - 8}" y="{y + 14}" text-anchor="end">{escape(label)}</text>')
        parts.append(
            f'<rect x="{left}" y="{y}" width="{max(0.0, value * scale):.1f}" height="{line - 10}" fill="{COLOURS[number % len(COLOURS)]}"/>'
        )
        parts.append(f'<text x="{left + value * scale + 6:.1f}" y="{y + 14}">{value:.4g}</text>')
    if baseline is not None:
        x = left + baseline * scale
        parts.append(f'<line x1="{x:.1f}" y1="0" x2="{x:.1f}" y2="{height}" class="baseline"/>')
    return "".join([*parts, "</svg>"])


def line_chart(
    title: str, x_title: str, series: Sequence[tuple[str, Sequence[tuple[float, float]]]], *, mark: float | None = None
) -> str:
    """Lines through (x, y) points, one a series, with a legend; series without points are left out; a dashed line marks the x of `mark`."""
    shown = [(number, name, points) for number, (name, points) in enumerate(series) if points]
    height = 300
    if not shown:
        return ""
    xs = [x for _, _, points in shown for x, _ in points]
    ys = [y for _, _, points in shown for _, y in points]
    low_x, high_x, low_y, high_y = min(xs), max(xs), min(ys), max(ys)
    span_x, span_y = (high_x - low_x) or 1.0, (high_y - low_y) or 1.0

    def place(x: float, y: float) -> str:
        across = LEFT + (x - low_x) / span_x * (WIDTH - LEFT - RIGHT)
        return f"{across:.1f},{TOP + (high_y - y) / span_y * (height - TOP - BOTTOM):.1f}"

    parts = [_open(title, height)]
    for step in range(5):
        y = low_y + span_y * step / 4
        vertical = place(low_x, y).split(",")[1]
        parts.append(f'<line x1="{LEFT}" y1="{vertical}" x2="{WIDTH - RIGHT}" y2="{vertical}" class="grid"/>')
        parts.append(f'<text x="{LEFT - 6}" y="{float(vertical) + 4:.1f}" text-anchor="end">{y:.3g}</text>')
    digits = 0 if span_x >= 10 else 2
    if mark is not None and low_x <= mark <= high_x:
        x = place(mark, low_y).split(",")[0]
        parts.append(f'<line x1="{x}" y1="{TOP}" x2="{x}" y2="{height - BOTTOM}" class="baseline"/>')
    for x in (low_x, (low_x + high_x) / 2, high_x):
        parts.append(
            f'<text x="{place(x, low_y).split(",")[0]}" y="{height - 22}" text-anchor="middle">{x:,.{digits}f}</text>'
        )
    parts.append(
        f'<text x="{(LEFT + WIDTH - RIGHT) / 2}" y="{height - 5}" text-anchor="middle">{escape(x_title)}</text>'
    )
    for row, (number, name, points) in enumerate(shown):
        colour = COLOURS[number % len(COLOURS)]
        path = " ".join(place(x, y) for x, y in points)
        parts.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="2"/>')
        y = TOP + 6 + row * 20
        parts.append(f'<rect x="{WIDTH - RIGHT + 12}" y="{y - 4}" width="12" height="4" fill="{colour}"/>')
        parts.append(f'<text x="{WIDTH - RIGHT + 30}" y="{y + 3}">{escape(name)}</text>')
    return "".join([*parts, "</svg>"])


def heat_map(title: str, scores: Sequence[Sequence[float]], low: float, high: float) -> str:
    """A square of scores: the stronger the colour, the higher between `low` and `high`; the diagonal is outlined."""
    size = 12
    side = size * len(scores)
    parts = [
        f'<svg viewBox="0 0 {side} {side}" role="img" xmlns="http://www.w3.org/2000/svg"><title>{escape(title)}</title>'
    ]
    for row, line in enumerate(scores):
        for column, score in enumerate(line):
            depth = min(1.0, max(0.0, (score - low) / ((high - low) or 1.0)))
            outline = ' stroke="#d9730d" stroke-width="2"' if row == column else ""
            parts.append(
                f'<rect x="{column * size}" y="{row * size}" width="{size}" height="{size}" fill="{COLOURS[0]}" fill-opacity="{depth:.2f}"{outline}/>'
            )
    return "".join([*parts, "</svg>"])


def _open(title: str, height: float) -> str:
    return f'<svg viewBox="0 0 {WIDTH} {height}" role="img" xmlns="http://www.w3.org/2000/svg"><title>{escape(title)}</title>'
