"""Metrics: how well one mask matches another, in voxels and in millimetres along their borders.

Definitions, the same in every table that medseg writes:

- A border voxel belongs to the mask and has a face neighbour outside it (6 neighbours in a volume, 4 in a single
  slice). What lies outside the volume counts as outside the mask, so a mask cut by the edge of the volume has a border
  there. An axis of length 1 is no direction to look in: a 2D image has the border of its drawing, not all its pixels.
- The distance of a border voxel is that between its centre and the nearest centre of the other mask's border voxels.
- HD95 is the larger of the two directions' 95th percentiles (linear interpolation between ranks); HD the largest
  distance of all.
- ASSD is the mean of all distances of both directions together.
- NSD (surface Dice) is the share of all border voxels of both masks with a distance up to the tolerance.

They are MONAI's ``compute_hausdorff_distance`` (with and without ``percentile=95``),
``compute_average_surface_distance(symmetric=True)`` and ``compute_surface_dice(use_subvoxels=False)``, except for what
an absent structure gives (MONAI issue 9095): here every border voxel is infinitely far from an empty mask, so a missed
or spurious structure has HD95 infinite and NSD 0 and cannot improve a mean by being left out. Where both masks are
empty, everything is nan: there is nothing to measure. DeepMind's ``surface-distance`` puts the border between voxels
and weighs it by area; its distances differ by up to a voxel, and its NSD with them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from medseg.records.grid import Float3

# Spacings come from float32 headers: 3 voxels of 0.3 mm are as far as a tolerance of 0.9 mm.
_TOLERANCE_SLACK = 1e-5


@dataclass(frozen=True, slots=True)
class Overlap:
    """Voxels in both masks, only in the prediction, and only in the reference."""

    true_positives: int
    false_positives: int
    false_negatives: int

    @property
    def dice(self) -> float:
        """2 TP / (2 TP + FP + FN); nan where both masks are empty."""
        return _ratio(2 * self.true_positives, 2 * self.true_positives + self.false_positives + self.false_negatives)

    @property
    def iou(self) -> float:
        """TP / (TP + FP + FN); nan where both masks are empty."""
        return _ratio(self.true_positives, self.true_positives + self.false_positives + self.false_negatives)

    @property
    def precision(self) -> float:
        """TP / (TP + FP); nan where the prediction is empty."""
        return _ratio(self.true_positives, self.true_positives + self.false_positives)

    @property
    def recall(self) -> float:
        """TP / (TP + FN); nan where the reference is empty."""
        return _ratio(self.true_positives, self.true_positives + self.false_negatives)

    @property
    def predicted(self) -> int:
        """Voxels of the prediction."""
        return self.true_positives + self.false_positives

    @property
    def expected(self) -> int:
        """Voxels of the reference."""
        return self.true_positives + self.false_negatives


@dataclass(frozen=True, slots=True, eq=False)
class BorderDistances:
    """Distance in mm of every border voxel of one mask to the other's border, in no particular order.

    Infinite where the other mask is empty; no entries for an empty mask.
    """

    from_prediction_mm: NDArray[np.float64]
    from_reference_mm: NDArray[np.float64]


def hausdorff(distances: BorderDistances) -> float:
    """HD in mm, the largest distance of all; infinite if exactly one mask is empty, nan if both are."""
    directions = (distances.from_prediction_mm, distances.from_reference_mm)
    return max((float(d.max()) for d in directions if d.size), default=math.nan)


def hausdorff_95(distances: BorderDistances) -> float:
    """HD95 in mm; infinite if exactly one mask is empty, nan if both are."""
    directions = (distances.from_prediction_mm, distances.from_reference_mm)
    if any(np.isinf(d).any() for d in directions):
        return math.inf
    return max((float(np.percentile(d, 95)) for d in directions if d.size), default=math.nan)


def average_distance(distances: BorderDistances) -> float:
    """ASSD in mm; infinite if exactly one mask is empty, nan if both are."""
    pooled = np.concatenate([distances.from_prediction_mm, distances.from_reference_mm])
    return float(pooled.mean()) if pooled.size else math.nan


def surface_dice(distances: BorderDistances, tolerance_mm: float) -> float:
    """NSD at ``tolerance_mm``; 0 if exactly one mask is empty, nan if both are.

    Raises:
        ValueError: the tolerance is negative or not finite.
    """
    if not 0 <= tolerance_mm < math.inf:
        raise ValueError(f"tolerance_mm {tolerance_mm} must be finite and not negative")
    pooled = np.concatenate([distances.from_prediction_mm, distances.from_reference_mm])
    within = np.count_nonzero(pooled <= tolerance_mm * (1 + _TOLERANCE_SLACK))
    return _ratio(int(within), pooled.size)


def volume_ml(voxels: int, spacing_mm: Float3) -> float:
    """Volume of a number of voxels in millilitres (1000 mm³)."""
    return voxels * math.prod(spacing_mm) / 1000


def _ratio(part: int, whole: int) -> float:
    return part / whole if whole else math.nan
