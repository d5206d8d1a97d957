"""Fix: a corrected copy of a data set, in nnU-Net's layout; the input is only read."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from medseg.artefacts import commit_json, owned, sha256_of
from medseg.dataset.check import CheckReport, check_dataset
from medseg.dataset.declaration import FILE_NAME
from medseg.dataset.fix import Target, ending_of_copy, fixable, input_hashes, mend_case
from medseg.dataset.side_by_side import side_by_side
from medseg.dataset.table import IGNORE_NAME
from medseg.errors import (
    EnvironmentFailure,
    IncompatibleError,
    InputError,
    MedsegError,
    Problem,
    ResourceError,
    UsageError,
)
from medseg.imaging.rewrite import Form
from medseg.progress import SILENT, Progress
from medseg.records.base import read_json, read_record, write_record
from medseg.records.case import Case, Dataset
from medseg.records.check import FixManifest, MendedCase, ProblemRecord
from medseg.records.task import Task

MANIFEST = "medseg-fix.json"
SAVE_EVERY = 20  # cases; what a killed run did since is done once more


@dataclass(frozen=True, slots=True)
class FixOptions:
    """``form``: which NIfTI form to believe where both are valid and differ; ``drop_duplicates``: keep one of each."""

    form: Form | None = None
    drop_duplicates: bool = False
    workers: int | None = None


@dataclass(frozen=True, slots=True)
class FixReport:
    """What was found, what was done to each case, which cases were left out and why, and what is left in the copy."""

    before: CheckReport
    cases: tuple[MendedCase, ...]
    left_out: tuple[Problem, ...]
    after: CheckReport

    @property
    def mended(self) -> tuple[MendedCase, ...]:
        """The cases that were not just copied."""
        return tuple(case for case in self.cases if case.changes)


def fix_dataset(path: Path, out: Path, options: FixOptions | None = None, progress: Progress = SILENT) -> FixReport:
    """Write a corrected copy of a data set into ``out`` and check it; the same call goes on where a stopped one was.

    Problems that cannot be mended without a guess leave their case out. The copy has nnU-Net's layout with one file
    per channel; files that need no change are copied byte for byte. Files of ``path`` are only read.

    Args:
        path: a data set in any layout.
        out: a folder that is not there, empty, or an unfinished or finished copy of the same with the same options.
        options: see ``FixOptions``.
        progress: told after every case of each stage: check, fix, check.

    Raises:
        UsageError: E0001 ``out`` lies in the input or the input in it, or is in use for something else.
        InputError: the data set cannot be read, or no case can be kept; every problem is listed.
        EnvironmentFailure: E0501, E0502; what was written stays and is gone on with.
        OwnershipError: E0901. IncompatibleError: E0802 the copy was begun with other input or options.
    """
    options = options or FixOptions()
    path, out = Path(path), Path(out)
    settings = _settings(path, options)
    known = _begun(path, out, settings)
    before = check_dataset(path, options.workers, progress)
    if before.dataset is None:
        raise InputError(before.problems or [Problem("E0146", f"{path} is no data set", "", "give a data set")])
    if any(file.resolve().is_relative_to(out.resolve()) for case in before.cases for file in _files(case)):
        raise _overlap(out)
    left_out = _left_out(before, options)
    refused = {problem.case for problem in left_out}
    dataset = replace(before.dataset, cases=tuple(case for case in before.cases if case.id not in refused))
    if not dataset.cases:
        raise InputError([*before.problems, Problem("E0146", "no case can be mended", "", "correct the data set")])
    _require_space(dataset, out)
    with owned(out, "imagesTr", "labelsTr"):
        cases, failed = _write_cases(dataset, out, settings, known, options, progress)
        left_out = [*left_out, *failed]
        if not cases:
            raise InputError(left_out)
        kept = {case.id for case in cases}
        _remove_stale(out, known, kept)
        dataset = replace(dataset, cases=tuple(case for case in dataset.cases if case.id in kept))
        commit_json(out / FILE_NAME, _declaration(dataset, ending_of_copy(before.dataset)))
        after = check_dataset(out, options.workers, progress)
        records = tuple(ProblemRecord.of(problem) for problem in left_out)
        manifest = FixManifest(settings=settings, finished=True, cases=cases, left_out=records)
        write_record(out / MANIFEST, manifest)
    return FixReport(before, cases, tuple(left_out), after)


def _settings(path: Path, options: FixOptions) -> dict[str, str]:
    """What a copy depends on; the input's place as a hash, for paths can hold names of patients."""
    place = hashlib.sha256(str(path.resolve()).encode()).hexdigest()
    return {"input": place, "form": options.form or "", "drop_duplicates": str(options.drop_duplicates)}


def _begun(path: Path, out: Path, settings: Mapping[str, str]) -> dict[str, MendedCase]:
    """The cases that ``out`` holds already; refuse a folder that is not ours to write to."""
    source, target = path.resolve(), out.resolve()
    if target.is_relative_to(source) or source.is_relative_to(target):
        raise _overlap(out)
    if out.exists() and not out.is_dir():
        raise UsageError(Problem("E0001", f"{out} is a file", "a folder", "choose another"))
    if not (out / MANIFEST).exists():
        if out.is_dir() and any(not entry.name.startswith(".medseg") for entry in out.iterdir()):
            measured = f"{out} is not empty and no copy by --fix"
            raise UsageError(Problem("E0001", measured, "a new or empty folder", "choose another"))
        return {}
    manifest = read_record(out / MANIFEST, FixManifest)
    if manifest.settings != dict(settings):
        measured = f"{out} was made from another data set, or with other options"
        raise IncompatibleError(Problem("E0802", measured, "", "choose another folder, or remove this one"))
    return {case.id: case for case in manifest.cases}


def _overlap(out: Path) -> UsageError:
    return UsageError(Problem("E0001", f"{out} and the input lie in each other", "two folders", "choose another"))


def _left_out(report: CheckReport, options: FixOptions) -> list[Problem]:
    """The problems that cost cases their place: errors that cannot be mended, and copies if they are to be dropped."""
    problems = [problem for problem in report.errors if problem.case is not None and not _may_mend(problem)]
    copies = report.duplicates if options.drop_duplicates else ()
    for first, *others in copies:
        problems += [Problem("W0141", f"equal to {first}", "", "left out as asked for", case) for case in others]
    return problems


def _may_mend(problem: Problem) -> bool:
    """E0121 too: it is mended where the other form of the header is valid, which only trying tells."""
    return fixable(problem) or problem.code == "E0121"


def _files(case: Case) -> tuple[Path, ...]:
    return (*case.files, case.label) if case.label is not None else case.files


def _require_space(dataset: Dataset, out: Path) -> None:
    """Refuse at once what cannot fit: copies are about as large as their originals."""
    needed = sum(path.stat().st_size for case in dataset.cases for path in _files(case) if path.is_file())
    there = next(folder for folder in (out.resolve(), *out.resolve().parents) if folder.exists())
    written = sum(file.stat().st_size for file in out.rglob("*") if file.is_file()) if out.is_dir() else 0
    if (free := shutil.disk_usage(there).free + written) < needed:
        measured = f"{free / 1e9:.3g} GB free for a copy of {needed / 1e9:.3g} GB"
        raise EnvironmentFailure(Problem("E0502", measured, "", "free space, or choose another folder"))


def _write_cases(
    dataset: Dataset,
    out: Path,
    settings: Mapping[str, str],
    known: Mapping[str, MendedCase],
    options: FixOptions,
    progress: Progress,
) -> tuple[tuple[MendedCase, ...], list[Problem]]:
    """Mend or copy every case that is not there yet; returns them by id, and why others failed."""
    target = Target(out, ending_of_copy(dataset), options.form)

    def mend(case: Case) -> MendedCase | MedsegError:
        try:
            there = known.get(case.id)
            return there if there and _is_there(there, case, out) else mend_case(case, dataset.task, target)
        except (EnvironmentFailure, KeyboardInterrupt):
            raise
        except MedsegError as error:
            return error
        except MemoryError:
            return ResourceError(Problem("E0600", "the case does not fit into memory", "", "use fewer --workers"))

    done: dict[str, MendedCase] = dict(known)
    failed: list[Problem] = []
    write_record(out / MANIFEST, FixManifest(settings=dict(settings), cases=tuple(done.values())))
    progress.begin("fix", len(dataset.cases), "cases")
    try:
        for count, (case, outcome) in enumerate(side_by_side(mend, dataset.cases, options.workers), start=1):
            if isinstance(outcome, MendedCase):
                done[case.id] = outcome
            else:
                done.pop(case.id, None)
                failed += [replace(problem, case=case.id) for problem in outcome.problems]
            if count % SAVE_EVERY == 0:
                write_record(out / MANIFEST, FixManifest(settings=dict(settings), cases=tuple(done.values())))
            progress.update(count, case.id)
    finally:
        write_record(out / MANIFEST, FixManifest(settings=dict(settings), cases=tuple(done.values())))
        progress.end()
    return tuple(done[case.id] for case in dataset.cases if case.id in done), failed


def _is_there(mended: MendedCase, case: Case, out: Path) -> bool:
    """Whether a case was copied already, from these files, and the copy is whole."""
    files = {name: out / name for name in mended.outputs}
    if not all(file.is_file() and sha256_of(file) == mended.outputs[name] for name, file in files.items()):
        return False
    return mended.inputs == input_hashes(case)


def _remove_stale(out: Path, known: Mapping[str, MendedCase], kept: Iterable[str]) -> None:
    """Remove our files of cases that the copy no longer has."""
    kept = set(kept)
    for name in (name for case in known.values() if case.id not in kept for name in case.outputs):
        folder, _, file = name.partition("/")
        if folder in ("imagesTr", "labelsTr") and "/" not in file and file not in ("", ".", ".."):
            (out / folder / file).unlink(missing_ok=True)


def _declaration(dataset: Dataset, ending: str) -> dict[str, Any]:
    """``dataset.json`` of the copy: the task as it was read, and what else the file of the input said."""
    task = dataset.task
    own = dataset.root / FILE_NAME
    kept = read_json(own) if dataset.layout == "nnunet" and own.is_file() else {"name": task.name}
    missing = {
        case.id: [channel for channel, path in enumerate(case.images) if path is None]
        for case in dataset.cases
        if None in case.images
    }
    changed: dict[str, Any] = {
        "channel_names": {str(number): channel.name for number, channel in enumerate(task.channels)},
        "labels": _labels(task),
        "numTraining": len(dataset.cases),
        "file_ending": ending,
    }
    if task.regions:
        changed["regions_class_order"] = list(task.regions_order)
    dropped = ("dataset", "missing_channels", "overwrite_image_reader_writer")
    result = {key: value for key, value in kept.items() if key not in dropped} | changed
    return result | ({"missing_channels": missing} if missing else {})


def _labels(task: Task) -> dict[str, Any]:
    labels: dict[str, Any] = {"background": 0}
    if task.regions:
        labels |= {region.name: list(region.values) for region in task.regions}
    else:
        labels = {label.name: label.value for label in task.labels}
    return labels | ({IGNORE_NAME: task.ignore_value} if task.ignore_value is not None else {})
