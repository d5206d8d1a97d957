"""Inspect: what a path holds — each image or DICOM series with its grid, its values and what is wrong with it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import nibabel as nib
import numpy as np

from medseg.dataset.dicom_folders import dicom_inputs
from medseg.dataset.naming import visible
from medseg.errors import InputError, MedsegError, Problem
from medseg.imaging.dicom import is_dicom, list_series, read_series, split_path
from medseg.imaging.geometry import nifti_affine
from medseg.imaging.volumes import file_ending, read_volume
from medseg.records.grid import Float3, Int3, Volume

MAX_CHANNELS = 16  # tried for a file that does not hold one channel
_OTHER_CHANNELS = {"E0111", "E0133"}


@dataclass(frozen=True, slots=True)
class Found:
    """One image. ``axes`` are the directions in which the index grows, along ``shape`` and ``spacing_mm`` (z, y, x).

    What could not be read is None. ``number``, ``modality``, ``description`` and ``files`` are those of DICOM series.
    """

    path: Path
    file_format: str
    channels: int | None = None
    shape: Int3 | None = None
    spacing_mm: Float3 | None = None
    axes: str | None = None
    voxel_type: str | None = None
    lowest: float | None = None
    highest: float | None = None
    number: int | None = None
    modality: str | None = None
    description: str | None = None
    files: int | None = None
    problems: tuple[Problem, ...] = ()


def inspect(path: Path) -> Iterator[Found]:
    """Every image that a file, a folder of images, a DICOM folder or a folder of those holds, one by one, all read.

    Raises:
        InputError: E0100 there is no such path; E0146 no image in it.
    """
    folder, marked = split_path(Path(path))
    if not folder.exists():
        raise InputError(Problem("E0100", f"{folder} does not exist", "", "check the path"))
    series = dicom_inputs(path) if marked is None else [path]
    if series:
        for one in series:
            yield from _series(one)
    elif folder.is_dir():
        files = [entry for entry in visible(folder) if file_ending(entry.name) and entry.is_file()]
        if not files:
            raise InputError(Problem("E0146", f"no image in {folder.name}", "", "check the path"))
        for file in files:
            yield from _series(file) if is_dicom(file) else [_file(file)]
    else:
        yield from _series(path) if is_dicom(path) else [_file(path)]


def _series(path: Path) -> Iterator[Found]:
    try:
        listed = list_series(path)
    except InputError as error:
        yield Found(path, "dicom", problems=error.problems)
        return
    for one in listed:
        known = Found(path, "dicom", number=one.number, files=one.files, problems=one.problems)
        known = replace(known, modality=one.modality, description=one.description)
        if one.shape is None:
            yield known
            continue
        try:
            yield _measured(known, read_series(split_path(path)[0], str(one.number), one.shape[0]))
        except MedsegError as error:
            yield replace(known, problems=error.problems)


def _file(path: Path) -> Found:
    ending = file_ending(path.name) or "unknown"
    first: MedsegError | None = None
    for channels in range(1, MAX_CHANNELS + 1):
        try:
            return _measured(Found(path, ending.lstrip(".")), read_volume(path, channels))
        except MedsegError as error:
            first = first or error
            if not {problem.code for problem in error.problems} <= _OTHER_CHANNELS:
                break
    assert first is not None
    return Found(path, ending.lstrip("."), problems=first.problems)


def _measured(known: Found, volume: Volume) -> Found:
    axes = nib.aff2axcodes(nifti_affine(volume.grid))
    finite = volume.array if volume.array.dtype.kind != "f" else volume.array[np.isfinite(volume.array)]
    return replace(
        known,
        channels=len(volume.array),
        shape=volume.grid.shape,
        spacing_mm=volume.grid.spacing_mm,
        axes="".join(reversed(axes)),
        voxel_type=str(volume.array.dtype),
        lowest=float(finite.min()) if finite.size else None,
        highest=float(finite.max()) if finite.size else None,
        problems=volume.notes,
    )
