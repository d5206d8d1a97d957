"""Preprocessing: a whole data set prepared for one or several configurations, resumable at any point."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
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
from medseg.machine import usable_cores
from medseg.preparation.estimate import Need, case_need, default_workers, memory_for_cases
from medseg.preparation.job import Digests, Job, Target, hash_sources, prepare_case
from medseg.preparation.pool import run_cases
from medseg.preparation.store import (
    MANIFEST,
    Provenance,
    case_files,
    finished,
    open_store,
    read_case_record,
)
from medseg.progress import SILENT, Progress
from medseg.records.base import write_record
from medseg.records.case import Dataset
from medseg.records.fingerprint import CasePrint
from medseg.records.plan import ConfigurationPlan, Plan
from medseg.records.preparation import StoreManifest, StorePrecision

logger = logging.getLogger(__name__)

WORTH_THREADS_S = 0.1  # a case of less is prepared by one thread: starting others takes as long as they save
PREPARATION_VERSION = 2  # raise when prepare gives other voxels for the same settings: stores are then redone


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
    """``preprocess_all`` for one configuration, for instance ``3d_fullres``."""
    folders = {configuration_name: Path(folder)}
    return preprocess_all(dataset, plan, folders, workers, progress, planned, precision)[configuration_name]


def preprocess_all(
    dataset: Dataset,
    plan: Plan,
    folders: Mapping[str, Path],
    workers: int | None = None,
    progress: Progress = SILENT,
    planned: Mapping[str, CasePrint] | None = None,
    precision: StorePrecision | None = None,
) -> dict[str, StoreManifest]:
    """Prepare every case of a data set for some configurations and commit the manifests that list them.

    A case is read once for all of them. Cases that are there already, made from the same files with the same settings
    and undamaged, are kept. However often it is killed and run again, a store ends up byte for byte the same.

    Args:
        dataset: its task's labels and channels are those of ``plan``.
        plan: all decisions.
        folders: of each configuration's prepared cases, by its name; owned while this runs.
        workers: processes; None for as many as cores and memory allow, 1 for none but this one. Cores that are left
            work on the same cases.
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
        OwnershipError: E0901 another process is at work in one of ``folders``.
    """
    targets = {name: _target(dataset, plan, name, Path(folder), precision) for name, folder in folders.items()}
    jobs = {case.id: Job(case, plan, targets, (planned or {}).get(case.id)) for case in dataset.cases}
    configurations = [target.configuration for target in targets.values()]
    needs = {case_id: case_need(job.planned, plan, configurations) for case_id, job in jobs.items()}
    workers = workers or default_workers(needs.values())
    with contextlib.ExitStack() as stack:
        for target in targets.values():
            stack.enter_context(owned(target.folder))
        kept = _check_cases(jobs, workers, progress)
        missing = {case_id: _missing(job, kept[case_id]) for case_id, job in jobs.items()}
        missing = {case_id: job for case_id, job in missing.items() if job.targets}
        for name, target in targets.items():
            if any(name in job.targets for job in missing.values()):
                _remove(target.folder, [MANIFEST])
        made = _prepare_cases(missing, needs, workers, progress, any(kept.values()))
        digests = {case_id: {**kept[case_id], **made.get(case_id, {})} for case_id in jobs}
        return {
            name: _finish(target, settings_sha256(plan, target.configuration), digests, name)
            for name, target in targets.items()
        }


def _target(dataset: Dataset, plan: Plan, name: str, folder: Path, precision: StorePrecision | None) -> Target:
    configuration = _configuration(dataset, plan, name)
    settings = settings_sha256(plan, configuration)
    precision = precision or _precision_of(folder)
    made_with = settings if precision == "float32" else sha256_of_json([settings, precision])
    return Target(configuration, folder, precision, made_with)


def _missing(job: Job, kept: Digests) -> Job:
    return replace(job, targets={name: target for name, target in job.targets.items() if name not in kept})


def _finish(target: Target, settings: str, digests: Mapping[str, Digests], name: str) -> StoreManifest:
    """Clear the folder of all that is not a case's, and commit the manifest last."""
    sweep(target.folder)  # of what killed workers left
    manifest = StoreManifest(
        configuration=name,
        settings_sha256=settings,
        precision=target.precision,
        cases={case_id: digests[case_id][name] for case_id in sorted(digests)},
    )
    files = case_files(target.folder)
    _remove(target.folder, [file for file, case_id in files.items() if case_id not in digests])
    if not _is_there(target.folder, manifest):
        write_record(target.folder / MANIFEST, manifest)
    return manifest


def settings_sha256(plan: Plan, configuration: ConfigurationPlan) -> str:
    """Hash of all that decides a prepared case besides its files; batch size or network do not enter it."""
    schemes = [normalisation.scheme for normalisation in configuration.normalisation]
    turned = {} if plan.orientation == "canonical" else {"orientation": plan.orientation}
    return sha256_of_json(
        turned
        | {
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


def _check_cases(jobs: Mapping[str, Job], workers: int, progress: Progress) -> dict[str, Digests]:
    """What need not be done again of each case. Threads: all of it is reading and hashing."""
    kept: dict[str, Digests] = {case_id: {} for case_id in jobs}
    there = [job for job in map(_with_records, jobs.values()) if job.targets]
    if not there:
        return kept
    progress.begin("check prepared cases", len(there), "cases")
    with ThreadPoolExecutor(workers) as pool:
        for done, (job, digests) in enumerate(zip(there, pool.map(_check_case, there), strict=True), start=1):
            kept[job.case.id] = digests
            progress.update(done, job.case.id)
    progress.end()
    return kept


def _with_records(job: Job) -> Job:
    """The job with the targets that say that they have the case."""
    records = {name: read_case_record(target.folder, job.case.id) for name, target in job.targets.items()}
    said = {
        name for name, record in records.items() if record and record.settings_sha256 == job.targets[name].made_with
    }
    return replace(job, targets={name: target for name, target in job.targets.items() if name in said})


def _check_case(job: Job) -> Digests:
    """SHA-256 of the records of a case that need not be made again."""
    try:
        sources = hash_sources(job.case)
    except MedsegError:
        return {}  # told when the case is prepared
    found = {
        name: finished(target.folder, job.case.id, Provenance(target.made_with, sources))
        for name, target in job.targets.items()
    }
    return {name: digest for name, digest in found.items() if digest is not None}


def _prepare_cases(
    jobs: Mapping[str, Job], needs: Mapping[str, Need], workers: int, progress: Progress, some_kept: bool
) -> dict[str, Digests]:
    """What was made of each case, or an error with the problems of all that failed."""
    done: dict[str, Digests] = {}
    failed: dict[str, MedsegError] = {}
    if not jobs:
        return done
    workers = min(workers, len(jobs))
    threads = max(1, usable_cores() // workers)
    large = {case_id for case_id in jobs if needs[case_id].seconds > WORTH_THREADS_S}
    jobs = {case_id: replace(job, threads=threads if case_id in large else 1) for case_id, job in jobs.items()}
    memory = memory_for_cases(workers)
    wanted = {case_id: needs[case_id].memory_bytes for case_id in jobs}
    for case_id in (case_id for case_id in jobs if wanted[case_id] > memory):
        sizes = f"about {wanted[case_id] / 2**30:.1f} GiB, {memory / 2**30:.1f} GiB are free"
        logger.warning("case %s needs %s; it is prepared alone", case_id, sizes)
    progress.begin("prepare", len(jobs), "cases")
    for case_id, outcome in run_cases(prepare_case, jobs, workers, wanted, memory, 1 if large else threads):
        if isinstance(outcome, MedsegError):
            failed[case_id] = outcome
        else:
            done[case_id] = outcome
        progress.update(len(done) + len(failed), case_id)
    progress.end()
    if failed:
        raise _together([failed[case_id] for case_id in jobs if case_id in failed], bool(done) or some_kept)
    return done


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
