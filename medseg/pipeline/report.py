"""Report: a run as one HTML page, from what lies in its folder."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from medseg import __version__
from medseg.artefacts import commit, sha256_of
from medseg.dataset.layouts import scan_inputs
from medseg.errors import MedsegError
from medseg.evaluation.scores import summarise
from medseg.pipeline.history import training_history
from medseg.pipeline.outputs import output_name
from medseg.pipeline.pictures import label_files
from medseg.pipeline.predict import MANIFEST
from medseg.pipeline.recipe import SELECTION
from medseg.pipeline.report_cases import Wanted, choose, rows_by_case, show_cases
from medseg.pipeline.run_folder import ALL_CASES, RunFolder
from medseg.pipeline.validate import FOLDER, SCORES
from medseg.progress import SILENT, Progress
from medseg.records.base import read_record
from medseg.records.case import Dataset
from medseg.records.model import CARD, ModelCard
from medseg.records.plan import Plan
from medseg.records.run import RunManifest
from medseg.records.scores import CaseScore, Measures, Scores
from medseg.records.selection import Selection
from medseg.records.task import Task
from medseg.reporting.content import ReportContent, ScoreSet, Training
from medseg.reporting.flags import Flag, flags_of_quality, flags_of_scores, ordered, usual_volumes
from medseg.reporting.report import render_report
from medseg.training.journal import NAME as JOURNAL
from medseg.training.recipe import NAME as RECIPE

PAGE = "report.html"
HELD_OUT = "held-out.json"
PICTURES = 6

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class _Validated:
    """The finished folds of a configuration with the rows of their validation cases, and which fold each case is of."""

    configuration: str
    folds: tuple[str, ...]
    scores: Scores
    fold_of: dict[str, str]


def report_run(run: Path, output: Path | None = None, pictures: int = PICTURES, progress: Progress = SILENT) -> Path:
    """Write a report on a run, finished or not, and return where it lies.

    Args:
        run: the run folder; it must have been planned.
        output: the page; None: ``report.html`` in the run folder.
        pictures: cases shown of each: held-out images, and validation of the best configuration.
        progress: told of every case that is drawn.

    Raises:
        InputError: E0100 the run was not planned.
        IntegrityError: E0711 the plan is damaged. What else is missing or damaged is named in the report.
        EnvironmentFailure: E0501, E0502 the page cannot be written.
    """
    folder, notes = RunFolder(run), list[str]()
    plan = folder.read_plan()
    fingerprint = _optional(folder.read_fingerprint, folder.fingerprint_json, "fingerprint", notes)
    splits = _optional(folder.read_splits, folder.splits_json, "splits", notes)
    trainings = tuple(_trainings(folder, notes))
    validated = _validated(folder, plan.task, trainings, notes)
    held_out_json = folder.scores / HELD_OUT
    held_out = _optional(lambda: read_record(held_out_json, Scores), held_out_json, "scores", notes)
    manifest_json = folder.predictions / MANIFEST
    selection_json = folder.path / SELECTION
    selection = _optional(lambda: read_record(selection_json, Selection), selection_json, "selection", notes)
    manifest = _optional(lambda: read_record(manifest_json, RunManifest), manifest_json, "predictions", notes)
    rows = [*(held_out.cases if held_out else ()), *(validated[0].scores.cases if validated else ())]
    usual = usual_volumes(fingerprint, plan.task) if fingerprint else {}
    cases, problems = show_cases(
        _wanted(folder, plan.task, held_out, validated[0] if validated else None, pictures, notes), plan.task, progress
    )
    sets = [ScoreSet("held-out images", held_out)] if held_out else []
    sets += [ScoreSet(_validation_title(v), v.scores) for v in validated]
    content = ReportContent(
        title=plan.task.name,
        task=plan.task,
        fingerprint=fingerprint,
        plan=plan,
        splits=splits,
        trainings=trainings,
        score_sets=tuple(sets),
        flags=tuple(ordered([*failures(manifest), *flags_of_scores(rows, usual)])),
        cases=cases,
        manifest=manifest,
        selection=selection,
        provenance=tuple(_provenance(folder, trainings, manifest)),
        commands=tuple(_commands(folder, plan, trainings)),
        notes=(*notes, *problems),
    )
    return write_page(content, output or run / PAGE)


def write_page(content: ReportContent, page: Path) -> Path:
    """Render and commit a report."""
    commit(page, render_report(content).encode("utf-8", "replace"))
    return page


def failures(manifest: RunManifest | None) -> list[Flag]:
    """A flag for each image that could not be segmented, or that the networks doubt."""
    if manifest is None:
        return []
    failed = [Flag(case.id, "", "failed", " ".join(case.problems) or "no output", 2000) for case in manifest.failed]
    return failed + flags_of_quality(manifest.cases)


def _optional(read: Callable[[], T], path: Path, what: str, notes: list[str]) -> T | None:
    """What a file holds; None if it is not there, and a note if it is damaged."""
    if not path.is_file():
        return None
    try:
        return read()
    except MedsegError as error:
        notes.append(f"{what}: {error}")
        return None


def _trainings(folder: RunFolder, notes: list[str]) -> list[Training]:
    found = []
    for path in sorted((folder.path / "models").glob("*/fold_*")):
        card = _optional(lambda path=path: read_record(path / CARD, ModelCard), path / CARD, CARD, notes)  # type: ignore[misc]
        history = _optional(lambda path=path: training_history(path / JOURNAL), path / JOURNAL, JOURNAL, notes) or ()  # type: ignore[misc]
        if card is not None or history:
            found.append(Training(path.parent.name, path.name.removeprefix("fold_"), card, history))
    return found


def _validated(folder: RunFolder, task: Task, trainings: Sequence[Training], notes: list[str]) -> list[_Validated]:
    """The configurations with validated folds, the highest mean Dice first."""
    found = []
    finished = [t for t in trainings if t.card is not None and t.fold != ALL_CASES]
    for name in dict.fromkeys(training.configuration for training in finished):
        rows: list[CaseScore] = []
        fold_of: dict[str, str] = {}
        measures = Measures()
        for training in [t for t in finished if t.configuration == name]:
            path = folder.fold(name, training.fold) / SCORES
            scores = _optional(lambda path=path: read_record(path, Scores), path, SCORES, notes)  # type: ignore[misc]
            if scores is not None:
                rows += [row for row in scores.cases if row.case not in fold_of]
                fold_of |= {row.case: training.fold for row in scores.cases if row.case not in fold_of}
                measures = Measures(tolerance_mm=scores.tolerance_mm, label_tolerances_mm=scores.label_tolerances_mm)
        if rows:
            folds = tuple(dict.fromkeys(fold_of.values()))
            found.append(_Validated(name, folds, summarise(rows, task, measures), fold_of))
    return sorted(found, key=lambda v: (-(v.scores.mean_dice or 0), v.configuration))


def _validation_title(validated: _Validated) -> str:
    folds = f"fold{'s' if len(validated.folds) > 1 else ''} {', '.join(validated.folds)}"
    return f"{validated.configuration}, validation cases of {folds}"


def _wanted(
    folder: RunFolder, task: Task, held_out: Scores | None, best: _Validated | None, number: int, notes: list[str]
) -> list[Wanted]:
    if number < 1:
        return []
    try:
        dataset = folder.read_dataset()
    except MedsegError as error:
        notes.append(f"no pictures: {error}")
        return []
    wanted = _held_out(folder, task, dataset, held_out, number)
    return wanted + (_validation(folder, dataset, best, number) if best else [])


def _held_out(folder: RunFolder, task: Task, dataset: Dataset, scores: Scores | None, number: int) -> list[Wanted]:
    """Held-out images: chosen by their scores, without scores the first ones."""
    images, predicted = dataset.root / "imagesTs", label_files(folder.predictions)
    if not predicted or not images.is_dir():
        return []
    cases = {case.id: case for case in scan_inputs(images, task).cases if case.id in predicted}
    true = label_files(dataset.root / "labelsTs") if scores else {}
    rows = rows_by_case(scores.cases) if scores else {}
    chosen = choose(scores.cases, number) if scores else [(case, "") for case in sorted(cases)[:number]]
    return [
        Wanted(
            cases[i],
            predicted[i],
            true.get(i),
            "held-out image",
            role or ("" if scores else "held out"),
            rows.get(i, ()),
        )
        for i, role in chosen
        if i in cases
    ]


def _validation(folder: RunFolder, dataset: Dataset, best: _Validated, number: int) -> list[Wanted]:
    cases, rows = {case.id: case for case in dataset.cases}, rows_by_case(best.scores.cases)
    wanted = []
    for case_id, role in choose(best.scores.cases, number):
        case, fold = cases.get(case_id), best.fold_of[case_id]
        if case is not None:
            prediction = folder.fold(best.configuration, fold) / FOLDER / output_name(case)
            source = f"{best.configuration}, fold {fold}"
            wanted.append(Wanted(case, prediction, case.label, source, role, rows[case_id]))
    return wanted


def _provenance(
    folder: RunFolder, trainings: Sequence[Training], manifest: RunManifest | None
) -> list[tuple[str, str]]:
    facts = [("medseg, this report", __version__)]
    files = (folder.dataset_json, folder.fingerprint_json, folder.plan_json, folder.splits_json)
    facts += [(path.name, sha256_of(path)) for path in files if path.is_file()]
    for training in trainings:
        if (card := training.card) is not None:
            name = f"{card.configuration} fold {card.fold}"
            facts.append((f"{name}: weights", card.weights_sha256))
            facts.append((f"{name}: trained with", f"medseg {card.medseg_version}, PyTorch {card.torch_version}"))
    return facts + (facts_of(manifest) if manifest else [])


def facts_of(manifest: RunManifest) -> list[tuple[str, str]]:
    """What a manifest says of a prediction, as names and values."""
    facts = [("predicted with", f"medseg {manifest.medseg_version}")]
    facts += [(f"predicted with {name}", version) for name, version in manifest.versions.items()]
    facts += [(f"predicted by {name}", digest) for name, digest in manifest.inputs.items()]
    return facts + list(manifest.settings.items())


def _commands(folder: RunFolder, plan: Plan, trainings: Sequence[Training]) -> list[str]:
    """Commands that lead to such a run; what it was called with is not kept."""
    names = dict.fromkeys(training.configuration for training in trainings)
    commands = [f"medseg plan DATASET --run RUN --preset {shlex.quote(plan.preset)} --memory {plan.budget.memory_gb:g}"]
    commands += [f"medseg preprocess --run RUN --configuration {name}" for name in names]
    for training in trainings:
        if (card := training.card) is not None:
            timed = (folder.fold(training.configuration, training.fold) / RECIPE).is_file()
            epochs = max(1, round(card.steps / card.training.iterations_per_epoch))
            length = f"--time-budget {max(1, round(card.training_seconds))}s" if timed else f"--epochs {epochs}"
            which = f"--configuration {training.configuration} --fold {training.fold}"
            commands.append(f"medseg train --run RUN {which} {length}")
    return [*commands, "medseg report --run RUN"]
