"""Probabilities that a prediction was saved with: nnU-Net's ``.npz`` files beside its label files."""

from __future__ import annotations

import zipfile
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from medseg.errors import InputError, Problem
from medseg.records.task import Task

ENDING = ".npz"
KEY = "probabilities"

Probabilities = NDArray[np.floating]


def find_probabilities(folder: Path) -> dict[str, Path]:
    """The probability files ``CASE.npz`` of a folder by case id.

    Raises:
        InputError: E0100 no such folder, E0146 nothing in it.
    """
    if not folder.is_dir():
        raise InputError(Problem("E0100", f"{folder} is no folder", "", "check the path"))
    found = {path.name.removesuffix(ENDING): path for path in sorted(folder.glob(f"*{ENDING}"))}
    if not found:
        raise InputError(Problem("E0146", f"no *{ENDING} in {folder}", "", "predict with --save_probabilities"))
    return found


def read_probabilities(path: Path, task: Task, shape: tuple[int, ...]) -> Probabilities:
    """Read an array ``probabilities`` (outputs of the task, Z, Y, X) as nnU-Net saves it, on the label file's grid.

    Raises:
        InputError: E0102 damaged or no such array, E0119 another shape than the labels, E0133 other outputs than
            the task's.
    """
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as archive:
            array: Probabilities = archive[KEY]
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        problem = Problem("E0102", f"{path.name}: {error}", f"an array {KEY!r}", "predict it again")
        raise InputError(problem) from error
    if array.ndim != 4 or array.shape[1:] != shape or array.dtype.kind != "f":
        found = f"{path.name}: {array.dtype} {array.shape}"
        raise InputError(Problem("E0119", found, f"floating point ({task.outputs}, {', '.join(map(str, shape))})"))
    if len(array) != task.outputs:
        raise InputError(Problem("E0133", f"{path.name}: {len(array)} channels", f"{task.outputs}", "check the task"))
    return array
