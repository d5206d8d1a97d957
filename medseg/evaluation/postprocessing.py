"""Post-processing: keep only the largest component, where cross-validation shows that it helps.

The rule is nnU-Net's (``remove_connected_components.py``, arXiv 1904.08128, section on empirical configuration): first
for all foreground together, if the mean Dice rises and no label's Dice falls; then for each label on its own, if that
label's Dice rises. Two things are added: a rise counts only above ``MIN_GAIN``; and where the task has regions, the
mean is theirs and none of them may fall in either step.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from medseg.errors import InputError, Problem
from medseg.evaluation.targets import Target, targets
from medseg.imaging.components import Box, bounding_box, keep_largest, remove_smaller
from medseg.preparation.foreground import IGNORE
from medseg.records.grid import Float3
from medseg.records.model import PostProcessing
from medseg.records.task import Task

Labels = NDArray[np.integer]
Counts = NDArray[np.int64]

MIN_GAIN = 1e-4  # a step changes every future prediction: it must show in the digits that papers report
_ROUNDING = 1e-9


def apply(labels: Labels, postprocessing: PostProcessing, spacing_mm: Float3 | None = None) -> Labels:
    """Class indices (Z, Y, X) after post-processing; a new array unless there is nothing to do.

    Removed voxels become background. A label that is not there stays away. ``spacing_mm`` is needed for ``min_mm3``.
    """
    if postprocessing.keep_largest_foreground:
        labels = np.where(_outside_largest(labels > 0), labels.dtype.type(0), labels)
    if postprocessing.keep_largest_labels:
        labels = labels.copy()
        for _, box, outside in _outside_largest_of(labels, postprocessing.keep_largest_labels):
            labels[box][outside] = 0
    for group in postprocessing.keep_largest_groups:
        labels = np.where(_outside_largest(np.isin(labels, group)), labels.dtype.type(0), labels)
    if postprocessing.min_mm3 or postprocessing.fill_holes_labels:
        labels = labels.copy()
    for label, smallest_mm3 in postprocessing.min_mm3.items():
        if spacing_mm is None:
            raise ValueError("post-processing by volume needs spacing_mm")
        found = small_components(labels, label, smallest_mm3, spacing_mm)
        if found is not None:
            labels[found[0]][found[1]] = 0
    if postprocessing.fill_holes_labels:
        for label, box, inside in holes(labels, postprocessing.fill_holes_labels):
            labels[box][inside] = label
    return labels


def small_components(
    labels: Labels, label: int, smallest_mm3: float, spacing_mm: Float3
) -> tuple[Box, NDArray[np.bool_]] | None:
    """A box and its voxels in components of ``label`` of less than ``smallest_mm3``; None if the label is not there."""
    box = bounding_box(labels == label)
    if box is None:
        return None
    mask = labels[box] == label
    return box, mask & ~remove_smaller(mask, math.ceil(smallest_mm3 / math.prod(spacing_mm) * (1 - _ROUNDING)))


def holes(labels: Labels, chosen: Sequence[int]) -> Iterable[tuple[int, Box, NDArray[np.bool_]]]:
    """For each chosen label a box and the background in it that the label encloses.

    A hole is background connected through faces that has faces with one label only and does not reach the edge of the
    volume, along axes longer than 1.
    """
    boxes = ndimage.find_objects(labels, max_label=max(chosen))
    for label in chosen:
        box = boxes[label - 1] if label > 0 else None
        if box is None:
            continue
        numbers, count = ndimage.label(labels[box] == 0)
        open_ones = np.zeros(count + 1, bool)
        for axis in range(labels.ndim):
            if labels.shape[axis] > 1:
                pieces, values = np.moveaxis(numbers, axis, 0), np.moveaxis(labels[box], axis, 0)
                open_ones[pieces[0]] = open_ones[pieces[-1]] = True
                for inside, outside in ((pieces[1:], values[:-1]), (pieces[:-1], values[1:])):
                    open_ones[inside[(outside > 0) & (outside != label)]] = True
        open_ones[0] = True
        if not open_ones.all():
            yield label, box, ~open_ones[numbers]


def _outside_largest(mask: NDArray[np.bool_]) -> NDArray[np.bool_]:
    return mask & ~keep_largest(mask)


def _outside_largest_of(
    labels: Labels, chosen: Sequence[int]
) -> Iterable[tuple[int, tuple[slice, ...], NDArray[np.bool_]]]:
    """For each chosen label its box in ``labels`` and, in that box, its voxels outside its largest component."""
    boxes = ndimage.find_objects(labels, max_label=max(chosen))
    for label in chosen:
        if label > 0 and (box := boxes[label - 1]) is not None:
            yield label, box, _outside_largest(labels[box] == label)


def choose(cases: Iterable[tuple[Labels, Labels]], task: Task) -> PostProcessing:
    """Decide from cross-validated predictions which post-processing to apply from now on.

    Args:
        cases: (prediction, reference) class indices (Z, Y, X); ``IGNORE`` in the reference is not counted. Each pair
            is looked at once, so a generator that loads them keeps memory flat.
        task: labels and regions; their Dice per case decides, cases without the label on both sides left out.

    Returns:
        The chosen steps, with one sentence of evidence per step considered.
    """
    tally = _Tally(targets(task))
    for number, (prediction, reference) in enumerate(cases):
        if prediction.shape != reference.shape:
            found = f"prediction {prediction.shape} of case number {number}"
            raise InputError(Problem("E0119", found, f"reference {reference.shape}", "give pairs on one grid"))
        tally.add(prediction, reference)
    if not tally.plain:
        return PostProcessing(evidence=("No cross-validated predictions: nothing is removed.",))
    whole, sentence = _choose_foreground(tally)
    labels, sentences = _choose_labels(tally, whole)
    return PostProcessing(keep_largest_foreground=whole, keep_largest_labels=labels, evidence=(sentence, *sentences))


class _Tally:
    """Voxel counts per case and target: as predicted, with the largest foreground kept, and what each label loses.

    Counts are (targets, 3): in both, in the prediction, in the reference. Steps only remove voxels, so what a step does
    is a subtraction, and the labels' steps, which touch different voxels, add up.
    """

    def __init__(self, scored: tuple[Target, ...]) -> None:
        self.targets = scored
        self.labels = tuple(t.indices[0] for t in scored if t.kind == "label")
        kinds = [t.kind for t in scored]
        self.main = [kind == ("region" if "region" in kinds else "label") for kind in kinds]
        self.plain: list[Counts] = []
        self.whole: list[Counts] = []
        self.losses: dict[bool, list[dict[int, Counts]]] = {False: [], True: []}

    def add(self, prediction: Labels, reference: Labels) -> None:
        """Count one case."""
        counts = self._count(prediction, reference)
        outside = _outside_largest(prediction > 0)
        self.plain.append(counts)
        self.whole.append(counts - self._lost(prediction[outside], reference[outside]))
        self.losses[False].append(self._losses(prediction, reference))
        kept = np.where(outside, prediction.dtype.type(0), prediction)
        self.losses[True].append(self._losses(kept, reference) if outside.any() else self.losses[False][-1])

    def _losses(self, prediction: Labels, reference: Labels) -> dict[int, Counts]:
        losses = {}
        for label, box, outside in _outside_largest_of(prediction, self.labels):
            if outside.any():
                losses[label] = self._lost(prediction[box][outside], reference[box][outside])
        return losses

    def _lost(self, prediction: Labels, reference: Labels) -> Counts:
        counts = self._count(prediction, reference)
        counts[:, 2] = 0
        return counts

    def _count(self, prediction: Labels, reference: Labels) -> Counts:
        looked_at = (reference != IGNORE) & ((prediction > 0) | (reference > 0))
        prediction, reference = prediction[looked_at], reference[looked_at]
        per_class = [
            np.bincount(values, minlength=max(self.labels) + 1)
            for values in (prediction[prediction == reference], prediction, reference)
        ]
        counts = np.zeros((len(self.targets), 3), dtype=np.int64)
        for row, target in enumerate(self.targets):
            if target.kind == "label":
                counts[row] = [per_class[column][target.indices[0]] for column in range(3)]
            else:
                predicted, expected = target.mask(prediction), target.mask(reference)
                counts[row] = [np.count_nonzero(m) for m in (predicted & expected, predicted, expected)]
        return counts


def _choose_foreground(tally: _Tally) -> tuple[bool, str]:
    before, after = _mean_dice(tally.plain), _mean_dice(tally.whole)
    mean_before, mean_after = _nanmean(before[tally.main]), _nanmean(after[tally.main])
    falling = [t.name for t, b, a in zip(tally.targets, before, after, strict=True) if a < b - _ROUNDING]
    taken = mean_after > mean_before + MIN_GAIN and not falling
    change = f"mean Dice {mean_before:.5f} → {mean_after:.5f} over {len(tally.plain)} cases"
    return taken, _sentence("all foreground", change, falling, taken)


def _choose_labels(tally: _Tally, whole: bool) -> tuple[tuple[int, ...], list[str]]:
    """Label after label, each on top of the steps already taken."""
    current = tally.whole if whole else tally.plain
    taken: list[int] = []
    sentences = []
    for target in tally.targets:
        if target.kind != "label":
            continue
        label = target.indices[0]
        tried = [c - loss[label] if label in loss else c for c, loss in zip(current, tally.losses[whole], strict=True)]
        before, after = _mean_dice(current), _mean_dice(tried)
        row = tally.targets.index(target)
        falling = [t.name for t, b, a in zip(tally.targets, before, after, strict=True) if a < b - _ROUNDING]
        better = bool(after[row] > before[row] + MIN_GAIN) and not falling
        changed = sum(label in loss for loss in tally.losses[whole])
        change = f"Dice {before[row]:.5f} → {after[row]:.5f}, {changed} of {len(current)} cases would change"
        sentences.append(_sentence(f"label {target.name}", change, falling, better))
        if better:
            taken.append(label)
            current = tried
    return tuple(taken), sentences


def _sentence(what: str, change: str, falling: Sequence[str], taken: bool) -> str:
    against = f", but {', '.join(falling[:5])} would fall" if falling else ""
    return f"Keep the largest component of {what}: {change}{against}: {'yes' if taken else 'no'}."


def _mean_dice(counts: Sequence[Counts]) -> NDArray[np.float64]:
    """Mean over cases of each target's Dice; nan for a target that occurs in no case."""
    stacked = np.stack(counts)
    whole = stacked[..., 1] + stacked[..., 2]
    total = np.where(whole > 0, 2 * stacked[..., 0] / np.maximum(whole, 1), 0).sum(axis=0)
    occurs = (whole > 0).sum(axis=0)
    return np.where(occurs > 0, total / np.maximum(occurs, 1), np.nan)


def _nanmean(values: NDArray[np.float64]) -> float:
    present = values[~np.isnan(values)]
    return float(present.mean()) if present.size else float("nan")
