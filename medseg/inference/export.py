"""Export: logits on the network's grid → labels on the cropped grid of the file, slab by slab.

Logits are interpolated linearly (nnU-Net: order 1) and decided at once, so that no more than one slab of
(outputs, slices, Y, X) lives on the file's resolution.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from medseg.imaging.resample import separate_axis
from medseg.records.grid import Int3
from medseg.records.plan import Resampling
from medseg.records.preparation import Preparation
from medseg.records.task import Task

SLAB_BYTES = 256 * 2**20


def decide(logits: Tensor, task: Task) -> Tensor:
    """(N, outputs, ...) logits → (N, ...) int16 class indices.

    Classes: the largest logit. Regions: those with probability > 0.5 are painted one after the other in
    ``regions_order``, later over earlier.
    """
    if not task.regions:
        return logits.argmax(1).to(torch.int16)
    labels = torch.zeros((logits.shape[0], *logits.shape[2:]), dtype=torch.int16)
    for region, value in enumerate(task.regions_order):
        labels[logits[:, region] > 0] = task.values.index(value)
    return labels


@torch.inference_mode()
def labels_from_logits(
    logits: Tensor, preparation: Preparation, resampling: Resampling, task: Task
) -> NDArray[np.int16]:
    """(outputs, z, y, x) float32 on the target grid → (Z, Y, X) class indices on the cropped grid.

    An axis that nnU-Net's rule treats separately on the way back is interpolated with ``probability_order_z``.
    """
    shape = preparation.cropped_shape
    small: Int3 = (logits.shape[1], logits.shape[2], logits.shape[3])
    orders = [resampling.probability_order] * 3
    separate = separate_axis(preparation.target_spacing_mm, preparation.spacing_mm, resampling.force_separate_z)
    if separate is not None and small != shape:
        orders[separate] = resampling.probability_order_z
    labels = np.empty(shape, np.int16)
    slab = max(1, SLAB_BYTES // (4 * logits.shape[0] * shape[1] * shape[2]))
    for first in range(0, shape[0], slab):
        rows = slice(first, min(first + slab, shape[0]))
        part = _along_z(logits, rows, shape[0], orders[0]).movedim(1, 0)
        part = _in_plane(part, shape, (orders[1], orders[2]))
        labels[rows] = decide(part, task).numpy()
    return labels


def _along_z(logits: Tensor, rows: slice, size: int, order: int) -> Tensor:
    """Rows ``rows`` of the ``size`` that the first axis has after resampling: (outputs, rows, y, x)."""
    count = logits.shape[1]
    if count == size:
        return logits[:, rows]
    position = (torch.arange(rows.start, rows.stop, dtype=torch.float64) + 0.5) * count / size - 0.5
    if order == 0:
        return logits[:, (position + 0.5).floor().long().clamp(0, count - 1)]
    position = position.clamp(0, count - 1)
    low = position.floor().long()
    share = (position - low).float().view(1, -1, 1, 1)
    return torch.lerp(logits[:, low], logits[:, (low + 1).clamp_max(count - 1)], share)


def _in_plane(part: Tensor, shape: Int3, orders: tuple[int, int]) -> Tensor:
    """(rows, outputs, y, x) → (rows, outputs, Y, X), each axis linearly or by nearest neighbour."""
    for axis, order in ((2, orders[0]), (3, orders[1])):
        size = [part.shape[2], part.shape[3]]
        size[axis - 2] = shape[axis - 1]
        if part.shape[axis] == size[axis - 2]:
            continue
        if order == 0:
            part = F.interpolate(part, size=size, mode="nearest-exact")
        else:
            part = F.interpolate(part, size=size, mode="bilinear", align_corners=False)
    return part
