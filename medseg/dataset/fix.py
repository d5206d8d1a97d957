"""Fix: a case written again without what can be mended without a guess. The input is only read.

Mended are: voxels of images that are not finite (they become the smallest finite value of their channel, which is the
background of CT and MR), labels stored as floating point, label and channel grids within half a voxel of the first
image's, sheared or contradictory headers, and files that hold several channels or have another format than the copy.
"""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from medseg.artefacts import commit
from medseg.dataset.labels import LABEL, label_problems
from medseg.errors import InputError, Problem
from medseg.imaging.dicom import sha256_of_image
from medseg.imaging.geometry import compare_grids
from medseg.imaging.nifti import header_notes
from medseg.imaging.rewrite import REWRITABLE, Form, read_by_form, write_image
from medseg.imaging.volumes import PICTURE_ENDINGS, file_ending, nonfinite, read_volume, write_labels
from medseg.records.case import Case, Dataset
from medseg.records.check import MendedCase
from medseg.records.grid import Grid, Source, Volume
from medseg.records.task import Task

FORM_CODES = {"E0121", "E0122"}  # mendable where one form is valid, or the user names one
HEADER_NOTES = {"W0121", "W0122"}
FIXABLE = {"E0110", "W0120", "W0130", "E0122", *HEADER_NOTES}


@dataclass(frozen=True, slots=True)
class Target:
    """Where a copy goes, in nnU-Net's layout, with one file ending; which form to believe where the two disagree."""

    folder: Path
    ending: str
    form: Form | None = None

    def image(self, case: str, channel: int) -> Path:
        """The file of a channel; of a picture with several, channel 0."""
        return self.folder / "imagesTr" / f"{case}_{channel:04d}{self.ending}"

    def label(self, case: str) -> Path:
        """The label file."""
        return self.folder / "labelsTr" / f"{case}{self.ending}"


def fixable(problem: Problem) -> bool:
    """Whether a problem can be mended; labels that are not finite cannot."""
    return problem.code in FIXABLE and not (problem.code == "E0110" and problem.measured.startswith(f"{LABEL}:"))


def ending_of_copy(dataset: Dataset) -> str:
    """The data set's own file ending if it has one that images can be written with, else ``.png`` or ``.nii.gz``."""
    files = [path for case in dataset.cases for path in (*case.files, *([case.label] if case.label else []))]
    endings = {file_ending(path.name) if path.is_file() else None for path in files}
    if len(endings) == 1 and (only := next(iter(endings))) in REWRITABLE:
        return only
    return ".png" if endings <= set(PICTURE_ENDINGS) else ".nii.gz"


def mend_case(case: Case, task: Task, target: Target) -> MendedCase:
    """Write the files of one case into the copy: byte for byte where nothing has to change, else mended.

    Raises:
        InputError: something cannot be mended, and no file of the case stays in the copy; E0122 both forms of a header
            are valid and none was named; E0110, E0130, E0131 of labels that only now could be read.
        EnvironmentFailure: E0501, E0502.
    """
    try:
        return _mend_case(case, task, target)
    except (InputError, MemoryError):
        for path in (*(target.image(case.id, n) for n in range(len(task.channels))), target.label(case.id)):
            path.unlink(missing_ok=True)
        raise


def _mend_case(case: Case, task: Task, target: Target) -> MendedCase:
    files = [(path, len(list(repeated))) for path, repeated in groupby(case.images)]
    outputs: dict[str, str] = {}
    changes: list[str] = []
    first: Grid | None = None
    channel = 0
    for path, channels in files:
        if path is not None:
            volume, said = _read(path, channels, target)
            first, volume, more = _settle(first, volume, path.name)
            written = _write_image(volume, path, [*said, *more], case.id, channel, target)
            outputs |= written[0]
            changes += written[1]
        channel += channels
    if case.label is not None:
        volume, said = _read(case.label, 1, target)
        first, volume, more = _settle(first, volume, case.label.name)
        problems, _ = label_problems(volume.array[0], task, case.id)
        if errors := [problem for problem in problems if problem.severity == "error"]:
            raise InputError(errors)
        output, digest, said = _write_label(volume, case.label, [*said, *more], case.id, target)
        outputs[output] = digest
        changes += said
    return MendedCase(id=case.id, inputs=input_hashes(case), outputs=outputs, changes=tuple(changes))


def input_hashes(case: Case) -> dict[str, str]:
    """SHA-256 of every file or DICOM series of a case by its name."""
    paths = (*case.files, *([case.label] if case.label else []))
    return {str(Path(*path.parts[-2:])): sha256_of_image(path) for path in paths}


def _read(path: Path, channels: int, target: Target) -> tuple[Volume, list[str]]:
    """The volume, and what had to be decided to read it."""
    try:
        return read_volume(path, channels), []
    except InputError as error:
        if not {problem.code for problem in error.problems} <= FORM_CODES or not path.name.endswith(
            (".nii", ".nii.gz")
        ):
            raise
        form, volume = _by_form(path, channels, target, error)
    return replace(volume, source=Source("", "")), [f"{path.name}: header by its {form}"]


def _by_form(path: Path, channels: int, target: Target, error: InputError) -> tuple[Form, Volume]:
    valid: dict[Form, Volume] = {}
    forms: Sequence[Form] = ("sform", "qform") if target.form is None else (target.form,)
    for form in forms:
        temporary = target.folder / f".medseg-{hashlib.sha256(str(path).encode()).hexdigest()[:12]}.tmp.nii"
        try:
            valid[form] = read_by_form(path, channels, form, temporary)
        except InputError:
            continue
    if len(valid) != 1:
        hint = "name the right one with --geometry sform or --geometry qform" if valid else "restore the header"
        raise InputError([replace(problem, action=hint) for problem in error.problems])
    return next(iter(valid.items()))


def _settle(first: Grid | None, volume: Volume, name: str) -> tuple[Grid, Volume, list[str]]:
    """The case's grid, the volume on it, and what was wrong with its own; too far apart is an error.

    A volume whose header must change has no source any more that it could be copied from.
    """
    notes = {note.code for note in (*volume.notes, *header_notes(volume.source, len(volume.array)))}
    changes = [f"{name}: header made consistent"] if notes & HEADER_NOTES else []
    grid = volume.grid
    problem = None if first is None else compare_grids(first, grid, name)
    if problem is not None and problem.severity == "error":
        raise InputError(problem)
    if problem is not None and first is not None:
        changes.append(f"{name}: moved onto the grid of the first image")
        grid = first
    return first or grid, replace(volume, grid=grid, source=Source("", "") if changes else volume.source), changes


def _write_image(
    volume: Volume, path: Path, changes: list[str], case: str, channel: int, target: Target
) -> tuple[dict[str, str], list[str]]:
    """Write one file's channels; returns relative path → SHA-256, and what was changed."""
    array, replaced = _finite(volume.array, path.name)
    changes = changes + replaced
    one_file = len(array) == 1 or (array.shape[1] == 1 and target.ending in PICTURE_ENDINGS)
    parts = [array] if one_file else [array[n : n + 1] for n in range(len(array))]
    if not one_file:
        changes.append(f"{path.name}: split into {len(parts)} files, one per channel")
    if file_ending(path.name) != target.ending or path.is_dir():
        changes.append(f"{path.name}: converted to {target.ending}")
    outputs = {}
    for number, part in enumerate(parts, start=channel):
        output = target.image(case, number)
        digest = write_image(output, part, volume.grid) if changes else copy_file(path, output)
        outputs[_relative(output, target)] = digest
    return outputs, changes


def _finite(array: NDArray[np.generic], name: str) -> tuple[NDArray[np.generic], list[str]]:
    """The array (C, Z, Y, X) with what is not finite replaced by its channel's smallest finite value, and a word."""
    bad = nonfinite(array)
    if bad is None:
        return array, []
    mended = array.copy()
    values = []
    for voxels in mended:
        finite = np.isfinite(voxels)
        if not finite.any():
            raise InputError(Problem("E0110", f"{name}: no voxel of a channel is finite", "", "replace the image"))
        if not finite.all():
            values.append(voxels[finite].min())
            voxels[~finite] = values[-1]
    shown = ", ".join(f"{float(value):.6g}" for value in values)
    return mended, [f"{name}: {bad[0]} voxels that were not finite are now {shown}, the smallest value of the channel"]


def _write_label(
    volume: Volume, path: Path, changes: list[str], case: str, target: Target
) -> tuple[str, str, list[str]]:
    labels = volume.array[0]
    if labels.dtype.kind == "f":
        changes = [*changes, f"{path.name}: {labels.dtype} labels stored as integers"]
        labels = np.rint(labels)
    if file_ending(path.name) != target.ending:
        changes.append(f"{path.name}: converted to {target.ending}")
    output = target.label(case)
    if not changes:
        return _relative(output, target), copy_file(path, output), []
    kind = np.min_scalar_type(int(labels.max()))
    digest = write_labels(output, labels.astype(kind), volume.grid, volume.source)
    return _relative(output, target), digest, changes


def _relative(output: Path, target: Target) -> str:
    return output.relative_to(target.folder).as_posix()


def copy_file(source: Path, output: Path) -> str:
    """Commit a copy, byte for byte, and return its SHA-256.

    It is no hard link: many tools rewrite a file in place, and would change the input through the copy. Where the file
    system can share blocks until one side is written, it does.
    """

    def write(temporary: Path) -> None:
        with source.open("rb") as read, temporary.open("xb") as written:
            left = os.fstat(read.fileno()).st_size
            try:
                while left > 0 and (done := os.copy_file_range(read.fileno(), written.fileno(), left)):
                    left -= done
            except (OSError, AttributeError):  # another file system, or another operating system
                read.seek(0)
                written.seek(0)
                written.truncate()
                shutil.copyfileobj(read, written)

    return commit(output, write)
