"""Curves: the course of a training in one picture — losses, Dice per label, learning rate, waiting for data."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.ticker import EngFormatter, PercentFormatter
from numpy.typing import NDArray

from medseg.reporting import style

MAX_LABEL_LINES = 10
FEW_POINTS = 60
PART_LINES = ("dashed", "dotted", "dashdot")
TIME_UNITS = ((86400.0, "days"), (3600.0, "hours"), (60.0, "minutes"), (1.0, "seconds"))
_SMOOTHED_OVER = 1 / 30  # of all points


@dataclass(frozen=True, slots=True)
class HistoryPoint:
    """What was known at one step of a training; None is what was not measured there.

    ``seconds`` counts from the start of the training; ``losses`` are the parts of the training loss by name; ``dice``
    is by label name, None where a label was not there; ``smoothed_dice`` is the moving average of the mean, and
    ``wait_share`` the share of the step's time, from 0 to 1, that was spent waiting for data.
    """

    step: int
    seconds: float
    train_loss: float | None = None
    validation_loss: float | None = None
    learning_rate: float | None = None
    mean_dice: float | None = None
    dice: Mapping[str, float | None] = field(default_factory=dict)
    losses: Mapping[str, float] = field(default_factory=dict)
    smoothed_dice: float | None = None
    wait_share: float | None = None


def training_picture(path: Path, history: Sequence[HistoryPoint]) -> str:
    """Draw the course of a training over its steps and commit it as PNG.

    Losses with their running mean, Dice on the validation cases per label (with more than ten labels the mean stands
    out among them), the learning rate, and where it is known the share of time that was spent waiting for data; the
    time is below the steps. Points that are None or not finite are gaps. A history without points gives a picture
    that says so.

    Args:
        path: where the PNG goes.
        history: points in the order of their steps.

    Returns:
        The file's SHA-256.

    Raises:
        EnvironmentFailure: E0501 not writable, E0502 no space.
    """
    figure = style.new_figure(9, 9)
    draw = [_draw_losses, _draw_dice, _draw_learning_rate]
    if any(point.wait_share is not None for point in history):
        draw.append(_draw_waiting)
    panels = figure.subplots(len(draw), 1, sharex=True, height_ratios=(3, 3, 1.2, 1.2)[: len(draw)])
    for axes, draw_panel in zip(panels, draw, strict=True):
        style.plain_axes(axes)
        draw_panel(axes, history)
    panels[-1].set_xlabel("step", fontsize=style.TEXT_POINTS, color=style.INK)
    panels[-1].set_xlim(0, max(1, *(point.step for point in history), 1))
    panels[-1].xaxis.set_major_formatter(EngFormatter(sep=""))
    _add_time(panels[-1], history)
    figure.suptitle(_headline(history), fontsize=style.TITLE_POINTS, color=style.INK)
    return style.save_png(figure, path)


Curve = tuple[NDArray[np.float64], NDArray[np.float64]]


def _curve(history: Sequence[HistoryPoint], value: Callable[[HistoryPoint], float | None]) -> Curve:
    """Steps and values where there is a value; one that is not finite is a gap."""
    points = [(point.step, v) for point in history if (v := value(point)) is not None]
    steps, values = np.array(points, dtype=np.float64).reshape(-1, 2).T
    return steps, np.where(np.isfinite(values), values, np.nan)


def _running_mean(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Mean of each value with its neighbours before and after; gaps do not count."""
    reach = round(len(values) * _SMOOTHED_OVER / 2)
    sums = np.concatenate([[0.0], np.nancumsum(values)])
    counts = np.concatenate([[0], np.cumsum(~np.isnan(values))])
    here = np.arange(len(values))
    first, stop = np.maximum(here - reach, 0), np.minimum(here + reach + 1, len(values))
    number = counts[stop] - counts[first]
    return np.where(number > 0, (sums[stop] - sums[first]) / np.maximum(number, 1), np.nan)


def _plot(axes: Any, curve: Curve, **look: Any) -> None:
    """A line, with markers where it has so few points that a line alone could not be seen."""
    steps, values = curve
    if len(steps):
        axes.plot(steps, values, marker="." if len(steps) <= FEW_POINTS else "", **look)


def _draw_losses(axes: Any, history: Sequence[HistoryPoint]) -> None:
    axes.set_title("Loss", loc="left", fontsize=style.TEXT_POINTS + 1, color=style.INK)
    curves = (
        ("training", _curve(history, lambda p: p.train_loss), style.PALETTE[6]),
        ("validation", _curve(history, lambda p: p.validation_loss), style.PALETTE[5]),
    )
    for name, (steps, values), colour in curves:
        if len(steps):
            axes.plot(steps, values, color=colour, linewidth=0.8, alpha=0.35)
            _plot(axes, (steps, _running_mean(values)), color=colour, linewidth=1.8, label=name)
    for index, name in enumerate(dict.fromkeys(name for point in history for name in point.losses)):
        steps, values = _curve(history, lambda p, name=name: p.losses.get(name))  # type: ignore[misc]
        look: dict[str, Any] = {"color": style.PALETTE[6], "linewidth": 1.1, "linestyle": PART_LINES[index % 3]}
        axes.plot(steps, _running_mean(values), label=f"{style.text(name, 30)} part", **look)
    _legend(axes, "upper right")


def _draw_dice(axes: Any, history: Sequence[HistoryPoint]) -> None:
    axes.set_title("Dice on the validation cases", loc="left", fontsize=style.TEXT_POINTS + 1, color=style.INK)
    axes.set_ylim(0, 1.02)
    names = list(dict.fromkeys(name for point in history for name in point.dice))
    many = len(names) > MAX_LABEL_LINES
    for index, name in enumerate(names, start=1):
        curve = _curve(history, lambda p, name=name: p.dice.get(name))  # type: ignore[misc]
        if many:
            axes.plot(*curve, color=style.FAINT, linewidth=0.6, alpha=0.6)
        else:
            label = f"{style.text(name, 30)} {_last(curve)}"
            _plot(axes, curve, color=style.label_colour(index), linewidth=1.4, label=label)
    if many:
        axes.plot([], [], color=style.FAINT, linewidth=0.6, label=f"each of {len(names)} labels")
    mean = _curve(history, lambda p: p.mean_dice)
    _plot(axes, mean, color=style.INK, linewidth=2, label=f"mean {_last(mean)}")
    smoothed = _curve(history, lambda p: p.smoothed_dice)
    if len(smoothed[0]):
        look: dict[str, Any] = {"color": style.INK, "linewidth": 1.2, "linestyle": "dashed"}
        axes.plot(*smoothed, label=f"moving average {_last(smoothed)}", **look)
    _legend(axes, "lower right")


def _draw_waiting(axes: Any, history: Sequence[HistoryPoint]) -> None:
    title = "Share of the time spent waiting for data"
    axes.set_title(title, loc="left", fontsize=style.TEXT_POINTS + 1, color=style.INK)
    steps, values = _curve(history, lambda p: p.wait_share)
    _plot(axes, (steps, _running_mean(values)), color=style.PALETTE[5], linewidth=1.4)
    axes.set_ylim(0, 1)
    axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))


def _add_time(axes: Any, history: Sequence[HistoryPoint]) -> None:
    """A second axis below: the time of training at each step, in the unit that suits."""
    known = sorted({point.step: point.seconds for point in history}.items())
    if len(known) < 2 or known[-1][1] <= known[0][1]:
        return
    steps, seconds = np.array(known, dtype=np.float64).T
    steps, seconds = np.append(0.0, steps), np.append(0.0, np.maximum.accumulate(seconds))
    seconds += np.arange(len(seconds)) * 1e-9 * seconds[-1]  # two steps of the same second must differ to be told apart
    unit, name = next((u, n) for u, n in TIME_UNITS if seconds[-1] >= 2 * u or u == 1)
    below = axes.secondary_xaxis(
        -0.45,  # of the panel: below the steps
        functions=(
            lambda step: _line_through(step, steps, seconds / unit),
            lambda time: _line_through(time, seconds / unit, steps),
        ),
    )
    below.set_xlabel(name, fontsize=style.TEXT_POINTS, color=style.INK)
    below.tick_params(labelsize=style.TEXT_POINTS, colors=style.INK, length=0)
    below.spines["bottom"].set_visible(False)


def _line_through(x: NDArray[np.float64], xs: NDArray[np.float64], ys: NDArray[np.float64]) -> NDArray[np.float64]:
    """Linear between the points and beyond the last, where the axis may end a little later."""
    slope = (ys[-1] - ys[0]) / (xs[-1] - xs[0])
    inside = np.interp(x, xs, ys)
    return np.where(x > xs[-1], ys[-1] + slope * (x - xs[-1]), np.where(x < xs[0], ys[0] + slope * (x - xs[0]), inside))


def _draw_learning_rate(axes: Any, history: Sequence[HistoryPoint]) -> None:
    axes.set_title("Learning rate", loc="left", fontsize=style.TEXT_POINTS + 1, color=style.INK)
    _plot(axes, _curve(history, lambda p: p.learning_rate), color=style.INK, linewidth=1.4)
    axes.set_ylim(bottom=0)


def _legend(axes: Any, place: str) -> None:
    if axes.get_legend_handles_labels()[0]:
        axes.legend(loc=place, fontsize=style.TEXT_POINTS, frameon=True, framealpha=0.85, edgecolor="none", ncols=2)


def _last(curve: Curve) -> str:
    present = curve[1][~np.isnan(curve[1])]
    return f"{present[-1]:.3f}" if present.size else "n/a"


def _headline(history: Sequence[HistoryPoint]) -> str:
    if not history:
        return "No step yet"
    seconds = history[-1].seconds
    hours, minutes = divmod(round(seconds / 60), 60)
    duration = f"{seconds:.0f} s" if seconds < 90 else f"{hours} h {minutes} min" if hours else f"{minutes} min"
    return f"{history[-1].step:,} steps in {duration}".replace(",", " ")
