"""Stats: label files, and images beside them, to volumes and intensities of every label."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from medseg.artefacts import commit
from medseg.dataset.labels import INTEGER_TOLERANCE
from medseg.dataset.naming import channel_of, visible
from medseg.errors import InputError, MedsegError, Problem, UsageError
from medseg.evaluation.statistics import measure_labels, statistics_csv
from medseg.imaging.geometry import compare_grids
from medseg.imaging.volumes import file_ending, nonfinite, read_volume, strip_ending
from medseg.progress import SILENT, Progress
from medseg.records.base import write_record
from medseg.records.grid import Volume
from medseg.records.stats import LabelStatistics, Statistics
from medseg.records.task import Task

LARGEST = 65535  # value of a label, as in Task

Images = dict[str, dict[str, Path]]


def measure_files(
    labels: Path,
    images: Path | None = None,
    task: Task | None = None,
    output: Path | None = None,
    progress: Progress = SILENT,
) -> Statistics:
    """Measure the labels of a file, or of every label file of a folder.

    Args:
        labels: a file or a folder; the case is the file's name without ending.
        images: a file or a folder with ``CASE_0000.nii.gz``, ``CASE_0001.nii.gz`` … or ``CASE.nii.gz``, on the grids of
            the labels. A case without an image has no intensities, and is a problem.
        task: names the labels; its labels are measured where they do not occur, too.
        output: ``.json`` or ``.csv`` to write.
        progress: told of every case.

    Returns:
        Rows by case and value. Cases that could not be measured are in ``problems``.

    Raises:
        UsageError: E0001 ``output`` has another ending.
        InputError: E0100 a path does not exist, E0146 no label file, or no case could be measured.
        EnvironmentFailure: E0501, E0502 ``output`` cannot be written.
    """
    if output is not None and output.suffix.lower() not in (".json", ".csv"):
        raise UsageError(Problem("E0001", f"--output {output.name}", "a name that ends with .json or .csv"))
    cases = {strip_ending(path.name): path for path in _files(labels)}
    if not cases:
        raise InputError(Problem("E0146", f"no label file in {labels}", "", "check the path"))
    pictures = None if images is None else _by_case(images, cases)
    rows: list[LabelStatistics] = []
    problems: list[Problem] = []
    progress.begin("stats", len(cases), "cases")
    for done, (case, path) in enumerate(cases.items(), start=1):
        try:
            rows += _measure(case, path, None if pictures is None else pictures.get(case, {}), task)
        except MedsegError as error:
            problems += [replace(problem, case=case) for problem in error.problems]
        progress.update(done, case)
    progress.end()
    if problems and not rows and len({p.case for p in problems}) == len(cases):
        raise InputError(problems)
    statistics = Statistics(rows=tuple(rows), problems=tuple(str(problem) for problem in problems))
    if output is not None:
        write_statistics(statistics, output)
    return statistics


def write_statistics(statistics: Statistics, output: Path) -> None:
    """Commit as JSON or CSV, by the ending of ``output``."""
    if output.suffix.lower() == ".csv":
        commit(output, statistics_csv(statistics).encode())
    else:
        write_record(output, statistics)


def _measure(case: str, path: Path, images: dict[str, Path] | None, task: Task | None) -> list[LabelStatistics]:
    volume = read_volume(path)
    values = _whole_numbers(volume)
    found: dict[str, NDArray[np.generic]] = {}
    for name, image in (images or {}).items():
        shown = read_volume(image)
        problem = compare_grids(volume.grid, shown.grid, f"{image.name} and {path.name}")
        if problem is not None and problem.severity == "error":
            raise InputError(problem)
        if (bad := nonfinite(shown.array)) is not None:
            raise InputError(Problem("E0110", f"{image.name}: {bad[0]} voxels are not finite", "none", "repair it"))
        found[name] = shown.array[0]
    if images is not None and not images:
        raise InputError(Problem("E0100", "no image", f"{case}_0000.* or {case}.*", "check --images"))
    names = None if task is None else {label.value: label.name for label in task.foreground}
    return measure_labels(case, values, volume.grid.spacing_mm, names, found)


def _whole_numbers(volume: Volume) -> NDArray[np.uint16]:
    """The label values; what is no whole number from 0 to 65535 is refused."""
    array = volume.array[0]
    if array.dtype.kind not in "biuf":
        raise InputError(Problem("E0111", f"label values of type {array.dtype}", "integers", "export as integers"))
    with np.errstate(invalid="ignore"):
        rounded = np.rint(array) if array.dtype.kind == "f" else array
        whole = bool((np.abs(array - rounded) <= INTEGER_TOLERANCE).all()) if array.dtype.kind == "f" else True
    if not whole:
        raise InputError(Problem("E0130", "label values that are not whole numbers", "", "export as integers"))
    low, high = float(rounded.min()), float(rounded.max())
    if low < 0 or high > LARGEST:
        measured = f"label values from {low:g} to {high:g}"
        raise InputError(Problem("E0131", measured, f"0 to {LARGEST}", "is this a label file?"))
    values: NDArray[np.uint16] = rounded.astype(np.uint16)
    return values


def _files(path: Path) -> Iterator[Path]:
    if not path.exists():
        raise InputError(Problem("E0100", f"{path} does not exist", "", "check the path"))
    if path.is_file():
        yield path
        return
    yield from (file for file in visible(path) if file.is_file() and file_ending(file.name) is not None)


def _by_case(folder: Path, cases: dict[str, Path]) -> Images:
    """Image files of each case by name: its channel number, or "image" without one."""
    found: Images = {}
    files = list(_files(folder))
    for path in files:
        whole, numbered = strip_ending(path.name), channel_of(path.name)
        if whole in cases or (folder.is_file() and len(cases) == 1):
            found.setdefault(whole if whole in cases else next(iter(cases)), {})["image"] = path
        elif numbered is not None and numbered[0] in cases:
            found.setdefault(numbered[0], {})[f"{numbered[1]:04d}"] = path
    return found
