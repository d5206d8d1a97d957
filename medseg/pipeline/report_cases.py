"""Report cases: which cases a report shows, and their pictures, read one at a time."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from medseg.errors import MedsegError
from medseg.pipeline.pictures import see_case
from medseg.progress import Progress
from medseg.records.case import Case
from medseg.records.scores import CaseScore
from medseg.records.task import Task
from medseg.reporting.content import ShownCase
from medseg.reporting.cutout import cut_out
from medseg.reporting.planes import plane_pictures
from medseg.reporting.scene import make_scene

log = logging.getLogger(__name__)

MOST_VIEWER_BYTES = 8_000_000  # of all volumes of a page together


@dataclass(frozen=True, slots=True)
class Wanted:
    """A case to show: its files, why it was chosen, and its scores."""

    case: Case
    prediction: Path
    reference: Path | None
    source: str
    role: str = ""
    rows: tuple[CaseScore, ...] = ()

    @property
    def in_viewer(self) -> bool:
        """Whether its volume goes into the page too: of cases that stand for something."""
        return bool(self.role)


def choose(rows: Sequence[CaseScore], number: int) -> list[tuple[str, str]]:
    """Up to ``number`` case ids with their role, by the mean Dice of their structures: the worst, the median, the best.

    Ties are broken by name. Cases without any structure are not chosen.
    """
    dice: dict[str, list[float]] = {}
    for row in rows:
        if row.dice is not None:
            dice.setdefault(row.case, []).append(row.dice)
    ranked = sorted(dice, key=lambda case: (float(np.mean(dice[case])), case))
    if not ranked or number < 1:
        return []
    roles = {ranked[0]: "worst"}
    if number > 1:
        roles.setdefault(ranked[-1], "best")
    if number > 2:
        roles.setdefault(ranked[len(ranked) // 2], "median")
    for case in ranked:
        if len(roles) >= number:
            break
        roles.setdefault(case, "")
    return [(case, roles[case]) for case in ranked if case in roles]


def show_cases(
    wanted: Iterable[Wanted], task: Task, progress: Progress
) -> tuple[tuple[ShownCase, ...], tuple[str, ...]]:
    """Read and draw the cases; those that cannot be shown are told in the second tuple."""
    shown: list[ShownCase] = []
    notes = []
    size = 0
    todo = list(wanted)
    progress.begin("report", len(todo), "cases")
    for done, item in enumerate(todo, start=1):
        try:
            case = _show(item, task)
        except (MedsegError, MemoryError) as error:
            notes.append(f"{item.case.id}: {error if isinstance(error, MedsegError) else 'not enough memory'}")
            continue
        if case.cutout is not None:
            size += case.cutout.size
            if size > MOST_VIEWER_BYTES:
                case = replace(case, cutout=None)
        shown.append(case)
        progress.update(done, item.case.id)
    progress.end()
    return tuple(shown), tuple(notes)


def _show(item: Wanted, task: Task) -> ShownCase:
    seen = see_case(item.case, item.prediction, item.reference, task)
    scene = make_scene(seen.image, seen.prediction, seen.reference, seen.spacing_mm)
    names = [label.name for label in task.labels]
    cutout = cut_out(scene, item.case.id, names) if item.in_viewer else None
    return ShownCase(item.case.id, item.source, item.role, plane_pictures(scene), item.rows, cutout)


def rows_by_case(rows: Sequence[CaseScore]) -> Mapping[str, tuple[CaseScore, ...]]:
    """The rows of each case."""
    found: dict[str, list[CaseScore]] = {}
    for row in rows:
        found.setdefault(row.case, []).append(row)
    return {case: tuple(its) for case, its in found.items()}
