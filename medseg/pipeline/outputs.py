"""Outputs: names and values of the label files that are written."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from medseg.imaging.volumes import PICTURE_ENDINGS, file_ending
from medseg.records.case import Case
from medseg.records.task import Task

LOSSLESS = ".png"


def output_name(case: Case) -> str:
    """``case_0000.nii.gz`` → ``case.nii.gz``; pictures of any kind become ``.png``, which loses nothing."""
    ending = file_ending(case.files[0].name) or ".nii.gz"
    return f"{case.id}{LOSSLESS if ending in PICTURE_ENDINGS else ending}"


def label_values(labels: NDArray[np.integer], task: Task) -> NDArray[np.integer]:
    """Class indices → the label values of the task, in the smallest unsigned type that fits."""
    largest = max(task.values)
    kind: type[np.unsignedinteger] = np.uint8 if largest <= np.iinfo(np.uint8).max else np.uint16
    values: NDArray[np.integer] = np.array(task.values, dtype=kind)[labels]
    return values
