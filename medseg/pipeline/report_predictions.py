"""Report on predictions: a folder that ``medseg predict`` filled, as one HTML page."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from medseg import __version__
from medseg.dataset.layouts import scan_inputs
from medseg.errors import IncompatibleError, InputError, MedsegError, Problem, UsageError
from medseg.imaging.volumes import read_volume
from medseg.pipeline.evaluate import EvaluateOptions, evaluate_files
from medseg.pipeline.outputs import predicted_files
from medseg.pipeline.pictures import label_files
from medseg.pipeline.predict import MANIFEST
from medseg.pipeline.report import PAGE, PICTURES, facts_of, failures, write_page
from medseg.pipeline.report_cases import Wanted, choose, rows_by_case, show_cases
from medseg.pipeline.run_folder import RunFolder
from medseg.progress import SILENT, Progress
from medseg.records.base import read_record
from medseg.records.fingerprint import Fingerprint
from medseg.records.model import CARD, ModelCard
from medseg.records.plan import Plan
from medseg.records.run import RunManifest
from medseg.records.scores import Scores
from medseg.records.task import Task
from medseg.reporting.content import ReportContent, ScoreSet
from medseg.reporting.flags import Flag, flags_of_scores, flags_of_volumes, ordered, usual_volumes


@dataclass(frozen=True, slots=True)
class PredictionReportOptions:
    """What else is known of the predictions.

    ``model`` is the run or model folder they come from: it names the structures, and a run knows their usual volumes.
    ``images`` and ``references`` lie in folders; with images there are pictures, with references scores.
    """

    model: Path | None = None
    images: Path | None = None
    references: Path | None = None
    pictures: int = PICTURES


def report_predictions(
    predictions: Path,
    output: Path | None = None,
    options: PredictionReportOptions = PredictionReportOptions(),
    progress: Progress = SILENT,
) -> Path:
    """Write a report on a folder of predictions and return where it lies.

    Args:
        predictions: the folder, with its ``predict.json``.
        output: the page; None: ``report.html`` in the folder.
        options: model, images and references.
        progress: told of every case that is read.

    Raises:
        UsageError: E0001 images or references without a model.
        InputError: E0100 no ``predict.json``, or a folder is missing.
        IncompatibleError: E0802 the predictions are not of this model.
        EnvironmentFailure: E0501, E0502 the page cannot be written.
    """
    if options.model is None and (options.images or options.references):
        raise UsageError(Problem("E0001", "--images or --references without --model", "", "name the run or model too"))
    if not (predictions / MANIFEST).is_file():
        missing = f"no {MANIFEST} in {predictions}"
        raise InputError(Problem("E0100", missing, "", "name the folder that medseg predict -o wrote"))
    manifest = read_record(predictions / MANIFEST, RunManifest)
    plan, fingerprint = _model(options.model, manifest) if options.model else (None, None)
    usual = usual_volumes(fingerprint, plan.task) if plan and fingerprint else {}
    scores = _scores(predictions, options.references, plan.task, progress) if plan and options.references else None
    notes: list[str] = [] if plan else ["names of structures and usual volumes: name the model with --model"]
    volumes = _volumes(predictions, manifest, plan.task if plan else None, progress, notes)
    flags = failures(manifest)
    flags += flags_of_scores(scores.cases, usual) if scores else flags_of_volumes(volumes, usual)
    wanted = (
        _wanted(predicted_files(predictions, manifest), options, plan.task, scores, flags)
        if plan and options.images
        else []
    )
    cases, problems = show_cases(wanted, plan.task, progress) if plan else ((), ())
    content = ReportContent(
        title=f"Predictions: {plan.task.name}" if plan else "Predictions",
        task=plan.task if plan else None,
        plan=None,
        score_sets=(ScoreSet("predictions", scores),) if scores else (),
        flags=tuple(ordered(flags)),
        cases=cases,
        manifest=manifest,
        volumes_ml=volumes,
        provenance=(("medseg, this report", __version__), *facts_of(manifest)),
        notes=(*notes, *problems),
    )
    return write_page(content, output or predictions / PAGE)


def _model(path: Path, manifest: RunManifest) -> tuple[Plan, Fingerprint | None]:
    """Plan of the models that predicted, and the fingerprint of their run, if it is one."""
    cards = [read_record(card, ModelCard) for card in sorted(path.rglob(CARD))]
    if not cards:
        raise InputError(Problem("E0100", f"no trained model in {path}", "", "name the run or model folder"))
    used = set(manifest.inputs.values())
    own = [card for card in cards if card.weights_sha256 in used]
    if used and not own:
        wrong = f"the predictions are not of a model in {path}"
        raise IncompatibleError(Problem("E0802", wrong, "the weights that predict.json names", "name their model"))
    folder = RunFolder(path)
    fingerprint = folder.read_fingerprint() if folder.fingerprint_json.is_file() else None
    return (own or cards)[0].plan, fingerprint


def _scores(predictions: Path, references: Path, task: Task, progress: Progress) -> Scores:
    options = EvaluateOptions(allow_missing=True)
    return evaluate_files(predictions, references, task, None, options, progress)


def _volumes(
    folder: Path, manifest: RunManifest, task: Task | None, progress: Progress, notes: list[str]
) -> Mapping[str, Mapping[str, float]]:
    """Volumes in ml of all structures by case, regions after labels; every file is read."""
    files = predicted_files(folder, manifest)
    counts: dict[str, dict[int, float]] = {}
    progress.begin("volumes", len(files), "cases")
    for done, (case, path) in enumerate(files.items(), start=1):
        try:
            volume = read_volume(path)
        except MedsegError as error:
            notes.append(f"{case}: {error}")
            continue
        values, voxels = np.unique(volume.array, return_counts=True)
        voxel_ml = math.prod(volume.grid.spacing_mm) / 1000
        counts[case] = {int(v): int(n) * voxel_ml for v, n in zip(values, voxels, strict=True) if v > 0}
        progress.update(done, case)
    progress.end()
    if task is None:
        values_there = sorted({value for its in counts.values() for value in its})
        groups: dict[str, tuple[int, ...]] = {f"label {value}": (value,) for value in values_there}
    else:
        groups = {label.name: (label.value,) for label in task.foreground}
        groups |= {region.name: region.values for region in task.regions}
    return {
        case: {name: sum(its.get(v, 0.0) for v in values) for name, values in groups.items()}
        for case, its in counts.items()
    }


def _wanted(
    predicted: Mapping[str, Path],
    options: PredictionReportOptions,
    task: Task,
    scores: Scores | None,
    flags: list[Flag],
) -> list[Wanted]:
    """Cases to show: by their scores; without references the flagged ones first."""
    assert options.images is not None
    cases = {case.id: case for case in scan_inputs(options.images, task).cases}
    there = [case for case in sorted(cases) if case in predicted]
    true = label_files(options.references) if options.references else {}
    rows = rows_by_case(scores.cases) if scores else {}
    if scores:
        chosen = choose(scores.cases, options.pictures)
    else:
        flagged = [case for case in dict.fromkeys(flag.case for flag in ordered(flags)) if case in there]
        order = [*flagged, *(case for case in there if case not in flagged)]
        chosen = [(case, "flagged" if case in flagged else "predicted") for case in order[: options.pictures]]
    return [
        Wanted(cases[i], predicted[i], true.get(i), "prediction", role, rows.get(i, ()))
        for i, role in chosen
        if i in there
    ]
