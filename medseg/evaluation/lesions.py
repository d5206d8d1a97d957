"""Lesions: which connected pieces of the reference were found, and which of the prediction are false.

The rule is overlap with the other side as a whole, so that one lesion predicted in two pieces is found, and two that
were merged are both found; a minimal share keeps a touching voxel from counting as a find. Each side is judged on its
own, as the MS lesion challenges do for sensitivity and precision (Carass et al. 2017, Commowick et al. 2018).
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from medseg.imaging.components import components
from medseg.records.scores import Lesions

Mask = NDArray[np.bool_]

_ROUNDING = 1e-9


def count_lesions(prediction: Mask, reference: Mask, overlap: float) -> Lesions:
    """Count pieces (26 neighbours, 8 in a single slice) of two masks of the same shape.

    Args:
        prediction: predicted mask (Z, Y, X).
        reference: true mask (Z, Y, X).
        overlap: share of a piece, above 0 and up to 1, that the other mask must cover.

    Raises:
        ValueError: the shapes differ, or ``overlap`` is out of range.
    """
    if prediction.shape != reference.shape:
        raise ValueError(f"prediction has shape {prediction.shape}, reference {reference.shape}")
    if not 0 < overlap <= 1:
        raise ValueError(f"overlap {overlap} must be above 0 and at most 1")
    found = _covered(reference, prediction) >= overlap - _ROUNDING
    right = _covered(prediction, reference) >= overlap - _ROUNDING
    return Lesions(
        expected=found.size,
        found=int(found.sum()),
        predicted=right.size,
        false_positives=int(right.size - right.sum()),
    )


def _covered(mask: Mask, other: Mask) -> NDArray[np.float64]:
    """The share of each piece of ``mask`` that ``other`` covers."""
    numbers, sizes = components(mask)
    inside = np.bincount(numbers[mask & other], minlength=len(sizes))
    return inside[1:] / sizes[1:]
