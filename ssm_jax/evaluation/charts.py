"""Line charts and bars as SVG and HTML text. Colours are the page's CSS; hovering shows values without any script."""

import itertools
import math
from collections.abc import Sequence
from html import escape
from typing import NamedTuple

import numpy as np

Number = float | int
_LEFT, _RIGHT, _TOP, _BOTTOM = 64, 16, 24, 40
_BINS = 160


class Series(NamedTuple):
    """One line. ``tone`` is a CSS class (a, b, c). ``band`` shades the range of the points that are drawn as one, or, where a
    series is short and has them, the ``intervals`` (low, high) of its points (None: unknown).
    """

    name: str
    x: Sequence[Number]
    y: Sequence[Number | None]
    tone: str = "a"
    band: bool = False
    intervals: Sequence[Sequence[Number] | None] = ()


class Level(NamedTuple):
    """A horizontal line with a name."""

    name: str
    y: Number


class _Point(NamedTuple):
    """The points of one stretch of the x axis."""

    x: Number
    y: Number
    low: Number
    high: Number


_Lines = list[tuple[Series, list[_Point]]]


class _Plane(NamedTuple):
    """From data to SVG coordinates."""

    x_low: Number
    x_high: Number
    y_low: Number
    y_high: Number
    width: int
    height: int
    log2: bool = False

    @property
    def bottom(self) -> int:
        return self.height - _BOTTOM

    @property
    def right(self) -> int:
        return self.width - _RIGHT

    def x(self, value: Number) -> float:
        return round(_LEFT + (value - self.x_low) / (self.x_high - self.x_low) * (self.right - _LEFT), 1)

    def y(self, value: Number) -> float:
        return round(self.bottom - (value - self.y_low) / (self.y_high - self.y_low) * (self.bottom - _TOP), 1)


def line_chart(
    series: Sequence[Series],
    *,
    title: str,
    y_label: str,
    x_label: str = "step",
    levels: Sequence[Level] = (),
    width: int = 720,
    height: int = 320,
    from_zero: bool = False,
    x_log2: bool = False,
    whole: bool = False,
) -> str:
    """A figure with axes, a legend and values on hover; "" without any finite point.

    A long series is drawn as its means over at most 160 stretches of the x axis. The y axis fits what comes after the first
    twentieth of the x axis, so that a steep start does not flatten the rest; what lies above is cut off.

    Args:
        x_log2: the x axis shows log2 of (positive) x, with marks at the points of the densest line.
        whole: the y axis fits every point and its interval instead.
    """
    if x_log2:
        series = [line._replace(x=[math.log2(x) for x in line.x]) for line in series]
    lines = [(line, points) for line in series if (points := _condense(line))]
    if not lines:
        return ""
    plane = _plane(lines, levels, width, height, from_zero, whole)._replace(log2=x_log2)
    marks = [_band(plane, line, points) for line, points in lines if line.band and len(points) > 1]
    marks += [_level(plane, level) for level in levels]
    marks += [_line(plane, line, points) for line, points in lines]
    plot = _cut_off(plane, "".join(marks))
    drawing = _axes(plane, _x_ticks(plane, lines), x_label, y_label) + plot + _hover(plane, lines, x_label)
    legend = "".join(f'<span class="key {line.tone}">{escape(line.name)}</span>' for line, _ in lines if len(lines) > 1)
    described = escape(f"{title}: {y_label} by {x_label}", quote=True)
    return (
        f"<figure><figcaption><b>{escape(title)}</b>{legend}</figcaption>"
        f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="{described}">{drawing}</svg></figure>'
    )


def bars(rows: Sequence[tuple[str, Number, str]]) -> str:
    """Horizontal bars for (name, value, the value as text)."""
    largest = max((value for _, value, _ in rows), default=0) or 1
    cells = (
        f'<tr><th>{escape(name)}</th><td class="bar"><i style="width:{100 * value / largest:.1f}%"></i></td>'
        f'<td class="number">{escape(text)}</td></tr>'
        for name, value, text in rows
    )
    return f'<table class="bars">{"".join(cells)}</table>'


def nice_ticks(low: Number, high: Number, count: int) -> list[float]:
    """At most ``count`` round numbers (1, 2 or 5 times a power of ten apart) within [low, high]."""
    raw = (high - low) / max(count - 1, 1)
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= raw * (1 - 1e-9))
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [round(i * step, 12) + 0.0 for i in range(first, last + 1)]


def number(value: Number) -> str:
    """A short text: 0.00123, 1.5, 1,234, 45.6k, 7.89M, 1.2G."""
    for unit, scale in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if abs(value) >= (10_000 if unit == "k" else scale):
            return f"{value / scale:.3g}{unit}"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def _condense(line: Series) -> list[_Point]:
    intervals = line.intervals or [None] * len(line.x)
    found = [
        _Point(x, y, *(interval or (y, y)))
        for x, y, interval in zip(line.x, line.y, intervals, strict=True)
        if y is not None and math.isfinite(y)
    ]
    if len(found) <= _BINS:
        return found
    x, y, *_ = np.asarray(found, float).T
    stretch = np.minimum((x - x[0]) / (x[-1] - x[0]) * _BINS, _BINS - 1).astype(int)
    groups = np.split(np.arange(len(x)), np.flatnonzero(np.diff(stretch)) + 1)
    return [_Point(*map(float, (x[g].mean(), y[g].mean(), y[g].min(), y[g].max()))) for g in groups]


def _plane(lines: _Lines, levels: Sequence[Level], width: int, height: int, from_zero: bool, whole: bool) -> _Plane:
    points = [point for _, line in lines for point in line]
    x_low, x_high = min(point.x for point in points), max(point.x for point in points)
    settled = [point for point in points if whole or point.x >= x_low + (x_high - x_low) / 20]
    values = [value for point in settled for value in (point.low, point.y)] + [level.y for level in levels]
    values += [point.high for point in points if whole]
    y_low, y_high = min(values), max(values)
    margin = 0.06 * (y_high - y_low) or 0.5 * abs(y_high) or 1.0
    y_low = 0.0 if from_zero and y_low >= 0 else y_low - margin
    x_high = x_high if x_high > x_low else x_low + 1
    return _Plane(x_low, x_high, y_low, y_high + margin, width, height)


def _densest(lines: _Lines) -> list[_Point]:
    return max((points for _, points in lines), key=len)


def _x_ticks(plane: _Plane, lines: _Lines) -> list[tuple[Number, str]]:
    if plane.log2:
        return [(point.x, f"{2**point.x:,.0f}") for point in _densest(lines)]
    return [(value, number(value)) for value in nice_ticks(plane.x_low, plane.x_high, 8)]


def _axes(plane: _Plane, x_ticks: Sequence[tuple[Number, str]], x_label: str, y_label: str) -> str:
    parts = []
    ticks = nice_ticks(plane.y_low, plane.y_high, 6)
    texts = [number(value) for value in ticks]
    if len(set(texts)) < len(texts):
        texts = [f"{value:.10g}" for value in ticks]
    for value, label in zip(ticks, texts, strict=True):
        y = plane.y(value)
        parts.append(f'<line class="grid" x1="{_LEFT}" x2="{plane.right}" y1="{y}" y2="{y}"/>')
        parts.append(f'<text class="tick" x="{_LEFT - 8}" y="{y + 4:.1f}" text-anchor="end">{label}</text>')
    for value, text in x_ticks:
        x = plane.x(value)
        parts.append(f'<line class="axis" x1="{x}" x2="{x}" y1="{plane.bottom}" y2="{plane.bottom + 4}"/>')
        place = f'x="{x}" y="{plane.bottom + 17}" text-anchor="middle"'
        if plane.log2 and value == plane.x_high:  # a mark at the very end may be wider than the margin
            place = f'x="{plane.width}" y="{plane.bottom + 17}" text-anchor="end"'
        parts.append(f'<text class="tick" {place}>{text}</text>')
    parts.append(f'<line class="axis" x1="{_LEFT}" x2="{plane.right}" y1="{plane.bottom}" y2="{plane.bottom}"/>')
    middle, centre = (_TOP + plane.bottom) // 2, (_LEFT + plane.right) // 2
    parts.append(
        f'<text class="name" x="14" y="{middle}" text-anchor="middle" transform="rotate(-90 14 {middle})">'
        f'{escape(y_label)}</text><text class="name" x="{centre}" y="{plane.height - 5}" text-anchor="middle">'
        f"{escape(x_label)}</text>"
    )
    return "".join(parts)


def _cut_off(plane: _Plane, marks: str) -> str:
    """The marks within the axes: a nested svg shows nothing outside its own area (with room for the width of a line)."""
    area = f"{_LEFT - 4} {_TOP - 4} {plane.right - _LEFT + 8} {plane.bottom - _TOP + 8}"
    x, y, width, height = area.split()
    return f'<svg x="{x}" y="{y}" width="{width}" height="{height}" viewBox="{area}">{marks}</svg>'


def _band(plane: _Plane, line: Series, points: list[_Point]) -> str:
    edge = [(p.x, p.high) for p in points] + [(p.x, p.low) for p in reversed(points)]
    return f'<polygon class="band {line.tone}" points="{_path(plane, edge)}"/>'


def _level(plane: _Plane, level: Level) -> str:
    y = plane.y(level.y)
    return (
        f'<line class="level" x1="{_LEFT}" x2="{plane.right}" y1="{y}" y2="{y}"/><text class="level" '
        f'x="{plane.right - 4}" y="{y - 6:.1f}" text-anchor="end">{escape(level.name)} {number(level.y)}</text>'
    )


def _line(plane: _Plane, line: Series, points: list[_Point]) -> str:
    path = f'<polyline class="line {line.tone}" points="{_path(plane, [(p.x, p.y) for p in points])}"/>'
    if len(points) > 40:
        return path
    return path + "".join(
        f'<circle class="dot {line.tone}" cx="{plane.x(p.x)}" cy="{plane.y(p.y)}" r="3"/>' for p in points
    )


def _hover(plane: _Plane, lines: _Lines, x_label: str) -> str:
    """A strip around each point of the densest line: while it is pointed at, its values stand at the top of the chart."""
    xs = [point.x for point in _densest(lines)]
    borders = [plane.x_low, *((a + b) / 2 for a, b in itertools.pairwise(xs)), plane.x_high]
    strips = []
    for x, (start, end) in zip(xs, itertools.pairwise(borders), strict=True):
        inside = [(line, p) for line, points in lines for p in points if start <= p.x <= end]
        shown = 2**x if plane.log2 else x
        values = " · ".join([f"{x_label} {shown:,.0f}", *(f"{line.name} {number(p.y)}" for line, p in inside)])
        dots = "".join(
            f'<circle class="dot {line.tone}" cx="{plane.x(p.x)}" cy="{plane.y(p.y)}" r="4"/>' for line, p in inside
        )
        left, right = plane.x(start), plane.x(end)
        strips.append(
            f'<g class="strip"><rect x="{left}" y="{_TOP}" width="{right - left:.1f}" height="{plane.bottom - _TOP}"/>'
            f'<g><line x1="{plane.x(x)}" x2="{plane.x(x)}" y1="{_TOP}" y2="{plane.bottom}"/>{dots}'
            f'<text x="{_LEFT}" y="{_TOP - 10}">{escape(values)}</text></g></g>'
        )
    return "".join(strips)


def _path(plane: _Plane, points: Sequence[tuple[Number, Number]]) -> str:
    return " ".join(f"{plane.x(x)},{plane.y(y)}" for x, y in points)
