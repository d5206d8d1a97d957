"""Geometry: the one module that converts between NIfTI's axes, our array axes and the canonical orientation.

NIfTI stores voxels as (i, j, k) with an affine to RAS millimetres. Our arrays are the file's bytes read in C order,
(z, y, x) = (k, j, i), so nothing is moved on reading. In the canonical orientation the index grows towards superior,
anterior and right along z, y and x; ``to_canonical`` and ``from_canonical`` are views that permute and flip.
"""

from __future__ import annotations

from itertools import permutations
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from medseg.errors import Problem
from medseg.records.grid import Grid, Int3

Flips = tuple[bool, bool, bool]
Scalar = TypeVar("Scalar", bound=np.generic)

SAME_GRID_VOXELS = 0.1
CLOSE_GRID_VOXELS = 0.5

_REVERSED = [2, 1, 0, 3]
_WORLD_OF_CANONICAL = (2, 1, 0)  # canonical z, y, x run along the world's S, A, R: rows 2, 1, 0 of an affine


def grid_from_nifti(affine_ijk: NDArray[np.float64], shape_ijk: Int3) -> Grid:
    """The grid of a NIfTI volume from its affine (i, j, k, 1) → RAS mm and its shape (i, j, k)."""
    i, j, k = shape_ijk
    return Grid((k, j, i), np.array(affine_ijk, dtype=np.float64)[:, _REVERSED])


def nifti_affine(grid: Grid) -> NDArray[np.float64]:
    """The affine (i, j, k, 1) → RAS mm, (4, 4) float64, that a NIfTI file on this grid has."""
    return grid.affine[:, _REVERSED]


def shear(affine: NDArray[np.float64]) -> float:
    """How far the axes are from being perpendicular: max |RᵀR - 1| of the unit axis directions, 0 for a rotation."""
    directions = affine[:3, :3] / np.linalg.norm(affine[:3, :3], axis=0)
    return float(np.abs(directions.T @ directions - np.eye(3)).max())


def canonical_axes(grid: Grid) -> tuple[Int3, Flips]:
    """For each canonical axis (z, y, x) the array axis it is taken from, and whether that axis is reversed.

    Of the six ways to pair array axes with world axes the one with the largest sum of direction cosines is taken.
    Ties (a volume turned by exactly 45 degrees) are broken by the directions themselves and never by the order of the
    file's axes: however a file's axes are permuted and flipped, its canonical view holds the same voxels in the same
    order. (nibabel's ``io_orientation`` agrees away from ties.)
    """
    directions = grid.affine[:3, :3] / np.linalg.norm(grid.affine[:3, :3], axis=0)

    def preference(axes: tuple[int, ...]) -> tuple[float, ...]:
        chosen = directions[:, axes] * np.where(_falling(directions, axes), -1.0, 1.0)
        cosines = chosen[_WORLD_OF_CANONICAL, (0, 1, 2)]
        return tuple(float(v) + 0.0 for v in np.round([cosines.sum(), *cosines, *chosen.ravel()], 6))

    z, y, x = max(permutations(range(3)), key=preference)
    flipped = _falling(directions, (z, y, x))
    return (z, y, x), (bool(flipped[0]), bool(flipped[1]), bool(flipped[2]))


def _falling(directions: NDArray[np.float64], axes: tuple[int, ...]) -> NDArray[np.bool_]:
    """Which of the axes, in canonical order, run towards inferior, posterior or left."""
    return np.asarray(directions[_WORLD_OF_CANONICAL, axes] < 0)


def to_canonical(array: NDArray[Scalar], axes: Int3, flipped: Flips) -> NDArray[Scalar]:
    """View of ``array`` (…, Z, Y, X) in canonical orientation; leading axes stay where they are."""
    lead = array.ndim - 3
    return _flip(np.transpose(array, (*range(lead), *(lead + axis for axis in axes))), flipped)


def from_canonical(array: NDArray[Scalar], axes: Int3, flipped: Flips) -> NDArray[Scalar]:
    """View of a canonical ``array`` (…, Z, Y, X) on the source file's axes; the inverse of ``to_canonical``."""
    lead = array.ndim - 3
    back = [axes.index(axis) for axis in range(3)]
    return np.transpose(_flip(array, flipped), (*range(lead), *(lead + axis for axis in back)))


def _flip(array: NDArray[Scalar], flipped: Flips) -> NDArray[Scalar]:
    z, y, x = (slice(None, None, -1 if flip else 1) for flip in flipped)
    return array[..., z, y, x]


def canonical_grid(grid: Grid) -> Grid:
    """The grid of the canonical view: the same voxels, counted towards superior, anterior, right."""
    axes, flipped = canonical_axes(grid)
    z, y, x = (grid.shape[axis] for axis in axes)
    step = np.zeros((4, 4))
    step[3, 3] = 1
    for canonical, (source, flip) in enumerate(zip(axes, flipped, strict=True)):
        step[source, canonical] = -1 if flip else 1
        step[source, 3] = grid.shape[source] - 1 if flip else 0
    return Grid((z, y, x), grid.affine @ step)


def compare_grids(expected: Grid, found: Grid, what: str) -> Problem | None:
    """What is wrong with ``found`` where ``expected`` was wanted, or None; ``what`` names both in the message.

    Corners may lie up to 0.1 voxel apart (rounding of float32 headers); up to 0.5 voxel is a warning. Rules F06 of
    the fault catalogue: nothing is resampled silently, and left and right are never guessed.
    """
    if found.shape != expected.shape:
        return Problem(
            "E0119", f"{what}: shape {found.shape} (z, y, x)", str(expected.shape), "export both on the same grid"
        )
    moved = expected.corner_displacement_voxels(found)
    if moved <= SAME_GRID_VOXELS:
        return None
    millimetres = moved * min(expected.spacing_mm)
    measured = f"{what}: corners lie {moved:.3g} voxels ({millimetres:.3g} mm) apart"
    if moved <= CLOSE_GRID_VOXELS:
        return Problem("W0120", measured, f"at most {SAME_GRID_VOXELS}", "check how the files were exported")
    return Problem(
        "E0120", measured, f"at most {CLOSE_GRID_VOXELS}", "resample one onto the other, or correct a header"
    )
