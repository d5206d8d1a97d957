"""Cases from files: what is checked of every case in whatever way its files were found."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from medseg.dataset.naming import absent, clashes, unsafe_id, wrong_channels
from medseg.errors import InputError, Problem
from medseg.imaging.dicom import is_dicom
from medseg.imaging.volumes import IMAGE_ENDINGS, PICTURE_ENDINGS, file_ending, strip_ending
from medseg.records.case import Case
from medseg.records.task import Task

logger = logging.getLogger(__name__)

Found = Iterator[Case | Problem]


@dataclass(frozen=True, slots=True)
class Scan:
    """What was found: the cases that are complete, sorted by id, and everything that is wrong."""

    cases: tuple[Case, ...]
    problems: tuple[Problem, ...]

    @property
    def errors(self) -> tuple[Problem, ...]:
        """The problems that are not warnings."""
        return tuple(problem for problem in self.problems if problem.severity == "error")


def make_case(
    case: str,
    images: Mapping[int, Path | None] | Path,
    task: Task,
    label: Path | None = None,
    group: str | None = None,
) -> Case | Problem:
    """The case of these files by channel, or of one file that holds all channels; or what is wrong with it.

    None is a channel that is declared missing. A lone picture numbered 0 of a task with several channels holds them
    all: that is how nnU-Net keeps RGB. A folder stands for the DICOM series in it.
    """
    problem = unsafe_id(case)
    paths = problem or _by_channel(images, task, case)
    if isinstance(paths, Problem):
        return paths
    result = Case(case, paths, label, group)
    if not result.files:
        return Problem("E0133", "all channels are missing", "at least one image", "remove the case", case)
    for path in result.files:
        if path.is_dir() or (file_ending(path.name) is None and is_dicom(path)):
            continue
        problem = absent(path, "E0100", case)
        if problem is None and file_ending(path.name) is None:
            supported = f"one of {' '.join(IMAGE_ENDINGS)}"
            problem = Problem("E0106", f"{path.name} has no supported ending", supported, "convert it", case)
        if problem is not None:
            return problem
    return (absent(label, "E0144", case) if label is not None else None) or result


def _by_channel(images: Mapping[int, Path | None] | Path, task: Task, case: str) -> tuple[Path | None, ...] | Problem:
    count = len(task.channels)
    if isinstance(images, Path):
        return (images,) * count
    first = images.get(0)
    if set(images) == {0} and first is not None and file_ending(first.name) in PICTURE_ENDINGS:
        return (first,) * count
    problem = wrong_channels(images, task, case)
    if problem is not None:
        return problem
    there = [path for path in images.values() if path is not None]
    twice = sorted({path.name for path in there if there.count(path) > 1})
    if twice:
        return Problem("E0140", f"{twice[0]} stands for several channels", "one file each", "correct the list", case)
    return tuple(images[n] for n in range(count))


def same_name(path: Path, case: str) -> Problem:
    """E0140 for two files that differ only in their endings."""
    measured = f"{strip_ending(path.name)} is there twice, with different endings"
    return Problem("E0140", measured, "one file", "remove one", case)


def finish(found: Iterable[Case | Problem], what: str) -> Scan:
    """Sort what was found; ids that clash and files that two cases claim leave these cases out."""
    found = list(found)
    cases = sorted((item for item in found if isinstance(item, Case)), key=lambda case: case.id)
    problems = [item for item in found if isinstance(item, Problem)]
    problems += [*clashes(case.id for case in cases), *_shared_files(cases)]
    if not cases and not any(problem.severity == "error" for problem in problems):
        problems.append(Problem("E0146", f"no {what}", "", "check the folder and the file ending"))
    refused = {problem.case for problem in problems if problem.severity == "error"}
    return Scan(tuple(case for case in cases if case.id not in refused), tuple(problems))


def _shared_files(cases: Iterable[Case]) -> list[Problem]:
    """E0140 for images of two cases, and for images that are also a label. Two cases may have the same label."""
    owner: dict[Path, str] = {}
    problems = []
    labels = {case.label for case in cases}
    for case in cases:
        for path in case.files:
            if path in labels:
                problems.append(Problem("E0140", f"{path.name} is image and label", "two files", "correct it", case.id))
            if owner.setdefault(path, case.id) != case.id:
                measured = f"{path.name} is also an image of {owner[path]}"
                problems.append(Problem("E0140", measured, "one case per image", "remove one", case.id))
    return problems


def accept(scan: Scan) -> tuple[Case, ...]:
    """The cases if nothing is wrong; warnings are logged.

    Raises:
        InputError: every problem, if one is an error.
    """
    if scan.errors:
        raise InputError(scan.problems)
    for problem in scan.problems:
        logger.warning("%s", problem)
    return scan.cases
