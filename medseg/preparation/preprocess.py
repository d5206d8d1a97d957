"""Preprocessing: a whole data set prepared for one configuration, resumable at any point."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from medseg.artefacts import environment_failure, owned, sha256_of_json, sweep
from medseg.errors import (
    EnvironmentFailure,
    IncompatibleError,
    InputError,
    IntegrityError,
    MedsegError,
    PartialFailure,
    Problem,
    ResourceError,
)
from medseg.imaging.volumes import read_channels, read_volume, volume_sha256
from medseg.preparation.estimate import Need, case_need, default_workers, memory_for_cases
from medseg.preparation.pool import run_cases
from medseg.preparation.prepare import check_grids, prepare, prepare_labels
from medseg.preparation.store import (
    MANIFEST,
    Provenance,
    case_files,
    check_id,
    finished,
    open_store,
    read_case_record,
    write_case,
)
from medseg.progress import SILENT, Progress
from medseg.records.base import write_record
from medseg.records.case import Case, Dataset
from medseg.records.fingerprint import CasePrint
from medseg.records.plan import ConfigurationPlan, Plan
from medseg.records.preparation import StoreManifest, StorePrecision

logger = logging.getLogger(__name__)

PREPARATION_VERSION = 2  # raise when prepare gives other voxels for the same settings: stores are then redone


@dataclass(frozen=True, slots=True)
class _Job:
    case: Case
    plan: Plan
    configuration: ConfigurationPlan
    settings_sha256: str
    folder: Path
    precision: StorePrecision
    planned: CasePrint | None


def preprocess(
    dataset: Dataset,
    plan: Plan,
    configuration_name: str,
    folder: Path,
    workers: int | None = None,
    progress: Progress = SILENT,
    planned: Mapping[str, CasePrint] | None = None,
    precision: StorePrecision | None = None,
) -> StoreManifest:
    """Prepare every case of a data set for one configuration and commit the manifest that lists them.

    Cases that are there already, made from the same files with the same settings and undamaged, are kept. However
    often it is killed and run again, the store ends up byte for byte the same.

    Args:
        dataset: its task's labels and channels are those of ``plan``.
        plan: all decisions.
        configuration_name: for instance ``3d_fullres``.
        folder: of the prepared configuration; owned while this runs.
        workers: processes; None for as many as cores and memory allow, 1 for none but this one.
        progress: told of every case.
        planned: what was measured of each case when the plan was made; cases whose files are others by now are
            refused (E0103), and it tells how much memory they need.
        precision: of the images on disk; None for that of the store that is there, else float32.

    Raises:
        IncompatibleError: E0802 the plan has no such configuration, or was made for another task.
        InputError: every case failed; the problems of all are listed. Nor is there a manifest after any other error.
        PartialFailure: some cases failed, the others are kept for the next run.
        ResourceError: E0600, E0601 memory ran out for some cases.
        EnvironmentFailure: E0501, E0502 the store cannot be written; the rest of the cases was not tried.
        OwnershipError: E0901 another process is at work in ``folder``.
    """
    configuration = _configuration(dataset, plan, configuration_name)
    settings = settings_sha256(plan, configuration)
    folder = Path(folder)
    planned = planned or {}
    precision = precision or _precision_of(folder)
    own = settings if precision == "float32" else sha256_of_json([settings, precision])
    jobs = {c.id: _Job(c, plan, configuration, own, folder, precision, planned.get(c.id)) for c in dataset.cases}
    needs = {case_id: case_need(job.planned, plan, configuration) for case_id, job in jobs.items()}
    workers = workers or default_workers(needs.values())
    with owned(folder):
        kept = _check_cases(jobs, workers, progress)
        missing = {case_id: job for case_id, job in jobs.items() if case_id not in kept}
        if missing:
            _remove(folder, [MANIFEST])
        done = _prepare_cases(missing, needs, kept, workers, progress)
        sweep(folder)  # of what killed workers left
        manifest = StoreManifest(
            configuration=configuration_name,
            settings_sha256=settings,
            precision=precision,
            cases={case_id: done[case_id] for case_id in sorted(done)},
        )
        _remove(folder, [name for name, case_id in case_files(folder).items() if case_id not in done])
        if not _is_there(folder, manifest):
            write_record(folder / MANIFEST, manifest)
    return manifest


def settings_sha256(plan: Plan, configuration: ConfigurationPlan) -> str:
    """Hash of all that decides a prepared case besides its files; batch size or network do not enter it."""
    schemes = [normalisation.scheme for normalisation in configuration.normalisation]
    return sha256_of_json(
        {
            "version": PREPARATION_VERSION,
            "channels": len(plan.task.channels),
            "values": plan.task.values,
            "ignore": plan.task.ignore_value,
            "transpose": plan.transpose,
            "normalisation": [normalisation.to_json() for normalisation in configuration.normalisation],
            "intensities": [
                intensity.to_json() if scheme == "ct" else None
                for intensity, scheme in zip(plan.intensities, schemes, strict=True)
            ],
            "spacing_mm": configuration.spacing_mm,
            "resampling": configuration.resampling.to_json(),
        }
    )


def _check_cases(jobs: Mapping[str, _Job], workers: int, progress: Progress) -> dict[str, str]:
    """SHA-256 of the record of each case that need not be done again. Threads: all of it is reading and hashing."""
    records = {case_id: read_case_record(job.folder, case_id) for case_id, job in jobs.items()}
    there = [jobs[i] for i, record in records.items() if record and record.settings_sha256 == jobs[i].settings_sha256]
    kept: dict[str, str] = {}
    if not there:
        return kept
    progress.begin("check prepared cases", len(there), "cases")
    with ThreadPoolExecutor(workers) as pool:
        for done, (job, digest) in enumerate(zip(there, pool.map(_check_case, there), strict=True), start=1):
            if digest is not None:
                kept[job.case.id] = digest
            progress.update(done, job.case.id)
    progress.end()
    return kept


def _check_case(job: _Job) -> str | None:
    """SHA-256 of the record of a case that need not be done again, else None."""
    try:
        sources = _hash_sources(job.case)
    except MedsegError:
        return None  # told when the case is prepared
    return finished(job.folder, job.case.id, Provenance(job.settings_sha256, sources))


def _prepare_cases(
    jobs: Mapping[str, _Job], needs: Mapping[str, Need], kept: Mapping[str, str], workers: int, progress: Progress
) -> dict[str, str]:
    """``kept`` with the SHA-256 of each prepared case's record, or an error with the problems of all that failed."""
    done = dict(kept)
    failed: dict[str, MedsegError] = {}
    if not jobs:
        return done
    workers = min(workers, len(jobs))
    memory = memory_for_cases(workers)
    wanted = {case_id: needs[case_id].memory_bytes for case_id in jobs}
    for case_id in (case_id for case_id in jobs if wanted[case_id] > memory):
        sizes = f"about {wanted[case_id] / 2**30:.1f} GiB, {memory / 2**30:.1f} GiB are free"
        logger.warning("case %s needs %s; it is prepared alone", case_id, sizes)
    progress.begin("prepare", len(jobs), "cases")
    for case_id, outcome in run_cases(_prepare_case, jobs, workers, wanted, memory):
        if isinstance(outcome, MedsegError):
            failed[case_id] = outcome
        else:
            done[case_id] = outcome
        progress.update(len(done) - len(kept) + len(failed), case_id)
    progress.end()
    if failed:
        raise _together([failed[case_id] for case_id in jobs if case_id in failed], bool(done))
    return done


def _prepare_case(job: _Job) -> str:
    """Read, prepare and commit one case; the SHA-256 of its record."""
    case = job.case
    provenance = Provenance(job.settings_sha256, _hash_sources(case))
    if job.planned is not None and job.planned.sha256 != provenance.source_sha256:
        raise InputError(
            Problem("E0103", "files changed since planning", "the planned files", "run plan again", case.id)
        )
    volume = read_channels(case.images)
    grid = volume.grid
    prepared = prepare(volume, job.plan, job.configuration)
    del volume  # the largest cases decide how much memory a machine needs
    assert case.label is not None  # _hash_sources refuses such cases
    labels = read_volume(case.label)
    check_grids(grid, labels.grid)
    indices = prepare_labels(labels, job.plan.task, prepared.preparation, job.configuration.resampling)
    del labels
    return write_case(
        job.folder,
        case.id,
        prepared.image,
        indices,
        prepared.preparation,
        provenance,
        job.configuration.dimensions,
        job.precision,
    )


def _hash_sources(case: Case) -> tuple[str, ...]:
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


def _together(errors: Sequence[MedsegError], some_done: bool) -> MedsegError:
    """One error with the problems of all, of the class that decides the exit code."""
    problems = [problem for error in errors for problem in error.problems]
    for kind in (EnvironmentFailure, ResourceError, IntegrityError):
        if any(isinstance(error, kind) for error in errors):
            return kind(problems)
    if any(type(error) is MedsegError for error in errors):  # a bug
        return MedsegError(problems)
    return PartialFailure(problems) if some_done else InputError(problems)


def _configuration(dataset: Dataset, plan: Plan, name: str) -> ConfigurationPlan:
    if name not in plan.configurations:
        known = ", ".join(plan.configurations)
        raise IncompatibleError(Problem("E0802", f"no configuration {name!r} in the plan", known, "choose one of them"))
    if not dataset.cases:
        raise InputError(Problem("E0146", f"no cases in {dataset.root.name}", "", "check the data set"))
    ids = [case.id for case in dataset.cases]
    if len(set(ids)) < len(ids):
        raise InputError(
            [Problem("E0140", "case twice", "", "remove one", i) for i in sorted(set(ids)) if ids.count(i) > 1]
        )
    for what in ("channels", "labels", "ignore_value"):
        if getattr(dataset.task, what) != getattr(plan.task, what):
            raise IncompatibleError(
                Problem("E0802", f"the data set's {what} are not those of the plan", "", "make a new plan")
            )
    return plan.configurations[name]


def _precision_of(folder: Path) -> StorePrecision:
    try:
        return open_store(folder).manifest.precision
    except MedsegError:
        return "float32"


def _is_there(folder: Path, manifest: StoreManifest) -> bool:
    try:
        return open_store(folder).manifest == manifest
    except MedsegError:
        return False


def _remove(folder: Path, names: Sequence[str]) -> None:
    for name in names:
        try:
            (folder / name).unlink(missing_ok=True)
        except OSError as error:
            raise environment_failure(error, folder / name) from error
