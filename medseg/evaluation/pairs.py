"""Pairs: a prediction and its reference, found by name and read as class indices on one grid."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from medseg.errors import InputError, Problem
from medseg.evaluation.targets import IGNORE
from medseg.imaging.geometry import compare_grids
from medseg.imaging.volumes import IMAGE_ENDINGS, read_volume, strip_ending
from medseg.records.grid import Float3, Grid, Volume
from medseg.records.task import Task

log = logging.getLogger(__name__)

Pair = tuple[str, Path, Path]

_UNDECLARED = -2


def find_pairs(predictions: Path, references: Path) -> tuple[list[Pair], list[Problem]]:
    """Pair two folders by file name without ending (or two files), whatever supported format each side has.

    Returns:
        pairs (case id, prediction, reference) sorted by id; and problems: E0100 a reference without prediction, E0140
        several files of one name (none is taken), W0147 a prediction without reference.

    Raises:
        InputError: E0100 a path does not exist, E0146 nothing fits together.
    """
    predictions, references = Path(predictions), Path(references)
    for path in (predictions, references):
        if not path.exists():
            raise InputError(Problem("E0100", f"{path} does not exist", "", "check the path"))
    if predictions.is_file() and references.is_file():
        return [(strip_ending(references.name), predictions, references)], []
    if not (predictions.is_dir() and references.is_dir()):
        raise InputError(Problem("E0100", f"{predictions} and {references}", "two folders or two files", ""))
    predicted, expected = _by_stem(predictions), _by_stem(references)
    twice = [
        Problem("E0140", ", ".join(p.name for p in files), "one file", f"remove the others from {folder}", case)
        for folder, found in ((predictions, predicted), (references, expected))
        for case, files in found.items()
        if len(files) > 1
    ]
    missing = [
        Problem("E0100", "no prediction", f"a file {case}.* in {predictions}", "predict it", case)
        for case in expected.keys() - predicted.keys()
    ]
    ignored = [
        Problem("W0147", "prediction without reference", "", "not scored", case)
        for case in predicted.keys() - expected.keys()
    ]
    both = sorted(predicted.keys() & expected.keys() - {p.case for p in twice})
    pairs = [(case, predicted[case][0], expected[case][0]) for case in both]
    problems = sorted([*twice, *missing, *ignored], key=lambda p: (p.case or "", p.code))
    if not pairs and not twice:
        found = f"{len(predicted)} predictions and {len(expected)} references, no name in common"
        raise InputError(Problem("E0146", found, "files of the same names", f"compare {predictions} and {references}"))
    return pairs, problems


def _by_stem(folder: Path) -> dict[str, list[Path]]:
    files: dict[str, list[Path]] = {}
    for path in sorted(folder.iterdir()):
        if not path.name.startswith(".") and path.name.lower().endswith(IMAGE_ENDINGS) and path.is_file():
            files.setdefault(strip_ending(path.name), []).append(path)
    return files


def read_pair(pair: Pair, task: Task) -> tuple[NDArray[np.integer], NDArray[np.integer], Float3]:
    """Read prediction and reference as class indices (Z, Y, X), with the reference's ``spacing_mm``.

    Raises:
        InputError: E0119 shapes differ, E0120 grids differ, whatever reading finds, and see ``class_indices``.
    """
    case, prediction_path, reference_path = pair
    prediction, reference = read_volume(prediction_path), read_volume(reference_path)
    _check_same_grid(case, prediction.grid, reference.grid)
    decided = task.model_copy(update={"ignore_value": None})  # a prediction has to decide everywhere
    return class_indices(prediction, decided), class_indices(reference, task), reference.grid.spacing_mm


def _check_same_grid(case: str, prediction: Grid, reference: Grid) -> None:
    problem = compare_grids(reference, prediction, "prediction against reference")
    if problem is None:
        return
    problem = replace(problem, case=case)
    if problem.severity == "error":
        raise InputError(problem)
    log.warning("%s", problem)


def class_indices(volume: Volume, task: Task) -> NDArray[np.integer]:
    """The label values of a file as class indices (Z, Y, X) int16, ``IGNORE`` where it holds the ignore value.

    Raises:
        InputError: E0111 several channels or complex numbers, E0130 fractions, E0131 values the task does not declare.
    """
    array: NDArray[Any] = volume.array
    name = Path(volume.source.path).name or "label map"
    if array.shape[0] != 1 or array.dtype.kind not in "biuf":
        found = f"{name}: {array.shape[0]} channels of {array.dtype}"
        raise InputError(Problem("E0111", found, "one channel of label values", "give a label map"))
    known = task.values if task.ignore_value is None else (*task.values, task.ignore_value)
    table: NDArray[np.integer] = np.full(max(known) + 2, _UNDECLARED, np.int16 if len(known) < 2**15 else np.int32)
    table[list(task.values)] = np.arange(len(task.values))
    if task.ignore_value is not None:
        table[task.ignore_value] = IGNORE
    indices = np.empty(array.shape[1:], table.dtype)
    undeclared: set[float] = set()
    for z, plane in enumerate(array[0]):  # plane by plane: the look-up needs 8 bytes per voxel
        indices[z] = _look_up(plane, table, name)
        undeclared.update(np.unique(plane[indices[z] == _UNDECLARED]).tolist())
    if undeclared:
        found = f"{name} holds {_listed(sorted(undeclared))}"
        raise InputError(Problem("E0131", found, _listed(known), "declare the labels or correct the file"))
    return indices


def _look_up(plane: NDArray[Any], table: NDArray[np.integer], name: str) -> NDArray[np.integer]:
    """``table`` at the values of ``plane``; its last entry stands for every value outside it."""
    if plane.dtype.kind == "f" and not np.array_equal(plane, np.rint(plane)):
        found = f"{name} holds values that are no whole numbers"
        raise InputError(Problem("E0130", found, "label values", "give labels, not probabilities"))
    outside = (plane < 0) | (plane >= len(table))
    return table[np.where(outside, len(table) - 1, plane).astype(np.intp)]


def _listed(values: Sequence[float]) -> str:
    text = ", ".join(f"{value:g}" for value in values[:20])
    return f"{text}, … ({len(values)} values)" if len(values) > 20 else text
