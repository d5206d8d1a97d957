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

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from medseg.evaluation.paired import permutation
from medseg.evaluation.postprocessing import MIN_GAIN
from medseg.evaluation.targets import Target
from medseg.records.model import PostProcessing
from medseg.records.task import Task

SMALLEST_MM3 = (10.0, 30.0, 100.0, 300.0, 1000.0, 3000.0)
SIGNIFICANT = 0.05
_ROUNDING = 1e-9

Counts = NDArray[np.int64]  # (targets, 3): voxels in both, in the prediction, in the reference


@dataclass(frozen=True, slots=True)
class Step:
    """What is tried: its name for people, what it does alone, the targets it is for, and what joins it to others."""

    name: str
    alone: PostProcessing
    rows: tuple[int, ...]
    taken: Callable[[PostProcessing], PostProcessing]


Stage = Callable[[PostProcessing], list[Step]]


def stages(task: Task, scored: Sequence[Target]) -> Iterator[Stage]:
    """What is tried, one stage after the other, each given what was taken before.

    Steps of one stage touch different voxels, so that their effects add up; regions overlap and come one by one.
    """
    kind = "region" if task.regions else "label"
    main = tuple(row for row, target in enumerate(scored) if target.kind == kind)
    labels = [(row, target) for row, target in enumerate(scored) if target.kind == "label"]
    whole = PostProcessing(keep_largest_foreground=True)
    yield lambda _: [Step("Keep the largest component of all foreground", whole, main, _whole)]
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


def _largest(row: int, target: Target) -> Step:
    (label,) = target.indices

    def taken(chosen: PostProcessing) -> PostProcessing:
        return chosen.model_copy(update={"keep_largest_labels": (*chosen.keep_largest_labels, label)})

    alone = PostProcessing(keep_largest_labels=(label,))
    return Step(f"Keep the largest component of {target.name}", alone, (row,), taken)


def _largest_region(row: int, target: Target) -> Step:
    def taken(chosen: PostProcessing) -> PostProcessing:
        return chosen.model_copy(update={"keep_largest_groups": (*chosen.keep_largest_groups, target.indices)})

    alone = PostProcessing(keep_largest_groups=(target.indices,))
    return Step(f"Keep the largest component of region {target.name}", alone, (row,), taken)


def _small(row: int, target: Target, mm3: float) -> Step:
    (label,) = target.indices

    def taken(chosen: PostProcessing) -> PostProcessing:
        return chosen.model_copy(update={"min_mm3": {**chosen.min_mm3, label: mm3}})

    alone = PostProcessing(min_mm3={label: mm3})
    return Step(f"Remove components of {target.name} below {mm3:g} mm³", alone, (row,), taken)


def _filled(row: int, target: Target) -> Step:
    (label,) = target.indices

    def taken(chosen: PostProcessing) -> PostProcessing:
        return chosen.model_copy(update={"fill_holes_labels": (*chosen.fill_holes_labels, label)})

    return Step(f"Fill holes of {target.name}", PostProcessing(fill_holes_labels=(label,)), (row,), taken)


def take(
    chosen: PostProcessing,
    steps: Sequence[Step],
    counted: Sequence[tuple[Counts, Sequence[Counts | None]]],
    scored: Sequence[Target],
    learn: NDArray[np.bool_],
) -> tuple[PostProcessing, list[Counts], list[str]]:
    """Take the steps of a stage for which some cases speak, each on top of those taken.

    Args:
        chosen: what was taken before.
        steps: of several sizes for one label only the first that passes is taken.
        counted: for each case its counts as it is, and what every step adds to them, None for nothing.
        scored: the targets that are counted.
        learn: the cases that decide, at least one.

    Returns:
        What is taken now, the counts of all cases with it, and a sentence for each step that changes a case.
    """
    current = [plain for plain, _ in counted]
    who: list[int] = np.flatnonzero(learn).tolist()
    sentences = []
    tests = sum(any(counted[case][1][number] is not None for case in who) for number in range(len(steps)))
    done: set[tuple[int, ...]] = set()
    for number, step in enumerate(steps):
        added = [row[number] for _, row in counted]
        changed = sum(added[case] is not None for case in who)
        if not changed or step.rows in done:
            continue
        tried = [counts if more is None else counts + more for counts, more in zip(current, added, strict=True)]
        before, after = (dice_of([counts[case] for case in who]) for counts in (current, tried))
        passed, told = _judged(step, before, after, tests, scored)
        sentences.append(f"{step.name}: {told}, {changed} of {len(who)} cases change: {'yes' if passed else 'no'}.")
        if passed:
            chosen, current = step.taken(chosen), tried
            done.add(step.rows)
    return chosen, current, sentences


def _judged(
    step: Step, before: NDArray[np.float64], after: NDArray[np.float64], tests: int, scored: Sequence[Target]
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


def dice_of(counts: Sequence[Counts]) -> NDArray[np.float64]:
    """(cases, targets), nan where both masks are empty: there a change from or to nothing counts as from or to 1."""
    stacked = np.stack(counts)
    whole = stacked[..., 1] + stacked[..., 2]
    return np.where(whole > 0, 2 * stacked[..., 0] / np.maximum(whole, 1), np.nan)


def _means(dice: NDArray[np.float64]) -> NDArray[np.float64]:
    present = ~np.isnan(dice)
    total = np.where(present, dice, 0).sum(axis=0)
    return np.where(present.any(axis=0), total / np.maximum(present.sum(axis=0), 1), np.nan)
