"""Resampling of images and labels to another grid of the same extent: one banded matrix per axis.

Interpolation with splines is linear and separable, so a volume is resampled by multiplying each axis with a matrix
that holds prefilter, edge rule and sampling in one. The results are those of nnU-Net (skimage.transform.resize with
mode "edge" and no anti-aliasing; default_resampling.py; batchgenerators' resize_segmentation 0.25.5) up to rounding.
Output voxel ``o`` of an axis of ``m`` voxels samples the input of ``n`` voxels at ``(o + 0.5) * n / m - 0.5``.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from medseg.imaging.axes import nearest_indices
from medseg.imaging.bands import Way, fill, parts, shrinking_first
from medseg.imaging.normalise import Channel
from medseg.imaging.vote import Label, vote
from medseg.records.grid import Int3
from medseg.records.plan import Resampling

ANISOTROPY_THRESHOLD = 3  # nnU-Net's configuration.py, ANISO_THRESHOLD

T = TypeVar("T", bound=np.generic)


def resampled_shape(shape: Sequence[int], spacing: Sequence[float], target_spacing: Sequence[float]) -> Int3:
    """Shape after resampling: size × spacing / target, rounded half to even as nnU-Net does, at least one voxel."""
    z, y, x = (max(1, round(old / new * size)) for old, new, size in zip(spacing, target_spacing, shape, strict=True))
    return z, y, x


def separate_axis(spacing: Sequence[float], target_spacing: Sequence[float], force: bool | None = None) -> int | None:
    """The axis that is resampled on its own because its slices lie far apart, or None (default_resampling.py:14-66).

    The current spacing decides if its largest entry is more than three times its smallest, else the target spacing
    does. An axis is only separate if it alone has the largest spacing. ``force`` True takes the current spacing
    whatever its ratio, False means never.
    """
    if force is False:
        return None
    if force or max(spacing) / min(spacing) > ANISOTROPY_THRESHOLD:
        deciding = spacing
    elif max(target_spacing) / min(target_spacing) > ANISOTROPY_THRESHOLD:
        deciding = target_spacing
    else:
        return None
    largest = [axis for axis, size in enumerate(deciding) if size == max(deciding)]
    return largest[0] if len(largest) == 1 else None


def resample_image(
    image: NDArray[np.generic],
    shape: Sequence[int],
    spacing: Sequence[float],
    target_spacing: Sequence[float],
    resampling: Resampling,
) -> NDArray[np.float32]:
    """Resample every channel, clipped to its input's range (in every slice, if one axis is treated separately).

    Args:
        image: (C, Z, Y, X) finite.
        shape: target (z, y, x).
        spacing: millimetres per axis of the input; with ``target_spacing`` it only decides ``separate_axis``.
        target_spacing: millimetres per axis of the result.
        resampling: spline orders, and whether to force or forbid a separate axis.

    Returns:
        A new float32 array (C, *shape).
    """
    return resample_channels([Channel(voxels) for voxels in image], shape, spacing, target_spacing, resampling)


def resample_channels(
    channels: Sequence[Channel],
    shape: Sequence[int],
    spacing: Sequence[float],
    target_spacing: Sequence[float],
    resampling: Resampling,
    threads: int = 1,
) -> NDArray[np.float32]:
    """``resample_image`` of channels that are normalised where they are read; threads do not change the result."""
    z, y, x = shape
    result = np.empty((len(channels), z, y, x), dtype=np.float32)
    axis = separate_axis(spacing, target_spacing, resampling.force_separate_z)
    for channel, out in zip(channels, result, strict=True):
        way = _way(channel, (z, y, x), axis, resampling)
        fill_part = partial(fill, channel, way, out=np.moveaxis(out, way.outer, 0))
        if threads == 1:
            fill_part(slice(0, way.rows))
            continue
        with ThreadPoolExecutor(threads) as pool:
            list(pool.map(fill_part, parts(channel.shape[way.outer], way, threads)))
    return result


def _way(channel: Channel, shape: Int3, separate: int | None, resampling: Resampling) -> Way:
    if channel.shape == shape:
        return Way(shape, 0, 0, 0, None)
    if separate is not None:  # slice by slice across this axis, each clipped by itself, then along it
        return Way(shape, separate, resampling.image_order, resampling.image_order_z, "plane")
    outer = [axis for axis in shrinking_first(channel.shape, shape) if axis < 2][-1]  # slices across x lie scattered
    order = resampling.image_order
    return Way(shape, outer, order, order, channel.bounds() if order else None)


def resample_labels(
    labels: NDArray[Label],
    shape: Sequence[int],
    spacing: Sequence[float],
    target_spacing: Sequence[float],
    resampling: Resampling,
) -> NDArray[Label]:
    """Resample a label map by interpolating each label's indicator and taking the label with the highest score.

    Ties go to the nearest neighbour if its label is among the tied, else to the lowest label. Every value that
    occurs is a label, IGNORE too. Equal to nnU-Net's to the last voxel (see ``vote``).

    Args:
        labels: (Z, Y, X) integer.
        shape: target (z, y, x).
        spacing: millimetres per axis of the input, see ``resample_image``.
        target_spacing: millimetres per axis of the result.
        resampling: the label orders, and whether to force or forbid a separate axis.

    Returns:
        A new array of ``shape`` and the type of ``labels``.
    """
    target = tuple(shape)
    axis = separate_axis(spacing, target_spacing, resampling.force_separate_z)
    if axis is None or labels.shape == target:
        return _resample_labels(labels, target, resampling.label_order)
    if resampling.label_order_z == 0 and target[axis] < labels.shape[axis]:
        labels = _take_nearest(labels, axis, target[axis])
    in_plane = (*target[:axis], labels.shape[axis], *target[axis + 1 :])
    return _resample_labels(
        _resample_labels(labels, in_plane, resampling.label_order), target, resampling.label_order_z
    )


def _resample_labels(labels: NDArray[Label], shape: tuple[int, ...], order: int) -> NDArray[Label]:
    """All axes alike; always a new array."""
    if labels.shape == shape:
        return labels.copy()
    if order > 0:
        z, y, x = shape
        return vote(labels, (z, y, x))
    for axis, size in enumerate(shape):
        labels = _take_nearest(labels, axis, size)
    return labels


def _take_nearest(volume: NDArray[T], axis: int, m: int) -> NDArray[T]:
    n = volume.shape[axis]
    return volume if n == m else np.take(volume, nearest_indices(n, m), axis=axis)
