"""Fingerprint of a data set: measured from its files, or taken over from nnU-Net's ``dataset_fingerprint.json``."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from medseg.artefacts import sha256_of
from medseg.dataset.labels import label_problems
from medseg.errors import InputError, IntegrityError, MedsegError, Problem, ResourceError
from medseg.imaging.crop import box_slices, nonzero_box
from medseg.imaging.geometry import canonical_axes, compare_grids, to_canonical
from medseg.imaging.volumes import nonfinite, read_channels, read_volume
from medseg.progress import SILENT, Progress
from medseg.records.base import parse_record, read_json
from medseg.records.case import Case, Dataset
from medseg.records.fingerprint import CasePrint, Fingerprint, Intensity
from medseg.records.grid import Volume
from medseg.records.task import Task

MAX_VALUES = 10_000_000  # of a channel, kept for percentiles; a bound on memory
PART = 1_000_000
PERCENTILES = (0.5, 50.0, 99.5)


@dataclass(frozen=True, slots=True, eq=False)
class Foreground:
    """The foreground voxels of one case, per channel: moments and extremes (C,) of all, and values (C, n) of some."""

    mean: NDArray[np.float64]
    variance: NDArray[np.float64]
    low: NDArray[np.float64]
    high: NDArray[np.float64]
    values: NDArray[np.float32]


def measure(
    dataset: Dataset, workers: int = 1, progress: Progress = SILENT, known: Fingerprint | None = None
) -> Fingerprint:
    """Measure every case; the result does not depend on the number of workers.

    Intensity statistics are over foreground voxels: label above 0, not the ignore value, inside the nonzero box.
    Every case with foreground has the same weight, however large its foreground: this is what nnU-Net's sample,
    1e8 voxels drawn with replacement in equal parts from all cases, converges to (fingerprint_extractor.py:40-59).
    Mean, standard deviation, minimum and maximum are exact. So are the percentiles as long as no case has more than
    ``MAX_VALUES`` / cases foreground voxels; of larger cases that many evenly spaced ranks are used.

    Args:
        dataset: its cases are measured in the order given.
        workers: threads. Reading is decompression and numpy, which release Python's lock; processes take longer to
            start than a small data set to read, and send every value through a pipe.
        progress: told about every finished case.
        known: an earlier fingerprint of the same task. It is returned as it is if cases and files are the same.

    Raises:
        InputError: E0146 no cases; E0110, E0119, E0120, E0130, E0131 and what reading raises, of all cases at once;
            E0135 no case has foreground.
        ResourceError: E0600 a case does not fit into memory.
    """
    if not dataset.cases:
        raise InputError(Problem("E0146", f"{dataset.root} holds no training cases", "", "check the folder"))
    if known is not None and _same_files(dataset, known):
        return known
    measured = _measure_all(dataset, max(1, workers), progress)
    records = tuple(record for record, _ in measured)
    intensities = _intensities([foreground for _, foreground in measured if foreground is not None])
    median = float(np.median([record.relative_size_after_cropping for record in records]))
    return Fingerprint(cases=records, intensities=intensities, median_relative_size_after_cropping=median)


def _same_files(dataset: Dataset, known: Fingerprint) -> bool:
    if [case.id for case in dataset.cases] != [record.id for record in known.cases]:
        return False
    if len(known.intensities) != len(dataset.task.channels):
        return False
    return all(_hashes(case) == record.sha256 for case, record in zip(dataset.cases, known.cases, strict=True))


def _hashes(case: Case) -> tuple[str, ...]:
    """SHA-256 of each image of ``case.images`` and then of the label file; "" for a file that is not there."""
    paths = case.images if case.label is None else (*case.images, case.label)
    hashes = {path: sha256_of(path) if path.is_file() else "" for path in dict.fromkeys(paths)}
    return tuple(hashes[path] for path in paths)


def _measure_all(dataset: Dataset, workers: int, progress: Progress) -> list[tuple[CasePrint, Foreground | None]]:
    """All cases in order, or one error with the problems of all cases that failed."""
    keep = max(1, MAX_VALUES // len(dataset.cases))
    failed: dict[str, MedsegError] = {}
    progress.begin("fingerprint", len(dataset.cases), "cases")
    with ThreadPoolExecutor(workers, thread_name_prefix="fingerprint") as pool:
        running = {pool.submit(measure_case, case, dataset.task, keep): case.id for case in dataset.cases}
        try:
            for done, future in enumerate(as_completed(running), start=1):
                error = future.exception()
                if isinstance(error, MedsegError):
                    failed[running[future]] = error
                elif error is not None:
                    raise error
                progress.update(done, running[future])
        except BaseException:
            pool.shutdown(wait=True, cancel_futures=True)
            raise
    progress.end()
    if failed:
        raise _together([failed[case.id] for case in dataset.cases if case.id in failed])
    return [future.result() for future in running]  # in the order they were submitted


def _together(errors: Sequence[MedsegError]) -> MedsegError:
    """One error with the problems of all; memory comes first, for that is not the data's fault."""
    problems = [problem for error in errors for problem in error.problems]
    if any(isinstance(error, ResourceError) for error in errors):
        return ResourceError(problems)
    return InputError(problems)


def measure_case(case: Case, task: Task, keep: int) -> tuple[CasePrint, Foreground | None]:
    """Read and measure one case in canonical orientation. Without a label above 0 there is no foreground.

    Args:
        case: its files.
        task: declares the label values, and the one that is ignored.
        keep: most values per channel to return.

    Raises:
        InputError: E0110, E0119, E0120, E0130, E0131, and what reading raises; every problem names the case.
        ResourceError: E0600.
    """
    try:
        return _measure_case(case, task, keep)
    except MedsegError as error:
        raise type(error)([_in_case(problem, case.id) for problem in error.problems]) from error
    except MemoryError as error:
        problem = Problem("E0600", "the case does not fit into memory", "", "use fewer workers", case.id)
        raise ResourceError(problem) from error
    except Exception as error:
        error.add_note(f"while measuring case {case.id}")
        raise


def _measure_case(case: Case, task: Task, keep: int) -> tuple[CasePrint, Foreground | None]:
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
    if case.label is not None:
        on_file, counts = _read_labels(case, case.label, volume, task)
        labels = to_canonical(on_file, axes, flipped)[inside]
        mask = labels > 0
        if task.ignore_value is not None:
            mask &= labels != task.ignore_value
        if mask.any():
            foreground = _foreground((channel[inside][mask] for channel in image), keep)
    spacing = volume.grid.spacing_mm
    record = CasePrint(
        id=case.id,
        shape_after_crop=(z, y, x),
        spacing_mm=(spacing[axes[0]], spacing[axes[1]], spacing[axes[2]]),
        relative_size_after_cropping=z * y * x / volume.array[0].size,
        voxels_per_label=counts,
        sha256=_hashes(case),
    )
    return record, foreground


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


def _in_case(problem: Problem, case_id: str) -> Problem:
    return Problem(problem.code, problem.measured, problem.expected, problem.action, problem.case or case_id)


def _foreground(channels: Iterable[NDArray[Any]], keep: int) -> Foreground:
    """Moments and values of each channel's foreground voxels (n,), one channel in memory at a time."""
    rows = [(*_moments(values), float(values.min()), float(values.max()), _evenly(values, keep)) for values in channels]
    mean, variance, low, high, values = zip(*rows, strict=True)
    return Foreground(np.array(mean), np.array(variance), np.array(low), np.array(high), np.stack(values))


def _moments(values: NDArray[Any]) -> tuple[float, float]:
    """Mean and variance in float64, part by part, for a case may have 10^8 foreground voxels."""
    mean = float(values.mean(dtype=np.float64))
    parts = (values[start : start + PART].astype(np.float64) for start in range(0, len(values), PART))
    return mean, sum(float(np.square(part - mean).sum()) for part in parts) / len(values)


def _evenly(values: NDArray[Any], keep: int) -> NDArray[np.float32]:
    """All values, or the middles of ``keep`` equal parts of the sorted values; as float32, what networks see."""
    if len(values) <= keep:
        return values.astype(np.float32)
    ranks = ((np.arange(keep) + 0.5) * (len(values) / keep)).astype(np.int64)
    return np.sort(values)[ranks].astype(np.float32)


def _intensities(cases: Sequence[Foreground]) -> tuple[Intensity, ...]:
    """Statistics per channel of the mixture of all cases in equal parts."""
    if not cases:
        raise InputError(Problem("E0135", "no case has a voxel with a label above 0", "", "check the label files"))
    means = np.stack([case.mean for case in cases])
    mean = means.mean(0)
    variance = (np.stack([case.variance for case in cases]) + (means - mean) ** 2).mean(0)
    low, high = np.min([case.low for case in cases], 0), np.max([case.high for case in cases], 0)
    intensities = []
    for channel in range(len(mean)):
        percentiles = _percentiles([case.values[channel] for case in cases])
        intensities.append(
            Intensity(
                mean=float(mean[channel]),
                median=percentiles[1],
                std=float(variance[channel] ** 0.5),
                min=float(low[channel]),
                max=float(high[channel]),
                percentile_00_5=percentiles[0],
                percentile_99_5=percentiles[2],
            )
        )
    return tuple(intensities)


def _percentiles(cases: Sequence[NDArray[np.float32]]) -> list[float]:
    """The least values that ``PERCENTILES`` of the weight do not exceed; each case weighs 1, whatever its size."""
    values = np.concatenate(cases)
    weights = np.repeat([1 / len(case) for case in cases], [len(case) for case in cases])
    order = np.argsort(values, kind="stable")
    reached = np.cumsum(weights[order]) / len(cases)
    # 1e-12: a sum of weights that should equal a percentile may have been rounded below it
    places = np.minimum(np.searchsorted(reached, np.array(PERCENTILES) / 100 - 1e-12), len(values) - 1)
    return [float(values[order[place]]) for place in places]


def read_fingerprint(path: Path) -> Fingerprint:
    """A fingerprint from a JSON file: ours, or nnU-Net's ``dataset_fingerprint.json``.

    Raises:
        InputError: E0100 there is none.
        IntegrityError: E0711 it is neither.
    """
    value = read_json(path)
    if isinstance(value, dict) and "shapes_after_crop" in value:
        return from_nnunet(value)
    return parse_record(value, Fingerprint, path.name)


def from_nnunet(value: Mapping[str, Any]) -> Fingerprint:
    """nnU-Net's ``dataset_fingerprint.json`` as our record.

    It has no case ids (``case_0000`` … are given), no hashes and no relative size per case (the median stands for
    each). Axes stay in nnU-Net's order, that of the files.

    Raises:
        IntegrityError: E0711 keys are missing or hold something else.
    """
    shapes, spacings = value.get("shapes_after_crop"), value.get("spacings")
    channels = value.get("foreground_intensity_properties_per_channel")
    relative_size = value.get("median_relative_size_after_cropping")
    if not (
        isinstance(shapes, list)
        and isinstance(spacings, list)
        and isinstance(channels, dict)
        and len(shapes) == len(spacings)
    ):
        measured = "dataset_fingerprint.json does not hold as many spacings as shapes, and the intensities"
        raise IntegrityError(Problem("E0711", measured, "", "extract the fingerprint again"))
    record = {
        "cases": [
            {
                "id": f"case_{index:04d}",
                "shape_after_crop": shape,
                "spacing_mm": spacing,
                "relative_size_after_cropping": relative_size,
            }
            for index, (shape, spacing) in enumerate(zip(shapes, spacings, strict=True))
        ],
        "intensities": [channels.get(str(index)) for index in range(len(channels))],
        "median_relative_size_after_cropping": relative_size,
    }
    return parse_record(record, Fingerprint, "dataset_fingerprint.json")
