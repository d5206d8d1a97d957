"""Tables of scores: the JSON record, a CSV with one row per case and label, and rows for the console."""

from __future__ import annotations

import csv
import io
from pathlib import Path

from medseg.artefacts import commit
from medseg.records.base import write_record
from medseg.records.scores import CaseScore, LabelSummary, Scores, Statistic


def write_scores(scores: Scores, json_path: Path) -> dict[str, str]:
    """Commit ``scores`` as JSON at ``json_path`` and as CSV beside it; return the SHA-256 of each file by its name.

    In the CSV an infinite distance (missed, spurious) is ``inf`` and a cell without a number is empty, so that a mean
    over a column cannot pass over a missed structure unnoticed.
    """
    csv_path = Path(json_path).with_suffix(".csv")
    return {
        csv_path.name: commit(csv_path, csv_text(scores).encode()),
        Path(json_path).name: write_record(json_path, scores),
    }


def csv_text(scores: Scores) -> str:
    """One row per case and label; the header names units and the tolerance of the surface Dice."""
    header = (
        *("case", "label", "kind", "values", "status", "dice", "iou", "precision", "recall"),
        *("hd95_mm", "assd_mm", f"nsd_at_{scores.tolerance_mm:g}_mm"),
        *("true_positives_voxels", "false_positives_voxels", "false_negatives_voxels"),
        *("prediction_ml", "reference_ml", "volume_error_ml"),
    )
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(header)
    writer.writerows(_csv_row(row) for row in scores.cases)
    return buffer.getvalue()


def _csv_row(row: CaseScore) -> tuple[object, ...]:
    distances = (row.hd95_mm, row.assd_mm)
    if row.status in ("missed", "spurious"):
        distances = (float("inf"), float("inf"))
    values = "+".join(map(str, row.values))
    return (
        *(row.case, row.label, row.kind, values, row.status, row.dice, row.iou, row.precision, row.recall),
        *(*distances, row.nsd, row.true_positives, row.false_positives, row.false_negatives),
        *(row.prediction_ml, row.reference_ml, row.volume_error_ml),
    )


def summary_table(scores: Scores) -> list[tuple[str, ...]]:
    """Header and one row per label for people to read; "n/a" where no case has a number."""
    nsd = f"NSD {scores.tolerance_mm:g} mm"
    header = ("label", "cases", "Dice", nsd, "HD95 mm", "volume error ml", "missed", "spurious", "both empty")
    rows = [_summary_row(summary) for summary in scores.labels]
    blank = ("",) * (len(header) - 4)
    return [header, *rows, ("mean", "", _number(scores.mean_dice, 4), _number(scores.mean_nsd, 4), *blank)]


def _summary_row(summary: LabelSummary) -> tuple[str, ...]:
    return (
        summary.label,
        str(summary.cases),
        _spread(summary.dice, 4),
        _spread(summary.nsd, 4),
        _spread(summary.hd95_mm, 2),
        _spread(summary.volume_error_ml, 2),
        *map(str, (summary.missed, summary.spurious, summary.both_empty)),
    )


def _spread(statistic: Statistic, digits: int) -> str:
    text = _number(statistic.mean, digits)
    if statistic.std is not None:
        text += f" ± {statistic.std:.{digits}f}"
    return f"{text} ({statistic.infinite} infinite)" if statistic.infinite else text


def _number(value: float | None, digits: int) -> str:
    return "n/a" if value is None else f"{value:.{digits}f}"
