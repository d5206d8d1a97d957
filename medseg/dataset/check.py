"""Check: every file of a data set read once, and everything that is wrong with it said in one run."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from medseg.dataset.case_check import CaseFindings, check_case
from medseg.dataset.comparison import compare_cases, duplicates
from medseg.dataset.dicom_folders import dicom_inputs
from medseg.dataset.layouts import scan_dataset
from medseg.dataset.naming import ignored, visible
from medseg.dataset.side_by_side import side_by_side
from medseg.dataset.twins import identical_cases
from medseg.errors import CODES, InputError, Problem
from medseg.imaging.dicom import is_dicom
from medseg.imaging.volumes import file_ending
from medseg.progress import SILENT, Progress
from medseg.records.case import Case, Dataset

BRIEF = 3


@dataclass(frozen=True, slots=True)
class CheckReport:
    """The outcome: the data set as far as it is complete, all problems sorted, errors first, and what was read.

    ``dataset`` is None if it could not be read, and for images without a data set. ``identical`` lists cases that
    share an image voxel by voxel: they belong on the same side of a split; ``duplicates`` those that are equal in
    all images and in the label.
    """

    dataset: Dataset | None
    problems: tuple[Problem, ...]
    files_read: int
    identical: tuple[tuple[str, ...], ...] = ()
    duplicates: tuple[tuple[str, ...], ...] = ()
    findings: tuple[CaseFindings, ...] = ()

    @property
    def cases(self) -> tuple[Case, ...]:
        """The cases of the data set whose files are all there."""
        return self.dataset.cases if self.dataset else ()

    @property
    def errors(self) -> tuple[Problem, ...]:
        """The problems that are not warnings; the data set can be used if there are none."""
        return tuple(problem for problem in self.problems if problem.severity == "error")

    @property
    def brief(self) -> tuple[str, ...]:
        """One line per problem, of every kind only the first few and how many more."""
        kinds: dict[str, list[Problem]] = {}
        for problem in self.problems:
            kinds.setdefault(problem.code, []).append(problem)
        lines = []
        for code, of_kind in kinds.items():
            lines += [str(problem) for problem in of_kind[:BRIEF]]
            if len(of_kind) > BRIEF:
                more = f"{len(of_kind) - BRIEF} more; medseg check lists them"
                lines.append(f"{of_kind[0].severity}[{code}]: {CODES[code]}: {more}")
        return tuple(lines)

    @property
    def label_types(self) -> dict[str, int]:
        """Number of label files by voxel type, the most frequent first."""
        return dict(Counter(found.label_type for found in self.findings if found.label_type).most_common())


def check_dataset(path: Path, workers: int | None = None, progress: Progress = SILENT) -> CheckReport:
    """Read every file of a data set once and report all problems; one bad case never stops the others.

    A folder that is no data set but holds images or DICOM series, and a single image file, are checked as images to be
    segmented: no labels, nothing declared, every file or series a case of its own.

    Args:
        path: a data set in any layout, a folder of images or DICOM series, or an image file.
        workers: threads (reading and counting release the interpreter lock); default: one per core, at most 16. No
            more cases are in memory than half of what is free holds, by the sizes of their files.
        progress: told after every case.
    """
    path = Path(path)
    if path.is_file() and (file_ending(path.name) is not None or is_dicom(path)):
        return _report(None, [Case(path.name, (path,))], [], workers, progress)
    try:
        dataset, scan = scan_dataset(path)
    except InputError as error:
        images = _images(path)
        if not images or {problem.code for problem in error.problems} != {"E0100"}:
            return CheckReport(None, _sorted(error.problems), 0)
        others = [p.name for p in visible(path) if p.is_file() and file_ending(p.name) is None]
        unused = [] if images[0].is_dir() else ignored(path, others, "a supported file ending")
        return _report(None, [Case(image.name, (image,)) for image in images], unused, workers, progress)
    return _report(dataset, dataset.cases, scan.problems, workers, progress)


def _images(folder: Path) -> list[Path]:
    """The image files of a folder, or the folders with DICOM series that it is or holds."""
    return dicom_inputs(folder) or [
        path for path in visible(folder) if path.is_file() and file_ending(path.name) is not None
    ]


def _report(
    dataset: Dataset | None, cases: Sequence[Case], known: Sequence[Problem], workers: int | None, progress: Progress
) -> CheckReport:
    found = _check_cases(dataset, cases, workers, progress)
    findings = tuple(sorted(found, key=lambda case: case.case))
    problems = [*known, *(problem for case in findings for problem in case.problems)]
    problems += compare_cases(findings, dataset.task if dataset else None)
    files_read = sum(case.files_read for case in findings)
    identical = identical_cases({case.case: case.hashes.values() for case in findings})
    return CheckReport(dataset, _sorted(problems), files_read, identical, duplicates(findings), findings)


def _check_cases(
    dataset: Dataset | None, cases: Sequence[Case], workers: int | None, progress: Progress
) -> Iterator[CaseFindings]:
    """Check the cases side by side; those that memory did not suffice for once more, one at a time."""

    def check(case: Case) -> CaseFindings:
        return check_case(case, dataset.task if dataset else None)

    progress.begin("check", len(cases), "cases")
    again: list[Case] = []
    done = 0
    try:
        for alone in (False, True):
            for case, found in side_by_side(check, again if alone else cases, 1 if alone else workers):
                if not alone and any(problem.code == "E0600" for problem in found.problems):
                    again.append(case)
                    continue
                done += 1
                progress.update(done, case.id)
                yield found
    finally:
        progress.end()


def _sorted(problems: Iterable[Problem]) -> tuple[Problem, ...]:
    return tuple(sorted(problems, key=lambda p: (p.severity, p.case or "", p.code, p.measured)))
