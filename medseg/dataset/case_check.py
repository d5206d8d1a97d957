"""Case check: what reading the files of one case, each once and one at a time, tells about them."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import groupby
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
from numpy.typing import NDArray

from medseg.dataset.labels import LABEL, label_problems, nonfinite_problem
from medseg.dataset.twins import voxels_sha256
from medseg.errors import InputError, MedsegError, Problem
from medseg.imaging.geometry import canonical_grid, compare_grids, nifti_affine
from medseg.imaging.nifti import header_notes
from medseg.imaging.volumes import PICTURE_ENDINGS, file_ending, nonfinite, read_volume
from medseg.records.case import Case
from medseg.records.grid import Float3, Grid, Int3, Volume
from medseg.records.task import Task

logger = logging.getLogger(__name__)

TINY = 4  # voxels: what the deepest layer of a U-Net sees
OUTSIDE_SHARE = 0.5  # of the labelled voxels
EMPTY_SHARE = 0.2  # of the image: with fewer zeros, as in CT where water is 0, they do not mean "nothing here"
_SAMPLED = 20_000  # voxels of a channel, for percentiles
_EXTREMES = (0.5, 99.5)


@dataclass(frozen=True, slots=True)
class Shape:
    """What the first image of a case is like: shape and spacing in canonical orientation, orientation on file."""

    shape: Int3
    spacing_mm: Float3
    orientation: str
    picture: bool


@dataclass(frozen=True, slots=True)
class CaseFindings:
    """What reading one case told.

    ``hashes``: of each image file that is not constant, by the name of its first channel, equal for equal voxels.
    ``extremes``: percentiles 0.5 and 99.5 by channel, of voxel types of more than 8 bits. ``label_type``: the voxel
    type of the label file. ``label_hash``: empty without foreground.
    """

    case: str
    problems: tuple[Problem, ...]
    files_read: int = 0
    shape: Shape | None = None
    hashes: dict[str, str] = field(default_factory=dict)
    extremes: dict[int, tuple[float, float]] = field(default_factory=dict)
    label_counts: dict[int, int] = field(default_factory=dict)
    label_hash: str = ""
    label_type: str = ""


def check_case(case: Case, task: Task | None) -> CaseFindings:
    """Read the files of one case, one at a time, and look at geometry, voxels and labels.

    Args:
        case: its files; without a label it is an image to be segmented.
        task: names channels and declares labels; None where nothing is declared.
    """
    reading = _Reading(case, task)
    for path, repeated in groupby(case.images):
        reading.image(path, len(list(repeated)))
    reading.end_images()
    if case.label is not None and task is not None:
        reading.label(case.label, task)
    return reading.findings()


class _Reading:
    """What is known of a case while its files come and go; at most one of them is in memory, and a mask."""

    def __init__(self, case: Case, task: Task | None) -> None:
        self.case, self.task = case, task
        self.problems: list[Problem] = []
        self.files_read = self.channels = 0
        self.constant: list[Problem] = []
        self.varied = False
        self.reference: tuple[str, Grid] | None = None
        self.shape: Shape | None = None
        self.something: NDArray[np.bool_] | None = None
        self.hashes: dict[str, str] = {}
        self.extremes: dict[int, tuple[float, float]] = {}
        self.counts: dict[int, int] = {}
        self.label_hash = self.label_type = ""

    def image(self, path: Path | None, channels: int) -> None:
        """Read one image file; None is a channel that is declared missing."""
        first = self.channels
        self.channels += channels
        volume = self._read(path, channels) if path is not None else None
        if path is None or volume is None:
            return
        names = [self._name(first + n) for n in range(len(volume.array))]
        self._compare(volume.grid, names[0])
        if self.shape is None:
            self.shape = _shape(volume.grid, path)
            self.problems += _tiny(self.shape, self.case.id)
        for number, (name, voxels) in enumerate(zip(names, volume.array, strict=True), start=first):
            self._channel(number, name, voxels)
        self.hashes[names[0]] = voxels_sha256(volume.array)
        if self.case.label is not None:
            something = (volume.array != 0).any(0)
            same = self.something is not None and self.something.shape == something.shape
            self.something = something | self.something if same else something

    def end_images(self) -> None:
        """Judge channels that are constant: E0136 if nothing else is there to learn from."""
        if self.case.label is not None and self.files_read and not self.varied:
            self.constant = [replace(problem, code="E0136") for problem in self.constant]
        self.problems += self.constant

    def label(self, path: Path, task: Task) -> None:
        """Read the label file."""
        volume = self._read(path, 1)
        if volume is None:
            return
        self._compare(volume.grid, LABEL)
        labels = volume.array[0]
        self.label_type = str(labels.dtype)
        found, self.counts = label_problems(labels, task, self.case.id)
        self.problems += found
        if any(value != 0 for value in self.counts):
            self.label_hash = voxels_sha256(labels) or f"all {labels.flat[0]} {labels.shape}"
            self._outside(labels, task)

    def findings(self) -> CaseFindings:
        """All that was found."""
        return CaseFindings(
            self.case.id,
            tuple(self.problems),
            self.files_read,
            self.shape,
            self.hashes,
            self.extremes,
            self.counts,
            self.label_hash,
            self.label_type,
        )

    def _name(self, channel: int) -> str:
        return f"channel {channel} ({self.task.channels[channel].name})" if self.task else f"channel {channel}"

    def _read(self, path: Path, channels: int) -> Volume | None:
        """The volume, or None with the reason among the problems."""
        try:
            volume = read_volume(path, channels) if self.task else read_any(path)
        except MedsegError as error:
            self.problems += [replace(problem, case=self.case.id) for problem in error.problems]
            return None
        except MemoryError:
            measured = f"{path.name} does not fit into memory"
            self.problems.append(Problem("E0600", measured, "", "use fewer --workers", self.case.id))
            return None
        except Exception as error:  # a bug in a reader must not hide what is wrong with the other cases
            logger.debug("unexpected error while reading %s", path.name, exc_info=True)
            measured = f"{path.name}: {type(error).__name__}: {error}"
            self.problems.append(Problem("E7000", measured, "", "please report this", self.case.id))
            return None
        self.files_read += 1
        notes = dict.fromkeys((*volume.notes, *header_notes(volume.source, channels)))
        self.problems += [replace(note, case=self.case.id) for note in notes]
        return volume

    def _compare(self, grid: Grid, name: str) -> None:
        if self.reference is None:
            self.reference = (name, grid)
            return
        problem = compare_grids(self.reference[1], grid, f"{name} against {self.reference[0]}")
        self.problems += [replace(problem, case=self.case.id)] if problem else []

    def _channel(self, number: int, name: str, voxels: NDArray[np.generic]) -> None:
        """E0110 not finite, W0136 constant; else remember where the values lie."""
        bad = nonfinite(voxels)
        if bad is not None:
            self.varied = True
            self.problems.append(nonfinite_problem(bad, name, self.case.id))
        elif (low := voxels.min()) == voxels.max() and voxels.size > 1:
            action = "check that the export worked; a channel that was never taken is to be declared missing"
            self.constant.append(Problem("W0136", f"{name} is {low} everywhere", "", action, self.case.id))
        else:
            self.varied = True
            if voxels.dtype.itemsize > 1:
                self.extremes[number] = _extremes(voxels)

    def _outside(self, labels: NDArray[Any], task: Task) -> None:
        """W0139 if most labelled voxels lie where every channel is 0 and much of the image is."""
        if self.something is None or self.something.shape != labels.shape:
            return
        if self.something.mean() > 1 - EMPTY_SHARE:
            return
        marked = (labels != 0) if task.ignore_value is None else (labels != 0) & (labels != task.ignore_value)
        count = int(marked.sum())
        outside = int((marked & ~self.something).sum())
        if count and outside > OUTSIDE_SHARE * count:
            measured = f"{outside} of {count} labelled voxels lie where the image is 0"
            expected = "labels inside the image"
            action = "check that image and label belong together, and their headers"
            self.problems.append(Problem("W0139", measured, expected, action, self.case.id))


def read_any(path: Path) -> Volume:
    """A volume with as many channels as the file turns out to hold: 1, or the 3 of a colour picture.

    Raises:
        InputError, ResourceError: as ``read_volume``.
    """
    try:
        return read_volume(path)
    except InputError as error:
        if {problem.code for problem in error.problems} != {"E0133"} or file_ending(path.name) not in PICTURE_ENDINGS:
            raise
        return read_volume(path, 3)


def _shape(grid: Grid, path: Path) -> Shape:
    canonical = canonical_grid(grid)
    codes = "".join(str(code) for code in nib.aff2axcodes(nifti_affine(grid)))
    return Shape(canonical.shape, canonical.spacing_mm, codes, file_ending(path.name) in PICTURE_ENDINGS)


def _tiny(shape: Shape, case: str) -> Sequence[Problem]:
    if sorted(shape.shape)[1] >= TINY:
        return []
    measured = f"shape {shape.shape} (z, y, x)"
    return [Problem("W0137", measured, f"{TINY} voxels along two axes", "check that it is the right file", case)]


def _extremes(voxels: NDArray[Any]) -> tuple[float, float]:
    """Percentiles 0.5 and 99.5 of evenly spaced voxels; the step is odd, so that rows do not repeat it."""
    flat = voxels.reshape(-1)
    low, high = np.percentile(flat[:: (flat.size // _SAMPLED) | 1], _EXTREMES)
    return float(low), float(high)
