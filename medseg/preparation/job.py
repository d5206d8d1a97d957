"""Job: one case, read once, prepared and committed for every configuration that lacks it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TypeVar

from medseg.artefacts import staging
from medseg.errors import InputError, Problem
from medseg.imaging.volumes import read_channels, read_volume, volume_sha256
from medseg.preparation.prepare import check_grids, prepare, prepare_labels
from medseg.preparation.store import Provenance, check_id
from medseg.preparation.writer import CaseWriter, Packed, pack_image
from medseg.records.case import Case
from medseg.records.fingerprint import CasePrint
from medseg.records.grid import Volume
from medseg.records.plan import ConfigurationPlan, Plan, Resampling
from medseg.records.preparation import Preparation, StorePrecision

Digests = Mapping[str, str]  # SHA-256 of a case's record, by target

A = TypeVar("A")
B = TypeVar("B")


@dataclass(frozen=True, slots=True)
class Target:
    """A configuration to prepare for: ``made_with`` is the hash of its settings and of the number type on disk."""

    configuration: ConfigurationPlan
    folder: Path
    precision: StorePrecision
    made_with: str


@dataclass(frozen=True, slots=True)
class Job:
    """A case, the targets that lack it, and how many threads it may keep busy."""

    case: Case
    plan: Plan
    targets: Mapping[str, Target]
    planned: CasePrint | None
    threads: int = 1


def prepare_case(job: Job) -> dict[str, str]:
    """Read a case, prepare and commit it for every target; the SHA-256 of its records."""
    case = job.case
    volume: Volume | None
    volume, sources = _read_and_hash(job)
    labels: Volume | None = None
    done: dict[str, str] = {}
    for name, target in job.targets.items():
        assert volume is not None
        grid = volume.grid
        preparation, image = _prepare_image(job, target, volume)
        if len(done) + 1 == len(job.targets):
            volume = None  # the largest cases decide how much memory a machine needs
        if labels is None:
            assert case.label is not None  # hash_sources refuses such cases
            labels = read_volume(case.label)
            check_grids(grid, labels.grid)
        with staging(target.folder) as stage:
            writer = CaseWriter(stage, case.id, preparation, target.configuration.dimensions)
            write_labels = partial(_write_labels, writer, labels, job, target.configuration.resampling)
            _both(partial(writer.write_image, image), write_labels, job.threads)
            done[name] = writer.commit(Provenance(target.made_with, sources))
    return done


def _write_labels(writer: CaseWriter, labels: Volume, job: Job, resampling: Resampling) -> None:
    writer.write_labels(prepare_labels(labels, job.plan.task, writer.preparation, resampling))


def _prepare_image(job: Job, target: Target, volume: Volume) -> tuple[Preparation, Packed]:
    configuration = target.configuration
    prepared = prepare(volume, job.plan, configuration, job.plan.orientation, threads=job.threads)
    how = prepared.preparation
    return how, pack_image(job.case.id, prepared.image, how, configuration.dimensions, target.precision)


def _read_and_hash(job: Job) -> tuple[Volume, tuple[str, ...]]:
    """The image, and the hashes of all sources."""
    sources, volume = _both(partial(_hash_planned, job), partial(read_channels, job.case.images), job.threads)
    return volume, sources


def _both(first: Callable[[], A], second: Callable[[], B], threads: int) -> tuple[A, B]:
    """The results of both, at the same time if there are threads; if both fail, the first one's error is raised."""
    if threads == 1:
        return first(), second()
    with ThreadPoolExecutor(1) as beside:
        other = beside.submit(first)
        try:
            result = second()
        except Exception:
            other.result()
            raise
        return other.result(), result


def _hash_planned(job: Job) -> tuple[str, ...]:
    """Hashes of the sources, if they are those that were planned."""
    sources = hash_sources(job.case)
    if job.planned is not None and job.planned.sha256 != sources:
        raise InputError(
            Problem("E0103", "files changed since planning", "the planned files", "run plan again", job.case.id)
        )
    return sources


def hash_sources(case: Case) -> tuple[str, ...]:
    """SHA-256 of each channel's image file ("" for a missing one), then of the label file.

    Raises:
        InputError: E0144 the case has no label file; E0100, E0106 a file cannot be read.
    """
    check_id(case.id)
    if case.label is None:
        raise InputError(Problem("E0144", "no label file", "one for each training case", "add it, or the case"))
    hashes = {path: _hash_source(path) for path in (*case.files, case.label)}
    return tuple("" if path is None else hashes[path] for path in (*case.images, case.label))


def _hash_source(path: Path) -> str:
    try:
        return volume_sha256(path)
    except FileNotFoundError as error:
        raise InputError(Problem("E0100", f"{path.name} does not exist", "", "check the data set")) from error
    except OSError as error:
        raise InputError(Problem("E0106", f"cannot read {path.name}: {error.strerror}", "", "check it")) from error
