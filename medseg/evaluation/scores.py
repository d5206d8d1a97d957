"""Scores of predictions against references: every label and region of every case."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from medseg.errors import InputError, MedsegError, Problem
from medseg.evaluation import metrics
from medseg.evaluation.calibration import calibrate
from medseg.evaluation.groups import groups_of
from medseg.evaluation.measurement import Measured, measure
from medseg.evaluation.pairs import Pair, find_pairs, read_pair_on_grid
from medseg.evaluation.probabilities import Probabilities, open_probabilities
from medseg.evaluation.summary import summarise
from medseg.evaluation.tables import summary_table, write_scores
from medseg.evaluation.targets import Target, targets
from medseg.preparation.foreground import IGNORE
from medseg.progress import SILENT, Progress
from medseg.records.grid import Float3
from medseg.records.scores import CaseScore, Measures, Scores, Status
from medseg.records.task import Task

__all__ = ["evaluate", "find_pairs", "score_arrays", "summarise", "summary_table", "write_scores"]

log = logging.getLogger(__name__)

Mask = NDArray[np.bool_]


def evaluate(
    pairs: Sequence[Pair],
    task: Task,
    measures: Measures,
    workers: int = 1,
    progress: Progress = SILENT,
    probabilities: Mapping[str, Path] | None = None,
) -> Scores:
    """Score label files against reference files.

    Args:
        pairs: (case id, prediction file, reference file); both hold the label values of ``task``.
        task: the labels and regions; references may hold its ignore value.
        measures: what to measure.
        workers: threads; each holds one pair of volumes. Two threads halve the time of 256³ volumes with 54 labels as
            two processes do (measured): reading and distances run outside the interpreter's lock.
        progress: told of every finished case.
        probabilities: what ``find_probabilities`` found, by case id; other cases lack what is measured with them.

    Returns:
        The scores of all pairs that could be read, in the order of ``pairs``. A pair that failed has no scores and is
        named in ``problems``; whether that is an error (``PartialFailure``) is the caller's decision.
    """
    finished: dict[int, tuple[CaseScore, ...]] = {}
    problems: dict[int, tuple[Problem, ...]] = {}
    files = probabilities or {}
    progress.begin("evaluate", len(pairs), "cases")
    with ThreadPoolExecutor(max_workers=max(1, workers)) as pool:
        futures = {pool.submit(_score_pair, p, task, measures, files.get(p[0])): i for i, p in enumerate(pairs)}
        try:
            for done, future in enumerate(as_completed(futures), start=1):
                index = futures[future]
                try:
                    finished[index] = future.result()
                except Exception as error:
                    problems[index] = _problems_of(error, case=pairs[index][0])
                progress.update(done, pairs[index][0])
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    progress.end()
    rows = [row for index in sorted(finished) for row in finished[index]]
    return summarise(rows, task, measures, [p for index in sorted(problems) for p in problems[index]])


def _problems_of(error: Exception, case: str) -> tuple[Problem, ...]:
    if isinstance(error, MedsegError):
        return tuple(replace(problem, case=problem.case or case) for problem in error.problems)
    if isinstance(error, MemoryError):
        return (Problem("E0600", "not enough memory to score this case", "", "use fewer workers", case),)
    log.error("case %s could not be scored", case, exc_info=error)
    return (Problem("E7000", f"{type(error).__name__}: {error}", "", "report this with the log", case),)


def _score_pair(pair: Pair, task: Task, measures: Measures, probability_file: Path | None) -> tuple[CaseScore, ...]:
    prediction, reference, grid = read_pair_on_grid(pair, task)
    probabilities = None if probability_file is None else open_probabilities(probability_file, task, grid)
    return score_arrays(prediction, reference, grid.spacing_mm, task, measures, pair[0], probabilities)


def score_arrays(
    prediction: NDArray[np.integer],
    reference: NDArray[np.integer],
    spacing_mm: Float3,
    task: Task,
    measures: Measures,
    case: str = "",
    probabilities: Probabilities | None = None,
) -> tuple[CaseScore, ...]:
    """Score class indices (Z, Y, X) against class indices; ``IGNORE`` in the reference is left out on both sides.

    All labels are measured in the same passes over the volume, each region in its own. ``probabilities`` are
    of all outputs of the network.

    Raises:
        InputError: E0119 the shapes differ.
    """
    if prediction.shape != reference.shape:
        raise InputError(Problem("E0119", f"prediction {prediction.shape}", f"reference {reference.shape}", "", case))
    classes, chosen = len(task.labels), targets(task, measures.labels)
    labels = [target for target in chosen if target.kind == "label"]
    together = [labels, *([target] for target in chosen if target.kind == "region")]  # regions overlap
    ignored: Mask | None = reference == IGNORE
    if ignored is not None and not ignored.any():
        ignored = None
    voxels = reference.size - (0 if ignored is None else int(np.count_nonzero(ignored)))
    rows = []
    for some in filter(None, together):
        groups = groups_of(prediction, reference, classes, [target.indices for target in some])
        for target, measured in zip(some, measure(groups, spacing_mm, measures.lesion_overlap), strict=True):
            row = _case_score(_Subject(case, target, spacing_mm, voxels), measured, measures)
            if probabilities is not None and (outputs := target.outputs(task)):
                believed = calibrate(partial(probabilities.slabs, outputs), target.mask(reference), ignored, spacing_mm)
                row = row.model_copy(update={"calibration": believed})
            rows.append(row)
    return tuple(rows)


@dataclass(frozen=True, slots=True)
class _Subject:
    """What a row of the table is about; ``voxels`` are all that count in the case."""

    case: str
    target: Target
    spacing_mm: Float3
    voxels: int


def _case_score(subject: _Subject, measured: Measured, measures: Measures) -> CaseScore:
    target, spacing_mm = subject.target, subject.spacing_mm
    counts, distances = measured.overlap, measured.distances
    prediction_ml = metrics.volume_ml(counts.predicted, spacing_mm)
    reference_ml = metrics.volume_ml(counts.expected, spacing_mm)
    error_ml = prediction_ml - reference_ml
    return CaseScore(
        case=subject.case,
        label=target.name,
        kind=target.kind,
        values=target.values,
        status=_status(counts),
        dice=_finite(counts.dice),
        iou=_finite(counts.iou),
        precision=_finite(counts.precision),
        recall=_finite(counts.recall),
        hd_mm=_finite(metrics.hausdorff(distances)),
        hd95_mm=_finite(metrics.hausdorff_95(distances)),
        assd_mm=_finite(metrics.average_distance(distances)),
        nsd=_finite(metrics.surface_dice(distances, measures.tolerance_of(target.name))),
        nsd_at=tuple(_finite(metrics.surface_dice(distances, t)) for t in measures.more_tolerances_mm),
        true_positives=counts.true_positives,
        false_positives=counts.false_positives,
        false_negatives=counts.false_negatives,
        true_negatives=subject.voxels - counts.predicted - counts.false_negatives,
        prediction_ml=prediction_ml,
        reference_ml=reference_ml,
        volume_error_ml=error_ml,
        relative_volume_error=error_ml / reference_ml if counts.expected else None,
        prediction_area_mm2=measured.areas_mm2[0],
        reference_area_mm2=measured.areas_mm2[1],
        lesions=measured.lesions,
    )


def _status(counts: metrics.Overlap) -> Status:
    if counts.predicted and counts.expected:
        return "ok"
    if counts.expected:
        return "missed"
    return "spurious" if counts.predicted else "both empty"


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
