"""Cross-fitting: post-processing chosen on all cases but a part of them and judged on that part, part after part.

Chosen and judged on the same cases it would look better than it is, and the more so the poorer the predictions are
that it mends. What it does for cases that had no say is what it will do for new ones (Stone, "Cross-validatory choice
and assessment of statistical predictions", JRSS B 1974). The choice for predictions to come is made on all cases.

Every case is read once, cut to its labels and kept compressed while there is room; all choices that lead to the same
post-processing share their counts, and mostly they do.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import blosc2
import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from medseg.evaluation.postprocessing import apply
from medseg.evaluation.steps import Counts, Step, dice_of, stages, take
from medseg.evaluation.targets import Target, targets
from medseg.imaging.components import Box, bounding_box
from medseg.preparation.foreground import IGNORE
from medseg.records.grid import Float3
from medseg.records.model import PostProcessing
from medseg.records.task import Task

PARTS = 5  # where all cases are of one fold
SHELF_BYTES = 1_000_000_000  # of compressed label maps; organs take some 100 kB a case

Labels = NDArray[np.integer]
Case = tuple[Labels, Labels, Float3]
Dice = NDArray[np.float64]  # (cases, labels, or regions where there are any); nan where both masks are empty


@dataclass(frozen=True, slots=True, eq=False)
class Judged:
    """The Dice of predictions as they are and with post-processing that the other parts chose; and what all choose."""

    labels: tuple[str, ...]
    plain: Dice
    processed: Dice
    postprocessing: PostProcessing


def parts_of(folds: Sequence[str]) -> list[int]:
    """The part of each case: its fold, or of a single fold every fifth case."""
    names = sorted(set(folds))
    if len(names) > 1:
        return [names.index(fold) for fold in folds]
    return [place % PARTS for place in range(len(folds))]


def cross_fit(cases: Sequence[Callable[[], Case]], parts: Sequence[int], task: Task, workers: int = 1) -> Judged:
    """Choose post-processing by the rule of ``medseg.evaluation.steps``, and judge what such a choice is worth.

    Args:
        cases: each gives a cross-validated prediction, its reference (class indices, ``IGNORE`` is not counted) and
            spacing when it is called.
        parts: of every case. With a single part nothing can be judged: the processed Dice is the plain one.
        task: its labels and regions.
        workers: threads; each holds one case.

    Raises:
        Whatever ``cases`` raise.
    """
    scored = targets(task)
    kind = "region" if task.regions else "label"
    main = [row for row, target in enumerate(scored) if target.kind == kind]
    names = tuple(scored[row].name for row in main)
    if not cases:
        none = np.zeros((0, len(main)))
        return Judged(
            names, none, none, PostProcessing(evidence=("No cross-validated predictions: nothing is changed.",))
        )
    where = np.array(parts)
    apart = sorted(set(parts)) if len(set(parts)) > 1 else []
    fits = [_Fit(np.ones(len(where), bool)), *(_Fit(where != part) for part in apart)]
    shelf = _Shelf(cases)
    plain: list[Counts] = []
    for stage in stages(task, scored):
        asked = {fit.key: (fit.chosen, stage(fit.chosen)) for fit in fits}
        asked = {key: (chosen, steps) for key, (chosen, steps) in asked.items() if steps}
        counted = _counted(shelf, list(asked.values()), scored, workers)
        by_key = dict(zip(asked, counted, strict=True))
        plain = plain or [counts for counts, _ in counted[0]]
        for fit in fits:
            if (key := fit.key) in by_key:
                fit.chosen, fit.current, told = take(fit.chosen, asked[key][1], by_key[key], scored, fit.learn)
                fit.sentences += told
    processed = list(plain)
    for fit in fits[1:]:
        for case in np.flatnonzero(~fit.learn):
            processed[case] = fit.current[case]
    evidence = tuple(fits[0].sentences) or ("No step would change a case.",)
    chosen = fits[0].chosen.model_copy(update={"evidence": evidence})
    return Judged(names, dice_of(plain)[:, main], dice_of(processed)[:, main], chosen)


@dataclass(slots=True, eq=False)
class _Fit:
    """A choice in the making: the cases that make it, what they took so far, and the counts of all cases with that."""

    learn: NDArray[np.bool_]
    chosen: PostProcessing = field(default_factory=PostProcessing)
    current: list[Counts] = field(default_factory=list)
    sentences: list[str] = field(default_factory=list)

    @property
    def key(self) -> str:
        return self.chosen.model_dump_json()


Variant = tuple[PostProcessing, Sequence[Step]]
Counted = tuple[Counts, list[Counts | None]]


def _counted(shelf: _Shelf, variants: Sequence[Variant], scored: Sequence[Target], workers: int) -> list[list[Counted]]:
    """For each variant and case its counts with what was taken, and what every step adds to them."""
    if not variants:
        return []
    with ThreadPoolExecutor(max(1, workers)) as pool:
        rows = list(pool.map(lambda case: [_count(shelf.case(case), v, scored) for v in variants], range(len(shelf))))
    return [[row[number] for row in rows] for number in range(len(variants))]


def _count(case: Case, variant: Variant, scored: Sequence[Target]) -> Counted:
    prediction, reference, spacing_mm = case
    chosen, steps = variant
    before = apply(prediction, chosen, spacing_mm)
    boxes = ndimage.find_objects(before)
    row: list[Counts | None] = []
    for step in steps:
        box = _reach(step.alone, boxes)
        if box is None:
            row.append(None)
            continue
        old, truth = before[box], reference[box]
        new = apply(old, step.alone, spacing_mm)
        changed = (new != old) & (truth != IGNORE)
        if not changed.any():
            row.append(None)
            continue
        row.append(_counts(new[changed], truth[changed], scored) - _counts(old[changed], truth[changed], scored))
    decided = reference != IGNORE
    return _counts(before[decided], reference[decided], scored), row


def _reach(alone: PostProcessing, boxes: Sequence[Box | None]) -> Box | None:
    """The box that a step looks at: of a single label its own, None if the label is not there; else all."""
    labels = (*alone.keep_largest_labels, *alone.min_mm3, *alone.fill_holes_labels)
    if not labels:
        return ()
    (label,) = labels
    return boxes[label - 1] if label <= len(boxes) else None


def _counts(prediction: Labels, reference: Labels, scored: Sequence[Target]) -> Counts:
    """By one count of pairs of classes."""
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


@dataclass(frozen=True, slots=True)
class _Packed:
    shape: tuple[int, ...]
    prediction: bytes
    reference: bytes
    spacing_mm: Float3


class _Shelf:
    """Cases cut to their labels, kept compressed up to ``SHELF_BYTES``; what has no room is read again each time."""

    def __init__(self, cases: Sequence[Callable[[], Case]]) -> None:
        self.cases, self.packed, self.size = cases, dict[int, _Packed](), 0

    def __len__(self) -> int:
        return len(self.cases)

    def case(self, number: int) -> Case:
        if (packed := self.packed.get(number)) is not None:
            arrays = (_unpack(data, packed.shape) for data in (packed.prediction, packed.reference))
            return next(arrays), next(arrays), packed.spacing_mm
        prediction, reference, spacing_mm = self.cases[number]()
        box = _surroundings((prediction > 0) | (reference > 0))
        prediction, reference = (np.ascontiguousarray(a[box], np.int16) for a in (prediction, reference))
        if self.size < SHELF_BYTES:
            kept = _Packed(prediction.shape, _pack(prediction), _pack(reference), spacing_mm)
            self.size += len(kept.prediction) + len(kept.reference)
            self.packed[number] = kept
        return prediction, reference, spacing_mm


def _pack(array: NDArray[np.int16]) -> bytes:
    return bytes(blosc2.compress2(array.tobytes(), typesize=2, codec=blosc2.Codec.LZ4, nthreads=1))


def _unpack(data: bytes, shape: tuple[int, ...]) -> NDArray[np.int16]:
    return np.frombuffer(blosc2.decompress2(data, nthreads=1), np.int16).reshape(shape)


def _surroundings(mask: NDArray[np.bool_]) -> Box:
    """The box around a mask with one voxel more where there is one, so that edges of the box are none of a label."""
    box = bounding_box(mask)
    return () if box is None else tuple(slice(max(0, s.start - 1), s.stop + 1) for s in box)
