"""Resampling of images and labels to another grid of the same extent: one banded matrix per axis.

Interpolation with splines is linear and separable, so a volume is resampled by multiplying each axis with a matrix
that holds prefilter, edge rule and sampling in one. The results are those of nnU-Net (skimage.transform.resize with
mode "edge" and no anti-aliasing; default_resampling.py; batchgenerators' resize_segmentation 0.25.5) up to rounding.
Output voxel ``o`` of an axis of ``m`` voxels samples the input of ``n`` voxels at ``(o + 0.5) * n / m - 0.5``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from medseg.imaging.axes import axis_blocks, nearest_indices
from medseg.imaging.vote import vote
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
    result = np.empty((len(image), *shape), dtype=np.float32)
    axis = separate_axis(spacing, target_spacing, resampling.force_separate_z)
    for channel, out in zip(image, result, strict=True):
        if channel.shape == out.shape:
            np.copyto(out, channel, casting="unsafe")
        elif axis is None:
            out[...] = _resample_together(channel.astype(np.float32, copy=False), out.shape, resampling.image_order)
        else:
            out[...] = _resample_separately(channel.astype(np.float32, copy=False), out.shape, axis, resampling)
    return result


def resample_labels(
    labels: NDArray[np.int16],
    shape: Sequence[int],
    spacing: Sequence[float],
    target_spacing: Sequence[float],
    resampling: Resampling,
) -> NDArray[np.int16]:
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


def _resample_together(volume: NDArray[np.float32], shape: Sequence[int], order: int) -> NDArray[np.float32]:
    if order == 0:
        for axis, size in enumerate(shape):
            volume = _take_nearest(volume, axis, size)
        return volume
    result = _interpolate(volume, shape, order)
    return np.clip(result, volume.min(), volume.max(), out=result)


def _resample_separately(
    volume: NDArray[np.float32], shape: Sequence[int], axis: int, resampling: Resampling
) -> NDArray[np.float32]:
    """Slice by slice across ``axis``, then along it; choosing slices and interpolating in them commute."""
    if resampling.image_order_z == 0 and shape[axis] < volume.shape[axis]:
        volume = _take_nearest(volume, axis, shape[axis])
    in_plane = (*shape[:axis], volume.shape[axis], *shape[axis + 1 :])
    if in_plane != volume.shape and resampling.image_order > 0:
        others = tuple(other for other in range(3) if other != axis)
        low, high = volume.min(axis=others, keepdims=True), volume.max(axis=others, keepdims=True)
        volume = _interpolate(volume, in_plane, resampling.image_order)
        np.clip(volume, low, high, out=volume)
    else:
        volume = _resample_together(volume, in_plane, 0)
    if resampling.image_order_z == 0:
        return _take_nearest(volume, axis, shape[axis])
    return _interpolate(volume, shape, resampling.image_order_z)


def _resample_labels(labels: NDArray[np.int16], shape: tuple[int, ...], order: int) -> NDArray[np.int16]:
    """Like ``_resample_together``, for labels; always a new array."""
    if labels.shape == shape:
        return labels.copy()
    if order > 0:
        z, y, x = shape
        return vote(labels, (z, y, x))
    for axis, size in enumerate(shape):
        labels = _take_nearest(labels, axis, size)
    return labels


def _interpolate(volume: NDArray[np.float32], shape: Sequence[int], order: int) -> NDArray[np.float32]:
    for axis in shrinking_first(volume.shape, shape):
        n, m = volume.shape[axis], shape[axis]
        if n != m:
            volume = _multiply(volume, axis, n, m, order, slice(0, n), slice(0, m))
    return volume


def shrinking_first(shape: Sequence[int], target: Sequence[int]) -> list[int]:
    """Axes in the order that keeps the arrays in between small."""
    return sorted(range(len(shape)), key=lambda axis: target[axis] / shape[axis])


def _multiply(
    volume: NDArray[np.float32], axis: int, n: int, m: int, order: int, columns: slice, rows: slice
) -> NDArray[np.float32]:
    """Rows ``rows`` of the n → m matrix times ``axis`` of ``volume``, which holds the inputs ``columns`` of it.

    Every product is a small one, slice by slice: BLAS then stays on this thread. Its own threads gain nothing here and
    cost a factor of ten where other processes are busy (measured).
    """
    result = np.empty((*volume.shape[:axis], rows.stop - rows.start, *volume.shape[axis + 1 :]), dtype=np.float32)
    source, target = (array if axis == 2 else np.moveaxis(array, axis, 1) for array in (volume, result))
    for block in axis_blocks(n, m, order):
        if block.rows.start < rows.start or block.rows.stop > rows.stop:
            continue
        inputs = slice(block.columns.start - columns.start, block.columns.stop - columns.start)
        outputs = slice(block.rows.start - rows.start, block.rows.stop - rows.start)
        if axis == 2:
            np.matmul(source[:, :, inputs], block.weights.T, out=target[:, :, outputs])
        else:
            np.matmul(block.weights, source[:, inputs], out=target[:, outputs])
    return result


def _take_nearest(volume: NDArray[T], axis: int, m: int) -> NDArray[T]:
    n = volume.shape[axis]
    return volume if n == m else np.take(volume, nearest_indices(n, m), axis=axis)
