"""Probabilities that a prediction was saved with: NIfTI maps of ``medseg predict``, or nnU-Net's ``.npz`` files.

``medseg predict --probabilities`` writes ``probabilities/CASE/label_VALUE.nii.gz``, a map for each output of the
network; nnU-Net writes ``CASE.npz`` beside its label files. Maps are read slab by slab, as often as they are asked for.
"""

from __future__ import annotations

import math
import zipfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from medseg.errors import InputError, Problem
from medseg.imaging.geometry import compare_grids
from medseg.imaging.nifti import nifti_slabs
from medseg.records.grid import Grid
from medseg.records.task import Task

FOLDER = "probabilities"
ENDING = ".npz"
KEY = "probabilities"
SLAB_VOXELS = 2**20
_ROUNDING = 1e-5

Values = NDArray[np.floating]


class Probabilities(Protocol):
    """What the outputs of a network say of every voxel of a case."""

    def slabs(self, outputs: Sequence[int]) -> Iterator[tuple[int, Values]]:
        """The sum of some outputs, not above 1, from the first slice on: number of the first slice, (z, Y, X).

        Raises:
            InputError: what is read is damaged, or does not fit.
        """


@dataclass(frozen=True, slots=True, eq=False)
class ArrayProbabilities:
    """Probabilities in memory: (outputs, Z, Y, X)."""

    array: Values

    def slabs(self, outputs: Sequence[int]) -> Iterator[tuple[int, Values]]:
        """See ``Probabilities.slabs``."""
        slices = slab_slices(self.array.shape[1:])
        for start in range(0, self.array.shape[1], slices):
            yield start, _sum([self.array[output, start : start + slices] for output in outputs], "probabilities")


@dataclass(frozen=True, slots=True)
class MapProbabilities:
    """Maps on a disk, one for each output; they must lie on ``grid``."""

    files: tuple[Path, ...]
    grid: Grid

    def slabs(self, outputs: Sequence[int]) -> Iterator[tuple[int, Values]]:
        """See ``Probabilities.slabs``; a slab of each of the maps is in memory at a time."""
        slices, start = slab_slices(self.grid.shape), 0
        for parts in zip(*(self._read(self.files[output], slices) for output in outputs), strict=True):
            yield start, _sum(parts, self.files[outputs[0]].parent.name)
            start += slices

    def _read(self, path: Path, slices: int) -> Iterator[Values]:
        for grid, values in nifti_slabs(path, slices):
            problem = compare_grids(self.grid, grid, f"{path.parent.name}/{path.name}")
            if problem is not None and problem.severity == "error":
                raise InputError(problem)
            yield values


def slab_slices(shape: Sequence[int]) -> int:
    """Slices of a volume (Z, Y, X) that are taken at a time."""
    return max(1, SLAB_VOXELS // math.prod(shape[1:]))


def _sum(parts: Sequence[Values], name: str) -> Values:
    low, high = min(float(part.min()) for part in parts), max(float(part.max()) for part in parts)
    if not (low >= 0 and high <= 1 + _ROUNDING):
        measured = f"{name}: probabilities range from {low:g} to {high:g}"
        raise InputError(Problem("E0102", measured, "0 to 1", "predict it again"))
    total = parts[0].astype(np.float32)
    for part in parts[1:]:
        total += part
    return np.minimum(total, 1, out=total)


def map_files(task: Task) -> tuple[str, ...]:
    """The names of a case's maps in the order of the network's outputs, as ``medseg predict`` writes them."""
    if task.regions:
        return tuple(f"region_{number}.nii.gz" for number in range(1, len(task.regions) + 1))
    return tuple(f"label_{value}.nii.gz" for value in task.values)


def find_probabilities(folder: Path) -> dict[str, Path]:
    """By case id: ``CASE.npz`` files of a folder, and folders of maps in it or in its ``probabilities``.

    Raises:
        InputError: E0100 no such folder, E0146 nothing in it.
    """
    if not folder.is_dir():
        raise InputError(Problem("E0100", f"{folder} is no folder", "", "check the path"))
    maps = [m for place in (folder / FOLDER, folder) for kind in ("label", "region") for m in place.glob(f"*/{kind}_*")]
    found = {path.parent.name: path.parent for path in maps}
    found |= {path.name.removesuffix(ENDING): path for path in folder.glob(f"*{ENDING}")}
    if not found:
        expected = f"CASE{ENDING}, or {FOLDER}/CASE/label_VALUE.nii.gz"
        raise InputError(Problem("E0146", f"no probabilities in {folder}", expected, "predict with --probabilities"))
    return dict(sorted(found.items()))


def open_probabilities(path: Path, task: Task, grid: Grid) -> Probabilities:
    """The probabilities of a case at a path that ``find_probabilities`` gave; ``grid`` is that of its labels.

    Raises:
        InputError: E0100 a map is missing; and what ``read_probabilities`` raises.
    """
    if not path.is_dir():
        return ArrayProbabilities(read_probabilities(path, task, grid.shape))
    files = tuple(path / name for name in map_files(task))
    missing = [file.name for file in files if not file.is_file()]
    if missing:
        there = f"{len(files)} maps, one for each output of the task"
        raise InputError(Problem("E0100", f"no {', '.join(missing)} in {path}", there, "predict with --probabilities"))
    return MapProbabilities(files, grid)


def read_probabilities(path: Path, task: Task, shape: tuple[int, ...]) -> Values:
    """Read an array ``probabilities`` (outputs of the task, Z, Y, X) as nnU-Net saves it, on the label file's grid.

    Raises:
        InputError: E0102 damaged or no such array, E0119 another shape than the labels, E0133 other outputs than
            the task's.
    """
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as archive:
            array: Values = archive[KEY]
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        problem = Problem("E0102", f"{path.name}: {error}", f"an array {KEY!r}", "predict it again")
        raise InputError(problem) from error
    if array.ndim != 4 or array.shape[1:] != shape or array.dtype.kind != "f":
        found = f"{path.name}: {array.dtype} {array.shape}"
        raise InputError(Problem("E0119", found, f"floating point ({task.outputs}, {', '.join(map(str, shape))})"))
    if len(array) != task.outputs:
        raise InputError(Problem("E0133", f"{path.name}: {len(array)} channels", f"{task.outputs}", "check the task"))
    return array
