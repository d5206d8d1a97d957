"""Measurement: what the fingerprint needs to know of one case, read once, and kept so that it is not read again."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, ValidationError

from medseg.artefacts import commit, sha256_of_json
from medseg.dataset.labels import label_problems
from medseg.dataset.twins import voxels_sha256
from medseg.errors import InputError, MedsegError, Problem, ResourceError
from medseg.imaging.crop import box_slices, nonzero_box
from medseg.imaging.geometry import canonical_axes, compare_grids, to_canonical
from medseg.imaging.volumes import nonfinite, read_channels, read_volume, volume_sha256
from medseg.records.base import Record
from medseg.records.case import Case
from medseg.records.fingerprint import CasePrint
from medseg.records.grid import Float3, Volume
from medseg.records.task import Task

CENTRE_VOXELS = 2_000_000  # looked at for the centres of labels, evenly spread over the case
MAX_VALUES = 65_536  # kept of a case and channel: all that 16 bits can tell apart, and ranks 0.0015 % apart of the rest
PART = 1_000_000
SUFFIX = ".safetensors"
METADATA = "medseg"  # one key: safetensors writes several in any order


@dataclass(frozen=True, slots=True, eq=False)
class Foreground:
    """The foreground voxels of one case: per channel (C,) moments and extremes, and the ``Distribution`` of values.

    A channel that the case does not have has an empty distribution, and numbers without meaning.
    """

    mean: NDArray[np.float64]
    variance: NDArray[np.float64]
    low: NDArray[np.float64]
    high: NDArray[np.float64]
    channels: tuple[Distribution, ...]


@dataclass(frozen=True, slots=True, eq=False)
class Distribution:
    """Values (n,) in ascending order, and how many voxels each of them stands for (n,)."""

    values: NDArray[np.float32]
    counts: NDArray[np.int64]


NOTHING = Distribution(np.empty(0, np.float32), np.empty(0, np.int64))


@dataclass(frozen=True, slots=True, eq=False)
class Measurement:
    """One case measured; ``images`` holds a ``voxels_sha256`` for each file of it. No foreground: None."""

    case: CasePrint
    images: tuple[str, ...]
    foreground: Foreground | None


class _Kept(Record):
    """The header of a kept measurement, behind the SHA-256 of it and of the arrays that follow in the file."""

    schema_version: int = Field(default=1, ge=1, le=1)
    settings_sha256: str
    case: CasePrint
    images: tuple[str, ...]
    channels: int = Field(ge=0, le=256)


def measured_case(case: Case, task: Task, store: Path | None = None) -> Measurement:
    """The measurement of a case: that in ``store`` if it was made of the same bytes, else a new one, kept there.

    Args:
        case: its files.
        task: declares the label values, and the one that is ignored.
        store: folder of kept measurements; a damaged one is made anew.

    Raises:
        InputError: E0110, E0119, E0120, E0130, E0131, and what reading raises; every problem names the case.
        ResourceError: E0600.
        EnvironmentFailure: E0501, E0502 it cannot be kept.
    """
    hashes = _file_hashes(case)
    path = None if store is None else store / f"{case.id}{SUFFIX}"
    settings = _settings_sha256(task)
    sure = all(digest or image is None for digest, image in zip(hashes, (*case.images, case.label), strict=False))
    found = _load(path, case.id, hashes, settings) if path is not None and sure else None
    if found is None:
        found = _measure(case, task, hashes)
        if path is not None:
            _save(path, found, settings)
    return found


def _file_hashes(case: Case) -> tuple[str, ...]:
    """SHA-256 of each image of ``case.images`` and then of the label file; "" where there is no readable file."""
    paths = case.images if case.label is None else (*case.images, case.label)
    hashes = {path: _hash_or_nothing(path) for path in dict.fromkeys(paths)}
    return tuple(hashes[path] for path in paths)


def _hash_or_nothing(path: Path | None) -> str:
    try:
        return volume_sha256(path) if path is not None else ""
    except OSError:  # reading it will say what is wrong
        return ""


def _settings_sha256(task: Task) -> str:
    """Of everything but the files that a measurement depends on. Count ``version`` up when measuring changes."""
    settings = {"version": 2, "values": task.values, "ignore": task.ignore_value, "channels": len(task.channels)}
    return sha256_of_json(settings | {"max_values": MAX_VALUES})


def _measure(case: Case, task: Task, hashes: tuple[str, ...]) -> Measurement:
    """Read and measure one case; what it raises names the case."""
    try:
        return _measure_volume(case, task, hashes)
    except MedsegError as error:
        raise type(error)([_in_case(problem, case.id) for problem in error.problems]) from error
    except MemoryError as error:
        raise ResourceError(
            Problem("E0600", "the case does not fit into memory", "", "free memory", case.id)
        ) from error
    except Exception as error:
        error.add_note(f"while measuring case {case.id}")
        raise


def _measure_volume(case: Case, task: Task, hashes: tuple[str, ...]) -> Measurement:
    volume = read_channels(case.images)
    bad = nonfinite(volume.array)
    if bad is not None:
        measured = f"{bad[0]} voxels are not finite, the first at {bad[1]} (channel, z, y, x)"
        raise InputError(Problem("E0110", measured, "0", "repair the image"))
    axes, flipped = canonical_axes(volume.grid)
    image = to_canonical(volume.array, axes, flipped)
    box = nonzero_box(image)
    inside = box_slices(box)
    z, y, x = (stop - start for start, stop in box)
    counts: dict[int, int] = {}
    foreground = None
    centres: dict[int, Float3] = {}
    spacing = volume.grid.spacing_mm
    spacing = (spacing[axes[0]], spacing[axes[1]], spacing[axes[2]])
    if case.label is not None:
        on_file, counts = _read_labels(case, case.label, volume, task)
        labels = to_canonical(on_file, axes, flipped)[inside]
        mask = labels > 0
        if task.ignore_value is not None:
            mask &= labels != task.ignore_value
        centres = label_centres_mm(np.where(mask, labels, 0), spacing)
        if mask.any():
            foreground = _foreground((channel[inside][mask] for channel in image), volume.missing)
    record = CasePrint(
        id=case.id,
        shape_after_crop=(z, y, x),
        spacing_mm=spacing,
        relative_size_after_cropping=z * y * x / volume.array[0].size,
        voxels_per_label=counts,
        label_centres_mm=centres,
        sha256=hashes,
    )
    return Measurement(record, _image_hashes(case, volume.array), foreground)


def label_centres_mm(labels: NDArray[Any], spacing_mm: Float3) -> dict[int, Float3]:
    """The centre of each label above 0 in mm from the first voxel of ``labels`` (Z, Y, X), along z, y, x.

    Of large volumes every n-th voxel of each axis is looked at; labels that are too small to be met have no centre.
    """
    step = max(1, math.ceil((labels.size / CENTRE_VOXELS) ** (1 / 3)))
    seen = labels[::step, ::step, ::step]
    places = np.nonzero(seen)
    values, which = np.unique(seen[places], return_inverse=True)
    counts = np.bincount(which, minlength=len(values))
    sums = [np.bincount(which, place, len(values)) * step * mm for place, mm in zip(places, spacing_mm, strict=True)]
    centres = np.round(np.transpose(sums) / np.maximum(counts, 1)[:, None], 3)
    return {int(value): (float(z), float(y), float(x)) for value, (z, y, x) in zip(values, centres, strict=True)}


def _read_labels(case: Case, label: Path, image: Volume, task: Task) -> tuple[NDArray[Any], dict[int, int]]:
    """Label values (Z, Y, X), whole numbers on the image's file grid, and the voxels of each value."""
    volume = read_volume(label)
    problem = compare_grids(image.grid, volume.grid, "label against image")
    if problem is not None and problem.severity == "error":
        raise InputError(problem)
    labels: NDArray[Any] = volume.array[0]
    problems, counts = label_problems(labels, task, case.id)
    errors = [problem for problem in problems if problem.severity == "error"]
    if errors:
        raise InputError(errors)
    return np.rint(labels) if labels.dtype.kind == "f" else labels, counts


def _image_hashes(case: Case, image: NDArray[Any]) -> tuple[str, ...]:
    """A hash of the voxels of each file; image: (C, Z, Y, X), the files' channels one after the other."""
    hashes, done = [], 0
    for path, repeated in groupby(case.images):
        channels = len(list(repeated))
        if path is not None:
            hashes.append(voxels_sha256(image[done : done + channels]))
        done += channels
    return tuple(hashes)


def _in_case(problem: Problem, case_id: str) -> Problem:
    return Problem(problem.code, problem.measured, problem.expected, problem.action, problem.case or case_id)


def _foreground(channels: Iterable[NDArray[Any]], missing: Sequence[int]) -> Foreground:
    """Moments and values of each channel's foreground voxels (n,), one channel in memory at a time."""
    rows = [
        (0.0, 0.0, 0.0, 0.0, NOTHING)
        if number in missing
        else (*_moments(values), values.min(), values.max(), _distribution(values))
        for number, values in enumerate(channels)
    ]
    mean, variance, low, high, distributions = zip(*rows, strict=True)
    return _foreground_from(np.array([mean, variance, low, high], dtype=np.float64), distributions)


def _foreground_from(moments: NDArray[np.float64], channels: tuple[Distribution, ...]) -> Foreground:
    mean, variance, low, high = moments
    return Foreground(mean, variance, low, high, channels)


def _moments(values: NDArray[Any]) -> tuple[float, float]:
    """Mean and variance in float64, part by part, for a case may have 10^8 foreground voxels."""
    mean = float(values.mean(dtype=np.float64))
    parts = (values[start : start + PART].astype(np.float64) for start in range(0, len(values), PART))
    return mean, sum(float(np.square(part - mean).sum()) for part in parts) / len(values)


def _distribution(values: NDArray[Any]) -> Distribution:
    """The distribution of values (n,), at most ``MAX_VALUES`` of them; as float32, what networks see."""
    distinct, counts = np.unique(values, return_counts=True)
    return thinned(Distribution(distinct.astype(np.float32), counts.astype(np.int64)), MAX_VALUES)


def thinned(distribution: Distribution, keep: int) -> Distribution:
    """The distribution itself if it has at most ``keep`` values, else the middles of ``keep`` equal parts of it."""
    if len(distribution.values) <= keep:
        return distribution
    reached = np.cumsum(distribution.counts)
    ranks = ((np.arange(keep) + 0.5) * (int(reached[-1]) / keep)).astype(np.int64)
    places = np.searchsorted(reached, ranks, side="right")
    return Distribution(distribution.values[places], np.ones(keep, np.int64))


def _save(path: Path, found: Measurement, settings: str) -> None:
    from safetensors.numpy import save

    arrays = {} if found.foreground is None else _arrays(found.foreground)
    header = _Kept(
        settings_sha256=settings,
        case=found.case,
        images=found.images,
        channels=0 if found.foreground is None else len(found.foreground.channels),
    ).model_dump_json()
    commit(path, bytes(save(arrays, metadata={METADATA: _sha256(header, list(arrays.values())) + header})))


def _load(path: Path, case_id: str, hashes: tuple[str, ...], settings: str) -> Measurement | None:
    """The kept measurement, or None if there is none of these files and settings, or it is damaged."""
    from safetensors import SafetensorError, safe_open

    if not path.is_file():
        return None
    try:
        with safe_open(path, framework="numpy") as file:
            text = (file.metadata() or {})[METADATA]
            header = _Kept.model_validate_json(text[64:])
            if (header.case.id, header.case.sha256, header.settings_sha256) != (case_id, hashes, settings):
                return None
            arrays = {name: file.get_tensor(name) for name in _names(header.channels)}
    except (SafetensorError, OSError, KeyError, ValidationError):
        return None
    if _sha256(text[64:], list(arrays.values())) != text[:64]:
        return None
    return Measurement(header.case, header.images, _foreground_of(arrays, header.channels))


def _names(channels: int) -> list[str]:
    each = [f"{what}.{channel}" for channel in range(channels) for what in ("values", "counts")]
    return ["moments", *each] if channels else []


def _arrays(foreground: Foreground) -> dict[str, NDArray[Any]]:
    """The arrays of a foreground by their ``_names``."""
    moments = np.stack([foreground.mean, foreground.variance, foreground.low, foreground.high])
    each = [array for channel in foreground.channels for array in (channel.values, channel.counts)]
    return dict(zip(_names(len(foreground.channels)), (moments, *each), strict=True))


def _foreground_of(arrays: dict[str, NDArray[Any]], channels: int) -> Foreground | None:
    if not channels:
        return None
    distributions = (Distribution(arrays[f"values.{n}"], arrays[f"counts.{n}"]) for n in range(channels))
    return _foreground_from(arrays["moments"], tuple(distributions))


def _sha256(header: str, arrays: Sequence[NDArray[Any]]) -> str:
    """64 hexadecimal digits of all that is kept."""
    digest = hashlib.sha256(header.encode())
    for array in arrays:
        digest.update(f"{array.dtype.str} {array.shape}".encode())
        digest.update(np.ascontiguousarray(array).data)
    return digest.hexdigest()
