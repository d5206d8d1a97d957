"""Geometry: the one module that converts between NIfTI's axes, our array axes and the canonical orientation.

NIfTI stores voxels as (i, j, k) with an affine to RAS millimetres. Our arrays are the file's bytes read in C order,
(z, y, x) = (k, j, i), so nothing is moved on reading. In the canonical orientation the index grows towards superior,
anterior and right along z, y and x; ``to_canonical`` and ``from_canonical`` are views that permute and flip.
"""

from __future__ import annotations

from collections.abc import Iterable
from itertools import permutations
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from medseg.errors import InputError, Problem
from medseg.records.grid import Grid, Int3

Flips = tuple[bool, bool, bool]
Scalar = TypeVar("Scalar", bound=np.generic)

SAME_GRID_VOXELS = 0.1
CLOSE_GRID_VOXELS = 0.5

SKEW_SILENT_VOXELS = 0.01  # direction cosines written with four or more digits
SKEW_REFUSED_VOXELS = 0.5
SKEW_REFUSED_DEGREES = 1.0  # of a small volume even a tilted gantry moves no corner by half a voxel

SPACING_MM = (1e-3, 100.0)
NAMED_UNIT_SMALLEST_MM = 1e-6  # one nanometre: electron microscopy, believed where the header names its unit
ORIGIN_MM = 1e6  # a kilometre; float32, which most headers hold, has no tenths of a millimetre beyond
ONE_SLICE_LARGEST_MM = 5e3  # along an axis of one voxel, no distance is ever taken: 2D files say 999 there

_REVERSED = [2, 1, 0, 3]
_WORLD_OF_CANONICAL = (2, 1, 0)  # canonical z, y, x run along the world's S, A, R: rows 2, 1, 0 of an affine


def grid_from_nifti(affine_ijk: NDArray[np.float64], shape_ijk: Int3) -> Grid:
    """The grid of a NIfTI volume from its affine (i, j, k, 1) → RAS mm and its shape (i, j, k)."""
    i, j, k = shape_ijk
    return Grid((k, j, i), np.array(affine_ijk, dtype=np.float64)[:, _REVERSED])


def nifti_affine(grid: Grid) -> NDArray[np.float64]:
    """The affine (i, j, k, 1) → RAS mm, (4, 4) float64, that a NIfTI file on this grid has."""
    return grid.affine[:, _REVERSED]


def judge_affine(
    affine_ijk: NDArray[np.float64], shape_ijk: Int3, what: str, smallest_mm: float = SPACING_MM[0]
) -> tuple[Grid, tuple[Problem, ...]]:
    """The grid that a header's affine stands for, and the warnings about it: one judgement for all file formats.

    Axes that are not quite perpendicular are turned by the least that makes them so (polar decomposition; spacing
    and the centre of the volume stay); the caller keeps the file's own numbers for its output. Reflections are
    orientations like any other. Up to 0.01 voxel of corner displacement the affine is taken as it is.

    Args:
        affine_ijk: (4, 4), voxel index (i, j, k, 1), fastest axis first → RAS mm. Formats in LPS negate rows 0, 1.
        shape_ijk: voxels along i, j, k.
        what: file and field for the messages: ``"ct.nrrd: space directions"``.
        smallest_mm: lower limit of the spacing; ``NAMED_UNIT_SMALLEST_MM`` where the header names its unit.

    Returns:
        The grid with perpendicular axes, and W0121 if they had to be turned.

    Raises:
        InputError: E0121 not finite, a kilometre away, singular, or axes more than 1 degree or 0.5 voxel from
            perpendicular; E0124 spacing zero; E0125 spacing implausible (fault catalogue F07, F09).
    """
    affine = np.array(affine_ijk, np.float64)
    if not np.isfinite(affine).all():
        raise _refused("E0121", what, "is not finite", "finite numbers", "restore the header from the original images")
    if (distance := float(np.abs(affine[:3, 3]).max())) > ORIGIN_MM:
        action = "restore the header from the original images"
        raise _refused("E0121", what, f"has its origin {distance:.3g} mm away", f"at most {ORIGIN_MM:g} mm", action)
    with np.errstate(over="ignore", under="ignore"):
        spacing = np.linalg.norm(affine[:3, :3], axis=0)
    if spacing.min() == 0:
        raise _refused("E0124", what, f"spacing {listed(spacing)}", "positive numbers", "correct the header")
    judge_spacing(spacing, shape_ijk, what, smallest_mm)
    if abs(np.linalg.det(affine[:3, :3] / spacing)) < 1e-6:
        raise _refused("E0121", what, "is singular", "three independent axes", "restore it from the original images")
    straight = _perpendicular(affine, shape_ijk)
    grid = grid_from_nifti(straight, shape_ijk)
    moved = grid.corner_displacement_voxels(grid_from_nifti(affine, shape_ijk))
    degrees = float(np.degrees(np.arcsin(min(1.0, shear(affine)))))
    measured = f"axes deviate from perpendicular by {degrees:.3g} degrees, {moved:.3g} voxels at the corners"
    if moved > SKEW_REFUSED_VOXELS or degrees > SKEW_REFUSED_DEGREES:
        expected = f"at most {SKEW_REFUSED_DEGREES:g} degree and {SKEW_REFUSED_VOXELS} voxels"
        raise _refused("E0121", what, measured, expected, "resample it onto perpendicular axes")
    if moved > SKEW_SILENT_VOXELS:
        action = "the nearest perpendicular axes are used, outputs keep the file's own"
        return grid, (Problem("W0121", f"{what} {measured}", f"at most {SKEW_SILENT_VOXELS} voxels", action),)
    return grid_from_nifti(affine, shape_ijk), ()


def judge_spacing(spacing_mm: NDArray[np.float64], shape: Int3, what: str, smallest_mm: float = SPACING_MM[0]) -> None:
    """Refuse a spacing (3,) that no device produces, along axes of ``shape`` voxels in the same order.

    Raises:
        InputError: E0124 zero, negative or not finite; E0125 implausible.
    """
    if not (np.isfinite(spacing_mm).all() and (spacing_mm > 0).all()):
        raise _refused("E0124", what, f"spacing {listed(spacing_mm)}", "positive numbers", "correct the header")
    largest = np.where(np.array(shape) > 1, SPACING_MM[1], ONE_SLICE_LARGEST_MM)
    if spacing_mm.min() < smallest_mm * (1 - 1e-6) or (spacing_mm > largest * (1 + 1e-6)).any():
        expected = f"{smallest_mm:g} to {SPACING_MM[1]:g} mm"
        action = "correct the spacing, or the unit that the header names"
        raise _refused("E0125", what, f"spacing {listed(spacing_mm)} mm", expected, action)


def listed(values: Iterable[float]) -> str:
    """Numbers for a message: four digits each, apart by a blank."""
    return " ".join(f"{float(v):.4g}" for v in values)


def shear(affine: NDArray[np.float64]) -> float:
    """How far the axes are from being perpendicular: max |RᵀR - 1| of the unit axis directions, 0 for a rotation.

    It is the sine of the angle by which the worst pair of axes misses 90 degrees.
    """
    directions = affine[:3, :3] / np.linalg.norm(affine[:3, :3], axis=0)
    return float(np.abs(directions.T @ directions - np.eye(3)).max())


def _perpendicular(affine: NDArray[np.float64], shape_ijk: Int3) -> NDArray[np.float64]:
    """The affine with the nearest perpendicular axes, of the same spacing, handedness and centre."""
    spacing = np.linalg.norm(affine[:3, :3], axis=0)
    left, _, right = np.linalg.svd(affine[:3, :3] / spacing)
    straight = affine.copy()
    straight[:3, :3] = left @ right * spacing
    straight[:3, 3] += (affine - straight)[:3, :3] @ ((np.array(shape_ijk) - 1) / 2)
    return straight


def _refused(code: str, what: str, measured: str, expected: str, action: str) -> InputError:
    return InputError(Problem(code, f"{what} {measured}", expected, action))


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
