"""Outputs: names and values of the label files that are written."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from medseg.imaging.volumes import label_ending
from medseg.records.case import Case
from medseg.records.task import Task


def output_name(case: Case, ending: str | None = None) -> str:
    """``case_0000.nii.gz`` → ``case.nii.gz``, or with another ``ending``; without one as ``label_ending`` says."""
    return f"{case.id}{ending or label_ending(case.files[0].name)}"


def label_values(labels: NDArray[np.integer], task: Task) -> NDArray[np.integer]:
    """Class indices → the label values of the task, in the smallest unsigned type that fits."""
    largest = max(task.values)
    kind: type[np.unsignedinteger] = np.uint8 if largest <= np.iinfo(np.uint8).max else np.uint16
    values: NDArray[np.integer] = np.array(task.values, dtype=kind)[labels]
    return values
