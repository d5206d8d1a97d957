"""Predict: image files → label files on their own grid, case by case, none taking another with it."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from medseg import __version__
from medseg.artefacts import owned
from medseg.dataset.cases import Scan
from medseg.dataset.layouts import scan_inputs
from medseg.errors import InputError, MedsegError, Problem, UsageError
from medseg.inference.ladder import Ladder
from medseg.inference.model import Model, load_model
from medseg.networks.device import choose_device
from medseg.pipeline.joint import MANIFEST, predict_jointly
from medseg.pipeline.outputs import MAP_FOLDERS, POST_PROCESSING, output_name
from medseg.pipeline.pictures import PREVIEWS, preview
from medseg.pipeline.predict_case import Job, failed
from medseg.pipeline.predict_cases import CaseStream
from medseg.pipeline.predict_settings import PredictOptions, accelerated, adapted, check_options, engine_words, meaning
from medseg.pipeline.processing import processing
from medseg.pipeline.recipe import described, recipe_models, recipe_of
from medseg.progress import SILENT, Progress, never
from medseg.records.base import read_record, write_record
from medseg.records.case import Case
from medseg.records.model import PostProcessing
from medseg.records.run import CaseOutcome, RunManifest

__all__ = ["MANIFEST", "PredictOptions", "post_processing", "predict_files"]

log = logging.getLogger(__name__)

SAVE_EVERY_S = 5.0


def predict_files(
    model_path: Path,
    inputs: Path | Sequence[Path],
    output: Path,
    options: PredictOptions | None = None,
    progress: Progress = SILENT,
    stop_signal: Callable[[], int | None] = never,
) -> RunManifest:
    """Segment files with a trained model; one label file per case in ``output``, and ``predict.json`` about all.

    Cases whose output is there already, made from the same images by the same model in the same way, are skipped.

    Args:
        model_path: a run, a configuration's or a fold's folder; a run's ``selection.json`` is followed unless
            ``options`` name a configuration.
        inputs: a folder, a file or files; see ``medseg.dataset.layouts.scan_inputs`` for names.
        output: folder of the label files.
        options: configuration, folds, mirroring, device.
        progress: told of every case.
        stop_signal: asked before every case.

    Returns:
        How every case ended; ``failed`` cases have their problems.

    Raises:
        InputError: nothing to predict, or no model.
        UsageError: E0001 an output would replace an input, or an ending that is not written.
        EnvironmentFailure: E0501, E0502 the output cannot be written; finished cases stay.
        Stopped: by ``stop_signal``; finished cases stay.
    """
    options = options or PredictOptions()
    check_options(options)
    device = options.device or choose_device()
    recipe = recipe_of(model_path, options.configuration)
    if recipe is None:
        model = adapted(load_model(model_path, device, options.configuration, options.folds), options)
        return _predict_alone(model, post_processing(model), inputs, output, options, progress, stop_signal)
    progress.say(described(recipe))
    models = recipe_models(model_path, recipe, device, options.folds)
    models = {name: adapted(member, options) for name, member in models.items()}
    if len(models) > 1:
        return predict_jointly(models, recipe, inputs, output, options, progress, stop_signal)
    (model,) = models.values()
    return _predict_alone(model, recipe.postprocessing, inputs, output, options, progress, stop_signal)


def _predict_alone(
    model: Model,
    steps: PostProcessing,
    inputs: Path | Sequence[Path],
    output: Path,
    options: PredictOptions,
    progress: Progress,
    stop_signal: Callable[[], int | None],
) -> RunManifest:
    """``predict_files`` with one model, whose labels go through ``steps`` where the options say nothing else."""
    scan = scan_inputs(inputs, model.plan.task)
    if not scan.cases:
        raise InputError(scan.problems)
    _protect_inputs(scan.cases, output, options.ending)
    with owned(output, *MAP_FOLDERS, PREVIEWS):
        before = {case.id for case in _previous(output).cases if case.status != "failed"}
        model = accelerated(model, options, sum(case.id not in before for case in scan.cases))
        job = Job(model, Ladder(model), processing(steps, options, model.plan.task), options, output)
        for problem in scan.problems:
            if problem.severity == "warning":
                log.warning("%s", problem)
        progress.say(meaning(model, options))
        progress.say(engine_words(model))
        manifest = _predict_cases(scan, job, progress, stop_signal)
        if options.preview:
            preview(scan.cases, manifest, output, model.plan.task, progress, stop_signal)
    return manifest


def _predict_cases(scan: Scan, job: Job, progress: Progress, stop_signal: Callable[[], int | None]) -> RunManifest:
    """All cases that were found; the manifest is saved now and then, and at the end however that comes."""
    before = {case.id: case for case in _previous(job.output).cases}
    outcomes = [failed(p.case or "", [p]) for p in scan.errors]
    progress.begin("predict", len(scan.cases), "cases")
    saved = time.monotonic()
    try:
        for outcome in CaseStream(job, before, progress).predict(scan.cases, stop_signal):
            outcomes.append(outcome)
            progress.update(len(outcomes) - len(scan.errors), f"{outcome.id} {outcome.status}")
            if time.monotonic() - saved > SAVE_EVERY_S:
                _save(job, outcomes, before)
                saved = time.monotonic()
    finally:
        progress.end()
        manifest = _save(job, outcomes, before)
    return manifest


def _previous(output: Path) -> RunManifest:
    """The manifest of an earlier command in this folder; one that cannot be read means doing all again."""
    try:
        return read_record(output / MANIFEST, RunManifest)
    except MedsegError:
        return RunManifest(command="predict", medseg_version=__version__)


def _save(job: Job, outcomes: Sequence[CaseOutcome], before: dict[str, CaseOutcome]) -> RunManifest:
    """Commit the manifest: the outcomes of this command, and of earlier ones for cases it did not get to."""
    now = {outcome.id for outcome in outcomes}
    kept = [outcome for outcome in before.values() if outcome.id not in now]
    manifest = RunManifest(
        command="predict",
        medseg_version=__version__,
        versions={"torch": torch.__version__},
        inputs={
            f"{card.configuration} fold_{card.fold}": card.weights_sha256
            for stage in job.model.stages
            for card in stage.cards
        },
        settings={
            "configuration": job.model.configuration.name,
            "tta": "mirror" if job.options.mirror else "none",
            "step": f"{job.options.tile_step:g}",
            "precision": str(job.model.device.dtype),
            "device": job.model.device.torch_device.type,
            "backend": job.model.backend.name,
            "refinement": "none" if job.postprocessing.refinement is None else "mean-field",
        },
        cases=tuple(outcomes),
    )
    write_record(job.output / MANIFEST, manifest.model_copy(update={"cases": (*outcomes, *kept)}))
    return manifest


def post_processing(model: Model) -> PostProcessing:
    """What was chosen for the model by its cross-validation; nothing if that was not done."""
    path = model.folder / POST_PROCESSING
    return read_record(path, PostProcessing) if path.is_file() else PostProcessing()


def _protect_inputs(cases: Sequence[Case], output: Path, ending: str | None) -> None:
    images = {image.resolve() for case in cases for image in case.files}
    for case in cases:
        name = output_name(case, ending)
        if (output / name).resolve() in images:
            raise UsageError(Problem("E0001", f"{name} would replace an input", "", "choose another -o"))
