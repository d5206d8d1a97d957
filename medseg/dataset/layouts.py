"""Layouts: which files on disk make a data set — nnU-Net v2 folders and the Medical Segmentation Decathlon."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from medseg.dataset.declaration import FILE_NAME, MsdDeclaration, NnunetDeclaration, inside, read_declaration, task_of
from medseg.dataset.naming import absent, channel_of, clashes, ignored, unsafe_id, visible, wrong_channels
from medseg.errors import InputError, Problem
from medseg.imaging.volumes import IMAGE_ENDINGS, PICTURE_ENDINGS, file_ending, strip_ending
from medseg.records.case import Case, Dataset
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


def read_dataset(path: Path) -> Dataset:
    """The data set in a folder with a ``dataset.json``: nnU-Net v2 or Medical Segmentation Decathlon.

    No voxel is read; ``check_dataset`` does that. Warnings are logged.

    Raises:
        InputError: every structural problem at once: E0100, E0106, E0133, E0140, E0142–E0146.
    """
    dataset, scan = scan_dataset(path)
    return replace(dataset, cases=_accept(scan))


def scan_dataset(path: Path) -> tuple[Dataset, Scan]:
    """Like ``read_dataset``, but incomplete cases are left out and reported instead of refusing the whole.

    Raises:
        InputError: ``dataset.json`` itself is missing or invalid: E0100, E0106, E0145.
    """
    root = Path(path)
    declaration = read_declaration(root)
    task = task_of(declaration)
    if isinstance(declaration, MsdDeclaration):
        found = list(_msd_cases(root, declaration, task))
    elif declaration.dataset is not None:
        found = list(_explicit_cases(root, declaration, task))
    else:
        found = list(_nnunet_cases(root, declaration, task))
    found += _miscounted(found, declaration.numTraining)
    scan = _finish(found, f"training cases in {root.name}")
    if isinstance(declaration, NnunetDeclaration):
        return Dataset(root, "nnunet", task, scan.cases, declaration.file_ending), scan
    endings = [file_ending(case.files[0].name) for case in scan.cases]
    return Dataset(root, "msd", task, scan.cases, (endings and endings[0]) or ".nii.gz"), scan


def find_inputs(paths: Path | Sequence[Path], task: Task) -> list[Case]:
    """The cases to predict: a folder, a file, or a list of files; see ``scan_inputs`` for how names are read.

    Raises:
        InputError: every problem at once: E0100, E0106, E0133, E0140, E0142, E0143, E0146.
    """
    return list(_accept(scan_inputs(paths, task)))


def scan_inputs(paths: Path | Sequence[Path], task: Task) -> Scan:
    """The cases to predict, without labels; cases with a problem are left out and reported.

    Files with a channel number belong together: ``case_0000.nii.gz`` and ``case_0001.nii.gz`` are the channels of
    ``case``. A name without it, ``case.nii.gz``, is a file that holds all channels, as is a lone ``case_0000.png``
    of a task with several. Four digits count as a channel number where ``_0000`` is there too, or where the task has
    several channels and this is one of them; else ``patient_0012.nii.gz`` is a plain name. Hidden files are skipped.
    """
    found: list[Case | Problem] = []
    files: list[Path] = []
    for path in [paths] if isinstance(paths, Path) else paths:
        if path.is_dir():
            entries = [entry for entry in visible(path) if not entry.is_dir()]
            files += [entry for entry in entries if file_ending(entry.name)]
            found += ignored(path, [e.name for e in entries if not file_ending(e.name)], "a supported file ending")
        else:
            files.append(path)
    found += _group(files, task)
    return _finish(found, "images")


def _group(files: list[Path], task: Task) -> Found:
    """Cases from names: files with channel numbers by their common stem, others alone."""
    numbered: dict[tuple[Path, str], dict[int, Path]] = {}
    for path in files:
        found = channel_of(path.name)
        if found is None:
            yield _case(strip_ending(path.name), path, task)
        elif found[1] in numbered.setdefault((path.parent, found[0]), {}):
            yield _twice(path, found[0])
        else:
            numbered[path.parent, found[0]][found[1]] = path
    count = len(task.channels)
    for (_, case), group in numbered.items():
        if 0 in group or (count > 1 and min(group) < count):
            yield _case(case, group, task)
        else:
            yield from (_case(strip_ending(path.name), path, task) for path in group.values())


def _twice(path: Path, case: str) -> Problem:
    measured = f"{strip_ending(path.name)} is there twice, with different endings"
    return Problem("E0140", measured, "one file", "remove one", case)


def _case(case: str, images: Mapping[int, Path] | Path, task: Task, label: Path | None = None) -> Case | Problem:
    """The case of these files by channel, or of one file that holds all channels; or what is wrong with it.

    A lone picture numbered 0 of a task with several channels holds them all: that is how nnU-Net keeps RGB.
    """
    count = len(task.channels)
    if isinstance(images, Path):
        files = [images] * count
    elif set(images) == {0} and file_ending(images[0].name) in PICTURE_ENDINGS:
        files = [images[0]] * count
    else:
        problem = wrong_channels(images, task, case)
        if problem is not None:
            return problem
        files = [images[n] for n in range(count)]
    missing = [absent(path, "E0100", case) for path in files]
    missing += [absent(label, "E0144", case)] if label is not None else []
    for problem in (*missing, unsafe_id(case)):
        if problem is not None:
            return problem
    for path in files:
        if file_ending(path.name) is None:
            supported = f"one of {' '.join(IMAGE_ENDINGS)}"
            return Problem("E0106", f"{path.name} has no supported ending", supported, "convert it", case)
    return Case(case, tuple(files), label)


def _nnunet_cases(root: Path, declaration: NnunetDeclaration, task: Task) -> Found:
    ending = declaration.file_ending
    groups: dict[str, dict[int, Path]] = {}
    unused = []
    for path in visible(root / "imagesTr"):
        found = channel_of(path.name)
        if file_ending(path.name) != ending or path.is_dir():
            unused.append(path.name)
        elif found is None:
            expected = "a channel number, as in case_0000"
            yield Problem("E0133", f"imagesTr/{path.name}", expected, "rename it", strip_ending(path.name))
        elif found[1] in groups.setdefault(found[0], {}):
            yield _twice(path, found[0])
        else:
            groups[found[0]][found[1]] = path
    yield from ignored(root / "imagesTr", unused, f"files that end with {ending}")
    labels = {strip_ending(p.name): p for p in visible(root / "labelsTr") if file_ending(p.name) == ending}
    for case, images in groups.items():
        yield _case(case, images, task, labels.get(case, root / "labelsTr" / f"{case}{ending}"))
    used = {labels[case].name for case in groups if case in labels}
    without = [path.name for path in visible(root / "labelsTr") if path.name not in used]
    yield from ignored(root / "labelsTr", without, "labels of an image in imagesTr")


def _explicit_cases(root: Path, declaration: NnunetDeclaration, task: Task) -> Found:
    for case, files in (declaration.dataset or {}).items():
        try:
            images = [inside(root, image) for image in files.images]
            label = inside(root, files.label)
        except InputError as error:
            yield from (replace(problem, case=case) for problem in error.problems)
        else:
            yield _case(case, images[0] if len(images) == 1 else dict(enumerate(images)), task, label)


def _msd_cases(root: Path, declaration: MsdDeclaration, task: Task) -> Found:
    used: set[Path] = set()
    for pair in declaration.training:
        case = strip_ending(Path(pair.image).name)
        try:
            image, label = inside(root, pair.image), inside(root, pair.label)
        except InputError as error:
            yield from (replace(problem, case=case) for problem in error.problems)
        else:
            used |= {image, label}
            yield _case(case, image, task, label)
    for folder in sorted({path.parent for path in used}):
        unused = [path.name for path in visible(folder) if path not in used]
        yield from ignored(folder, unused, f"cases that {FILE_NAME} lists")


def _miscounted(found: Iterable[Case | Problem], declared: int | None) -> list[Problem]:
    count = len({item.id if isinstance(item, Case) else item.case for item in found} - {None})
    if declared in (None, count):
        return []
    measured = f"{FILE_NAME}: numTraining is {declared}"
    return [Problem("W0148", measured, f"{count} cases found", "correct it, or look for missing files")]


def _finish(found: Iterable[Case | Problem], what: str) -> Scan:
    found = list(found)
    cases = sorted((item for item in found if isinstance(item, Case)), key=lambda case: case.id)
    problems = [item for item in found if isinstance(item, Problem)] + clashes(case.id for case in cases)
    if not cases and not any(problem.severity == "error" for problem in problems):
        problems.append(Problem("E0146", f"no {what}", "", "check the folder and the file ending"))
    refused = {problem.case for problem in problems if problem.severity == "error"}
    return Scan(tuple(case for case in cases if case.id not in refused), tuple(problems))


def _accept(scan: Scan) -> tuple[Case, ...]:
    if scan.errors:
        raise InputError(scan.problems)
    for problem in scan.problems:
        logger.warning("%s", problem)
    return scan.cases
