"""Charts: line charts and box plots as inline SVG, in the page's own colours: light, dark and in print."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from markupsafe import Markup
from numpy.typing import NDArray

from medseg.reporting import style

WIDTH = 360  # of every chart, in its own units: text is readable where a chart is as wide as a phone
MOST_POINTS = 240  # of a line; more are averaged
ROW = 26
MOST_DOTS = 200  # of a row of a box plot; of more values only those beyond the whiskers are drawn
_LEFT, _RIGHT = 38, 8


@dataclass(frozen=True, slots=True)
class Axis:
    """A range of values, from ``low`` to ``high``, with ``ticks``; ``log`` if equal ratios are equally far apart."""

    low: float
    high: float
    ticks: tuple[float, ...]
    log: bool = False

    def place(self, value: float) -> float:
        """Where a value lies, 0 to 1."""
        low, high, value = self.low, self.high, min(max(value, self.low), self.high)
        if self.log:
            low, high, value = math.log(low), math.log(high), math.log(value)
        return (value - low) / (high - low)


def linear_axis(values: Sequence[float], low: float | None = None, high: float | None = None) -> Axis:
    """An axis with round ticks that holds the finite ``values``, and ``low`` and ``high`` where they are given."""
    finite = [v for v in values if math.isfinite(v)] or [0.0, 1.0]
    bottom = min(finite) if low is None else low
    top = max(finite) if high is None else high
    if top - bottom < 1e-6 * max(abs(top), abs(bottom), 1e-6):  # one value, or as good as one
        top = bottom + (abs(bottom) if abs(bottom) > 1e-6 else 1.0)
    step = _round_step((top - bottom) / 4)
    first, last = math.floor(bottom / step + 1e-9), math.ceil(top / step - 1e-9)
    return Axis(first * step, last * step, tuple(i * step for i in range(first, last + 1)))


def log_axis(values: Sequence[float]) -> Axis:
    """An axis of powers of ten (with 2 and 5 between if they are few) that holds the positive ``values``."""
    positive = [v for v in values if math.isfinite(v) and v > 0] or [1.0]
    marks = [m * 10.0**p for p in range(-9, 10) for m in (1, 2, 5)]
    low = max((m for m in marks if m <= min(positive) * (1 + 1e-9)), default=marks[0])
    high = min((m for m in marks if m > max(positive) * (1 - 1e-9) and m > low), default=marks[-1])
    inside = [m for m in marks if low <= m <= high]
    powers = [m for m in inside if f"{m:e}".startswith("1.")]
    ticks = inside if len(inside) <= 7 else powers[:: max(1, len(powers) // 5)]
    return Axis(low, high, tuple(ticks), log=True)


@dataclass(frozen=True, slots=True)
class Line:
    """A named line; values that are not finite are gaps. ``colour`` is a class index of the style's palette."""

    name: str
    x: NDArray[np.float64]
    y: NDArray[np.float64]
    colour: int
    dashed: bool = False


def line_chart(lines: Sequence[Line], y: Axis, x_label: str, description: str) -> Markup:
    """Lines over a common x from 0; ``description`` is read out instead of the picture."""
    x = linear_axis([float(line.x.max()) for line in lines if line.x.size], low=0)
    bottom, top = 190, 10
    parts = [_grid_y(y, bottom, top), _ticks_x(x, bottom)]
    parts.append(Markup('<text x="{}" y="{}" text-anchor="end">{}</text>').format(WIDTH - _RIGHT, 222, x_label))
    for line in lines:
        points = [
            (_LEFT + x.place(float(a)) * (WIDTH - _LEFT - _RIGHT), bottom - y.place(float(b)) * (bottom - top))
            if math.isfinite(b)
            else None
            for a, b in zip(*_thinned(line.x, line.y), strict=True)
        ]
        dash = Markup(' stroke-dasharray="5 4"') if line.dashed else ""
        parts.append(
            Markup('<path class="line" d="{}" stroke="{}"{}><title>{}</title></path>').format(
                _path(points), style.hex_colour(line.colour), dash, line.name
            )
        )
    return _svg(parts, 228, description)


@dataclass(frozen=True, slots=True)
class Group:
    """One row of a box plot: values with the names of their points; those that are not finite stand at the end."""

    name: str
    colour: int
    values: tuple[float, ...]
    points: tuple[str, ...]


def box_plot(groups: Sequence[Group], axis: Axis, unit: str, description: str) -> Markup:
    """One row per group: box of the quartiles, line at the median, whiskers to the last points within 1.5 boxes."""
    left = 100
    span = WIDTH - left - 12
    bottom = 6 + ROW * len(groups)
    parts = [_grid_x(axis, left, span, bottom, unit)]
    for row, group in enumerate(groups):
        middle = 6 + ROW * row + ROW / 2
        parts.append(_row_name(group.name, left, middle))
        finite = np.array([v for v in group.values if math.isfinite(v)])
        low, high = math.inf, -math.inf
        if finite.size >= 4:
            low, high = whiskers(finite)
            parts.append(_box(finite, axis, (left, span, middle), style.hex_colour(group.colour)))
        many = finite.size > MOST_DOTS
        for number, (value, point) in enumerate(zip(group.values, group.points, strict=True)):
            if many and low <= value <= high:
                continue
            x = left + span * axis.place(value)
            y = middle + ((number * 7) % 11 - 5)  # spread, the same way every time
            shown = f"{value:.3g}" if math.isfinite(value) else "infinite"
            parts.append(
                Markup('<circle cx="{:.1f}" cy="{:.1f}" r="2.2" fill="{}"><title>{}: {}</title></circle>').format(
                    x, y, style.hex_colour(group.colour), point, shown
                )
            )
    return _svg(parts, bottom + 22, description)


def whiskers(values: NDArray[np.float64]) -> tuple[float, float]:
    """The least and largest value within 1.5 boxes of the quartiles (Tukey 1977)."""
    q1, q3 = np.percentile(values, (25, 75))
    reach = 1.5 * (q3 - q1)
    return float(values[values >= q1 - reach].min()), float(values[values <= q3 + reach].max())


def _box(values: NDArray[np.float64], axis: Axis, place: tuple[int, int, float], colour: str) -> Markup:
    left, span, middle = place
    q1, q2, q3 = np.percentile(values, (25, 50, 75))
    low, high = whiskers(values)
    a, b, c, d, e = (left + span * axis.place(float(v)) for v in (low, q1, q2, q3, high))
    return Markup(
        '<path class="whisker" d="M{:.1f} {y:.1f}H{:.1f}M{:.1f} {y:.1f}H{:.1f}"/>'
        '<rect class="box" x="{:.1f}" y="{:.1f}" width="{:.1f}" height="14" fill="{}"/>'
        '<path class="median" d="M{:.1f} {:.1f}v14"/>'
    ).format(a, b, d, e, b, middle - 7, max(1.0, d - b), colour, c, middle - 7, y=middle)


def _row_name(name: str, left: int, middle: float) -> Markup:
    short = name if len(name) <= 15 else name[:14] + "…"
    return Markup('<text class="name" x="{}" y="{:.1f}" text-anchor="end">{}<title>{}</title></text>').format(
        left - 8, middle + 4, short, name
    )


def _grid_y(axis: Axis, bottom: int, top: int) -> Markup:
    parts = []
    for tick in axis.ticks:
        y = bottom - axis.place(tick) * (bottom - top)
        parts.append(
            Markup('<path class="grid" d="M{} {:.1f}H{}"/><text x="{}" y="{:.1f}" text-anchor="end">{}</text>').format(
                _LEFT, y, WIDTH - _RIGHT, _LEFT - 5, y + 4, number(tick)
            )
        )
    return Markup("").join(parts)


def _ticks_x(axis: Axis, bottom: int) -> Markup:
    parts = []
    for tick in axis.ticks:
        x = _LEFT + axis.place(tick) * (WIDTH - _LEFT - _RIGHT)
        anchor = "end" if x > WIDTH - 20 else "middle"
        parts.append(
            Markup('<text x="{:.1f}" y="{}" text-anchor="{}">{}</text>').format(x, bottom + 16, anchor, number(tick))
        )
    return Markup("").join(parts)


def _grid_x(axis: Axis, left: int, span: int, bottom: int, unit: str) -> Markup:
    parts = []
    for tick in axis.ticks:
        x = left + span * axis.place(tick)
        last = tick == axis.ticks[-1]
        text = f"{number(tick)} {unit}".strip() if last else number(tick)
        anchor = "end" if last else "middle"
        parts.append(
            Markup('<path class="grid" d="M{x:.1f} 2V{}"/><text x="{:.1f}" y="{}" text-anchor="{}">{}</text>').format(
                bottom, x + (8 if last else 0), bottom + 15, anchor, text, x=x
            )
        )
    return Markup("").join(parts)


def _svg(parts: Sequence[Markup], height: float, description: str) -> Markup:
    return Markup('<svg class="chart" viewBox="0 0 {} {:g}" role="img" aria-label="{}">{}</svg>').format(
        WIDTH, height, description, Markup("").join(parts)
    )


def _path(points: Sequence[tuple[float, float] | None]) -> str:
    """Pieces between gaps; a point on its own is a short stroke."""
    commands, drawing = [], False
    for index, point in enumerate(points):
        if point is not None:
            alone = not drawing and (index + 1 == len(points) or points[index + 1] is None)
            commands.append(f"{'L' if drawing else 'M'}{point[0]:.1f} {point[1]:.1f}{'h0.1' if alone else ''}")
        drawing = point is not None
    return "".join(commands)


def _thinned(x: NDArray[np.float64], y: NDArray[np.float64]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """At most ``MOST_POINTS`` points: means of neighbouring ones, gaps left out of them."""
    if len(x) <= MOST_POINTS:
        return x, y
    parts = np.array_split(np.arange(len(x)), MOST_POINTS)
    means = [float(np.mean(v)) if (v := y[p][np.isfinite(y[p])]).size else math.nan for p in parts]
    return np.array([x[p].mean() for p in parts]), np.array(means)


def _round_step(step: float) -> float:
    power = 10.0 ** math.floor(math.log10(step))
    return next(m * power for m in (1, 2, 2.5, 5, 10) if m * power >= step * (1 - 1e-9))


def number(value: float) -> str:
    """``0``, ``0.25``, ``40``, ``25k``: short, for axes."""
    if abs(value) >= 10_000:
        return f"{value / 1e6:g}M" if abs(value) >= 1e6 else f"{value / 1e3:g}k"
    return f"{value:.6g}" if abs(value) > 1e-9 else "0"
