"""Surface area of masks in mm², by counting how often lines of 13 directions cross its surface.

Crofton's formula: a surface has four times the area of its projection, averaged over all directions of space. In the
voxel grid 13 directions have lines through voxel centres (3 along edges, 6 along face diagonals, 4 along space
diagonals); each stands for the part of the sphere nearer to it than to the others (Lehmann and Legland, "Efficient
N-dimensional surface estimation using Crofton formula and run-length encoding", Insight Journal 2012). ITK's
``LabelShapeStatisticsImageFilter`` takes the sphere's shares of cubic voxels for any spacing; here they are those of
the spacing at hand, so that an organ in thick slices keeps its area. Adding up voxel faces instead would give half as
much again for any smooth shape.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
from numpy.typing import NDArray
from scipy.spatial import SphericalVoronoi

from medseg.evaluation.outlines import DIRECTIONS
from medseg.records.grid import Float3


def areas_mm2(leaving: NDArray[np.int64], spacing_mm: Float3) -> NDArray[np.float64]:
    """Surface areas from how many voxels have no neighbour of their own kind in each of ``DIRECTIONS``, (…, 13).

    Within 5 % of the true area of smooth shapes some 10 voxels wide (tests), whatever the spacing; 13 directions give
    no more.
    """
    return np.asarray(4 * (leaving @ np.array(_projected_mm2(spacing_mm))))


@lru_cache(maxsize=64)
def _projected_mm2(spacing_mm: Float3) -> tuple[float, ...]:
    """For each direction the area that one line stands for, times the direction's share of the sphere."""
    steps = np.array(DIRECTIONS) * spacing_mm
    lengths = np.linalg.norm(steps, axis=1)
    units = steps / lengths[:, None]
    shares = SphericalVoronoi(np.concatenate([units, -units])).calculate_areas()[: len(units)] / (2 * np.pi)
    return tuple((shares * np.prod(spacing_mm) / lengths).tolist())
