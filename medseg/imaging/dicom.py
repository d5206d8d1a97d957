"""DICOM series: what a folder holds, and one series of it as a volume.

A path may name a series of a folder: ``FOLDER#2`` is the second of ``list_series``, ``FOLDER#1.2.840`` the one whose
UID starts so, ``FOLDER#t1 post`` the one with these words in its description. Without it there must be one series.
"""

from __future__ import annotations

import hashlib
import logging
import math
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from medseg.artefacts import sha256_of
from medseg.errors import InputError, Problem
from medseg.imaging.dicom_frames import refused
from medseg.imaging.dicom_header import Instance, looks_like_dicom, read_instance, require_pydicom
from medseg.imaging.dicom_pixels import read_pixels
from medseg.imaging.dicom_stack import Stack, stack
from medseg.imaging.nifti_header import MAX_VOXELS
from medseg.records.grid import Float3, Source, Volume

logger = logging.getLogger(__name__)

ENDINGS = (".dcm", ".dicom", ".ima", ".dic")  # files that must be DICOM; others are tried
SNIFFED = 50  # files of a folder that are looked at to tell whether it holds DICOM
MAX_DEPTH = 8
_MARKED = "#"


@dataclass(frozen=True, slots=True)
class Series:
    """One series of a folder; ``shape`` (C, Z, Y, X) and ``spacing_mm`` are None where ``problems`` has errors."""

    number: int
    uid: str
    description: str
    modality: str
    files: int
    shape: tuple[int, int, int, int] | None
    spacing_mm: Float3 | None
    problems: tuple[Problem, ...]


@dataclass(frozen=True, slots=True)
class _Contents:
    """Series (by number, then UID) as their instances, files that were not used, and files that are damaged."""

    series: tuple[tuple[Instance, ...], ...]
    ignored: tuple[str, ...]
    damaged: tuple[tuple[Path, Problem], ...]


def list_series(folder: Path) -> tuple[Series, ...]:
    """The image series of a folder and of the folders in it (or of one file), judged by their headers alone.

    Of a path that ends with ``#…`` the one series that this chooses.

    Raises:
        InputError: E0100 no such folder; E0106 pydicom is missing; E0146 no DICOM image; E0151 ``#…`` chooses none or
            several; the errors of damaged files if there is nothing else.
    """
    folder, marked = split_path(Path(folder))
    contents = _contents(folder)
    chosen = contents.series if marked is None else (_choose(contents, marked, folder),)
    return tuple(_listed(n, found, contents) for n, found in enumerate(contents.series, 1) if found in chosen)


def read_series(folder: Path, series: str | None = None, channels: int = 1, max_voxels: int = MAX_VOXELS) -> Volume:
    """Read a series as (C, Z, Y, X) on its grid in RAS mm, slices sorted by their position along the normal.

    Values are rescaled by each slice's own slope and intercept: integers stay integers, and are float32 where slopes
    differ or are fractions. Several volumes in one series (time points, echoes, b-values) and RGB are read only as
    the number of ``channels`` asked for. MONOCHROME1 and pixel padding values are left as they are. Peak memory is
    the array and a few slices.

    Args:
        folder: folder, file, or either followed by ``#`` and what ``series`` can be.
        series: number in ``list_series``, start of the UID, or words of the description.
        channels: number of channels that the task declares.
        max_voxels: refused above.

    Raises:
        InputError: E0100; E0101, E0102 damaged files; E0104; E0106 no decoder; E0133 channels; E0146 nothing there;
            E0151 several series, or no or several match ``series``; and what ``stack`` raises.
        ResourceError: E0600 not enough memory.
    """
    folder, marked = split_path(Path(folder))
    contents = _contents(folder)
    chosen = _choose(contents, series if series is not None else marked, folder)
    damage = _damage(contents, chosen)
    if damage:
        raise InputError(damage)
    found = stack(chosen, _short(folder))
    if found.channels * math.prod(found.grid.shape) > max_voxels:
        raise refused("E0104", folder, f"declares {found.grid.shape} voxels", f"at most {max_voxels}", "cut it")
    _expect(found, channels, folder)
    notes = list(found.notes)
    if contents.ignored:
        shown = ", ".join(contents.ignored[:3]) + (" …" if len(contents.ignored) > 3 else "")
        notes.append(Problem("W0147", f"{len(contents.ignored)} files of {_short(folder)} not used: {shown}", "images"))
    array, unused_bits = read_pixels(found, _short(folder))
    if unused_bits:
        notes.append(Problem("W0157", f"{_short(folder)}: pixels have more bits than declared", "", "they are cleared"))
    return Volume(array, found.grid, Source(str(folder), "dicom"), tuple(notes))


def split_path(path: Path) -> tuple[Path, str | None]:
    """Folder or file, and what follows a ``#`` in its name unless that is its own name."""
    if path.exists() or _MARKED not in path.name:
        return path, None
    name, _, marked = path.name.partition(_MARKED)
    return path.with_name(name) if name else path.parent, marked


def read_dicom(path: Path, channels: int = 1) -> Volume:
    """``read_series`` of a path that may end with ``#…``, as the table of formats wants it; its notes are logged."""
    volume = read_series(path, channels=channels)
    for note in volume.notes:
        logger.warning("%s", note)
    return volume


def is_dicom(path: Path) -> bool:
    """Whether a path, with or without ``#…``, is a DICOM file or a folder that holds some, itself or further down."""
    path, _ = split_path(path)
    if path.is_file():
        return path.name.lower().endswith(ENDINGS) or looks_like_dicom(path)
    return any(looks_like_dicom(found) for _, found in zip(range(SNIFFED), _files(path), strict=False))


def sha256_of_image(path: Path) -> str:
    """SHA-256 (hex) of an image file, or of all that lies in a DICOM folder, with what chooses the series."""
    folder, marked = split_path(path)
    if not folder.is_dir() and marked is None:
        return sha256_of(folder)
    digest = hashlib.sha256((marked or "").encode())
    for file in [folder] if folder.is_file() else _files(folder):
        digest.update(sha256_of(file).encode())
    return digest.hexdigest()


def _files(folder: Path) -> Iterator[Path]:
    """Files under a folder in a fixed order, hidden ones left out; links to folders are not followed."""
    for place, folders, names in os.walk(folder):
        deep = len(Path(place).relative_to(folder).parts)
        folders[:] = sorted(n for n in folders if not n.startswith(".")) if deep < MAX_DEPTH else []
        for name in sorted(names):
            if not name.startswith("."):
                yield Path(place, name)


def _contents(folder: Path) -> _Contents:
    """Headers of all files."""
    require_pydicom()
    if not folder.exists():
        raise InputError(Problem("E0100", f"{folder} does not exist", "", "check the path"))
    groups: dict[str, list[Instance]] = {}
    ignored, damaged = [], []
    for path in [folder] if folder.is_file() else _files(folder):
        try:
            instance = _instance(path)
        except InputError as error:
            damaged += [(path, problem) for problem in error.problems]
            continue
        if instance is None:
            ignored.append(path.name)
        else:
            groups.setdefault(instance.series_uid, []).append(instance)
    if not groups:
        problems = [problem for _, problem in damaged]
        nothing = Problem("E0146", f"no DICOM image in {_short(folder)}", "", "check the path")
        raise InputError(problems or nothing)
    ordered = sorted(groups.values(), key=lambda group: (group[0].series_number, group[0].series_uid))
    return _Contents(tuple(map(tuple, ordered)), tuple(ignored), tuple(damaged))


def _instance(path: Path) -> Instance | None:
    if path.is_symlink() and not path.exists():
        raise refused("E0143", path, "links to nothing", "", "restore its target")
    if looks_like_dicom(path):
        return read_instance(path)
    if path.name.lower().endswith(ENDINGS):
        raise refused("E0102", path, "is not DICOM, against its name", "", "copy or export the file again")
    return None


def _listed(number: int, instances: tuple[Instance, ...], contents: _Contents) -> Series:
    problems = list(_damage(contents, instances))
    shape, spacing = None, None
    try:
        found = stack(instances, f"series {number}")
    except InputError as error:
        problems += error.problems
    else:
        problems += found.notes
        shape, spacing = (found.channels, *found.grid.shape), found.grid.spacing_mm
    first = instances[0]
    files = len(instances)
    return Series(number, first.series_uid, first.description, first.modality, files, shape, spacing, tuple(problems))


def _damage(contents: _Contents, instances: Sequence[Instance]) -> list[Problem]:
    """Problems of damaged files beside those of a series: they may belong to it."""
    places = {instance.path.parent for instance in instances}
    return [problem for path, problem in contents.damaged if path.parent in places]


def _choose(contents: _Contents, wanted: str | None, folder: Path) -> tuple[Instance, ...]:
    if wanted is None:
        if len(contents.series) == 1:
            return contents.series[0]
        found = f"{_short(folder)} holds {len(contents.series)} series: {_summary(contents)}"
        action = f"choose one: {_short(folder)}#1 … (medseg inspect tells more)"
        raise InputError(Problem("E0151", found, "one series", action))
    words = wanted.strip().lower()
    if words.isdecimal():
        matching = contents.series[int(words) - 1 : int(words)] if int(words) else ()
    else:
        matching = tuple(s for s in contents.series if words and s[0].series_uid.startswith(words)) or tuple(
            s for s in contents.series if words and words in s[0].description.lower()
        )
    if len(matching) == 1:
        return matching[0]
    found = f"{len(matching)} series of {_short(folder)} match {wanted!r}: {_summary(contents)}"
    raise InputError(Problem("E0151", found, "one series", "give its number"))


def _summary(contents: _Contents) -> str:
    """Number, modality and images of each series; no text of the headers, which may hold names of patients."""
    rows = [f"{n} ({group[0].modality or '?'}, {len(group)} files)" for n, group in enumerate(contents.series, 1)]
    return ", ".join(rows[:20]) + (" …" if len(rows) > 20 else "")


def _short(folder: Path) -> str:
    return folder.name or folder.resolve().name or str(folder)


def _expect(found: Stack, channels: int, folder: Path) -> None:
    if found.channels == channels:
        return
    samples = found.volumes[0][0].coding.samples
    if samples > 1:
        measured, action = f"{_short(folder)} holds RGB images", "declare 3 channels, or convert them to grey"
        raise InputError(Problem("E0133", measured, f"{channels} channel(s)", action))
    if len(found.volumes) == 1:
        measured = f"{_short(folder)} holds 1 channel"
        raise InputError(Problem("E0133", measured, str(channels), "provide one folder per channel"))
    measured = f"{_short(folder)} holds {len(found.volumes)} volumes, told apart by {found.told_apart_by}"
    action = "declare as many channels, or export one volume per series"
    raise InputError(Problem("E0153", measured, f"{channels} channel(s)", action))
