"""Border: distances to the borders of objects, computed from the labels of a batch on the CPU.

They are computed in the step, not stored when cases are prepared: augmentation turns, scales and cuts the labels after
that.
"""

from __future__ import annotations

import itertools

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import ndimage as ndi
from torch import Tensor

W0, SIGMA = 10.0, 5.0  # U-Net 2015: height and width of the extra weight, in voxels
REACH = 4.0  # in σ: beyond, the weight is below W0 · exp(-8) = 0.003


def border_weights(labels: Tensor, spacing: tuple[float, ...] | None = None) -> Tensor:
    """Extra weight of background voxels between objects: w0 · exp(-(d1 + d2)² / 2σ²) (Ronneberger et al. 2015).

    d1 and d2 are the distances to the nearest and the second nearest object, in voxels of the finest axis. An object
    is a connected component of foreground (neighbours by faces) of one class; where two touch there is no background
    between them, and no weight.

    Args:
        labels: (B, ...) int64 class indices, -1 = ignored: no object.
        spacing: of the axes in shares of the finest.

    Returns:
        (B, ...) float32 on the device of the labels.
    """
    arrays = labels.detach().cpu().numpy()
    found = np.stack([_border_weights(one, spacing or (1.0,) * one.ndim) for one in arrays])
    return torch.from_numpy(found).to(labels.device)


def _border_weights(labels: NDArray[np.int64], spacing: tuple[float, ...]) -> NDArray[np.float32]:
    nearest = np.full(labels.shape, np.inf, np.float32)
    second = nearest.copy()
    margin = [int(np.ceil(REACH * SIGMA / s)) for s in spacing]
    for value in np.unique(labels[labels > 0]):
        components, _ = ndi.label(labels == value)
        for number, box in enumerate(ndi.find_objects(components), start=1):
            near = tuple(slice(max(0, b.start - m), b.stop + m) for b, m in zip(box, margin, strict=True))
            distance = ndi.distance_transform_edt(components[near] != number, sampling=spacing).astype(np.float32)
            np.minimum(second[near], np.maximum(nearest[near], distance), out=second[near])
            np.minimum(nearest[near], distance, out=nearest[near])
    weight = W0 * np.exp(-((nearest + second) ** 2) / (2 * SIGMA**2))
    return np.where(labels == 0, weight, 0).astype(np.float32)


def signed_distances(target: Tensor, valid: Tensor, spacing: tuple[float, ...] | None = None) -> Tensor:
    """Distance of each voxel to the nearest of the other kind outside objects, minus it plus 1 inside.

    0 where an object is absent, or fills all: then there is no border. Ignored voxels belong to no object.

    Args:
        target: (B, N, ...) bool.
        valid: (B, 1, ...) bool.
        spacing: of the axes in shares of the finest.

    Returns:
        (B, N, ...) float32 on the device of the target, 0 where ignored.
    """
    masks = target.detach().cpu().numpy()
    distances = np.zeros(masks.shape, np.float32)
    for index in itertools.product(*map(range, masks.shape[:2])):
        mask = masks[index]
        if mask.any() and not mask.all():
            inside = ndi.distance_transform_edt(mask, sampling=spacing)
            outside = ndi.distance_transform_edt(~mask, sampling=spacing)
            distances[index] = np.where(mask, 1 - inside, outside)
    return torch.from_numpy(distances).to(target.device) * valid
