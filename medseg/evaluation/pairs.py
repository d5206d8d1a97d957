"""Pairs: a prediction and its reference, found by name and read as class indices on one grid."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from medseg.errors import InputError, Problem
from medseg.imaging.geometry import compare_grids
from medseg.imaging.volumes import IMAGE_ENDINGS, read_volume, strip_ending
from medseg.preparation.prepare import class_indices
from medseg.records.grid import Float3, Grid, Volume
from medseg.records.task import Task

log = logging.getLogger(__name__)

Pair = tuple[str, Path, Path]


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


def read_pair(pair: Pair, task: Task) -> tuple[NDArray[np.int16], NDArray[np.int16], Float3]:
    """``read_pair_on_grid`` with ``spacing_mm`` instead of the grid."""
    prediction, reference, grid = read_pair_on_grid(pair, task)
    return prediction, reference, grid.spacing_mm


def read_pair_on_grid(pair: Pair, task: Task) -> tuple[NDArray[np.int16], NDArray[np.int16], Grid]:
    """Read prediction and reference as class indices (Z, Y, X), with the reference's grid.

    Raises:
        InputError: E0119 shapes differ, E0120 grids differ, E0130 values are not integers, E0131 values are not
            declared (the ignore value is none that a prediction may hold), and what reading finds.
    """
    case, prediction_path, reference_path = pair
    prediction, reference = read_volume(prediction_path), read_volume(reference_path)
    _check_same_grid(case, prediction.grid, reference.grid)
    decided = task.model_copy(update={"ignore_value": None})
    return (
        _indices(prediction, decided, "prediction", case),
        _indices(reference, task, "reference", case),
        reference.grid,
    )


def _indices(volume: Volume, task: Task, what: str, case: str) -> NDArray[np.int16]:
    try:
        return class_indices(volume.array[0], task)
    except InputError as error:
        raise InputError(replace(p, measured=f"{what}: {p.measured}", case=case) for p in error.problems) from error


def _check_same_grid(case: str, prediction: Grid, reference: Grid) -> None:
    problem = compare_grids(reference, prediction, "prediction against reference")
    if problem is None:
        return
    problem = replace(problem, case=case)
    if problem.severity == "error":
        raise InputError(problem)
    log.warning("%s", problem)
