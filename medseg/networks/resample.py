"""Resampling of tensors: the axis matrices of ``imaging.resample`` on the device where the tensor lies.

On the CPU it is the numpy form itself. Elsewhere each axis is one product with a dense float32 matrix: a GPU does in
milliseconds what banded products save a CPU.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from medseg.imaging.axes import axis_blocks, nearest_indices
from medseg.imaging.bands import shrinking_first
from medseg.imaging.resample import resample_image, separate_axis
from medseg.records.plan import Resampling


def resample_tensor(
    image: Tensor,
    shape: Sequence[int],
    spacing: Sequence[float],
    target_spacing: Sequence[float],
    resampling: Resampling,
) -> Tensor:
    """``imaging.resample.resample_image`` for tensors: equal on the CPU, elsewhere within 2e-6 of the input's range.

    The latter while torch's float32 products are exact, as by default (``set_float32_matmul_precision("highest")``).

    Args:
        image: (C, Z, Y, X) float32 on any device, finite.
        shape: target (z, y, x).
        spacing: millimetres per axis of the input; with ``target_spacing`` it only decides ``separate_axis``.
        target_spacing: millimetres per axis of the result.
        resampling: spline orders, and whether to force or forbid a separate axis.

    Returns:
        A new float32 tensor (C, *shape) on the same device.
    """
    if image.device.type == "cpu":
        return torch.from_numpy(resample_image(image.numpy(), shape, spacing, target_spacing, resampling))
    return torch.stack([_resample(channel, shape, spacing, target_spacing, resampling) for channel in image])


def _resample(
    volume: Tensor,
    shape: Sequence[int],
    spacing: Sequence[float],
    target_spacing: Sequence[float],
    resampling: Resampling,
) -> Tensor:
    """One channel (Z, Y, X); clipped as ``resample_image`` clips."""
    volume = volume.float()
    axis = separate_axis(spacing, target_spacing, resampling.force_separate_z)
    if tuple(volume.shape) == tuple(shape):
        return volume.clone()
    if axis is None:
        return _clipped(volume, shape, resampling.image_order, (0, 1, 2))
    in_plane = [int(n) for n in shape]
    in_plane[axis] = volume.shape[axis]
    others = tuple(other for other in range(3) if other != axis)
    volume = _clipped(volume, in_plane, resampling.image_order, others)
    return _interpolate(volume, shape, resampling.image_order_z)


def _clipped(volume: Tensor, shape: Sequence[int], order: int, over: tuple[int, ...]) -> Tensor:
    """Interpolated, within the range that the input has over the axes ``over``."""
    if tuple(volume.shape) == tuple(shape):
        return volume
    low, high = volume.amin(over, keepdim=True), volume.amax(over, keepdim=True)
    return _interpolate(volume, shape, order).clamp(low, high)


def _interpolate(volume: Tensor, shape: Sequence[int], order: int) -> Tensor:
    for axis in shrinking_first(volume.shape, shape):
        n, m = volume.shape[axis], int(shape[axis])
        if n == m:
            continue
        if order == 0:
            volume = volume.index_select(axis, torch.from_numpy(nearest_indices(n, m)).to(volume.device))
        else:
            product = axis_matrix(n, m, order, volume.device) @ volume.movedim(axis, 0).reshape(n, -1)
            volume = product.reshape(m, *volume.movedim(axis, 0).shape[1:]).movedim(0, axis)
    return volume


def axis_matrix(n: int, m: int, order: int, device: torch.device) -> Tensor:
    """The (m, n) float32 matrix that resamples an axis of ``n`` voxels to ``m`` with a spline of ``order`` 1 to 3."""
    matrix = torch.zeros(m, n)
    for block in axis_blocks(n, m, order):
        matrix[block.rows, block.columns] = torch.from_numpy(block.weights.copy())
    return matrix.to(device)
