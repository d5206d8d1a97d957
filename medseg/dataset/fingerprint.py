"""Fingerprint of a data set: measured from its files, or taken over from nnU-Net's ``dataset_fingerprint.json``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from medseg.artefacts import sweep
from medseg.dataset.measurement import Distribution, Foreground, Measurement, measured_case, thinned
from medseg.dataset.side_by_side import bytes_of_all, side_by_side
from medseg.dataset.twins import identical_cases
from medseg.errors import InputError, IntegrityError, MedsegError, Problem, ResourceError
from medseg.progress import SILENT, Progress
from medseg.records.base import parse_record, read_json
from medseg.records.case import Case, Dataset
from medseg.records.fingerprint import Fingerprint, Intensity
from medseg.records.task import Channel

MAX_VALUES = 4_000_000  # of a channel, from all cases, for percentiles; a bound on memory
PERCENTILES = (0.5, 50.0, 99.5)


@dataclass(frozen=True, slots=True)
class Measured:
    """The fingerprint, and the groups of cases that share an image voxel by voxel."""

    fingerprint: Fingerprint
    identical: tuple[tuple[str, ...], ...]


def measure(
    dataset: Dataset, workers: int | None = None, progress: Progress = SILENT, store: Path | None = None
) -> Measured:
    """Measure every case; the result does not depend on the number of workers.

    Intensity statistics are over foreground voxels: label above 0, not the ignore value, inside the nonzero box.
    Every case with foreground has the same weight, however large its foreground: this is what nnU-Net's sample,
    1e8 voxels drawn with replacement in equal parts from all cases, converges to (fingerprint_extractor.py:40-59).
    Mean, standard deviation, minimum and maximum are exact. So are the percentiles as long as no case has more than
    65536, or ``MAX_VALUES`` / cases, different foreground values (images of 16 bits in up to 61 cases always); of
    other cases that many evenly spaced ranks are used.

    Args:
        dataset: its cases are measured in the order given.
        workers: threads, by default one per core, at most 16; fewer at a time where memory is short. Processes take
            longer to start than a small data set to read, and would send every value through a pipe.
        progress: told about every finished case.
        store: folder where each case's measurement is kept as soon as it is made. A case whose files, by their
            SHA-256, and labels are those of its kept measurement is not read again: a killed run goes on, and
            with a new case only that one is measured. The result is the same.

    Raises:
        InputError: E0146 no cases; E0110, E0119, E0120, E0130, E0131 and what reading raises, of all cases at once;
            E0135 no case has foreground.
        ResourceError: E0600 a case does not fit into memory.
        EnvironmentFailure: E0501, E0502 a measurement cannot be kept.
    """
    if not dataset.cases:
        raise InputError(Problem("E0146", f"{dataset.root} holds no training cases", "", "check the folder"))
    if store is not None:
        sweep(store)
    measured = _measure_all(dataset, workers, progress, store)
    intensities = _intensities(
        [found.foreground for found in measured if found.foreground is not None], dataset.task.channels
    )
    records = tuple(found.case for found in measured)
    median = float(np.median([record.relative_size_after_cropping for record in records]))
    fingerprint = Fingerprint(cases=records, intensities=intensities, median_relative_size_after_cropping=median)
    return Measured(fingerprint, identical_cases({found.case.id: found.images for found in measured}))


def _measure_all(dataset: Dataset, workers: int | None, progress: Progress, store: Path | None) -> list[Measurement]:
    """All cases in order, or one error with the problems of all cases that failed.

    Cases that memory did not suffice for are tried once more, each alone.
    """
    outcomes: dict[str, Measurement | MedsegError] = {}
    keep = max(1, MAX_VALUES // len(dataset.cases))

    def outcome(case: Case) -> Measurement | MedsegError:
        try:
            return _slim(measured_case(case, dataset.task, store), keep)
        except (InputError, ResourceError) as error:
            return error

    progress.begin("fingerprint", len(dataset.cases), "cases")
    again: list[Case] = []
    for case, found in side_by_side(outcome, dataset.cases, workers, bytes_of_all):
        if isinstance(found, ResourceError):
            again.append(case)
            continue
        outcomes[case.id] = found
        progress.update(len(outcomes), case.id)
    for case, found in side_by_side(outcome, again, 1):
        outcomes[case.id] = found
        progress.update(len(outcomes), case.id)
    progress.end()
    ordered = [outcomes[case.id] for case in dataset.cases]
    failed = [found for found in ordered if isinstance(found, MedsegError)]
    if failed:
        raise _together(failed)
    return [found for found in ordered if isinstance(found, Measurement)]


def _slim(found: Measurement, keep: int) -> Measurement:
    """A measurement with at most ``keep`` values per channel: those of all cases are held at once."""
    if found.foreground is None:
        return found
    channels = tuple(thinned(channel, keep) for channel in found.foreground.channels)
    return replace(found, foreground=replace(found.foreground, channels=channels))


def _together(errors: Sequence[MedsegError]) -> MedsegError:
    """One error with the problems of all; memory comes first, for that is not the data's fault."""
    problems = [problem for error in errors for problem in error.problems]
    if any(isinstance(error, ResourceError) for error in errors):
        return ResourceError(problems)
    return InputError(problems)


def _intensities(cases: Sequence[Foreground], channels: Sequence[Channel]) -> tuple[Intensity, ...]:
    """Statistics per channel of the mixture, in equal parts, of all cases that have it."""
    if not cases:
        raise InputError(Problem("E0135", "no case has a voxel with a label above 0", "", "check the label files"))
    having = [[case for case in cases if len(case.channels[n].values)] for n in range(len(channels))]
    nowhere = [channel.name for channel, there in zip(channels, having, strict=True) if not there]
    if nowhere:
        measured = f"no case with foreground has the channel(s) {', '.join(nowhere)}"
        raise InputError(Problem("E0133", measured, "some cases with each channel", "add them, or drop the channel"))
    return tuple(_intensity(there, number) for number, there in enumerate(having))


def _intensity(cases: Sequence[Foreground], channel: int) -> Intensity:
    means = np.array([case.mean[channel] for case in cases])
    variances = np.array([case.variance[channel] for case in cases])
    mean = means.mean()
    low, median, high = _percentiles([case.channels[channel] for case in cases])
    return Intensity(
        mean=float(mean),
        median=median,
        std=float((variances + (means - mean) ** 2).mean() ** 0.5),
        min=min(float(case.low[channel]) for case in cases),
        max=max(float(case.high[channel]) for case in cases),
        percentile_00_5=low,
        percentile_99_5=high,
    )


def _percentiles(cases: Sequence[Distribution]) -> list[float]:
    """The least values that ``PERCENTILES`` of the weight do not exceed; each case weighs 1, whatever its size."""
    values = np.concatenate([case.values for case in cases])
    weights = np.concatenate([case.counts / case.counts.sum() for case in cases])
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
