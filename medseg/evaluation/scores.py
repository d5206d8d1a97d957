"""Scores of predictions against references: per case and label, then summed up per label."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from medseg.errors import InputError, MedsegError, Problem
from medseg.evaluation import metrics
from medseg.evaluation.pairs import Pair, find_pairs, read_pair
from medseg.evaluation.tables import summary_table, write_scores
from medseg.evaluation.targets import Target, targets
from medseg.preparation.foreground import IGNORE
from medseg.progress import SILENT, Progress
from medseg.records.grid import Float3
from medseg.records.scores import CaseScore, LabelSummary, Scores, Statistic, Status
from medseg.records.task import Task

__all__ = ["evaluate", "find_pairs", "score_arrays", "summarise", "summary_table", "write_scores"]

log = logging.getLogger(__name__)


def evaluate(
    pairs: Sequence[Pair], task: Task, tolerance_mm: float, workers: int = 1, progress: Progress = SILENT
) -> Scores:
    """Score label files against reference files.

    Args:
        pairs: (case id, prediction file, reference file); both hold the label values of ``task``.
        task: which labels and regions to score; references may hold its ignore value.
        tolerance_mm: tolerance of the surface Dice.
        workers: threads; each holds one pair of volumes. Two threads halve the time of 256³ volumes with 54 labels as
            two processes do (measured): reading and distances run outside the interpreter's lock.
        progress: told of every finished case.

    Returns:
        The scores of all pairs that could be read, in the order of ``pairs``. A pair that failed has no scores and is
        named in ``problems``; whether that is an error (``PartialFailure``) is the caller's decision.
    """
    finished: dict[int, tuple[CaseScore, ...]] = {}
    problems: dict[int, tuple[Problem, ...]] = {}
    progress.begin("evaluate", len(pairs), "cases")
    with ThreadPoolExecutor(max_workers=max(1, workers)) as pool:
        futures = {pool.submit(_score_pair, pair, task, tolerance_mm): i for i, pair in enumerate(pairs)}
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
    return summarise(rows, task, tolerance_mm, [p for index in sorted(problems) for p in problems[index]])


def _problems_of(error: Exception, case: str) -> tuple[Problem, ...]:
    if isinstance(error, MedsegError):
        return tuple(replace(problem, case=problem.case or case) for problem in error.problems)
    if isinstance(error, MemoryError):
        return (Problem("E0600", "not enough memory to score this case", "", "use fewer workers", case),)
    log.error("case %s could not be scored", case, exc_info=error)
    return (Problem("E7000", f"{type(error).__name__}: {error}", "", "report this with the log", case),)


def _score_pair(pair: Pair, task: Task, tolerance_mm: float) -> tuple[CaseScore, ...]:
    prediction, reference, spacing_mm = read_pair(pair, task)
    return score_arrays(prediction, reference, spacing_mm, task, tolerance_mm, case=pair[0])


def score_arrays(
    prediction: NDArray[np.integer],
    reference: NDArray[np.integer],
    spacing_mm: Float3,
    task: Task,
    tolerance_mm: float,
    case: str = "",
) -> tuple[CaseScore, ...]:
    """Score class indices (Z, Y, X) against class indices; ``IGNORE`` in the reference is left out on both sides.

    One pass over each array finds the boxes of all labels; everything else happens inside them.
    """
    if prediction.shape != reference.shape:
        raise InputError(Problem("E0119", f"prediction {prediction.shape}", f"reference {reference.shape}", "", case))
    ignored = reference == IGNORE
    if ignored.any():
        prediction, reference = np.where(ignored, 0, prediction), np.where(ignored, 0, reference)
    classes = len(task.labels)
    predicted_boxes = ndimage.find_objects(prediction, max_label=classes - 1)
    expected_boxes = ndimage.find_objects(reference, max_label=classes - 1)
    rows = []
    for target in targets(task):
        found = [boxes[i - 1] for i in target.indices for boxes in (predicted_boxes, expected_boxes)]
        box = _union_with_margin([b for b in found if b is not None])
        masks = target.mask(prediction[box]), target.mask(reference[box])
        rows.append(_case_score(case, target, masks, spacing_mm, tolerance_mm))
    return tuple(rows)


def _union_with_margin(boxes: Sequence[tuple[slice, ...]]) -> tuple[slice, ...]:
    """The box around ``boxes`` and one voxel more, so that an axis of length 1 stays what it says: a flat image."""
    if not boxes:
        return (slice(0, 1),) * 3
    return tuple(
        slice(max(0, min(s.start for s in axis) - 1), max(s.stop for s in axis) + 1)
        for axis in zip(*boxes, strict=True)
    )


def _case_score(
    case: str,
    target: Target,
    masks: tuple[NDArray[np.bool_], NDArray[np.bool_]],
    spacing_mm: Float3,
    tolerance_mm: float,
) -> CaseScore:
    counts = metrics.overlap(*masks)
    distances = metrics.border_distances(*masks, spacing_mm)
    prediction_ml = metrics.volume_ml(counts.predicted, spacing_mm)
    reference_ml = metrics.volume_ml(counts.expected, spacing_mm)
    return CaseScore(
        case=case,
        label=target.name,
        kind=target.kind,
        values=target.values,
        status=_status(counts),
        dice=_finite(counts.dice),
        iou=_finite(counts.iou),
        precision=_finite(counts.precision),
        recall=_finite(counts.recall),
        hd95_mm=_finite(metrics.hausdorff_95(distances)),
        assd_mm=_finite(metrics.average_distance(distances)),
        nsd=_finite(metrics.surface_dice(distances, tolerance_mm)),
        true_positives=counts.true_positives,
        false_positives=counts.false_positives,
        false_negatives=counts.false_negatives,
        prediction_ml=prediction_ml,
        reference_ml=reference_ml,
        volume_error_ml=prediction_ml - reference_ml,
    )


def _status(counts: metrics.Overlap) -> Status:
    if counts.predicted and counts.expected:
        return "ok"
    if counts.expected:
        return "missed"
    return "spurious" if counts.predicted else "both empty"


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def summarise(rows: Sequence[CaseScore], task: Task, tolerance_mm: float, problems: Iterable[Problem] = ()) -> Scores:
    """Sum case scores up per label and region; a label without any number has no mean and enters no mean."""
    summaries = []
    for target in targets(task):
        own = [row for row in rows if row.label == target.name and row.kind == target.kind]
        summaries.append(_summary(target, own))
    main = [s for s in summaries if s.kind == ("region" if task.regions else "label")]
    return Scores(
        tolerance_mm=tolerance_mm,
        mean_dice=_mean([s.dice.mean for s in main]),
        mean_nsd=_mean([s.nsd.mean for s in main]),
        labels=tuple(summaries),
        cases=tuple(rows),
        problems=tuple(problems),
    )


def _summary(target: Target, rows: Sequence[CaseScore]) -> LabelSummary:
    status = [row.status for row in rows]
    infinite = status.count("missed") + status.count("spurious")
    present = [row for row in rows if row.status != "both empty"]
    return LabelSummary(
        label=target.name,
        kind=target.kind,
        values=target.values,
        cases=len(rows),
        both_empty=status.count("both empty"),
        missed=status.count("missed"),
        spurious=status.count("spurious"),
        dice=_statistic([row.dice for row in rows]),
        iou=_statistic([row.iou for row in rows]),
        precision=_statistic([row.precision for row in rows]),
        recall=_statistic([row.recall for row in rows]),
        hd95_mm=_statistic([row.hd95_mm for row in rows], infinite),
        assd_mm=_statistic([row.assd_mm for row in rows], infinite),
        nsd=_statistic([row.nsd for row in rows]),
        volume_error_ml=_statistic([row.volume_error_ml for row in present]),
    )


def _statistic(values: Iterable[float | None], infinite: int = 0) -> Statistic:
    numbers = np.array([v for v in values if v is not None])
    if numbers.size == 0:
        return Statistic(infinite=infinite)
    std = float(numbers.std(ddof=1)) if numbers.size > 1 else None
    return Statistic(
        mean=float(numbers.mean()), std=std, median=float(np.median(numbers)), cases=numbers.size, infinite=infinite
    )


def _mean(values: Iterable[float | None]) -> float | None:
    return _statistic(values).mean
