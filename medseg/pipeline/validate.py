"""Validate: a trained fold on the whole volumes of its validation cases, and what all folds say of post-processing."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from medseg.artefacts import owned_in_turn
from medseg.errors import Problem, Stopped
from medseg.evaluation.pairs import read_pair
from medseg.evaluation.postprocessing import choose
from medseg.evaluation.scores import evaluate, write_scores
from medseg.imaging.volumes import read_channels, write_labels
from medseg.inference.ladder import Ladder
from medseg.inference.model import Model, prepare_stages, segment
from medseg.inference.sliding import Blending
from medseg.machine import usable_cores
from medseg.pipeline.outputs import POST_PROCESSING, label_values, output_name
from medseg.pipeline.run_folder import ALL_CASES, RunFolder
from medseg.progress import SILENT, Progress, never
from medseg.records.base import read_record, write_record
from medseg.records.case import Case
from medseg.records.grid import Volume
from medseg.records.model import CARD, ModelCard
from medseg.records.scores import Measures, Scores
from medseg.records.task import Task

FOLDER, SCORES = "validation", "validation.json"
TOLERANCE_MM = 2.0


def validate_fold(
    folder: RunFolder,
    model: Model,
    case_ids: tuple[str, ...],
    progress: Progress = SILENT,
    stop_signal: Callable[[], int | None] = never,
) -> dict[str, float | None]:
    """Segment the validation cases from their files, write labels and scores beside the model, return Dice by label.

    Raises:
        Stopped: by ``stop_signal``, asked before every case.
    """
    card = model.cards[0]
    target = folder.fold(card.configuration, card.fold)
    cases = {case.id: case for case in folder.read_dataset().cases}
    chosen = [cases[case_id] for case_id in case_ids]
    ladder = Ladder(model)
    progress.begin("validate", len(chosen), "cases")
    for done, case in enumerate(chosen, start=1):
        if (stop := stop_signal()) is not None:
            raise Stopped(Problem("E1300", "stopped while validating", "", "the same command goes on here"), stop)
        volume = read_channels(case.images)
        labels = _labels_of(volume, ladder)
        path = target / FOLDER / output_name(case)
        write_labels(path, label_values(labels, card.plan.task), volume.grid, volume.source, card.plan.task.labels)
        progress.update(done, case.id)
    progress.end()
    pairs = [(case.id, target / FOLDER / output_name(case), _label(case)) for case in chosen]
    scores = evaluate(pairs, card.plan.task, Measures(tolerance_mm=TOLERANCE_MM), usable_cores(), progress)
    write_scores(scores, target / SCORES)
    return {"mean": scores.mean_dice} | {summary.label: summary.dice.mean for summary in scores.labels}


def finish_fold(folder: RunFolder, card: ModelCard) -> None:
    """Choose the configuration's post-processing anew and write the card of a validated fold; with it, it is finished.

    Folds that end at the same time do this one after the other: the last one sees the cards of all.

    Raises:
        OwnershipError: E0901 another fold has been at it for an hour.
    """
    with owned_in_turn(folder.models(card.configuration)):
        choose_post_processing(folder, card.configuration, card.fold, card.plan.task)
        write_record(folder.fold(card.configuration, card.fold) / CARD, card)


def _labels_of(volume: Volume, ladder: Ladder) -> NDArray[np.int16]:
    """Class indices on the axes of the file, with less of the GPU's memory where there is not enough."""
    prepared = prepare_stages(ladder.model, volume)
    return ladder.run(lambda model, blending: segment(model, prepared, blending=blending), Blending())


def choose_post_processing(folder: RunFolder, configuration: str, fold: str, task: Task) -> None:
    """Write ``postprocessing.json``: what the predictions of ``fold``, just validated, and finished ones speak for."""
    models = folder.models(configuration)
    finished = {card.parent for card in models.glob(f"fold_*/{CARD}")} - {folder.fold(configuration, ALL_CASES)}
    folds = sorted(finished | {folder.fold(configuration, fold)})
    cases = {case.id: case for case in folder.read_dataset().cases}

    def pairs() -> Iterator[tuple[NDArray[np.int16], NDArray[np.int16]]]:
        for fold in folds:
            scores = read_record(fold / SCORES, Scores)
            for case_id in sorted({row.case for row in scores.cases}):
                case = cases[case_id]
                prediction, reference, _ = read_pair((case_id, fold / FOLDER / output_name(case), _label(case)), task)
                yield prediction, reference

    write_record(models / POST_PROCESSING, choose(pairs(), task))


def _label(case: Case) -> Path:
    assert case.label is not None  # a data set for training has labels
    return case.label
