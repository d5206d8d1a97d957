"""Grid and Volume: where voxels lie in the patient, and the voxels themselves.

Arrays are (C, Z, Y, X). ``Grid.affine`` maps a voxel index in *array order* (z, y, x, 1) to a point in RAS
millimetres (right, anterior, superior, 1): column 0 is one step along z. In the canonical orientation the index grows
towards superior, anterior and right along z, y and x.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from medseg.errors import Problem

Int3 = tuple[int, int, int]
Float3 = tuple[float, float, float]


@dataclass(frozen=True, slots=True, eq=False)
class Grid:
    """shape (z, y, x) and affine (4, 4) float64, voxel index (z, y, x, 1) → RAS mm (x, y, z, 1)."""

    shape: Int3
    affine: NDArray[np.float64]

    def __post_init__(self) -> None:
        if self.affine.shape != (4, 4):
            raise ValueError(f"affine has shape {self.affine.shape}, expected (4, 4)")
        if len(self.shape) != 3 or min(self.shape) < 1:
            raise ValueError(f"grid shape {self.shape} is not three positive sizes")
        self.affine.setflags(write=False)

    @property
    def spacing_mm(self) -> Float3:
        """Distance between neighbouring voxel centres along z, y, x."""
        z, y, x = np.linalg.norm(self.affine[:3, :3], axis=0)
        return float(z), float(y), float(x)

    def corner_displacement_voxels(self, other: Grid) -> float:
        """Largest distance between the same corner voxel of two grids, in voxels of the finer axis of this grid."""
        last = np.array(self.shape, dtype=np.float64) - 1
        corners = np.array([[*(last * np.array(c)), 1.0] for c in np.ndindex(2, 2, 2)])
        difference = corners @ (self.affine - other.affine).T
        return float(np.linalg.norm(difference[:, :3], axis=1).max() / min(self.spacing_mm))


@dataclass(frozen=True, slots=True, eq=False)
class Source:
    """Where a volume came from, enough to write a label map on the same file grid with the same header.

    ``header`` is the raw NIfTI-1/2 header (348 or 540 bytes), empty for other formats; ``geometry`` holds the lines
    of a MetaImage header that place the voxels, empty for other formats. Array order is the file's order reversed:
    voxel (i, j, k) on disk is (k, j, i) here.
    """

    path: str
    file_format: str
    header: bytes = b""
    geometry: str = ""


@dataclass(frozen=True, slots=True, eq=False)
class Volume:
    """array (C, Z, Y, X) of the file's own type, on ``grid``; not yet in canonical orientation.

    ``missing`` are channels that the case does not have: zeros here, and zeros again after normalisation.
    """

    array: NDArray[np.generic]
    grid: Grid
    source: Source = field(default_factory=lambda: Source("", ""))
    notes: tuple[Problem, ...] = ()
    missing: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if self.array.ndim != 4 or self.array.shape[1:] != self.grid.shape:
            raise ValueError(f"array {self.array.shape} does not lie on a grid of {self.grid.shape}")
