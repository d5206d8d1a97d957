"""Sections: the tables and charts of a report's content, in words and numbers for the page."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from markupsafe import Markup
from numpy.typing import NDArray

from medseg.planning.wording import times
from medseg.records.fingerprint import Fingerprint
from medseg.records.plan import ConfigurationPlan, Plan
from medseg.records.scores import CaseScore, LabelSummary, Scores, Statistic
from medseg.records.selection import Selection
from medseg.records.task import Task
from medseg.reporting.charts import Group, Line, box_plot, line_chart, linear_axis, log_axis
from medseg.reporting.content import Training
from medseg.reporting.curves import HistoryPoint
from medseg.reporting.flags import usual_volumes
from medseg.reporting.network import TITLES

WORST_ROWS = 12
MOST_GROUPS = 40  # rows of a box plot
_FOLD_COLOURS = (7, 6, 5, 1, 4, 2)  # of the palette: lines on white and on black


@dataclass(frozen=True, slots=True)
class Table:
    """A table with a caption; the first cell of each row names it. ``links`` are anchors of rows that have one."""

    caption: str
    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    links: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Chart:
    """A chart with its heading."""

    heading: str
    svg: Markup


def data_table(fingerprint: Fingerprint) -> Table:
    """Shapes, spacings and extents of the cases, per axis."""
    shapes = np.array([case.shape_after_crop for case in fingerprint.cases], dtype=np.float64)
    spacings = np.array([case.spacing_mm for case in fingerprint.cases])
    rows = []
    for what, values in (("voxels", shapes), ("spacing, mm", spacings), ("extent, mm", shapes * spacings)):
        low, middle, high = (
            times(np.round(v, 3)) for v in (values.min(axis=0), np.median(values, axis=0), values.max(axis=0))
        )
        rows.append((what, low, middle, high))
    cropped = "cropped to nonzero voxels; z × y × x"
    return Table(f"Sizes of {len(fingerprint.cases)} cases, {cropped}", ("", "least", "median", "most"), tuple(rows))


def intensity_table(fingerprint: Fingerprint, task: Task) -> Table:
    """Intensities of each channel inside the structures."""
    rows = [
        (channel.name, *(f"{v:.4g}" for v in (i.mean, i.std, i.percentile_00_5, i.median, i.percentile_99_5)))
        for channel, i in zip(task.channels, fingerprint.intensities, strict=False)
    ]
    header = ("channel", "mean", "standard deviation", "0.5 %", "median", "99.5 %")
    return Table("Intensities inside the labelled structures", header, tuple(rows))


def volume_chart(fingerprint: Fingerprint, task: Task) -> Chart | None:
    """Volumes of the structures in the training cases."""
    groups = []
    for index, label in enumerate(task.foreground, start=1):
        pairs = [
            (case.id, case.voxels_per_label.get(label.value, 0) * math.prod(case.spacing_mm) / 1000)
            for case in fingerprint.cases
        ]
        there = [(case, volume) for case, volume in pairs if volume > 0]
        groups.append(Group(label.name, index, tuple(v for _, v in there), tuple(case for case, _ in there)))
    groups = groups[:MOST_GROUPS]
    values = [v for group in groups for v in group.values]
    if not values:
        return None
    words = f"Box plots of the volumes of {len(groups)} structures in the labelled cases"
    return Chart("Volumes of the structures, ml", box_plot(groups, log_axis(values), "ml", words))


def presence_table(fingerprint: Fingerprint, task: Task) -> Table:
    """In how many cases each structure is, and how large."""
    rows = []
    for name, usual in usual_volumes(fingerprint, task).items():
        volumes = usual.volumes_ml
        spread = (min(volumes), float(np.median(volumes)), max(volumes)) if volumes else (None, None, None)
        share = f"{len(volumes)} ({usual.share:.0%})"
        rows.append((name, share, *(shown(v) for v in spread)))
    header = ("structure", "cases", "least, ml", "median, ml", "most, ml")
    return Table("Structures in the labelled cases", header, tuple(rows))


def configuration_table(configuration: ConfigurationPlan, plan: Plan) -> Table:
    """What the plan decided for a configuration."""
    training = configuration.training
    schemes = ", ".join(
        f"{channel.name}: {n.scheme}{' in the mask' if n.use_mask else ''}"
        for channel, n in zip(plan.task.channels, configuration.normalisation, strict=True)
    )
    rows = [
        ("spacing, mm", times(configuration.spacing_mm)),
        ("median case, voxels", times(np.round(configuration.median_shape, 1))),
        ("patch, voxels", times(configuration.patch_size)),
        ("batch", str(configuration.batch_size)),
        ("normalisation", schemes),
        ("network", f"{TITLES[configuration.network.name]}, {len(configuration.network.features)} stages"),
        ("loss", training.loss),
        ("training", f"{training.epochs} epochs of {training.iterations_per_epoch} steps, unless a time is given"),
        ("learning rate, momentum", f"{training.initial_lr:.3g}, {training.momentum:g}"),
    ]
    if configuration.previous_stage:
        rows.append(("first stage", configuration.previous_stage))
    return Table(f"Settings of {configuration.name}", ("setting", "planned"), tuple(rows))


def training_table(trainings: Sequence[Training]) -> Table:
    """How far each fold came."""
    rows = []
    for training in trainings:
        card = training.card
        steps = card.steps if card else (training.history[-1].step if training.history else 0)
        seconds = card.training_seconds if card else (training.history[-1].seconds if training.history else 0.0)
        dice = shown(card.scores.get("mean")) if card else "not finished"
        minutes = f"{seconds / 60:.1f}"
        rows.append((f"{training.configuration} fold {training.fold}", f"{steps:,}".replace(",", " "), minutes, dice))
    return Table("Trainings", ("fold", "steps", "minutes", "mean Dice of its validation cases"), tuple(rows))


def training_charts(trainings: Sequence[Training]) -> list[Chart]:
    """Loss and validation Dice of each configuration, a line for each fold."""
    charts = []
    for name in dict.fromkeys(training.configuration for training in trainings):
        folds = [t for t in trainings if t.configuration == name and t.history]
        losses = _lines(folds, lambda point: point.train_loss)
        dice = _lines(folds, lambda point: point.mean_dice)
        if losses:
            axis = linear_axis([float(v) for line in losses for v in line.y])
            words = f"Training loss of {name} over its steps, {len(losses)} folds"
            charts.append(Chart(f"{name}: training loss", line_chart(losses, axis, "step", words)))
        if dice:
            words = f"Mean Dice of {name} on validation cases while training, {len(dice)} folds"
            heading = f"{name}: mean Dice while training"
            charts.append(Chart(heading, line_chart(dice, linear_axis([], low=0, high=1), "step", words)))
    return charts


def fold_legend(trainings: Sequence[Training]) -> list[tuple[str, int]]:
    """Folds with the palette's place of their colour."""
    return [(f"fold {fold}", _fold_colour(fold)) for fold in sorted({t.fold for t in trainings})]


def _fold_colour(fold: str) -> int:
    return _FOLD_COLOURS[int(fold) % len(_FOLD_COLOURS)] if fold.isdigit() else _FOLD_COLOURS[-1]


def _lines(folds: Sequence[Training], value: Callable[[HistoryPoint], float | None]) -> list[Line]:
    lines = []
    for training in folds:
        points = [(point.step, v) for point in training.history if (v := value(point)) is not None]
        if points:
            x, y = np.array(points, dtype=np.float64).T
            lines.append(Line(f"fold {training.fold}", x, _smooth(y), _fold_colour(training.fold)))
    return lines


def _smooth(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Running mean over a fortieth of the values; short curves stay as they are."""
    width = len(values) // 40
    if width < 2:
        return values
    sums = np.cumsum(np.insert(values, 0, 0.0))
    first = np.maximum(np.arange(len(values)) - width // 2, 0)
    stop = np.minimum(first + width, len(values))
    smooth: NDArray[np.float64] = (sums[stop] - sums[first]) / (stop - first)
    return smooth


def score_table(scores: Scores) -> Table:
    """One row per structure: means with intervals, and what a mean would hide."""
    rows = []
    for summary in scores.labels:
        present = summary.cases - summary.both_empty
        rows.append(
            (
                summary.label,
                str(present),
                _with_interval(summary.dice),
                shown(summary.dice.median),
                _with_interval(summary.nsd),
                shown(summary.hd95_mm.median),
                str(summary.missed),
                str(summary.spurious),
            )
        )
    surface = f"surface Dice at {scores.tolerance_mm:g} mm"
    header = (
        "structure",
        "cases",
        "Dice (95 %)",
        "median Dice",
        f"{surface} (95 %)",
        "median HD95, mm",
        "missed",
        "spurious",
    )
    return Table("Scores by structure", header, tuple(rows))


def score_charts(scores: Scores) -> list[Chart]:
    """Box plots of Dice and HD95, the structures with the lowest median Dice first."""
    by_label: dict[tuple[str, str], list[CaseScore]] = {}
    for row in scores.cases:
        if row.status != "both empty":
            by_label.setdefault((row.label, row.kind), []).append(row)
    colours: dict[tuple[str, str], int] = {(s.label, s.kind): index for index, s in enumerate(scores.labels, start=1)}

    def middle(summary: LabelSummary) -> float:
        return summary.dice.median if summary.dice.median is not None else 2.0

    order = [(s.label, s.kind) for s in sorted(scores.labels, key=middle) if (s.label, s.kind) in by_label]
    dice = _groups(order, by_label, colours, lambda row: 0.0 if row.dice is None else row.dice)
    distance = _groups(order, by_label, colours, lambda row: math.inf if row.hd95_mm is None else row.hd95_mm)
    if not dice:
        return []
    axis = linear_axis([v for group in distance for v in group.values], low=0)
    return [
        Chart(
            "Dice of every case (1 is perfect)",
            box_plot(dice, linear_axis([], low=0, high=1), "", f"Box plots of Dice for {len(dice)} structures"),
        ),
        Chart(
            "HD95 of every case, mm (0 is perfect)",
            box_plot(distance, axis, "mm", f"Box plots of border distances for {len(distance)} structures"),
        ),
    ]


def _groups(
    order: Sequence[tuple[str, str]],
    by_label: Mapping[tuple[str, str], Sequence[CaseScore]],
    colours: Mapping[tuple[str, str], int],
    value: Callable[[CaseScore], float],
) -> list[Group]:
    return [
        Group(key[0], colours[key], tuple(value(r) for r in by_label[key]), tuple(r.case for r in by_label[key]))
        for key in order[:MOST_GROUPS]
    ]


def worst_table(scores: Scores, anchors: Mapping[str, str]) -> Table:
    """The lowest Dice first; rows of cases that are shown link to their pictures."""
    rows = sorted((r for r in scores.cases if r.dice is not None), key=lambda r: (r.dice, r.case, r.label))
    lines = []
    for row in rows[:WORST_ROWS]:
        volumes = f"{shown(row.prediction_ml)} / {shown(row.reference_ml)}"
        distance = "∞" if row.hd95_mm is None else shown(row.hd95_mm)
        lines.append((row.case, row.label, row.status, shown(row.dice), shown(row.nsd), distance, volumes))
    header = ("case", "structure", "status", "Dice", "surface Dice", "HD95, mm", "found / true, ml")
    links = tuple(anchors.get(row.case, "") for row in rows[:WORST_ROWS])
    return Table("Lowest scores first", header, tuple(lines), links)


def selection_table(selection: Selection) -> Table:
    """The candidates that were compared on the cases that all of them validated; the chosen ones are named so."""
    chosen = {member.configuration for member in selection.members}
    rows = []
    for candidate in selection.candidates:
        interval = "" if candidate.mean_dice_ci is None else " ({:.3f}–{:.3f})".format(*candidate.mean_dice_ci)
        gain = "–" if candidate.gain is None else f"{candidate.gain:+.3f}".replace("-", "−")
        taken = "chosen" if set(candidate.configurations) == chosen else ""
        plain = shown(candidate.mean_dice_unprocessed)
        rows.append((candidate.name, plain, shown(candidate.mean_dice) + interval, gain, taken))
    header = (
        "configurations",
        "Dice as predicted",
        "post-processed (95 %)",
        "gain over the best cheaper one",
        "choice",
    )
    caption = f"Compared on {len(selection.cases)} cases that all validated, post-processed as the other folds chose"
    return Table(caption, header, tuple(rows))


def volumes_table(volumes_ml: Mapping[str, Mapping[str, float]]) -> Table:
    """Volumes of predicted structures, a row for each case."""
    names = tuple(dict.fromkeys(name for structures in volumes_ml.values() for name in structures))
    rows = tuple((case, *(shown(v.get(name)) for name in names)) for case, v in volumes_ml.items())
    return Table("Predicted volumes, ml", ("case", *names), rows)


def _with_interval(statistic: Statistic) -> str:
    if statistic.mean is None:
        return "–"
    interval = "" if statistic.ci is None else f" ({statistic.ci[0]:.3f}–{statistic.ci[1]:.3f})"
    return f"{statistic.mean:.3f}{interval}"


def shown(value: float | None) -> str:
    """A number for a table: three decimals below 10, else four digits, none of them after 1000; a dash for none."""
    if value is None:
        return "–"
    if abs(value) >= 1000:
        return f"{value:,.0f}".replace(",", "\N{NARROW NO-BREAK SPACE}")
    return f"{value:.3f}" if abs(value) < 10 else f"{value:.4g}"
