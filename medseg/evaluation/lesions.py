"""Lesions: which connected pieces of the reference were found, and which of the prediction are false.

The rule is overlap with the other side as a whole, so that one lesion predicted in two pieces is found, and two that
were merged are both found; a minimal share keeps a touching voxel from counting as a find. Each side is judged on its
own, as the MS lesion challenges do for sensitivity and precision (Carass et al. 2017, Commowick et al. 2018).
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from medseg.evaluation.groups import Groups, masks_as_groups
from medseg.evaluation.pieces import Pieces, pieces
from medseg.records.scores import Lesions

Mask = NDArray[np.bool_]

_ROUNDING = 1e-9


def lesions_of(groups: Groups, overlap: float) -> list[Lesions]:
    """Count the pieces of every group (26 neighbours, 8 in a single slice).

    Args:
        groups: prediction and reference.
        overlap: share of a piece, above 0 and up to 1, that the other side must cover.

    Raises:
        ValueError: ``overlap`` is out of range.
    """
    if not 0 < overlap <= 1:
        raise ValueError(f"overlap {overlap} must be above 0 and at most 1")
    predicted, expected = pieces(groups)
    size = groups.count + 1
    (predicted_all, right), (expected_all, found) = (_counts(side, overlap, size) for side in (predicted, expected))
    return [
        Lesions(
            expected=int(expected_all[group]),
            found=int(found[group]),
            predicted=int(predicted_all[group]),
            false_positives=int(predicted_all[group] - right[group]),
        )
        for group in range(1, size)
    ]


def count_lesions(prediction: Mask, reference: Mask, overlap: float) -> Lesions:
    """The same of two masks (Z, Y, X).

    Raises:
        ValueError: the shapes differ, or ``overlap`` is out of range.
    """
    return lesions_of(masks_as_groups(prediction, reference), overlap)[0]


def _counts(side: Pieces, overlap: float, size: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """How many pieces each group has, and how many of them are covered."""
    covered = side.covered / side.voxels >= overlap - _ROUNDING
    return np.bincount(side.groups, minlength=size), np.bincount(side.groups[covered], minlength=size)
