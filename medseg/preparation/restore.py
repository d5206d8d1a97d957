"""Restoring: labels from the network's grid back onto the axes and the grid of the source file."""

from __future__ import annotations

from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from medseg.imaging.crop import box_slices
from medseg.imaging.geometry import to_canonical
from medseg.imaging.resample import resample_labels
from medseg.records.plan import Resampling
from medseg.records.preparation import Preparation

Scalar = TypeVar("Scalar", bound=np.generic)


def paste_back(labels: NDArray[Scalar], preparation: Preparation) -> NDArray[Scalar]:
    """Undo crop, transpose and orientation; outside the crop box everything is zero (background).

    Args:
        labels: (Z, Y, X) on the cropped grid, class indices or label values.
        preparation: of the image.

    Returns:
        A new array of the same type on the source file's axes, of shape ``preparation.source_shape``.

    Raises:
        ValueError: ``labels`` does not have the shape of the crop box.
    """
    if labels.shape != preparation.cropped_shape:
        raise ValueError(f"labels of shape {labels.shape} do not fit the crop box of {preparation.cropped_shape}")
    source = np.zeros(preparation.source_shape, dtype=labels.dtype)
    canonical = to_canonical(source, preparation.to_canonical, preparation.flipped)  # a view: writes go to source
    canonical.transpose(preparation.transpose)[box_slices(preparation.crop_box)] = labels
    return source


def restore_labels(labels: NDArray[np.int16], preparation: Preparation, resampling: Resampling) -> NDArray[np.int16]:
    """Undo all of ``prepare``: resample to the cropped grid, then ``paste_back``.

    Args:
        labels: (Z, Y, X) class indices on the target grid.
        preparation: of the image.
        resampling: of the configuration; its label orders are used.

    Returns:
        A new array on the source file's axes, of shape ``preparation.source_shape``.

    Raises:
        ValueError: ``labels`` does not have the target shape.
    """
    if labels.shape != preparation.target_shape:
        raise ValueError(f"labels of shape {labels.shape} are not on the target grid of {preparation.target_shape}")
    cropped = resample_labels(
        labels,
        preparation.cropped_shape,
        preparation.target_spacing_mm,
        preparation.spacing_mm,
        resampling,
    )
    return paste_back(cropped, preparation)
