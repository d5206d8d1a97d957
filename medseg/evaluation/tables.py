"""Tables of scores: the JSON record, a CSV with one row per case and label, and rows for the console."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Iterable, Sequence
from pathlib import Path

from medseg.artefacts import commit
from medseg.records.base import write_record
from medseg.records.scores import CaseScore, LabelSummary, Lesions, Scores, Statistic

Row = tuple[str, ...]


def write_scores(scores: Scores, json_path: Path) -> dict[str, str]:
    """Commit ``scores`` as JSON at ``json_path`` and as CSV beside it; return the SHA-256 of each file by its name.

    In the CSV an infinite distance (missed, spurious) is ``inf`` and a cell without a number is empty, so that a mean
    over a column cannot pass over a missed structure unnoticed. A case without scores has one row with its status.
    """
    csv_path = Path(json_path).with_suffix(".csv")
    return {
        csv_path.name: commit(csv_path, csv_text(scores).encode()),
        Path(json_path).name: write_record(json_path, scores),
    }


def csv_text(scores: Scores) -> str:
    """One row per case and label; the header names units and tolerances."""
    header = (
        *("case", "label", "kind", "values", "status", "dice", "iou", "precision", "recall"),
        *("hd_mm", "hd95_mm", "assd_mm", "tolerance_mm", "nsd"),
        *(f"nsd_at_{tolerance:g}_mm" for tolerance in scores.more_tolerances_mm),
        *("true_positives_voxels", "false_positives_voxels", "false_negatives_voxels"),
        *("prediction_ml", "reference_ml", "volume_error_ml", "relative_volume_error"),
        *("prediction_area_mm2", "reference_area_mm2"),
        *("lesions_reference", "lesions_found", "lesions_predicted", "lesions_false"),
        *("lesion_sensitivity", "lesion_precision", "lesion_f1", "brier", "ece"),
    )
    rows = [_csv_row(row, scores) for row in scores.cases]
    rows += [(case.case, "", "", "", case.status, *[""] * (len(header) - 5)) for case in scores.unscored]
    return csv_of([header, *rows])


def csv_of(rows: Iterable[Sequence[object]]) -> str:
    """Rows, header first, as CSV with line feeds; None is an empty cell."""
    buffer = io.StringIO()
    csv.writer(buffer, lineterminator="\n").writerows(rows)
    return buffer.getvalue()


def _csv_row(row: CaseScore, scores: Scores) -> tuple[object, ...]:
    distances: tuple[float | None, ...] = (row.hd_mm, row.hd95_mm, row.assd_mm)
    if row.status in ("missed", "spurious"):
        distances = (math.inf,) * 3
    tolerance_mm = scores.label_tolerances_mm.get(row.label, scores.tolerance_mm)
    more = row.nsd_at or (None,) * len(scores.more_tolerances_mm)
    values = "+".join(map(str, row.values))
    calibration = (row.calibration.brier, row.calibration.ece) if row.calibration else (None, None)
    return (
        *(row.case, row.label, row.kind, values, row.status, row.dice, row.iou, row.precision, row.recall),
        *(*distances, tolerance_mm, row.nsd, *more, row.true_positives, row.false_positives, row.false_negatives),
        *(row.prediction_ml, row.reference_ml, row.volume_error_ml, row.relative_volume_error),
        *(row.prediction_area_mm2, row.reference_area_mm2, *_lesion_cells(row.lesions), *calibration),
    )


def _lesion_cells(found: Lesions | None) -> tuple[object, ...]:
    if found is None:
        return (None,) * 7
    counts = (found.expected, found.found, found.predicted, found.false_positives)
    return (*counts, found.sensitivity, found.precision, found.f1)


def summary_table(scores: Scores) -> list[Row]:
    """Header and one row per label for people to read; "n/a" where no case has a number.

    Columns for lesions, calibration and tolerances that differ are there only if they were measured.
    """
    own_tolerances = bool(scores.label_tolerances_mm)
    nsd = "NSD" if own_tolerances else f"NSD {scores.tolerance_mm:g} mm"
    header = ["label", "cases", "Dice (95 % CI)", nsd, "HD95 mm", "volume error ml", "missed", "spurious", "both empty"]
    rows = [_summary_row(summary) for summary in scores.labels]
    mean_dice = _number(scores.mean_dice, 4) + _interval(scores.mean_dice_ci)
    mean = ["mean", "", mean_dice, _number(scores.mean_nsd, 4), *[""] * 5]
    if own_tolerances:
        header.insert(3, "tolerance mm")
        mean.insert(3, "")
        for row in rows:
            row.insert(3, f"{scores.label_tolerances_mm.get(row[0], scores.tolerance_mm):g}")
    for index, tolerance in reversed(list(enumerate(scores.more_tolerances_mm))):
        place = header.index("HD95 mm")
        header.insert(place, f"NSD {tolerance:g} mm")
        mean.insert(place, "")
        for row, summary in zip(rows, scores.labels, strict=True):
            row.insert(place, _number(summary.nsd_at[index].mean, 4))
    for names, cells in ((_LESIONS, _lesion_summary), (_CALIBRATION, _calibration_summary)):
        extra = [cells(summary) for summary in scores.labels]
        if any(cell != "n/a" for more in extra for cell in more):
            header += names
            mean += [""] * len(names)
            for row, more in zip(rows, extra, strict=True):
                row += more
    return [tuple(row) for row in (header, *rows, mean)]


_LESIONS = ("lesion F1", "sensitivity", "false per case")
_CALIBRATION = ("Brier", "ECE")


def _summary_row(summary: LabelSummary) -> list[str]:
    return [
        summary.label,
        str(summary.cases),
        _number(summary.dice.mean, 4) + _interval(summary.dice.ci),
        _number(summary.nsd.mean, 4),
        _with_infinite(summary.hd95_mm, 2),
        _with_spread(summary.volume_error_ml, 2),
        *map(str, (summary.missed, summary.spurious, summary.both_empty)),
    ]


def _lesion_summary(summary: LabelSummary) -> list[str]:
    if summary.lesions is None:
        return ["n/a"] * len(_LESIONS)
    shares = [_number(value.mean, 4) for value in (summary.lesions.f1, summary.lesions.sensitivity)]
    return [*shares, f"{summary.lesions.false_positives_per_case:.2f}"]


def _calibration_summary(summary: LabelSummary) -> list[str]:
    return [_number(summary.brier.mean, 4), _number(summary.ece.mean, 4)]


def worst_table(scores: Scores, count: int) -> list[Row]:
    """Header and the ``count`` worst rows of the main kind (regions where there are any): Dice, then distance.

    Structures that were missed or are spurious come first; of those the larger ones.
    """
    kind = "region" if any(summary.kind == "region" for summary in scores.labels) else "label"
    rows = [row for row in scores.cases if row.kind == kind and row.status != "both empty"]
    rows.sort(key=lambda row: (row.dice or 0.0, row.hd95_mm is not None, -(row.hd95_mm or 0.0), -_size(row), row.case))
    header = ("case", "label", "status", "Dice", "NSD", "HD95 mm", "reference ml", "prediction ml")
    return [header, *(_worst_row(row) for row in rows[:count])]


def _size(row: CaseScore) -> float:
    return row.reference_ml + row.prediction_ml


def _worst_row(row: CaseScore) -> Row:
    distance = "infinite" if row.hd95_mm is None else f"{row.hd95_mm:.2f}"
    shares = (_number(row.dice, 4), _number(row.nsd, 4))
    return (row.case, row.label, row.status, *shares, distance, f"{row.reference_ml:.3f}", f"{row.prediction_ml:.3f}")


def _interval(ci: tuple[float, float] | None) -> str:
    return "" if ci is None else f" ({ci[0]:.4f} to {ci[1]:.4f})"


def _with_infinite(statistic: Statistic, digits: int) -> str:
    text = _number(statistic.mean, digits)
    return f"{text} ({statistic.infinite} infinite)" if statistic.infinite else text


def _with_spread(statistic: Statistic, digits: int) -> str:
    text = _number(statistic.mean, digits)
    return text if statistic.std is None else f"{text} ± {statistic.std:.{digits}f}"


def _number(value: float | None, digits: int) -> str:
    return "n/a" if value is None else f"{value:.{digits}f}"
