"""The nonzero region of an image: its bounding box, and its mask with holes filled."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage as ndi

Box = tuple[tuple[int, int], tuple[int, int], tuple[int, int]]


def nonzero_box(image: NDArray[np.generic]) -> Box:
    """Bounding box (start, stop) per axis of the voxels that are not zero in at least one channel.

    Filling holes, as nnU-Net does first (cropping.py), cannot change a bounding box and is left out.

    Args:
        image: (C, Z, Y, X) of any numeric type.

    Returns:
        ((z0, z1), (y0, y1), (x0, x1)); the whole image if every voxel is zero.
    """
    occupied = [np.zeros(size, dtype=bool) for size in image.shape[1:]]
    for channel in image:
        nonzero = channel != 0
        for axis, line in enumerate(occupied):
            line |= nonzero.any(axis=tuple(other for other in range(3) if other != axis))
    z, y, x = (_extent(line) for line in occupied)
    return z, y, x


def nonzero_mask(image: NDArray[np.generic]) -> NDArray[np.bool_]:
    """Mask (Z, Y, X) of the voxels that are not zero in at least one channel of (C, Z, Y, X), holes filled."""
    mask = np.zeros(image.shape[1:], dtype=bool)
    for channel in image:
        mask |= channel != 0
    return fill_holes(mask)


def fill_holes(mask: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """The mask (Z, Y, X) with every part of its outside that does not reach the border; neighbours share a face.

    Equal to scipy's binary_fill_holes, in half of its time: components are found once instead of eroding until
    nothing changes.
    """
    parts, count = ndi.label(~mask)
    hole = np.ones(count + 1, dtype=bool)
    for axis in range(mask.ndim):
        for end in (0, -1):
            hole[np.take(parts, end, axis=axis)] = False
    hole[0] = True  # the mask itself
    return hole[parts]


def box_slices(box: Box) -> tuple[slice, slice, slice]:
    """The box as an index of a (Z, Y, X) array."""
    (z0, z1), (y0, y1), (x0, x1) = box
    return slice(z0, z1), slice(y0, y1), slice(x0, x1)


def _extent(line: NDArray[np.bool_]) -> tuple[int, int]:
    indices = np.flatnonzero(line)
    return (int(indices[0]), int(indices[-1]) + 1) if indices.size else (0, line.size)
