"""Check record: the outcome of a check as it is written to JSON, with what the data set is like."""

from __future__ import annotations

from collections import Counter

import numpy as np

from medseg.dataset.check import CheckReport
from medseg.dataset.fix import fixable
from medseg.records.check import CheckRecord, LabelRecord, ProblemRecord, Spread


def check_record(report: CheckReport) -> CheckRecord:
    """The record of a report."""
    task = report.dataset.task if report.dataset else None
    shapes = [found.shape for found in report.findings if found.shape is not None]
    volumes = [shape for shape in shapes if not shape.picture]
    return CheckRecord(
        layout=report.dataset.layout if report.dataset else None,
        channels=tuple(channel.name for channel in task.channels) if task else (),
        cases=len(report.findings),
        files_read=report.files_read,
        errors=len(report.errors),
        warnings=len(report.problems) - len(report.errors),
        problems=tuple(ProblemRecord.of(problem, fixable(problem)) for problem in report.problems),
        identical=report.identical,
        duplicates=report.duplicates,
        labels=_labels(report),
        label_types=report.label_types,
        orientations=dict(Counter(shape.orientation for shape in volumes).most_common()),
        shape=_spread([shape.shape for shape in shapes]),
        spacing_mm=_spread([shape.spacing_mm for shape in volumes]),
    )


def _labels(report: CheckReport) -> tuple[LabelRecord, ...]:
    if report.dataset is None:
        return ()
    counts = [found.label_counts for found in report.findings]
    return tuple(
        LabelRecord(
            name=label.name,
            value=label.value,
            cases=sum(count.get(label.value, 0) > 0 for count in counts),
            voxels=sum(count.get(label.value, 0) for count in counts),
        )
        for label in report.dataset.task.foreground
    )


def _spread(rows: list[tuple[int, int, int]] | list[tuple[float, float, float]]) -> Spread | None:
    if not rows:
        return None
    values = np.array(rows, np.float64)
    smallest, median, largest = (tuple(float(v) for v in row) for row in np.quantile(values, [0, 0.5, 1], axis=0))
    return Spread.model_validate({"smallest": smallest, "median": median, "largest": largest})
