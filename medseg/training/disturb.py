"""Disturbance: errors put into the labels of a cascade's first stage, so that the second does not just repeat them.

Probabilities and sizes are nnU-Net's (2.8.1, ``nnUNetTrainer.get_training_transforms``): with probability 0.4 each
label, with 0.5, is dilated, eroded, opened or closed by a ball; with probability 0.2 each label, with 0.5, loses one of
its connected components that cover less than 15 % of the patch. What happens is drawn first and applied afterwards.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

MORPHOLOGY_P, REMOVAL_P, LABEL_P = 0.4, 0.2, 0.5
RADII = (1.0, 8.0)
LARGEST_SHARE = 0.15

Mask = NDArray[np.bool_]


@dataclass(frozen=True, slots=True)
class Morphology:
    """One operation on the mask of a class, by a ball of ``radius`` voxels."""

    label: int
    operation: str
    radius: float


@dataclass(frozen=True, slots=True)
class Removal:
    """One component of a class goes; ``place`` in [0, 1) says which of those small enough."""

    label: int
    place: float


@dataclass(frozen=True, slots=True)
class Disturbance:
    """Everything drawn for one sample, in the order in which it is done."""

    morphology: tuple[Morphology, ...] = ()
    removals: tuple[Removal, ...] = ()


def draw_disturbance(rng: np.random.Generator, classes: int) -> Disturbance:
    """Draw what happens to the labels 1 to ``classes - 1`` of one sample."""

    def some() -> list[int]:
        return [int(label) for label in rng.permutation(np.arange(1, classes)) if rng.random() < LABEL_P]

    operations = tuple(OPERATIONS)
    changed = some() if rng.random() < MORPHOLOGY_P else []
    morphology = tuple(
        Morphology(label, operations[rng.integers(len(operations))], float(rng.uniform(*RADII))) for label in changed
    )
    removed = some() if rng.random() < REMOVAL_P else []
    return Disturbance(morphology, tuple(Removal(label, float(rng.random())) for label in removed))


def disturb(labels: NDArray[np.int64], drawn: Disturbance) -> NDArray[np.int64]:
    """The labels (Z, Y, X) with the drawn errors; a new array if there are any.

    Voxels that a class gains are taken from the others, voxels that it loses become background.
    """
    if not drawn.morphology and not drawn.removals:
        return labels
    labels = labels.copy()
    for step in drawn.morphology:
        before = labels == step.label
        if before.any():
            after = OPERATIONS[step.operation](before, step.radius)
            labels[before & ~after] = 0
            labels[after] = step.label
    for removal in drawn.removals:
        found, count = ndimage.label(labels == removal.label)
        sizes = np.bincount(found.ravel())[1:]
        small = np.flatnonzero(sizes < LARGEST_SHARE * labels.size) + 1 if count else np.empty(0, np.intp)
        if small.size:
            labels[found == small[int(removal.place * small.size)]] = 0
    return labels


def dilate(mask: Mask, radius: float) -> Mask:
    """Every voxel within ``radius`` voxels of the mask."""
    if not mask.any():
        return mask
    reach = int(np.ceil(radius)) + 1
    box = tuple(slice(max(0, s.start - reach), s.stop + reach) for s in ndimage.find_objects(mask.view(np.int8))[0])
    grown = np.zeros_like(mask)
    grown[box] = ndimage.distance_transform_edt(~mask[box]) <= radius
    return grown


def erode(mask: Mask, radius: float) -> Mask:
    """Every voxel of the mask that has no voxel outside within ``radius``; the border of the patch is no outside."""
    return mask if mask.all() else np.asarray(mask & (ndimage.distance_transform_edt(mask) > radius))


def open_mask(mask: Mask, radius: float) -> Mask:
    """Eroded, then dilated: thin parts go."""
    return dilate(erode(mask, radius), radius)


def close_mask(mask: Mask, radius: float) -> Mask:
    """Dilated, then eroded: gaps close."""
    return erode(dilate(mask, radius), radius)


OPERATIONS: dict[str, Callable[[Mask, float], Mask]] = {
    "dilate": dilate,
    "erode": erode,
    "open": open_mask,
    "close": close_mask,
}
