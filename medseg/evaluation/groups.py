"""Groups: the voxels of all labels, or of one region, in a prediction and its reference, read slab by slab.

Labels exclude each other, so one pass over the volume measures all of them; a region is a group of its own. Nothing
here or in what builds on it holds a mask of the whole volume for every label.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from medseg.imaging.components import Box
from medseg.preparation.foreground import IGNORE

SLAB_VOXELS = 2**21  # a slab and what is computed from it stay in the processor's cache

Numbers = NDArray[np.unsignedinteger]
Counts = NDArray[np.int64]


@dataclass(frozen=True, slots=True, eq=False)
class Groups:
    """Prediction and reference (Z, Y, X) of class indices, and the group that each class belongs to.

    ``table`` holds a number by class index, 0 for classes that are not measured, and 0 as its last entry, for
    ``IGNORE``. ``flat`` names the axes along which the volume, not only the part of it here, has one voxel: those are
    no direction to look in.
    """

    prediction: NDArray[np.integer]
    reference: NDArray[np.integer]
    table: Numbers
    flat: tuple[bool, bool, bool]
    ignoring: bool = False

    @property
    def count(self) -> int:
        """How many groups there are."""
        return int(self.table.max())

    def within(self, box: Box) -> Groups:
        """The part of the volume in a box."""
        return replace(self, prediction=self.prediction[box], reference=self.reference[box])

    def slabs(self, halo: int = 0) -> Iterator[tuple[int, Numbers, Numbers]]:
        """First layer, prediction and reference of every slab, as numbers of groups; ``halo`` layers more around it."""
        layers, plane = len(self.reference), max(1, self.reference[0].size)
        depth = max(1, SLAB_VOXELS // plane)
        for start in range(0, layers, depth):
            rows = slice(max(0, start - halo), min(layers, start + depth + halo))
            reference = self.reference[rows]
            predicted, expected = self.table[self.prediction[rows]], self.table[reference]
            if self.ignoring:
                predicted[reference == IGNORE] = 0
            yield start, predicted, expected


def groups_of(
    prediction: NDArray[np.integer], reference: NDArray[np.integer], classes: int, members: Sequence[Sequence[int]]
) -> Groups:
    """Groups 1, 2, … of the class indices in ``members``, no class in two of them.

    Args:
        prediction: class indices (Z, Y, X) below ``classes``.
        reference: the same, with ``IGNORE`` where neither side counts.
        classes: number of classes, the background among them.
        members: class indices of every group.
    """
    kind: type[np.unsignedinteger] = np.uint8 if len(members) <= np.iinfo(np.uint8).max else np.uint16
    table = np.zeros(classes + 1, kind)
    for number, indices in enumerate(members, start=1):
        table[list(indices)] = number
    z, y, x = (n == 1 for n in reference.shape)
    ignoring = bool(reference.size) and int(reference.min()) == IGNORE
    return Groups(prediction, reference, table, (z, y, x), ignoring)


def masks_as_groups(prediction: NDArray[np.bool_], reference: NDArray[np.bool_]) -> Groups:
    """Two masks (Z, Y, X) as the prediction and reference of one group.

    Raises:
        ValueError: the shapes differ.
    """
    if prediction.shape != reference.shape:
        raise ValueError(f"prediction has shape {prediction.shape}, reference {reference.shape}")
    return groups_of(prediction.view(np.int8), reference.view(np.int8), 2, [(1,)])


def count_voxels(groups: Groups) -> tuple[Counts, Counts, Counts, Box | None]:
    """Voxels of every group in both, in the prediction and in the reference; and the box around all of them.

    Returns:
        three arrays (count + 1,), entry 0 meaningless; and the box, None if every group is empty on both sides.
    """
    size = groups.count + 1
    both, predicted, expected = np.zeros((3, size), np.int64)
    z, y, x = groups.reference.shape
    rows = [np.zeros(n, bool) for n in (z, y, x)]
    for start, a, b in groups.slabs():
        there: NDArray[np.bool_] = (a > 0) | (b > 0)
        rows[0][start : start + len(a)] = there.any(axis=(1, 2))
        rows[1] |= there.any(axis=(0, 2))
        rows[2] |= there.any(axis=(0, 1))
        a, b = a[there], b[there]
        both += np.bincount(a[a == b], minlength=size)
        predicted += np.bincount(a, minlength=size)
        expected += np.bincount(b, minlength=size)
    if not rows[0].any():
        return both, predicted, expected, None
    places = [np.flatnonzero(row) for row in rows]
    return both, predicted, expected, tuple(slice(int(p[0]), int(p[-1]) + 1) for p in places)
