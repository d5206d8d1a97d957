"""Content: everything that a report shows, read and chosen, before it becomes a page."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from medseg.records.fingerprint import Fingerprint
from medseg.records.model import ModelCard
from medseg.records.plan import Plan
from medseg.records.run import RunManifest, Splits
from medseg.records.scores import CaseScore, Scores
from medseg.records.selection import Selection
from medseg.records.task import Task
from medseg.reporting.curves import HistoryPoint
from medseg.reporting.cutout import Cutout
from medseg.reporting.flags import Flag
from medseg.reporting.planes import PlanePicture


@dataclass(frozen=True, slots=True)
class Training:
    """One fold: its course so far, and its card once it has finished."""

    configuration: str
    fold: str
    card: ModelCard | None
    history: tuple[HistoryPoint, ...]


@dataclass(frozen=True, slots=True)
class ScoreSet:
    """The scores of one method on one set of cases."""

    title: str
    scores: Scores


@dataclass(frozen=True, slots=True)
class ShownCase:
    """A case with its pictures. ``role`` says why it was chosen: "worst", "median", "best", or nothing.

    ``source`` says whose prediction it is. Without ``rows`` there was no reference.
    """

    case: str
    source: str
    role: str
    planes: tuple[PlanePicture, ...]
    rows: tuple[CaseScore, ...] = ()
    cutout: Cutout | None = None


@dataclass(frozen=True, slots=True)
class ReportContent:
    """A report on a run or on a folder of predictions; what is not there is left out of the page.

    ``volumes_ml`` are of predictions by case and structure. ``provenance`` are names and values, ``commands`` those
    that make the same again, ``notes`` what could not be shown and why.
    """

    title: str
    task: Task | None
    fingerprint: Fingerprint | None = None
    plan: Plan | None = None
    splits: Splits | None = None
    trainings: tuple[Training, ...] = ()
    score_sets: tuple[ScoreSet, ...] = ()
    flags: tuple[Flag, ...] = ()
    cases: tuple[ShownCase, ...] = ()
    manifest: RunManifest | None = None
    selection: Selection | None = None
    volumes_ml: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    provenance: tuple[tuple[str, str], ...] = ()
    commands: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
