"""Check: every file of a data set read once, and everything that is wrong with it said in one run."""

from __future__ import annotations

import hashlib
import logging
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, replace
from itertools import groupby
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from medseg.dataset.declaration import FILE_NAME
from medseg.dataset.labels import label_problems, nonfinite_problem
from medseg.dataset.layouts import scan_dataset
from medseg.errors import InputError, MedsegError, Problem
from medseg.imaging.geometry import compare_grids
from medseg.imaging.nifti import header_notes
from medseg.imaging.volumes import nonfinite, read_volume
from medseg.machine import usable_cores
from medseg.progress import SILENT, Progress
from medseg.records.case import Case, Dataset
from medseg.records.grid import Grid, Volume
from medseg.records.task import Task

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class CheckReport:
    """The outcome: the data set as far as it is complete, all problems sorted, errors first, and what was read.

    ``identical`` lists cases that share an image voxel by voxel: they belong on the same side of a split.
    """

    dataset: Dataset | None
    problems: tuple[Problem, ...]
    files_read: int
    identical: tuple[tuple[str, ...], ...] = ()

    @property
    def cases(self) -> tuple[Case, ...]:
        """The cases whose files are all there."""
        return self.dataset.cases if self.dataset else ()

    @property
    def errors(self) -> tuple[Problem, ...]:
        """The problems that are not warnings; the data set can be used if there are none."""
        return tuple(problem for problem in self.problems if problem.severity == "error")


@dataclass(frozen=True, slots=True)
class CaseFindings:
    """What reading one case told: problems, a hash of each image file by its first channel, voxels per label value."""

    case: str
    problems: tuple[Problem, ...]
    hashes: dict[str, str]
    label_counts: dict[int, int]
    files_read: int


def check_dataset(path: Path, workers: int | None = None, progress: Progress = SILENT) -> CheckReport:
    """Read every file of the data set once and report all problems; one bad case never stops the others.

    Args:
        path: folder with a ``dataset.json``.
        workers: threads (reading and counting release the interpreter lock); default: one per usable core, at most 8.
        progress: told after every case.
    """
    try:
        dataset, scan = scan_dataset(path)
    except InputError as error:
        return CheckReport(None, _sorted(error.problems), 0)
    workers = workers or min(usable_cores(), 8)
    findings = sorted(_check_cases(dataset, workers, progress), key=lambda found: found.case)
    problems = [*scan.problems, *(problem for found in findings for problem in found.problems)]
    identical, twins = _identical(findings)
    problems += twins + _label_coverage(findings, dataset.task)
    files_read = sum(found.files_read for found in findings)
    return CheckReport(dataset, _sorted(problems), files_read, identical)


def _check_cases(dataset: Dataset, workers: int, progress: Progress) -> Iterator[CaseFindings]:
    progress.begin("check", len(dataset.cases), "cases")
    executor = ThreadPoolExecutor(workers, thread_name_prefix="check")
    try:
        futures = [executor.submit(check_case, case, dataset.task) for case in dataset.cases]
        for done, future in enumerate(as_completed(futures), start=1):
            found = future.result()
            progress.update(done, found.case)
            yield found
    finally:
        executor.shutdown(cancel_futures=True)
        progress.end()


def check_case(case: Case, task: Task) -> CaseFindings:
    """Read the files of one case, one at a time, and look at geometry, voxels and labels."""
    problems: list[Problem] = []
    hashes: dict[str, str] = {}
    counts: dict[int, int] = {}
    files_read = channel = 0
    reference: tuple[str, Grid] | None = None
    for path, repeated in groupby(case.images):
        names = [f"channel {n} ({task.channels[n].name})" for n, _ in enumerate(repeated, start=channel)]
        channel += len(names)
        volume = None if path is None else _read(path, len(names), case.id, problems)
        if volume is None:
            continue
        files_read += 1
        problems += _against(reference, volume.grid, names[0], case.id)
        reference = reference or (names[0], volume.grid)
        for name, voxels in zip(names, volume.array, strict=True):
            problems += _voxel_problems(voxels, name, case.id)
        hashes[names[0]] = _hash(volume.array)
    if case.label is not None:
        volume = _read(case.label, 1, case.id, problems)
        if volume is not None:
            files_read += 1
            problems += _against(reference, volume.grid, "label", case.id)
            found, counts = label_problems(volume.array[0], task, case.id)
            problems += found
    return CaseFindings(case.id, tuple(problems), hashes, counts, files_read)


def _read(path: Path, channels: int, case: str, problems: list[Problem]) -> Volume | None:
    """The volume, or None with the reason added to ``problems``."""
    try:
        volume = read_volume(path, channels)
    except MedsegError as error:
        problems += [replace(problem, case=case) for problem in error.problems]
        return None
    except Exception as error:  # a bug in a reader must not hide what is wrong with the other cases
        logger.exception("unexpected error while reading %s", path.name)
        measured = f"{path.name}: {type(error).__name__}: {error}"
        problems.append(Problem("E7000", measured, "", "please report this", case))
        return None
    problems += [replace(note, case=case) for note in (*header_notes(volume.source, channels), *volume.notes)]
    return volume


def _against(reference: tuple[str, Grid] | None, grid: Grid, name: str, case: str) -> list[Problem]:
    """What ``compare_grids`` says about two files of a case."""
    if reference is None:
        return []
    problem = compare_grids(reference[1], grid, f"{name} against {reference[0]}")
    return [replace(problem, case=case)] if problem else []


def _voxel_problems(voxels: NDArray[np.generic], name: str, case: str) -> list[Problem]:
    """E0110 not finite, W0136 constant, of one channel (Z, Y, X)."""
    bad = nonfinite(voxels)
    if bad is not None:
        return [nonfinite_problem(bad, name, case)]
    low = voxels.min()
    if low == voxels.max():
        return [Problem("W0136", f"{name} is {low} everywhere", "", "check that the export worked", case)]
    return []


def _hash(voxels: NDArray[np.generic]) -> str:
    """Equal for images that are equal voxel by voxel, however they are compressed; empty for constant ones."""
    if voxels.min() == voxels.max():
        return ""
    digest = hashlib.sha256(f"{voxels.dtype.str} {voxels.shape}".encode())
    digest.update(np.ascontiguousarray(voxels).data)
    return digest.hexdigest()


def _identical(findings: Iterable[CaseFindings]) -> tuple[tuple[tuple[str, ...], ...], list[Problem]]:
    """Groups of cases that share an image, and a W0141 for each image that occurs more than once."""
    places: dict[str, list[tuple[str, str]]] = defaultdict(list)
    for found in findings:
        for channel, digest in found.hashes.items():
            if digest:
                places[digest].append((found.case, channel))
    groups, problems = set(), []
    for where in places.values():
        if len(where) > 1:
            shown = ", ".join(f"{case} {channel}" for case, channel in where[:5])
            action = "remove copies; else keep them on the same side of every split"
            problems.append(Problem("W0141", f"identical voxels: {shown}", "different images", action, where[0][0]))
            cases = tuple(sorted({case for case, _ in where}))
            groups |= {cases} if len(cases) > 1 else set()
    return tuple(sorted(groups)), problems


def _label_coverage(findings: Iterable[CaseFindings], task: Task) -> list[Problem]:
    """W0132 for labels that no case has, E0135 if no case has any foreground."""
    total: Counter[int] = Counter()
    for found in findings:
        total.update(found.label_counts)
    if not total:  # no label could be read: said already
        return []
    absent = [label for label in task.foreground if not total[label.value]]
    if len(absent) == len(task.foreground):
        declared = f"{FILE_NAME} declares {list(task.values[1:])}"
        return [Problem("E0135", "no case has foreground", declared, "check the label files")]
    return [
        Problem("W0132", f"label {label.value} ({label.name}) is in no case", "", "remove it or add cases")
        for label in absent
    ]


def _sorted(problems: Iterable[Problem]) -> tuple[Problem, ...]:
    return tuple(sorted(problems, key=lambda p: (p.severity, p.case or "", p.code, p.measured)))
