"""Volumes by file name: one table says which ending is read and written by what."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from medseg.artefacts import sha256_of
from medseg.errors import InputError, Problem
from medseg.imaging.dicom import is_dicom, read_dicom, sha256_of_image
from medseg.imaging.geometry import compare_grids
from medseg.imaging.images2d import read_image2d, write_image2d
from medseg.imaging.metaimage import read_metaimage, write_metaimage
from medseg.imaging.mgh import read_mgh
from medseg.imaging.nifti import read_nifti, write_nifti
from medseg.imaging.nrrd import read_nrrd, write_nrrd, write_segmentation
from medseg.imaging.raw_data import named_data_file
from medseg.records.grid import Grid, Source, Volume
from medseg.records.task import Label

logger = logging.getLogger(__name__)

_TEXT_HEADERS = (".nrrd", ".nhdr", ".mha", ".mhd")

_Classes = Sequence[Label]
_Write = Callable[[Path, NDArray[np.integer], Grid, Source, _Classes], str]


def _write_picture(path: Path, labels: NDArray[np.integer], grid: Grid, source: Source, classes: _Classes) -> str:
    return write_image2d(path, labels)


def _write_nrrd(path: Path, labels: NDArray[np.integer], grid: Grid, source: Source, classes: _Classes) -> str:
    return write_nrrd(path, labels, grid, source)


def _write_metaimage(path: Path, labels: NDArray[np.integer], grid: Grid, source: Source, classes: _Classes) -> str:
    return write_metaimage(path, labels, grid, source)


@dataclass(frozen=True, slots=True)
class _Format:
    """``labels`` is the ending of a label map for an image with this ending; without ``write`` it is another one."""

    read: Callable[[Path, int], Volume]
    write: _Write | None
    labels: str


_FORMATS: dict[str, _Format] = {
    ".nii.gz": _Format(read_nifti, write_nifti, ".nii.gz"),
    ".nii": _Format(read_nifti, write_nifti, ".nii"),
    ".seg.nrrd": _Format(read_nrrd, write_segmentation, ".seg.nrrd"),  # before .nrrd
    ".nrrd": _Format(read_nrrd, _write_nrrd, ".nrrd"),
    ".nhdr": _Format(read_nrrd, None, ".nrrd"),
    ".mha": _Format(read_metaimage, _write_metaimage, ".mha"),
    ".mhd": _Format(read_metaimage, None, ".mha"),
    ".mgz": _Format(read_mgh, None, ".nii.gz"),
    ".mgh": _Format(read_mgh, None, ".nii.gz"),
    ".dcm": _Format(read_dicom, None, ".nii.gz"),
    ".png": _Format(read_image2d, _write_picture, ".png"),
    ".bmp": _Format(read_image2d, _write_picture, ".png"),
    ".tif": _Format(read_image2d, _write_picture, ".tif"),
    ".tiff": _Format(read_image2d, _write_picture, ".tiff"),
    ".jpg": _Format(read_image2d, None, ".png"),
    ".jpeg": _Format(read_image2d, None, ".png"),
}
IMAGE_ENDINGS: tuple[str, ...] = tuple(_FORMATS)
LABEL_ENDINGS: tuple[str, ...] = tuple(ending for ending, kind in _FORMATS.items() if kind.write)
PICTURE_ENDINGS: tuple[str, ...] = tuple(ending for ending, kind in _FORMATS.items() if kind.read is read_image2d)


def label_ending(name: str) -> str:
    """The ending of the label file for an image file: its own if that can be written, else the nearest format's."""
    ending = file_ending(name)
    return _FORMATS[ending].labels if ending else ".nii.gz"


def file_ending(name: str) -> str | None:
    """The supported ending of a file name, in lower case (``.nii.gz`` before ``.gz``), or None."""
    return next((ending for ending in IMAGE_ENDINGS if name.lower().endswith(ending)), None)


def strip_ending(name: str) -> str:
    """A file name without its supported ending, a DICOM folder's without ``#…``; others are returned as they are."""
    ending = file_ending(name)
    if ending:
        return name[: -len(ending)]
    folder, mark, _ = name.partition("#")
    return strip_ending(folder) if mark and folder else name


def read_volume(path: Path, channels: int = 1) -> Volume:
    """Read any supported format by its ending as (C, Z, Y, X); the file must hold exactly ``channels`` channels.

    A folder stands for the DICOM series in it, ``FOLDER#2`` for one of several (see ``medseg.imaging.dicom``).

    Raises:
        InputError: E0100 not found; E0143 broken link; E0106 unsupported; and what the format's reader raises.
        ResourceError: E0600 not enough memory.
    """
    path = Path(path)
    if file_ending(path.name) is None and (path.is_dir() or is_dicom(path)):
        return read_dicom(path, channels)
    kind = _format(path)
    if path.is_symlink() and not path.exists():
        raise InputError(Problem("E0143", f"{path.name} links to nothing", "", "restore its target"))
    if not path.exists():
        raise InputError(Problem("E0100", f"{path} does not exist", "", "check the path"))
    if not path.is_file():
        raise InputError(Problem("E0106", f"{path.name} is not a file", "", "check the path"))
    return kind.read(path, channels)


def read_channels(paths: Sequence[Path | None]) -> Volume:
    """Read the channels of one case as (C, Z, Y, X), C = ``len(paths)``, on the grid of the first that is there.

    A path that follows itself stands for one file with as many channels: ``(p, p, p)`` is one RGB picture or one 4D
    NIfTI file with three (see ``Case.images``). None is a missing channel: zeros, and named in ``Volume.missing``.
    Grids may differ by 0.1 voxel, by up to 0.5 voxel with a warning.

    Raises:
        InputError: E0119 shapes differ; E0120 grids differ; and what ``read_volume`` raises.
        ResourceError: E0600 not enough memory.
        ValueError: there is no path.
    """
    runs = [
        (path, [channel for channel, _ in group]) for path, group in groupby(enumerate(paths), lambda item: item[1])
    ]
    files = [(path, channels) for path, channels in runs if path is not None]
    missing = tuple(channel for channel, path in enumerate(paths) if path is None)
    if not files:
        raise ValueError("a case without an image")
    first = read_volume(files[0][0], len(files[0][1]))
    if len(runs) == 1:
        return first
    grid, source = first.grid, first.source
    array = np.zeros((len(paths), *grid.shape), first.array.dtype)
    array[files[0][1]] = first.array
    del first
    for path, channels in files[1:]:
        volume = read_volume(path, len(channels))
        problem = compare_grids(grid, volume.grid, f"{path.name} and {files[0][0].name}")
        if problem is not None and problem.severity == "error":
            raise InputError(problem)
        if problem is not None:
            logger.warning("%s", problem)
        array = array.astype(np.result_type(array, volume.array), copy=False)
        array[channels] = volume.array
    return Volume(array, grid, source, missing=missing)


def write_labels(
    path: Path, labels: NDArray[np.integer], grid: Grid, source: Source, classes: Sequence[Label] = ()
) -> str:
    """Commit a label map (Z, Y, X) on the source file's grid in the format that ``path`` names; returns its SHA-256.

    The names of ``classes`` go where the format has a place for them: NIfTI and ``.seg.nrrd``.

    Raises:
        ValueError: labels and grid do not belong together, or labels are negative.
        InputError: E0106 an ending that is not written, E0111 several slices for a picture.
        EnvironmentFailure: E0501, E0502.
        IntegrityError: E0701 the file does not read back as it was written.
    """
    path = Path(path)
    if labels.shape != grid.shape:
        raise ValueError(f"labels {labels.shape} do not lie on a grid of {grid.shape}")
    write = _format(path).write
    if write is None:
        measured = f"{path.name}: label maps are not written in this format"
        raise InputError(Problem("E0106", measured, f"one of {' '.join(LABEL_ENDINGS)}", "choose another format"))
    return write(path, labels, grid, source, classes)


def volume_sha256(path: Path) -> str:
    """SHA-256 (hex) of an image file; of a detached header (``.mhd``, ``.nhdr``) with its data file, of both hashes.

    Of a DICOM folder all files count, and what chooses the series.

    Raises:
        OSError: a file cannot be read.
    """
    if not path.is_file():
        return sha256_of_image(path)
    digest, data = sha256_of(path), named_data_file(path) if path.suffix.lower() in _TEXT_HEADERS else None
    if data is None:
        return digest
    return hashlib.sha256(f"{digest} {sha256_of(data)}".encode()).hexdigest()


def nonfinite(array: NDArray[np.generic]) -> tuple[int, tuple[int, ...]] | None:
    """Count and first index of NaN and infinite voxels, or None if there are none."""
    if array.dtype.kind != "f":
        return None
    with np.errstate(invalid="ignore", over="ignore"):
        if np.isfinite(array.min()) and np.isfinite(array.max()):  # both carry NaN on, no mask is made
            return None
    bad = ~np.isfinite(array)
    return int(bad.sum()), tuple(int(n) for n in np.unravel_index(int(bad.argmax()), bad.shape))


def _format(path: Path) -> _Format:
    ending = file_ending(path.name)
    if ending is None:
        supported = f"one of {' '.join(IMAGE_ENDINGS)}"
        raise InputError(Problem("E0106", f"{path.name} has no supported ending", supported, "convert it"))
    return _FORMATS[ending]
