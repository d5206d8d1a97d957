"""Calibration: whether a structure is there as often as its probability says, in the surroundings of the structure.

Far from the structure every method is sure and right, and would make the error as small as the volume is large; so only
the box of the reference and of all probabilities of 0.5 or more counts, grown by ``MARGIN_MM`` (boxes around the
structure: Mehrtash et al., IEEE TMI 2020).

Probabilities come slab by slab and are gone through twice, first for the box, then for the sums in it: what is in
memory does not grow with the number of classes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import numpy as np
from numpy.typing import NDArray

from medseg.imaging.components import Box, bounding_box
from medseg.records.grid import Float3
from medseg.records.scores import Calibration

MARGIN_MM = 10.0
BINS = 10

Slabs = Callable[[], Iterator[tuple[int, NDArray[np.floating]]]]
Mask = NDArray[np.bool_]


def calibrate(slabs: Slabs, reference: Mask, ignored: Mask | None, spacing_mm: Float3) -> Calibration | None:
    """Brier score and expected calibration error of a probability of one structure against the rest.

    Args:
        slabs: gives the probability, 0 to 1, anew at each call: number of the first slice and (z, Y, X).
        reference: the truth (Z, Y, X).
        ignored: voxels that do not count.
        spacing_mm: (z, y, x).

    Returns:
        None if the structure is neither there nor predicted.
    """
    box = calibration_box(slabs, reference, ignored, spacing_mm)
    if box is None:
        return None
    tally = _Tally()
    z, y, x = box
    for start, probability in slabs():
        stop = start + len(probability)
        if stop <= z.start or start >= z.stop:
            continue
        low, high = max(start, z.start), min(stop, z.stop)
        place = (slice(low, high), y, x)
        inside = ... if ignored is None else ~ignored[place]
        tally.add(probability[low - start : high - start, y, x][inside], reference[place][inside])
    return tally.result()


def calibration_box(slabs: Slabs, reference: Mask, ignored: Mask | None, spacing_mm: Float3) -> Box | None:
    """The box that counts; None if the structure is neither there nor predicted."""
    first = list(reference.shape)
    last = [0] * 3
    for start, probability in slabs():
        place = slice(start, start + len(probability))
        marked = probability >= 0.5
        if ignored is not None:
            marked &= ~ignored[place]
        found = bounding_box(marked | reference[place])
        for axis, side in enumerate(found or ()):
            moved = start if axis == 0 else 0
            first[axis] = min(first[axis], side.start + moved)
            last[axis] = max(last[axis], side.stop + moved)
    if last[0] == 0:
        return None
    margins = [math.ceil(MARGIN_MM / s) for s in spacing_mm]
    limits = zip(first, last, margins, reference.shape, strict=True)
    return tuple(slice(max(0, a - m), min(b + m, n)) for a, b, m, n in limits)


def calibration(probability: NDArray[np.floating], reference: Mask) -> Calibration:
    """The same of all voxels of an array.

    Raises:
        ValueError: the shapes differ, there are no voxels, or a probability is not from 0 to 1.
    """
    if probability.shape != reference.shape or probability.size == 0:
        raise ValueError(f"probability has shape {probability.shape}, reference {reference.shape}")
    if not (probability.min() >= 0 and probability.max() <= 1):
        raise ValueError(f"probabilities range from {probability.min():g} to {probability.max():g}, not 0 to 1")
    tally = _Tally()
    tally.add(probability, reference)
    return tally.result()


class _Tally:
    """Sums over voxels: of squared errors, and in each bin of probability of what was believed and of what is true."""

    def __init__(self) -> None:
        self.voxels, self.squares = 0, 0.0
        self.believed, self.true = np.zeros(BINS), np.zeros(BINS)

    def add(self, probability: NDArray[np.floating], reference: Mask) -> None:
        p, truth = probability.astype(np.float64).ravel(), reference.ravel()
        bins = np.minimum((p * BINS).astype(np.intp), BINS - 1)
        self.believed += np.bincount(bins, weights=p, minlength=BINS)
        self.true += np.bincount(bins, weights=truth, minlength=BINS)
        self.squares += float(((p - truth) ** 2).sum())
        self.voxels += p.size

    def result(self) -> Calibration:
        ece = float(np.abs(self.believed - self.true).sum() / self.voxels)
        return Calibration(brier=min(1.0, self.squares / self.voxels), ece=min(1.0, ece))
