"""Calibration: whether a structure is there as often as its probability says, in the surroundings of the structure.

Far from the structure every method is sure and right, and would make the error as small as the volume is large; so only
the box of the reference and of all probabilities of 0.5 or more counts, grown by ``MARGIN_MM`` (boxes around the
structure: Mehrtash et al., IEEE TMI 2020).
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from medseg.imaging.components import Box, bounding_box
from medseg.records.grid import Float3
from medseg.records.scores import Calibration

MARGIN_MM = 10.0
BINS = 10


def calibration_box(probability: NDArray[np.floating], reference: NDArray[np.bool_], spacing_mm: Float3) -> Box | None:
    """The box that counts, of arrays (Z, Y, X); None if the structure is neither there nor predicted."""
    box = bounding_box(reference | (probability >= 0.5))
    if box is None:
        return None
    margins = [math.ceil(MARGIN_MM / s) for s in spacing_mm]
    return tuple(slice(max(0, b.start - m), b.stop + m) for b, m in zip(box, margins, strict=True))


def calibration(probability: NDArray[np.floating], reference: NDArray[np.bool_]) -> Calibration:
    """Brier score and expected calibration error of a probability of one structure against the rest.

    Args:
        probability: of any shape, 0 to 1.
        reference: the truth, same shape.

    Raises:
        ValueError: the shapes differ, there are no voxels, or a probability is not from 0 to 1.
    """
    if probability.shape != reference.shape or probability.size == 0:
        raise ValueError(f"probability has shape {probability.shape}, reference {reference.shape}")
    p, truth = probability.astype(np.float64).ravel(), reference.ravel()
    if not (p.min() >= 0 and p.max() <= 1 + 1e-5):
        raise ValueError(f"probabilities range from {p.min():g} to {p.max():g}, not 0 to 1")
    p = np.minimum(p, 1)
    bins = np.minimum((p * BINS).astype(np.intp), BINS - 1)
    believed = np.bincount(bins, weights=p, minlength=BINS)
    true = np.bincount(bins, weights=truth, minlength=BINS)
    return Calibration(brier=float(np.mean((p - truth) ** 2)), ece=float(np.abs(believed - true).sum() / p.size))
