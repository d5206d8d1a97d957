"""Listing: a list of cases written from what lies in folders, with everything stated that was derived."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from medseg.artefacts import commit, json_bytes
from medseg.dataset.bids import LABEL_SUFFIX, is_bids, pair_bids
from medseg.dataset.declaration import ListDeclaration, task_of
from medseg.dataset.folders import pair_folders
from medseg.dataset.labels import label_values, nonfinite_problem
from medseg.dataset.notation import region_order
from medseg.dataset.pairing import ChannelFiles, Pairing, with_groups
from medseg.dataset.table import IGNORE_NAME, table_text
from medseg.errors import InputError, MedsegError, Problem, UsageError
from medseg.imaging.volumes import nonfinite, read_volume
from medseg.progress import SILENT, Progress
from medseg.records.case import Case
from medseg.records.task import Task

MOST_LABELS = 500  # found without names; more are no classes but a label map of another kind
LARGEST = 65535


@dataclass(frozen=True, slots=True)
class ListingOptions:
    """What is said about the files. ``labels``: values by name, None to take those found, with names made for them.

    ``label_end``: end of the names of label files; by default nothing in folders, ``dseg`` in BIDS. ``group``: a
    regular expression. ``allow_missing``: a case may lack channels. ``skip``: leave incomplete cases out.
    """

    channels: tuple[ChannelFiles, ...]
    name: str = "dataset"
    labels: Mapping[str, int] | None = None
    ignore: int | None = None
    regions: Mapping[str, Sequence[int]] = field(default_factory=dict)
    regions_order: tuple[int, ...] = ()
    label_end: str | None = None
    group: str | None = None
    allow_missing: bool = False
    skip: bool = False


@dataclass(frozen=True, slots=True)
class Listing:
    """The cases that go into the list, their task, what was left out, and what was derived, one sentence each.

    ``label_cases`` counts the cases that have each label value.
    """

    cases: tuple[Case, ...]
    task: Task
    one_file: bool
    label_cases: Mapping[int, int]
    problems: tuple[Problem, ...]
    notes: tuple[str, ...]


def make_listing(images: Path, labels: Path | None, options: ListingOptions, progress: Progress = SILENT) -> Listing:
    """Pair images and labels, and read all labels to find their values.

    Args:
        images: a folder of images, a BIDS tree, or a folder with ``images`` and ``labels`` in it.
        labels: folder of the labels; may be left out for the latter two.
        options: names and choices.
        progress: told about every label file.

    Raises:
        InputError: everything that does not fit: E0100, E0130, E0131, E0133, E0140, E0142, E0144, E0145, E0146.
    """
    pairing = _pair(images, labels, options)
    if options.group is not None:
        pairing = with_groups(pairing, options.group)
    if any(p.severity == "error" for p in pairing.problems) and not options.skip:
        raise InputError(pairing.problems)
    left_out = tuple(replace(p, code="W0147", action="left out") if p.code[0] == "E" else p for p in pairing.problems)
    refused = {p.case for p in pairing.problems if p.code == "E0140"}
    cases = tuple(sorted((c for c in pairing.cases if c.id not in refused), key=lambda case: case.id))
    if not cases:
        raise InputError([*pairing.problems, Problem("E0146", "no complete case", "", "check names and folders")])
    counts = _count_labels(cases, progress)
    label_cases = Counter(value for of_case in counts.values() for value in of_case)
    values, notes = _values(label_cases, options)
    task = _task(values, options)
    undeclared = _undeclared(counts, {*task.values, task.ignore_value})
    if undeclared:
        raise InputError(undeclared)
    absent = [
        Problem("W0132", f"label {label.value} ({label.name}) is in no case", "", "remove it or add cases")
        for label in task.foreground
        if not label_cases[label.value]
    ]
    if task.regions and not options.regions_order:
        notes.append(f"regions are written as {', '.join(map(str, task.regions_order))}: what no later region has")
    return Listing(cases, task, pairing.one_file, label_cases, (*left_out, *absent), (*pairing.notes, *notes))


def _pair(images: Path, labels: Path | None, options: ListingOptions) -> Pairing:
    if is_bids(images):
        end = LABEL_SUFFIX if options.label_end is None else options.label_end
        return pair_bids(images, labels, options.channels, end, allow_missing=options.allow_missing)
    if labels is None and (images / "images").is_dir() and (images / "labels").is_dir():
        images, labels = images / "images", images / "labels"
    if labels is None:
        measured = f"{images} has neither sub-… folders (BIDS) nor the folders images and labels"
        raise UsageError(Problem("E0001", measured, "two folders, images and labels", "name the folder of the labels"))
    return pair_folders(images, labels, options.channels, options.label_end or "", allow_missing=options.allow_missing)


def _count_labels(cases: Sequence[Case], progress: Progress) -> dict[str, dict[int, int]]:
    """Voxels by value of each case's label file; all that cannot be counted is raised at once."""
    counts: dict[str, dict[int, int]] = {}
    problems: list[Problem] = []
    progress.begin("read labels", len(cases), "cases")
    with ThreadPoolExecutor(min(os.cpu_count() or 1, 8)) as pool:
        for done, (case, found) in enumerate(zip(cases, pool.map(_count, cases), strict=True), start=1):
            if isinstance(found, dict):
                counts[case.id] = found
            else:
                problems += found
            progress.update(done, case.id)
    progress.end()
    if problems:
        raise InputError(problems)
    return counts


def _count(case: Case) -> dict[int, int] | list[Problem]:
    assert case.label is not None  # pairs have labels
    try:
        array = read_volume(case.label).array
    except MedsegError as error:
        return [replace(problem, case=case.id) for problem in error.problems]
    bad = nonfinite(array)
    if bad is not None:
        return [nonfinite_problem(bad, "label", case.id)]
    values = label_values(array)
    outside = [value for value in values.counts if not 0 <= value <= LARGEST]
    if values.fractional or outside:
        examples = ", ".join(f"{value:.6g}" for value in (*values.examples, *outside[:3]))
        measured = f"label {case.label.name} holds {examples}"
        return [
            Problem("E0130", measured, "whole numbers from 0 to 65535", "export labels without interpolation", case.id)
        ]
    return values.counts


def _values(found: Mapping[int, int], options: ListingOptions) -> tuple[dict[str, int], list[str]]:
    """Label values by name, as given or as found, and what was derived."""
    if options.labels is not None:
        return dict(options.labels), []
    values = sorted(value for value in found if value not in (0, options.ignore))
    if len(values) > MOST_LABELS:
        measured = f"{len(values)} different label values"
        raise InputError(Problem("E0131", measured, f"at most {MOST_LABELS}", "name the labels, or check the files"))
    note = f"labels found: {', '.join(map(str, values)) or 'none'}; their names were made up"
    return {"background": 0} | {f"label_{value}": value for value in values}, [note]


def _task(values: dict[str, int], options: ListingOptions) -> Task:
    if options.ignore is not None:
        values = values | {IGNORE_NAME: options.ignore}
    order = list(options.regions_order) or region_order(options.regions)
    if options.regions and order is None:
        measured = "regions overlap so that the value to write for each is not clear"
        raise UsageError(Problem("E0001", measured, "one label value per region", "give --regions-order, as in 1,2,3"))
    declaration = ListDeclaration(
        name=options.name,
        channel_names={str(number): channel.name for number, channel in enumerate(options.channels)},
        labels=values,
        regions={name: list(of_region) for name, of_region in options.regions.items()} or None,
        regions_class_order=order if options.regions else None,
        cases={},
    )
    return task_of(declaration, "options")


def _undeclared(counts: Mapping[str, Mapping[int, int]], declared: set[int | None]) -> list[Problem]:
    problems = []
    for case, of_case in counts.items():
        wrong = [f"{value} ({voxels} voxels)" for value, voxels in of_case.items() if value not in declared]
        if wrong:
            measured = f"label values {', '.join(wrong[:5])}" + (" …" if len(wrong) > 5 else "")
            problems.append(Problem("E0131", measured, "the labels that were named", "name them too", case))
    return problems


def write_listing(path: Path, listing: Listing) -> None:
    """Commit the list as ``path``: ``.csv`` or ``.json``. Files below its folder are named relative to it.

    Raises:
        UsageError: E0001 another ending, or a name that a CSV list cannot hold.
        EnvironmentFailure: E0501, E0502.
    """
    value = _value(path.parent.resolve(), listing)
    try:
        if path.suffix.lower() == ".csv":
            content = table_text(value).encode()
        elif path.suffix.lower() == ".json":
            content = json_bytes(value)
        else:
            raise ValueError(f"{path.name} is neither .csv nor .json")
    except UnicodeEncodeError as error:
        measured = f"the name {error.object!r} is no valid UTF-8"
        raise InputError(Problem("E0142", measured, "", "rename the file")) from error
    except ValueError as error:
        raise UsageError(Problem("E0001", str(error), "", "write a .json list")) from error
    commit(path, content)


def _value(folder: Path, listing: Listing) -> dict[str, Any]:
    """The JSON list."""
    task = listing.task
    labels = {label.name: label.value for label in task.labels}
    value: dict[str, Any] = {
        "name": task.name,
        "channel_names": {str(number): channel.name for number, channel in enumerate(task.channels)},
        "labels": labels if task.ignore_value is None else labels | {IGNORE_NAME: task.ignore_value},
    }
    if task.regions:
        value["regions"] = {region.name: list(region.values) for region in task.regions}
        value["regions_class_order"] = list(task.regions_order)
    cases = {}
    for case in listing.cases:
        images = [None if path is None else _text(path, folder) for path in case.images]
        entry: dict[str, Any] = {"image": images[0]} if listing.one_file else {"images": images}
        if case.label is not None:
            entry["label"] = _text(case.label, folder)
        if case.group is not None:
            entry["group"] = case.group
        cases[case.id] = entry
    return value | {"cases": cases}


def _text(path: Path, folder: Path) -> str:
    """A path as the list has it: relative below the list's folder, else absolute. Links are not followed."""
    whole = path.parent.resolve() / path.name
    return (whole.relative_to(folder) if whole.is_relative_to(folder) else whole).as_posix()
