"""Measurement: overlap, border distances, surface areas and lesions of all groups of a volume together."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from medseg.evaluation.groups import Groups, count_voxels, masks_as_groups
from medseg.evaluation.lesions import lesions_of
from medseg.evaluation.metrics import BorderDistances, Overlap
from medseg.evaluation.nearest import nearest_mm, neighbourhood, split
from medseg.evaluation.outlines import Outline, outlines, padded_shape
from medseg.evaluation.surface import areas_mm2
from medseg.records.grid import Float3
from medseg.records.scores import Lesions

Mask = NDArray[np.bool_]

_NOTHING = BorderDistances(np.empty(0), np.empty(0))


@dataclass(frozen=True, slots=True, eq=False)
class Measured:
    """What was measured of one group; areas of prediction and reference are None for flat images."""

    overlap: Overlap
    distances: BorderDistances
    areas_mm2: tuple[float | None, float | None]
    lesions: Lesions | None


def measure(groups: Groups, spacing_mm: Float3, lesion_overlap: float | None = None) -> list[Measured]:
    """Measure every group; lesions only with ``lesion_overlap``, the share of one that must be covered.

    Raises:
        ValueError: a spacing is not positive and finite, or ``lesion_overlap`` is out of range.
    """
    if not all(0 < s < math.inf for s in spacing_mm):
        raise ValueError(f"spacing_mm {spacing_mm} must be positive and finite")
    both, predicted, expected, box = count_voxels(groups)
    overlaps = [
        Overlap(int(n), int(p - n), int(e - n)) for n, p, e in zip(both[1:], predicted[1:], expected[1:], strict=True)
    ]
    if box is None:
        empty = None if lesion_overlap is None else Lesions(expected=0, found=0, predicted=0, false_positives=0)
        return [Measured(overlap, _NOTHING, (None, None), empty) for overlap in overlaps]
    inside = groups.within(box)
    lesions = [None] * groups.count if lesion_overlap is None else lesions_of(inside, lesion_overlap)
    sides = outlines(inside, neighbourhood(spacing_mm, groups.flat)[1])
    areas = np.stack([areas_mm2(side.leaving, spacing_mm)[1:] for side in sides], axis=-1)
    distances = _distances(inside, sides, spacing_mm)
    return [
        Measured(overlap, away, _areas(overlap, area, groups), found)
        for overlap, away, area, found in zip(overlaps, distances, areas, lesions, strict=True)
    ]


def border_distances(prediction: Mask, reference: Mask, spacing_mm: Float3) -> BorderDistances:
    """Distances between the borders of two masks (Z, Y, X), both directions.

    Raises:
        ValueError: the shapes differ, or a spacing is not positive.
    """
    return measure(masks_as_groups(prediction, reference), spacing_mm)[0].distances


def _areas(overlap: Overlap, area: NDArray[np.float64], groups: Groups) -> tuple[float | None, float | None]:
    """None for flat images, and where there is nothing at all."""
    if any(groups.flat) or not overlap.predicted + overlap.expected:
        return None, None
    return float(area[0]), float(area[1])


def _distances(groups: Groups, sides: tuple[Outline, Outline], spacing_mm: Float3) -> list[BorderDistances]:
    """Of every group."""
    shape = padded_shape(groups.reference.shape, neighbourhood(spacing_mm, groups.flat)[1])
    found = []
    for queries, targets in (sides, sides[::-1]):
        distances = nearest_mm(queries, targets, shape, spacing_mm, groups.flat)
        order, starts = split(queries.groups, groups.count)
        found.append(np.split(distances[order], starts[2:-1]))
    return [BorderDistances(a, b) for a, b in zip(*found, strict=True)]
