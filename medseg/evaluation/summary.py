"""Summary of case scores per label and region: means with intervals, and counts of what a mean would hide."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence

import numpy as np

from medseg.errors import Problem
from medseg.evaluation.bootstrap import mean_interval, median
from medseg.evaluation.targets import Target, targets
from medseg.records.scores import CaseScore, Lesions, LesionSummary, Measures, Scores, Statistic
from medseg.records.scores import LabelSummary as Summary
from medseg.records.task import Task

_DISTANCES = ("hd_mm", "hd95_mm", "assd_mm")
_SHARES = ("dice", "iou", "precision", "recall", "nsd")
_VOLUMES = ("volume_error_ml", "relative_volume_error")


def summarise(rows: Sequence[CaseScore], task: Task, measures: Measures, problems: Iterable[Problem] = ()) -> Scores:
    """Sum case scores up per label and region; a label without any number has no mean and enters no mean."""
    chosen = targets(task, measures.labels)
    own = {(t.name, t.kind): [row for row in rows if (row.label, row.kind) == (t.name, t.kind)] for t in chosen}
    kind = "region" if any(t.kind == "region" for t in chosen) else "label"
    main = [own[t.name, t.kind] for t in chosen if t.kind == kind]
    mean_dice, mean_dice_ci = _mean_over_labels(main, lambda row: row.dice)
    mean_nsd, mean_nsd_ci = _mean_over_labels(main, lambda row: row.nsd)
    return Scores(
        tolerance_mm=measures.tolerance_mm,
        label_tolerances_mm=measures.label_tolerances_mm,
        more_tolerances_mm=measures.more_tolerances_mm,
        lesion_overlap=measures.lesion_overlap,
        mean_dice=mean_dice,
        mean_dice_ci=mean_dice_ci,
        mean_nsd=mean_nsd,
        mean_nsd_ci=mean_nsd_ci,
        labels=tuple(_summary(t, own[t.name, t.kind], len(measures.more_tolerances_mm)) for t in chosen),
        cases=tuple(rows),
        problems=tuple(problems),
    )


def _mean_over_labels(
    labels: Sequence[Sequence[CaseScore]], measure: Callable[[CaseScore], float | None]
) -> tuple[float | None, tuple[float, float] | None]:
    """The mean over labels of the mean over cases, and its interval."""
    cases = {case: index for index, case in enumerate(dict.fromkeys(row.case for rows in labels for row in rows))}
    table = np.full((len(cases), len(labels)), np.nan)
    for column, rows in enumerate(labels):
        for row in rows:
            value = measure(row)
            table[cases[row.case], column] = np.nan if value is None else value
    means = [float(column[~np.isnan(column)].mean()) for column in table.T if not np.isnan(column).all()]
    return (float(np.mean(means)), mean_interval(table)) if means else (None, None)


def _summary(target: Target, rows: Sequence[CaseScore], more_tolerances: int) -> Summary:
    status = [row.status for row in rows]
    infinite = status.count("missed") + status.count("spurious")
    present = [row for row in rows if row.status != "both empty"]
    lesions = [row.lesions for row in rows if row.lesions is not None]
    believed = [row.calibration for row in rows if row.calibration is not None]
    statistics = {name: statistic(getattr(row, name) for row in rows) for name in _SHARES}
    statistics |= {name: statistic((getattr(row, name) for row in rows), infinite) for name in _DISTANCES}
    statistics |= {name: statistic(getattr(row, name) for row in present) for name in _VOLUMES}
    return Summary(
        label=target.name,
        kind=target.kind,
        values=target.values,
        cases=len(rows),
        both_empty=status.count("both empty"),
        missed=status.count("missed"),
        spurious=status.count("spurious"),
        nsd_at=tuple(statistic(row.nsd_at[index] for row in rows) for index in range(more_tolerances)),
        lesions=_lesions(lesions) if lesions else None,
        brier=statistic(c.brier for c in believed),
        ece=statistic(c.ece for c in believed),
        **statistics,
    )


def _lesions(rows: Sequence[Lesions]) -> LesionSummary:
    total = Lesions(
        expected=sum(row.expected for row in rows),
        found=sum(row.found for row in rows),
        predicted=sum(row.predicted for row in rows),
        false_positives=sum(row.false_positives for row in rows),
    )
    return LesionSummary(
        sensitivity=statistic(row.sensitivity for row in rows),
        precision=statistic(row.precision for row in rows),
        f1=statistic(row.f1 for row in rows),
        false_positives_per_case=total.false_positives / len(rows),
        total=total,
    )


def statistic(values: Iterable[float | None], infinite: int = 0) -> Statistic:
    """Mean with its interval, spread and median of the numbers in ``values`` (None: a case without)."""
    numbers = np.array([v for v in values if v is not None], dtype=np.float64)
    middle = float(median(np.append(numbers, [np.inf] * infinite))) if numbers.size + infinite else math.inf
    if numbers.size == 0:
        return Statistic(infinite=infinite)
    return Statistic(
        mean=float(numbers.mean()),
        ci=mean_interval(numbers),
        std=float(numbers.std(ddof=1)) if numbers.size > 1 else None,
        median=middle if math.isfinite(middle) else None,
        cases=numbers.size,
        infinite=infinite,
    )
