"""Steps: post-processing for which cross-validation speaks beyond chance, of all kinds that ``apply`` knows.

The rule, step by step on top of those taken before. A step must raise the mean Dice of what it is for by more than
``MIN_GAIN``; it must lower that of no label and no region; and the gain must not be chance: a permutation test of the
differences of its cases, times the number of steps of its kind that would change anything, stays below
``SIGNIFICANT``. A step changes every future prediction, and removing what no case of the data set needed is how rare
true findings get lost; so few cases, which cannot tell, change nothing (six must agree at least).

Kinds, in this order: the largest component of all foreground, of single labels, of regions; small components of labels
of which not only the largest is kept; holes of labels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from medseg.evaluation.paired import permutation
from medseg.evaluation.postprocessing import MIN_GAIN, apply
from medseg.evaluation.targets import Target, targets
from medseg.imaging.components import Box, bounding_box
from medseg.preparation.foreground import IGNORE
from medseg.records.grid import Float3
from medseg.records.model import PostProcessing
from medseg.records.task import Task

SMALLEST_MM3 = (10.0, 30.0, 100.0, 300.0, 1000.0, 3000.0)
SIGNIFICANT = 0.05
_ROUNDING = 1e-9

Labels = NDArray[np.integer]
Counts = NDArray[np.int64]
Case = tuple[Labels, Labels, Float3]


@dataclass(frozen=True, slots=True)
class _Step:
    """What is tried: its name for people, what it does alone, the targets it is for, and what joins it to others."""

    name: str
    alone: PostProcessing
    rows: tuple[int, ...]
    taken: Callable[[PostProcessing], PostProcessing]


def choose_steps(cases: Callable[[], Iterable[Case]], task: Task) -> PostProcessing:
    """Choose by the rule above.

    Args:
        cases: gives cross-validated predictions, references (class indices, ``IGNORE`` is not counted) and spacings,
            anew at each call: once for every kind of step, so that one case is in memory at a time.
        task: its labels and regions.

    Returns:
        The steps taken, with a sentence for each that would change a case.
    """
    scored = targets(task)
    chosen, sentences = PostProcessing(), []
    for stage in _stages(task, scored):
        steps = stage(chosen)
        if not steps:
            continue
        plain, changes = _counted(cases(), chosen, steps, scored)
        if not plain:
            return PostProcessing(evidence=("No cross-validated predictions: nothing is changed.",))
        chosen, told = _taken(chosen, steps, plain, changes, scored)
        sentences += told
    return chosen.model_copy(update={"evidence": tuple(sentences) or ("No step would change a case.",)})


Stage = Callable[[PostProcessing], list[_Step]]


def _stages(task: Task, scored: Sequence[Target]) -> Iterator[Stage]:
    """Steps of one stage touch different voxels, so that their effects add up; regions overlap and come one by one."""
    kind = "region" if task.regions else "label"
    main = tuple(row for row, target in enumerate(scored) if target.kind == kind)
    labels = [(row, target) for row, target in enumerate(scored) if target.kind == "label"]
    whole = PostProcessing(keep_largest_foreground=True)
    yield lambda _: [_Step("Keep the largest component of all foreground", whole, main, _whole)]
    yield lambda _: [_largest(row, target) for row, target in labels]
    for row, target in enumerate(scored):
        if target.kind == "region":
            yield lambda chosen, row=row, target=target: [_largest_region(row, target)]  # type: ignore[misc]
    yield lambda chosen: [
        _small(row, target, mm3)
        for row, target in labels
        if target.indices[0] not in chosen.keep_largest_labels
        for mm3 in SMALLEST_MM3
    ]
    yield lambda _: [_filled(row, target) for row, target in labels]


def _whole(chosen: PostProcessing) -> PostProcessing:
    return chosen.model_copy(update={"keep_largest_foreground": True})


def _largest(row: int, target: Target) -> _Step:
    (label,) = target.indices

    def taken(chosen: PostProcessing) -> PostProcessing:
        return chosen.model_copy(update={"keep_largest_labels": (*chosen.keep_largest_labels, label)})

    alone = PostProcessing(keep_largest_labels=(label,))
    return _Step(f"Keep the largest component of {target.name}", alone, (row,), taken)


def _largest_region(row: int, target: Target) -> _Step:
    def taken(chosen: PostProcessing) -> PostProcessing:
        return chosen.model_copy(update={"keep_largest_groups": (*chosen.keep_largest_groups, target.indices)})

    alone = PostProcessing(keep_largest_groups=(target.indices,))
    return _Step(f"Keep the largest component of region {target.name}", alone, (row,), taken)


def _small(row: int, target: Target, mm3: float) -> _Step:
    (label,) = target.indices

    def taken(chosen: PostProcessing) -> PostProcessing:
        return chosen.model_copy(update={"min_mm3": {**chosen.min_mm3, label: mm3}})

    alone = PostProcessing(min_mm3={label: mm3})
    return _Step(f"Remove components of {target.name} below {mm3:g} mm³", alone, (row,), taken)


def _filled(row: int, target: Target) -> _Step:
    (label,) = target.indices

    def taken(chosen: PostProcessing) -> PostProcessing:
        return chosen.model_copy(update={"fill_holes_labels": (*chosen.fill_holes_labels, label)})

    return _Step(f"Fill holes of {target.name}", PostProcessing(fill_holes_labels=(label,)), (row,), taken)


def _counted(
    cases: Iterable[Case], chosen: PostProcessing, steps: Sequence[_Step], scored: Sequence[Target]
) -> tuple[list[Counts], list[list[Counts | None]]]:
    """For each case the counts (targets, 3) as they are, and what every step adds to them, None for nothing."""
    plain, changes = [], []
    for whole_prediction, whole_reference, spacing_mm in cases:
        box = _surroundings((whole_prediction > 0) | (whole_reference > 0))
        prediction, reference = whole_prediction[box], whole_reference[box]
        before = apply(prediction, chosen, spacing_mm)
        counted = reference != IGNORE
        plain.append(_counts(before[counted], reference[counted], scored))
        row: list[Counts | None] = []
        for step in steps:
            after = apply(before, step.alone, spacing_mm)
            changed = (after != before) & counted
            if not changed.any():
                row.append(None)
                continue
            truth = reference[changed]
            row.append(_counts(after[changed], truth, scored) - _counts(before[changed], truth, scored))
        changes.append(row)
    return plain, changes


def _surroundings(mask: NDArray[np.bool_]) -> Box:
    """The box around a mask with one voxel more where there is one, so that edges of the box are none of a label."""
    box = bounding_box(mask)
    return () if box is None else tuple(slice(max(0, s.start - 1), s.stop + 1) for s in box)


def _counts(prediction: Labels, reference: Labels, scored: Sequence[Target]) -> Counts:
    """(targets, 3): voxels in both, in the prediction, in the reference, by one count of pairs of classes."""
    size = 1 + max(max(target.indices) for target in scored)
    either = (prediction > 0) | (reference > 0)
    pairs = prediction[either].astype(np.int64) * size + reference[either]
    table = np.bincount(pairs, minlength=size * size).reshape(size, size)
    predicted, expected = table.sum(axis=1), table.sum(axis=0)
    rows = []
    for target in scored:
        own = list(target.indices)
        rows.append([table[np.ix_(own, own)].sum(), predicted[own].sum(), expected[own].sum()])
    return np.array(rows, np.int64)


def _taken(
    chosen: PostProcessing,
    steps: Sequence[_Step],
    plain: list[Counts],
    changes: list[list[Counts | None]],
    scored: Sequence[Target],
) -> tuple[PostProcessing, list[str]]:
    """Step after step, each on top of those taken; of several sizes for one label only the first that passes."""
    current, sentences = plain, []
    tests = sum(any(row[number] is not None for row in changes) for number in range(len(steps)))
    done: set[tuple[int, ...]] = set()
    for number, step in enumerate(steps):
        changed = sum(row[number] is not None for row in changes)
        if not changed or step.rows in done:
            continue
        added = [row[number] for row in changes]
        tried = [counts if more is None else counts + more for counts, more in zip(current, added, strict=True)]
        before, after = _dice(current), _dice(tried)
        passed, told = _judged(step, before, after, tests, scored)
        sentences.append(f"{step.name}: {told}, {changed} of {len(plain)} cases change: {'yes' if passed else 'no'}.")
        if passed:
            chosen, current = step.taken(chosen), tried
            done.add(step.rows)
    return chosen, sentences


def _judged(
    step: _Step, before: NDArray[np.float64], after: NDArray[np.float64], tests: int, scored: Sequence[Target]
) -> tuple[bool, str]:
    rows = list(step.rows)
    old, new = _means(before), _means(after)
    mean_old, mean_new = (float(np.nanmean(m[rows])) if not np.isnan(m[rows]).all() else np.nan for m in (old, new))
    differences = np.where(np.isnan(after), 1.0, after) - np.where(np.isnan(before), 1.0, before)
    p = permutation(differences[:, rows].mean(axis=1))
    assert p is not None
    p = min(1.0, p * tests)
    falling = [t.name for t, d in zip(scored, differences.mean(axis=0), strict=True) if d < -_ROUNDING]
    told = f"mean Dice {mean_old:.4f} → {mean_new:.4f}, p = {p:.2g}"
    told += f", but {', '.join(falling[:5])} would fall" if falling else ""
    gained = float(differences[:, rows].mean()) > MIN_GAIN
    return gained and p < SIGNIFICANT and not falling, told


def _dice(counts: Sequence[Counts]) -> NDArray[np.float64]:
    """(cases, targets), nan where both masks are empty: there a change from or to nothing counts as from or to 1."""
    stacked = np.stack(counts)
    whole = stacked[..., 1] + stacked[..., 2]
    return np.where(whole > 0, 2 * stacked[..., 0] / np.maximum(whole, 1), np.nan)


def _means(dice: NDArray[np.float64]) -> NDArray[np.float64]:
    present = ~np.isnan(dice)
    total = np.where(present, dice, 0).sum(axis=0)
    return np.where(present.any(axis=0), total / np.maximum(present.sum(axis=0), 1), np.nan)
