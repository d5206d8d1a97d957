"""Run: everything in one go, from a data set to scored predictions of its held-out images."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

from medseg.dataset.check import CheckReport, check_dataset
from medseg.errors import InputError, PartialFailure, Problem
from medseg.imaging.volumes import IMAGE_ENDINGS
from medseg.networks.device import Device, choose_device
from medseg.pipeline.evaluate import evaluate_files
from medseg.pipeline.folds import SideBySide, train_folds
from medseg.pipeline.pictures import draw_pictures
from medseg.pipeline.plan import PlanOptions, plan_run
from medseg.pipeline.predict import PredictOptions, predict_files
from medseg.pipeline.preprocess import preprocess_run
from medseg.pipeline.report import report_run
from medseg.pipeline.run_folder import RunFolder, check_fold, default_configuration, every_fold, stages_of
from medseg.pipeline.train import TrainOptions
from medseg.progress import SILENT, Progress, never
from medseg.records.model import ModelCard
from medseg.records.run import RunManifest
from medseg.records.scores import Scores

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class RunOptions:
    """What may be asked of a whole run. ``training`` is that of each fold; ``device`` is for all stages.

    ``folds`` None are all of the splits. They are trained in turn, or as ``side_by_side`` says. For the second stage of
    a cascade all folds of the first are trained before.
    """

    training: TrainOptions = field(default_factory=TrainOptions)
    configuration: str | None = None
    folds: tuple[str, ...] | None = ("0",)
    side_by_side: SideBySide | None = None
    device: Device | None = None
    workers: int | None = None
    plan: PlanOptions = field(default_factory=PlanOptions)


@dataclass(frozen=True, slots=True)
class RunResult:
    """What came out: the check, the trained folds, and of held-out images, if the data set has any, how each ended.

    ``held_out`` are their scores, None without labels; ``complete`` says whether all were segmented and scored.
    ``report`` is the page about it all, None if it failed.
    """

    check: CheckReport
    cards: tuple[ModelCard, ...]
    predictions: RunManifest | None = None
    pictures: tuple[Path, ...] = ()
    held_out: Scores | None = None
    report: Path | None = None

    @property
    def complete(self) -> bool:
        """Whether no held-out image failed."""
        unscored = self.held_out is not None and any(p.severity == "error" for p in self.held_out.problems)
        return not unscored and not (self.predictions is not None and self.predictions.failed)


def run_all(
    dataset_path: Path,
    run: Path,
    options: RunOptions | None = None,
    progress: Progress = SILENT,
    stop_signal: Callable[[], int | None] = never,
) -> RunResult:
    """Do everything from a data set to scored predictions; the same command goes on where a stopped one was.

    Images in ``imagesTs``, in the data set's folder or beside the list of cases, are segmented into
    ``RUN/predictions`` and drawn into ``RUN/pictures``; with ``labelsTs`` they are scored into ``RUN/scores``; one that
    fails does not stop the others. ``RUN/report.html`` shows everything; should it fail, the rest stands. Warnings of
    the check are logged.

    Raises:
        InputError: the check found errors; all are listed and nothing else was done.
        UsageError: E0001 no such configuration or fold; nothing was prepared.
        PartialFailure: E0400 of several folds some failed; the others are trained.
        And whatever the stages raise.
    """
    options = options or RunOptions()
    folder = RunFolder(run)
    device = options.device or choose_device()
    check = check_dataset(dataset_path, options.workers, progress)
    if check.errors:
        raise InputError(check.problems)
    for line in check.brief:
        log.warning("%s", line)
    plan = plan_run(dataset_path, run, options.plan, progress)
    progress.say(f"splits: {folder.read_splits().reason or 'given in a file'}")
    name = options.configuration or default_configuration(plan)
    stages_of(plan, name)
    every = every_fold(folder.read_splits())
    folds = options.folds or every
    for fold in folds:
        check_fold(fold, folder.read_splits())
    preprocess_run(run, [name], options.workers, progress)
    training = replace(options.training, device=device)
    cards: tuple[ModelCard, ...] = ()
    for stage in stages_of(plan, name):
        wanted = folds if stage == name else every
        trained = train_folds(run, stage, wanted, training, options.side_by_side, progress, stop_signal)
        if trained.failed:
            failed = f"folds {', '.join(trained.failed)} of {stage} failed"
            raise PartialFailure(Problem("E0400", failed, "", "see above; the same command goes on with them"))
        cards = (*cards, *trained.cards)
    beside = dataset_path if dataset_path.is_dir() else dataset_path.parent
    predicting = PredictOptions(configuration=name, folds=folds, device=device)
    result = _held_out(RunResult(check, cards), folder, beside, predicting, progress, stop_signal)
    return replace(result, report=_report(run, progress))


def _held_out(
    result: RunResult,
    folder: RunFolder,
    dataset: Path,
    options: PredictOptions,
    progress: Progress,
    stop_signal: Callable[[], int | None],
) -> RunResult:
    """The result with what becomes of held-out images, as far as there are images and labels of them."""
    images, references, task = dataset / "imagesTs", dataset / "labelsTs", folder.read_plan().task
    if not _has_images(images):
        return result
    manifest = predict_files(folder.path, images, folder.predictions, options, progress, stop_signal)
    pictures = draw_pictures(images, folder.predictions, references, task, folder.pictures)
    result = replace(result, predictions=manifest, pictures=pictures)
    if not _has_images(references) or len(manifest.failed) == len(manifest.cases):
        return result
    output = folder.scores / "held-out.json"
    return replace(result, held_out=evaluate_files(folder.predictions, references, task, output, progress=progress))


def _report(run: Path, progress: Progress) -> Path | None:
    """The page about the run; None, and a warning, if it cannot be made: hours of training do not end with an error."""
    try:
        return report_run(run, progress=progress)
    except Exception as error:
        log.warning("no report: %s; medseg report --run %s makes it", error, run)
        log.debug("the report failed", exc_info=error)
        return None


def _has_images(folder: Path) -> bool:
    """Whether a folder is there and holds images, not only hidden files."""
    names = [path.name for path in folder.iterdir()] if folder.is_dir() else []
    return any(name.lower().endswith(IMAGE_ENDINGS) and not name.startswith(".") for name in names)
