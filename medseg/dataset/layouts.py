"""Layouts: which files on disk make a data set — nnU-Net v2 and Decathlon folders, and lists of cases."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path

from medseg.dataset.cases import Found, Scan, accept, finish, make_case, same_name
from medseg.dataset.declaration import (
    FILE_NAME,
    LIST_ENDINGS,
    ListDeclaration,
    MsdDeclaration,
    NnunetDeclaration,
    inside,
    read_declaration,
    task_of,
)
from medseg.dataset.dicom_folders import dicom_inputs
from medseg.dataset.naming import channel_of, ignored, visible
from medseg.errors import InputError, Problem
from medseg.imaging.volumes import file_ending, strip_ending
from medseg.records.case import Case, Dataset
from medseg.records.task import Task

_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://")


def read_dataset(path: Path) -> Dataset:
    """The data set in an nnU-Net v2 or Decathlon folder, or of a list of cases (``.csv``, ``.json``).

    No voxel is read; ``check_dataset`` does that. Warnings are logged.

    Raises:
        InputError: every structural problem at once: E0100, E0106, E0133, E0140, E0142–E0146.
    """
    dataset, scan = scan_dataset(path)
    return replace(dataset, cases=accept(scan))


def scan_dataset(path: Path) -> tuple[Dataset, Scan]:
    """Like ``read_dataset``, but incomplete cases are left out and reported instead of refusing the whole.

    ``root`` of the data set is the folder, or the list file; a ``dataset.json`` that is no list stands for its folder.

    Raises:
        InputError: ``dataset.json`` or the list itself is missing or invalid: E0100, E0106, E0140, E0145.
    """
    root = Path(path)
    declaration = read_declaration(root)
    task = task_of(declaration, FILE_NAME if root.is_dir() else root.name)
    folder = root if root.is_dir() else root.parent
    found: list[Case | Problem]
    if isinstance(declaration, ListDeclaration):
        layout, found = "list", [*_unused(declaration, root), *_listed_cases(folder, declaration, task)]
        found += [_unlabelled(item.id) for item in found if isinstance(item, Case) and item.label is None]
    elif isinstance(declaration, MsdDeclaration):
        layout, root, found = "msd", folder, list(_msd_cases(folder, declaration, task))
    elif declaration.dataset is not None:
        layout, root, found = "nnunet", folder, list(_explicit_cases(folder, declaration, task))
    else:
        layout, root, found = "nnunet", folder, list(_nnunet_cases(folder, declaration, task))
    found += _miscounted(found, declaration.numTraining)
    scan = finish(found, f"training cases in {root.name}")
    if isinstance(declaration, NnunetDeclaration):
        return Dataset(root, layout, task, scan.cases, declaration.file_ending), scan
    endings = [file_ending(case.files[0].name) for case in scan.cases]
    return Dataset(root, layout, task, scan.cases, (endings and endings[0]) or ".nii.gz"), scan


def find_inputs(paths: Path | Sequence[Path], task: Task) -> list[Case]:
    """The cases to predict: a folder, a file, a list of cases or several of them; see ``scan_inputs``.

    Raises:
        InputError: every problem at once: E0100, E0106, E0133, E0140, E0142, E0143, E0145, E0146.
    """
    return list(accept(scan_inputs(paths, task)))


def scan_inputs(paths: Path | Sequence[Path], task: Task) -> Scan:
    """The cases to predict, without labels; cases with a problem are left out and reported.

    Files with a channel number belong together: ``case_0000.nii.gz`` and ``case_0001.nii.gz`` are the channels of
    ``case``. A name without it, ``case.nii.gz``, is a file that holds all channels, as is a lone ``case_0000.png``
    of a task with several. Four digits count as a channel number where ``_0000`` is there too, or where the task has
    several channels and this is one of them; else ``patient_0012.nii.gz`` is a plain name. Hidden files are skipped.
    A folder of DICOM files is one case, as is each of the folders in a folder without images; ``FOLDER#…`` chooses one
    series of each (see ``medseg.imaging.dicom``).
    A list of cases (``.csv``, ``.json``) must have the channels of the task, and may declare some missing.

    Raises:
        InputError: a list is missing or invalid: E0100, E0140, E0145.
    """
    found: list[Case | Problem] = []
    files: list[Path] = []
    for path in [paths] if isinstance(paths, Path) else paths:
        dicom = dicom_inputs(path)
        if dicom:
            files += dicom
        elif path.is_dir():
            entries = [entry for entry in visible(path) if not entry.is_dir()]
            files += [entry for entry in entries if file_ending(entry.name)]
            found += ignored(path, [e.name for e in entries if not file_ending(e.name)], "a supported file ending")
        elif path.suffix.lower() in LIST_ENDINGS:
            found += _inputs_of_list(path, task)
        else:
            files.append(path)
    found += _group(files, task)
    return finish(found, "images")


def _inputs_of_list(path: Path, task: Task) -> Found:
    declaration = read_declaration(path)
    if not isinstance(declaration, ListDeclaration):
        raise InputError(Problem("E0145", f"{path.name} lists no cases", "a list of cases", "give the images' folder"))
    channels = [channel.name for channel in task_of(declaration, path.name).channels]
    wanted = [channel.name for channel in task.channels]
    if channels != wanted:
        measured = f"{path.name} has the channels {', '.join(channels)}"
        raise InputError(Problem("E0133", measured, ", ".join(wanted), "list the channels of the model in this order"))
    for item in _listed_cases(path.parent, declaration, task):
        yield replace(item, label=None) if isinstance(item, Case) else item


def _group(files: list[Path], task: Task) -> Found:
    """Cases from names: files with channel numbers by their common stem, others alone."""
    numbered: dict[tuple[Path, str], dict[int, Path]] = {}
    for path in files:
        found = channel_of(path.name)
        if found is None:
            yield make_case(strip_ending(path.name), path, task)
        elif found[1] in numbered.setdefault((path.parent, found[0]), {}):
            yield same_name(path, found[0])
        else:
            numbered[path.parent, found[0]][found[1]] = path
    count = len(task.channels)
    for (_, case), group in numbered.items():
        if 0 in group or (count > 1 and min(group) < count):
            yield make_case(case, group, task)
        else:
            yield from (make_case(strip_ending(path.name), path, task) for path in group.values())


def _nnunet_cases(root: Path, declaration: NnunetDeclaration, task: Task) -> Found:
    ending = declaration.file_ending
    groups: dict[str, dict[int, Path | None]] = {}
    unused = []
    for path in visible(root / "imagesTr"):
        found = channel_of(path.name)
        if file_ending(path.name) != ending or path.is_dir():
            unused.append(path.name)
        elif found is None:
            expected = "a channel number, as in case_0000"
            yield Problem("E0133", f"imagesTr/{path.name}", expected, "rename it", strip_ending(path.name))
        elif found[1] in groups.setdefault(found[0], {}):
            yield same_name(path, found[0])
        else:
            groups[found[0]][found[1]] = path
    yield from ignored(root / "imagesTr", unused, f"files that end with {ending}")
    yield from _declare_missing(groups, declaration)
    labels = {strip_ending(p.name): p for p in visible(root / "labelsTr") if file_ending(p.name) == ending}
    for case, images in groups.items():
        yield make_case(case, images, task, labels.get(case, root / "labelsTr" / f"{case}{ending}"))
    used = {labels[case].name for case in groups if case in labels}
    without = [path.name for path in visible(root / "labelsTr") if path.name not in used]
    yield from ignored(root / "labelsTr", without, "labels of an image in imagesTr")


def _declare_missing(groups: dict[str, dict[int, Path | None]], declaration: NnunetDeclaration) -> list[Problem]:
    """Enter None for the channels that ``missing_channels`` names; what it says that cannot be is reported."""
    problems = []
    for case, numbers in declaration.missing_channels.items():
        images = groups.get(case)
        if images is None:
            measured = f"{FILE_NAME}: missing_channels names the unknown case {case[:80]!r}"
            problems.append(Problem("E0145", measured, "a case of imagesTr", f"correct {FILE_NAME}"))
            continue
        for number in numbers:
            if images.get(number) is not None:
                measured = f"channel {number} is there and declared missing"
                problems.append(Problem("E0133", measured, "one of the two", f"correct {FILE_NAME}", case))
            images.setdefault(number, None)
    return problems


def _explicit_cases(root: Path, declaration: NnunetDeclaration, task: Task) -> Found:
    for case, files in (declaration.dataset or {}).items():
        try:
            images = [inside(root, image) for image in files.images]
            label = inside(root, files.label)
        except InputError as error:
            yield from (replace(problem, case=case) for problem in error.problems)
        else:
            yield make_case(case, images[0] if len(images) == 1 else dict(enumerate(images)), task, label)


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
            yield make_case(case, image, task, label)
    for folder in sorted({path.parent for path in used}):
        unused = [path.name for path in visible(folder) if path not in used]
        yield from ignored(folder, unused, f"cases that {FILE_NAME} lists")


def _listed_cases(folder: Path, declaration: ListDeclaration, task: Task) -> Found:
    for case, entry in declaration.cases.items():
        try:
            label = None if entry.label is None else listed_path(folder, entry.label)
            images: Path | dict[int, Path | None]
            if entry.image is not None:
                images = listed_path(folder, entry.image)
            else:
                images = {n: None if p is None else listed_path(folder, p) for n, p in enumerate(entry.images or ())}
        except InputError as error:
            yield from (replace(problem, case=case) for problem in error.problems)
        else:
            yield make_case(case, images, task, label, entry.group)


def listed_path(folder: Path, text: str) -> Path:
    """A path of a list, relative to the list's folder or absolute, taken literally: no ``~``, no variables.

    It may lead anywhere, for whoever gives a list of his own may name his own files; they are only ever read.

    Raises:
        InputError: E0142 it is empty, a URL, or written with backslashes.
    """
    if not text or "\0" in text or "\\" in text or _URL.match(text):
        raise InputError(Problem("E0142", f"path {text[:300]!r}", "a path to a file, with /", "correct the list"))
    return folder / text


def _unused(declaration: ListDeclaration, path: Path) -> list[Problem]:
    return ignored(path, declaration.unused_columns, "case, the channels or image, label, group")


def _unlabelled(case: str) -> Problem:
    return Problem(
        "E0144", "no label file in the list", "one for each training case", "add it, or remove the case", case
    )


def _miscounted(found: Iterable[Case | Problem], declared: int | None) -> list[Problem]:
    count = len({item.id if isinstance(item, Case) else item.case for item in found} - {None})
    if declared in (None, count):
        return []
    measured = f"{FILE_NAME}: numTraining is {declared}"
    return [Problem("W0148", measured, f"{count} cases found", "correct it, or look for missing files")]
