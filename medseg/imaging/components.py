"""Components: the connected pieces of a mask, found inside the mask's bounding box.

Voxels are connected through faces, edges and corners: 26 neighbours in a volume, 8 in a single slice. It is the
neighbourhood nnU-Net post-processes with (acvl-utils labels with full connectivity), so imported models behave alike.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

Mask = NDArray[np.bool_]
Box = tuple[slice, ...]


def bounding_box(mask: Mask) -> Box | None:
    """The smallest box around the true voxels of ``mask`` (any number of axes), or None for an empty mask."""
    boxes = ndimage.find_objects(np.ascontiguousarray(mask).view(np.uint8), max_label=1)
    return boxes[0] if boxes else None


def components(mask: Mask) -> tuple[NDArray[np.integer], NDArray[np.int64]]:
    """Number the pieces of ``mask`` in scan order of their first voxels.

    Returns:
        numbers of the shape of ``mask``, 0 outside it and 1, 2, … inside; and the voxels of each piece, with
        ``sizes[0]`` those outside the mask.
    """
    plain = np.ascontiguousarray(mask)  # scipy scans a flipped or transposed view in another order
    numbers, count = ndimage.label(plain, structure=np.ones((3,) * mask.ndim, dtype=bool))
    return numbers, np.bincount(numbers.ravel(), minlength=count + 1)


def count_components(mask: Mask) -> int:
    """Number of connected pieces of ``mask``."""
    box = bounding_box(mask)
    return 0 if box is None else len(components(mask[box])[1]) - 1


def keep_largest(mask: Mask) -> Mask:
    """A new mask with only the largest piece of ``mask`` (Z, Y, X); among equals the first in scan order.

    An empty mask stays empty.
    """
    box = bounding_box(mask)
    if box is None:
        return np.zeros_like(mask)
    numbers, sizes = components(mask[box])
    if len(sizes) == 2:
        return mask.copy()
    kept = np.zeros_like(mask)
    kept[box] = numbers == 1 + int(np.argmax(sizes[1:]))  # argmax returns the first of equals
    return kept


def remove_smaller(mask: Mask, min_voxels: int) -> Mask:
    """A new mask without the pieces of ``mask`` (Z, Y, X) that have fewer than ``min_voxels`` voxels."""
    box = bounding_box(mask)
    if box is None:
        return np.zeros_like(mask)
    numbers, sizes = components(mask[box])
    stays = sizes >= min_voxels
    stays[0] = False
    kept = np.zeros_like(mask)
    kept[box] = stays[numbers]
    return kept
