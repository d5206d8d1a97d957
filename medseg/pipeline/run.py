"""Run: everything in one go, from a data set to scored predictions of its held-out images."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from medseg.dataset.check import CheckReport, check_dataset
from medseg.errors import InputError, PartialFailure, Problem
from medseg.networks.device import Device, choose_device
from medseg.pipeline.evaluate import evaluate_files, raise_if_partial
from medseg.pipeline.pictures import draw_pictures
from medseg.pipeline.plan import PlanOptions, plan_run
from medseg.pipeline.predict import PredictOptions, predict_files
from medseg.pipeline.preprocess import preprocess_run
from medseg.pipeline.run_folder import RunFolder, configuration_of, default_configuration
from medseg.pipeline.train import TrainOptions, never, train_run
from medseg.progress import SILENT, Progress
from medseg.records.model import ModelCard
from medseg.records.scores import Scores


@dataclass(frozen=True, slots=True)
class RunOptions:
    """What may be asked of a whole run. ``seconds`` or ``epochs`` of training are for each fold."""

    seconds: float | None = None
    epochs: int | None = None
    configuration: str | None = None
    folds: tuple[str, ...] = ("0",)
    device: Device | None = None
    workers: int | None = None
    seed: int = 0
    plan: PlanOptions = field(default_factory=PlanOptions)


@dataclass(frozen=True, slots=True)
class RunResult:
    """What came out: the check, the trained folds, and the scores of held-out images if the data set has any."""

    check: CheckReport
    cards: tuple[ModelCard, ...]
    held_out: Scores | None
    pictures: tuple[Path, ...]


def run_all(
    dataset_path: Path,
    run: Path,
    options: RunOptions | None = None,
    progress: Progress = SILENT,
    stop_signal: Callable[[], int | None] = never,
) -> RunResult:
    """Do everything from a data set to scored predictions; the same command goes on where a stopped one was.

    Images in ``imagesTs`` are segmented into ``RUN/predictions`` and drawn into ``RUN/pictures``; with ``labelsTs``
    they are scored into ``RUN/scores``.

    Raises:
        InputError: the check found errors; all are listed and nothing else was done.
        PartialFailure: some held-out cases could not be segmented or scored; everything else is done.
        And whatever the stages raise.
    """
    options = options or RunOptions()
    folder = RunFolder(run)
    device = options.device or choose_device()
    check = check_dataset(dataset_path, options.workers, progress)
    if check.errors:
        raise InputError(check.problems)
    plan = plan_run(dataset_path, run, options.plan, progress)
    name = options.configuration or default_configuration(plan)
    configuration_of(plan, name)
    preprocess_run(run, [name], options.workers, progress)
    training = TrainOptions(seconds=options.seconds, epochs=options.epochs, device=device, seed=options.seed)
    cards = tuple(train_run(run, name, fold, training, progress, stop_signal) for fold in options.folds)
    images = dataset_path / "imagesTs"
    if not images.is_dir() or not any(images.iterdir()):
        return RunResult(check, cards, None, ())
    predicting = PredictOptions(configuration=name, folds=options.folds, device=device)
    manifest = predict_files(run, images, folder.predictions, predicting, progress, stop_signal)
    references = dataset_path / "labelsTs"
    pictures = draw_pictures(images, folder.predictions, references, plan.task, folder.pictures)
    failed = [Problem("E0400", "could not be segmented", "", "see predict.json", c.id) for c in manifest.failed]
    if failed:
        raise PartialFailure(failed)
    if not references.is_dir() or not any(references.iterdir()):
        return RunResult(check, cards, None, pictures)
    scores = evaluate_files(
        folder.predictions, references, plan.task, folder.scores / "held-out.json", progress=progress
    )
    raise_if_partial(scores)
    return RunResult(check, cards, scores, pictures)
