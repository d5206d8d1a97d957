"""Outputs: names and values of the label files that are written."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from medseg.imaging.volumes import LABEL_ENDINGS, label_ending, strip_ending
from medseg.records.case import Case
from medseg.records.run import RunManifest
from medseg.records.task import Task

MAP_FOLDERS = ("probabilities/*", "uncertainty", "attention/*")  # below the folder of predicted labels
POST_PROCESSING = "postprocessing.json"  # in a configuration's folder, what its cross-validation chose


def output_name(case: Case, ending: str | None = None) -> str:
    """``case_0000.nii.gz`` → ``case.nii.gz``, or with another ``ending``; without one as ``label_ending`` says."""
    return f"{case.id}{ending or label_ending(case.files[0].name)}"


def predicted_files(folder: Path, manifest: RunManifest) -> dict[str, Path]:
    """The label file of each case that has one, by the case's name."""
    found: dict[str, Path] = {}
    for case in manifest.cases:
        for name in case.outputs:
            labels = strip_ending(name) == case.id and name.lower().endswith(LABEL_ENDINGS)
            if labels and Path(name).name == name and (folder / name).is_file():
                found.setdefault(case.id, folder / name)
    return found


def label_values(labels: NDArray[np.integer], task: Task) -> NDArray[np.integer]:
    """Class indices → the label values of the task, in the smallest unsigned type that fits."""
    largest = max(task.values)
    kind: type[np.unsignedinteger] = np.uint8 if largest <= np.iinfo(np.uint8).max else np.uint16
    values: NDArray[np.integer] = np.array(task.values, dtype=kind)[labels]
    return values
