"""Predict: image files → label files on their own grid, case by case, none taking another with it."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch

from medseg import __version__
from medseg.artefacts import owned, sha256_of, sha256_of_json
from medseg.dataset.layouts import scan_inputs
from medseg.errors import EnvironmentFailure, InputError, MedsegError, Problem, Stopped, UsageError
from medseg.evaluation.postprocessing import apply
from medseg.imaging.volumes import LABEL_ENDINGS, read_channels, volume_sha256, write_labels
from medseg.inference.model import Model, load_model, prepare_stages, segment
from medseg.networks.device import Device, choose_device
from medseg.pipeline.outputs import label_values, output_name, predicted_files
from medseg.pipeline.pictures import draw_previews
from medseg.pipeline.validate import POST_PROCESSING
from medseg.preparation.prepare import Prepared
from medseg.progress import SILENT, Progress, never
from medseg.records.base import read_record, write_record
from medseg.records.case import Case
from medseg.records.grid import Volume
from medseg.records.model import PostProcessing
from medseg.records.run import CaseOutcome, RunManifest

log = logging.getLogger(__name__)

MANIFEST = "predict.json"
PREVIEWS = "previews"
SAVE_EVERY_S = 5.0

Augmented = Literal["none", "mirror"]


@dataclass(frozen=True, slots=True)
class PredictOptions:
    """Which networks and how: ``folds`` () means the model of all cases, else all trained folds.

    ``ending`` of the label files is one of ``LABEL_ENDINGS``; None keeps the input's own, see ``label_ending``.
    With ``preview`` every case is also drawn, as ``previews/CASE.png`` in the output folder.
    """

    configuration: str | None = None
    folds: tuple[str, ...] = ()
    tta: Augmented = "none"
    device: Device | None = None
    ending: str | None = None
    preview: bool = False


@dataclass(frozen=True, slots=True)
class _Task:
    """What every case of one command shares."""

    model: Model
    postprocessing: PostProcessing
    mirror: bool
    output: Path
    ending: str | None

    def key(self, images_sha256: tuple[str, ...]) -> str:
        """Hash of all that a prediction depends on: the same key, the same labels."""
        return sha256_of_json(
            {
                "images": images_sha256,
                "weights": self.model.sha256,
                "plan": self.model.plan.to_json(),
                "postprocessing": self.postprocessing.to_json(),
                "mirror": self.mirror,
                "precision": str(self.model.device.dtype),
                "device": self.model.device.torch_device.type,
                "version": __version__,
                "ending": self.ending,
            }
        )


_Ready = tuple[str, Volume, tuple[Prepared, ...]]  # a case's key, its volume, and what every stage sees of it


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
        model_path: a run, a configuration's or a fold's folder.
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
    if options.ending not in (None, *LABEL_ENDINGS):
        raise UsageError(Problem("E0001", f"ending {options.ending}", f"one of {' '.join(LABEL_ENDINGS)}"))
    model = load_model(model_path, options.device or choose_device(), options.configuration, options.folds)
    scan = scan_inputs(inputs, model.plan.task)
    if not scan.cases:
        raise InputError(scan.problems)
    _protect_inputs(scan.cases, output, options.ending)
    task = _Task(model, _post_processing(model), options.tta == "mirror", output, options.ending)
    with owned(output):
        before = {case.id: case for case in _previous(output).cases}
        outcomes = [_failed(p.case or "", [p]) for p in scan.errors]
        for problem in scan.problems:
            if problem.severity == "warning":
                log.warning("%s", problem)
        progress.begin("predict", len(scan.cases), "cases")
        saved = time.monotonic()
        try:
            for outcome in _predict_all(scan.cases, task, before, stop_signal):
                outcomes.append(outcome)
                progress.update(len(outcomes) - len(scan.errors), f"{outcome.id} {outcome.status}")
                if time.monotonic() - saved > SAVE_EVERY_S:
                    _save(task, outcomes, before)
                    saved = time.monotonic()
        finally:
            progress.end()
            manifest = _save(task, outcomes, before)
        if options.preview:
            _preview(scan.cases, manifest, task, progress, stop_signal)
    return manifest


def _preview(
    cases: Sequence[Case],
    manifest: RunManifest,
    task: _Task,
    progress: Progress,
    stop_signal: Callable[[], int | None],
) -> None:
    """Draw the cases that were segmented now, and those of earlier commands that have no picture yet."""
    folder = task.output / PREVIEWS
    new = {case.id for case in manifest.cases if case.status == "done" or not (folder / f"{case.id}.png").is_file()}
    files = {case: path for case, path in predicted_files(task.output, manifest).items() if case in new}
    draw_previews(cases, files, task.model.plan.task, folder, progress, stop_signal)


def _predict_all(
    cases: Sequence[Case], task: _Task, before: dict[str, CaseOutcome], stop_signal: Callable[[], int | None]
) -> Iterator[CaseOutcome]:
    """Outcomes in order; the next case is read and prepared while the network works on this one."""
    with ThreadPoolExecutor(1, "medseg-read") as reader:
        ahead = reader.submit(_read, cases[0], task, before.get(cases[0].id))
        for index, case in enumerate(cases):
            current = ahead
            if index + 1 < len(cases):
                following = cases[index + 1]
                ahead = reader.submit(_read, following, task, before.get(following.id))
            signal_number = stop_signal()
            if signal_number is not None:
                ahead.cancel()
                stopped = Problem("E1300", f"stopped after {index} cases", "", "the same command goes on here")
                raise Stopped(stopped, signal_number)
            begun = time.monotonic()
            try:
                read = current.result()
                if isinstance(read, CaseOutcome):
                    yield read
                    continue
                name, digest = _write(case, task, *read[1:])
            except EnvironmentFailure:
                raise
            except Exception as error:
                yield _failed(case.id, _problems(error, case.id))
                continue
            seconds = round(time.monotonic() - begun, 2)
            yield CaseOutcome(id=case.id, status="done", key=read[0], outputs={name: digest}, seconds=seconds)


def _read(case: Case, task: _Task, before: CaseOutcome | None) -> CaseOutcome | _Ready:
    """The prepared case with its key; or its earlier outcome, if that still holds."""
    key = task.key(tuple("" if path is None else volume_sha256(path) for path in dict.fromkeys(case.images)))
    if before is not None and before.key == key and before.status != "failed" and _intact(before, task.output):
        return before.model_copy(update={"status": "skipped", "seconds": 0.0})
    volume = read_channels(case.images)
    return key, volume, prepare_stages(task.model, volume)


def _write(case: Case, task: _Task, volume: Volume, prepared: Sequence[Prepared]) -> tuple[str, str]:
    """Segment, post-process and commit one case: file name and SHA-256."""
    labels = apply(segment(task.model, prepared, mirror=task.mirror), task.postprocessing)
    name, declared = output_name(case, task.ending), task.model.plan.task
    values = label_values(labels, declared)
    return name, write_labels(task.output / name, values, volume.grid, volume.source, declared.labels)


def _problems(error: Exception, case: str) -> list[Problem]:
    if isinstance(error, MedsegError):
        return [replace(p, case=case) for p in error.problems]
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return [Problem("E0600", "not enough memory for this case", "", "free memory, or use --device cpu", case)]
    log.debug("case %s failed", case, exc_info=error)
    return [Problem("E7000", f"{type(error).__name__}: {error}", "", "report this with --debug", case)]


def _failed(case: str, problems: Sequence[Problem]) -> CaseOutcome:
    return CaseOutcome(id=case, status="failed", problems=tuple(str(p) for p in problems))


def _intact(outcome: CaseOutcome, output: Path) -> bool:
    files = [(output / name, digest) for name, digest in outcome.outputs.items()]
    return bool(files) and all(path.is_file() and sha256_of(path) == digest for path, digest in files)


def _previous(output: Path) -> RunManifest:
    """The manifest of an earlier command in this folder; one that cannot be read means doing all again."""
    try:
        return read_record(output / MANIFEST, RunManifest)
    except MedsegError:
        return RunManifest(command="predict", medseg_version=__version__)


def _save(task: _Task, outcomes: Sequence[CaseOutcome], before: dict[str, CaseOutcome]) -> RunManifest:
    """Commit the manifest: the outcomes of this command, and of earlier ones for cases it did not get to."""
    now = {outcome.id for outcome in outcomes}
    kept = [outcome for outcome in before.values() if outcome.id not in now]
    manifest = RunManifest(
        command="predict",
        medseg_version=__version__,
        versions={"torch": torch.__version__},
        inputs={
            f"{card.configuration} fold_{card.fold}": card.weights_sha256
            for stage in task.model.stages
            for card in stage.cards
        },
        settings={
            "configuration": task.model.configuration.name,
            "tta": "mirror" if task.mirror else "none",
            "precision": str(task.model.device.dtype),
            "device": task.model.device.torch_device.type,
        },
        cases=tuple(outcomes),
    )
    write_record(task.output / MANIFEST, manifest.model_copy(update={"cases": (*outcomes, *kept)}))
    return manifest


def _post_processing(model: Model) -> PostProcessing:
    path = model.folder / POST_PROCESSING
    return read_record(path, PostProcessing) if path.is_file() else PostProcessing()


def _protect_inputs(cases: Sequence[Case], output: Path, ending: str | None) -> None:
    images = {image.resolve() for case in cases for image in case.files}
    for case in cases:
        name = output_name(case, ending)
        if (output / name).resolve() in images:
            raise UsageError(Problem("E0001", f"{name} would replace an input", "", "choose another -o"))
