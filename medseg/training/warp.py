"""Warp: the map from a patch to the volume that it is sampled from: rotation, zoom and elastic deformation."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from medseg.records.grid import Float3, Int3

INTERVALS = 2  # of the control grid along each edge of a patch: three points, as Ronneberger et al. 2015
LARGEST = 0.4  # displacement in control intervals, along an axis; below 0.403 nothing folds (Choi & Lee 2000)
DEVIATIONS = 3.0  # normal displacements are cut there
LARGEST_SPREAD = LARGEST / INTERVALS / DEVIATIONS  # in shares of an edge


@dataclass(frozen=True, slots=True)
class Elastic:
    """A smooth random deformation: normal displacements of a coarse grid, cubic B-splines in between.

    ``spread`` is the standard deviation at the control points, in shares of the patch's edge along each axis. A patch
    has about the proportions of the cases in millimetres, so that slices that are thick move by fewer voxels.
    """

    spread: float
    seed: int

    def controls(self, patch: Int3, flat: bool) -> NDArray[np.float64]:
        """(3, z, y, x) displacements of the control points in patch voxels; in plane only, and alike, if ``flat``."""
        points = tuple(1 if flat and axis == 0 else INTERVALS + 3 for axis in range(3))
        drawn = np.random.default_rng(self.seed).normal(size=(3, *points)).clip(-DEVIATIONS, DEVIATIONS)
        edges = np.array([0 if flat else patch[0] - 1, patch[1] - 1, patch[2] - 1])
        return drawn * (self.spread * edges)[:, None, None, None]


@dataclass(frozen=True, slots=True)
class Spatial:
    """Elastic deformation, one zoom factor (> 1 shows more of the volume), rotation angles (z, y, x) in radians."""

    angles: tuple[float, float, float]
    zoom: float
    flat: bool  # the first axis is neither rotated, scaled nor deformed
    elastic: Elastic | None = None

    def matrix(self) -> NDArray[np.float64]:
        """(3, 3): offset from the patch centre in patch voxels → offset in volume voxels, axes (z, y, x)."""
        about_z, about_y, about_x = (
            np.array([[math.cos(a), -math.sin(a)], [math.sin(a), math.cos(a)]]) for a in self.angles
        )
        turn = np.eye(3)
        for plane, rotation in (((1, 2), about_z), ((0, 2), about_y), ((0, 1), about_x)):
            step = np.eye(3)
            step[np.ix_(plane, plane)] = rotation
            turn = turn @ step
        return turn @ np.diag([1.0 if self.flat else self.zoom, self.zoom, self.zoom])

    def reach(self, patch: Int3) -> NDArray[np.float64]:
        """How far from the patch's centre the map goes at most, in volume voxels along each axis.

        B-splines stay within the range of their control points.
        """
        half = (np.array(patch) - 1) / 2
        if self.elastic is not None:
            half += np.abs(self.elastic.controls(patch, self.flat)).max(axis=(1, 2, 3))
        return np.abs(self.matrix()) @ half

    def grid(self, patch: Int3, centre: Float3, shape: Int3, device: torch.device) -> Tensor:
        """Where the voxels of a patch lie in a box, as ``grid_sample`` wants it.

        Args:
            patch: size of the patch.
            centre: of the patch, in voxels of the box.
            shape: size of the box.
            device: where the result shall be.

        Returns:
            (*patch, 3) float32, (x, y, z) from -1 to 1 between the outer edges of the box (``align_corners=False``).
        """
        per_voxel = 2 / np.array(shape, dtype=np.float64)
        slopes = (self.matrix() * per_voxel[:, None])[::-1]
        middle = ((np.array(centre) + 0.5) * per_voxel - 1)[::-1]
        z, y, x = ((np.arange(n) - (n - 1) / 2)[:, None] * slopes[:, axis] for axis, n in enumerate(patch))
        grid = _floats(z[:, None, None] + y[:, None] + middle, device) + _floats(x, device)
        if self.elastic is not None:
            field = np.tensordot(self.elastic.controls(patch, self.flat), slopes, axes=(0, 1))  # (z, y, x, 3)
            grid += _interpolated(_floats(field, device), patch)
        return grid


def _interpolated(field: Tensor, patch: Int3) -> Tensor:
    """Control points (z, y, x, 3) → (*patch, 3), along the shortest way: the last axis is the largest product."""
    for axis in (2, 1, 0):
        weights = _floats(spline_weights(patch[axis], field.shape[axis]), field.device)
        field = torch.tensordot(weights, field, dims=([1], [axis])).movedim(0, axis)
    return field


def spline_weights(size: int, controls: int) -> NDArray[np.float64]:
    """(size, controls): cubic B-splines at the voxels of an edge; the first and last control point lie outside it."""
    if controls == 1:
        return np.ones((size, 1))
    intervals = controls - 3
    t = np.linspace(0, intervals, size) if size > 1 else np.array([intervals / 2])
    distance = np.abs(t[:, None] - (np.arange(controls) - 1))
    near = 2 / 3 - distance**2 + distance**3 / 2
    far = np.maximum(2 - distance, 0) ** 3 / 6
    return np.where(distance < 1, near, far)


def _floats(values: NDArray[np.float64], device: torch.device) -> Tensor:
    return torch.from_numpy(values.astype(np.float32)).to(device)
