"""Geometry against nibabel, and by properties over all 48 orientations of oblique volumes."""

from __future__ import annotations

from itertools import permutations, product

import nibabel as nib
import numpy as np
import pytest
import scipy.linalg
from hypothesis import given, settings
from hypothesis import strategies as st
from phantoms import affine_ijk

from medseg.errors import InputError
from medseg.imaging.geometry import (
    NAMED_UNIT_SMALLEST_MM,
    canonical_axes,
    canonical_grid,
    compare_grids,
    from_canonical,
    grid_from_nifti,
    judge_affine,
    nifti_affine,
    shear,
    to_canonical,
)
from medseg.records.grid import Grid

SHAPE = (5, 7, 4)
ORIENTATIONS = [(axes, signs) for axes in permutations(range(3)) for signs in product((1, -1), repeat=3)]
ANGLES = [(0, 0, 0), (8, -5, 12), (30, 20, -35), (45, 0, 0), (0, 0, 45), (45, 45, 0), (0, -45, 90), (60, 30, 45)]


def stored(array: np.ndarray, affine: np.ndarray, axes: tuple, signs: tuple) -> tuple[np.ndarray, np.ndarray]:
    """The same (i, j, k) volume as a file would hold it with permuted and flipped axes."""
    orientation = np.stack([axes, signs], axis=1)
    moved = nib.orientations.apply_orientation(array, orientation)
    return moved, affine @ nib.orientations.inv_ornt_aff(orientation, array.shape)


def volume(degrees: tuple = (8, -5, 12)) -> tuple[np.ndarray, np.ndarray]:
    return np.arange(np.prod(SHAPE)).reshape(SHAPE), affine_ijk(degrees=degrees)


def in_file_order(array: np.ndarray, affine: np.ndarray) -> tuple[np.ndarray, Grid]:
    return array.T, grid_from_nifti(affine, array.shape)


def test_array_order_is_the_reversed_file_order() -> None:
    affine = affine_ijk()
    grid = grid_from_nifti(affine, SHAPE)
    assert grid.shape == SHAPE[::-1]
    assert np.allclose(grid.affine @ [3, 2, 1, 1], affine @ [1, 2, 3, 1])
    assert np.array_equal(nifti_affine(grid), affine)


@pytest.mark.parametrize("degrees", ANGLES[:3])
@pytest.mark.parametrize(("axes", "signs"), ORIENTATIONS)
def test_canonical_view_is_what_nibabel_finds(axes: tuple, signs: tuple, degrees: tuple) -> None:
    array, affine = stored(*volume(degrees), axes, signs)
    ours, grid = in_file_order(array, affine)
    theirs = nib.as_closest_canonical(nib.Nifti1Image(array.astype(np.int16), affine))
    assert np.array_equal(to_canonical(ours, *canonical_axes(grid)).T, theirs.get_fdata())
    assert np.allclose(nifti_affine(canonical_grid(grid)), theirs.affine)


@pytest.mark.parametrize("degrees", ANGLES)
def test_the_way_a_file_stores_its_axes_never_changes_the_canonical_view(degrees: tuple) -> None:
    views, grids = [], []
    for axes, signs in ORIENTATIONS:
        array, grid = in_file_order(*stored(*volume(degrees), axes, signs))
        views.append(to_canonical(array, *canonical_axes(grid)))
        grids.append(canonical_grid(grid))
    for view, grid in zip(views, grids, strict=True):
        assert np.array_equal(view, views[0])
        assert np.allclose(grid.affine, grids[0].affine, atol=1e-9)
    assert grids[0].shape in set(permutations(SHAPE))


angle = st.floats(-180, 180, allow_nan=False)


@settings(max_examples=80, deadline=None)
@given(degrees=st.tuples(angle, angle, angle), which=st.sampled_from(ORIENTATIONS))
def test_any_rotation_has_one_canonical_view_that_grows_to_superior_anterior_right(
    degrees: tuple, which: tuple
) -> None:
    first, grid = in_file_order(*volume(degrees))
    other, other_grid = in_file_order(*stored(*volume(degrees), *which))
    canonical = canonical_grid(grid)
    assert np.array_equal(to_canonical(first, *canonical_axes(grid)), to_canonical(other, *canonical_axes(other_grid)))
    assert np.allclose(canonical.affine, canonical_grid(other_grid).affine, atol=1e-6)
    assert np.all(canonical.affine[(2, 1, 0), (0, 1, 2)] >= -1e-9)
    assert canonical_axes(canonical) == ((0, 1, 2), (False, False, False))


@pytest.mark.parametrize(("axes", "signs"), ORIENTATIONS)
def test_from_canonical_undoes_to_canonical_without_copying(axes: tuple, signs: tuple) -> None:
    array, grid = in_file_order(*stored(*volume(), axes, signs))
    channels = np.stack([array, array * 2])
    for x in (array, channels):
        there = to_canonical(x, *canonical_axes(grid))
        back = from_canonical(there, *canonical_axes(grid))
        assert np.array_equal(back, x)
        assert np.shares_memory(back, x)


def test_canonical_grid_places_every_voxel_where_it_was() -> None:
    array, grid = in_file_order(*stored(*volume((30, 20, -35)), (1, 2, 0), (-1, 1, -1)))
    canonical, view = canonical_grid(grid), to_canonical(array, *canonical_axes(grid))
    for index in np.ndindex(*view.shape):
        source = np.argwhere(array == view[index])[0]
        assert np.allclose(canonical.affine @ [*index, 1], grid.affine @ [*source, 1])


def test_shear_is_nothing_for_rotations_and_grows_with_the_angle() -> None:
    affine = affine_ijk()
    assert shear(affine) < 1e-12
    affine[:3, 0] += 0.05 * affine[:3, 1]
    assert 0.04 < shear(affine) < 0.08


@pytest.mark.parametrize(
    ("voxels", "code"), [(0, None), (0.01, None), (0.09, None), (0.4, "W0120"), (0.6, "E0120"), (40, "E0120")]
)
def test_grids_are_compared_by_the_displacement_of_their_corners(voxels: float, code: str | None) -> None:
    affine = affine_ijk()
    moved = affine.copy()
    moved[:3, 3] += voxels * affine[:3, 0]
    problem = compare_grids(grid_from_nifti(affine, SHAPE), grid_from_nifti(moved, SHAPE), "label against image")
    assert (problem and problem.code) == code


def test_a_flipped_axis_of_the_same_shape_is_another_grid() -> None:
    array, affine = volume()
    grid, flipped = (in_file_order(*stored(array, affine, (0, 1, 2), s))[1] for s in ((1, 1, 1), (-1, 1, 1)))
    mirrored = Grid(grid.shape, grid.affine @ np.diag([1.0, 1, -1, 1]))
    assert compare_grids(grid, flipped, "label").code == "E0120"
    assert compare_grids(grid, mirrored, "label").code == "E0120"


def test_another_shape_is_said_with_both_shapes() -> None:
    problem = compare_grids(grid_from_nifti(np.eye(4), (4, 5, 6)), grid_from_nifti(np.eye(4), (6, 5, 4)), "label")
    assert problem.code == "E0119"
    assert "(4, 5, 6)" in str(problem)
    assert "(6, 5, 4)" in str(problem)


# Judging an affine


def sheared(amount: float, spacing: tuple = (0.9, 1.1, 2.0)) -> np.ndarray:
    """x leans towards y by ``amount`` (tangent of the angle)."""
    affine = affine_ijk(spacing)
    affine[:3, 0] += amount * affine[:3, 1] * spacing[0] / spacing[1]
    return affine


def refusal(affine: np.ndarray, shape: tuple = (300, 200, 100), **limits: float) -> str:
    with pytest.raises(InputError) as error:
        judge_affine(affine, shape, "a.nrrd: space directions", **limits)
    assert all(problem.measured.startswith("a.nrrd: space directions ") for problem in error.value.problems)
    assert all(problem.action for problem in error.value.problems)
    return " ".join(problem.code for problem in error.value.problems)


@pytest.mark.parametrize("amount", [0, 1e-6, 2e-5])
def test_rounding_is_taken_as_it_is(amount: float) -> None:
    grid, problems = judge_affine(sheared(amount), (300, 200, 100), "a")
    assert np.array_equal(nifti_affine(grid), sheared(amount))
    assert problems == ()


@pytest.mark.parametrize("mirror", [1, -1])
def test_a_small_shear_becomes_the_nearest_rotation_about_the_centre(mirror: int) -> None:
    affine, shape = sheared(1e-3) @ np.diag([1, mirror, 1, 1]), (300, 200, 100)
    grid, problems = judge_affine(affine, shape, "a")
    straight = nifti_affine(grid)
    assert [problem.code for problem in problems] == ["W0121"]
    assert shear(straight) < 1e-14
    assert np.allclose(grid.spacing_mm[::-1], np.linalg.norm(affine[:3, :3], axis=0))
    assert np.linalg.det(straight) * np.linalg.det(affine) > 0
    centre = np.append((np.array(shape) - 1) / 2, 1)
    assert np.allclose(straight @ centre, affine @ centre)
    nearest, _ = scipy.linalg.polar(affine[:3, :3] / np.linalg.norm(affine[:3, :3], axis=0))
    assert np.allclose(straight[:3, :3] / np.linalg.norm(straight[:3, :3], axis=0), nearest)
    moved = grid.corner_displacement_voxels(grid_from_nifti(affine, shape))
    assert f"{moved:.3g} voxels" in problems[0].measured


def test_the_same_shear_moves_the_corners_of_a_larger_volume_further() -> None:
    assert judge_affine(sheared(3e-3), (100, 100, 100), "a")[1][0].code == "W0121"
    assert refusal(sheared(3e-3), (900, 900, 900)) == "E0121"


def test_no_volume_is_small_enough_for_a_tilt_of_more_than_a_degree() -> None:
    assert judge_affine(sheared(0.015), (6, 5, 4), "a")[1][0].code == "W0121"
    assert refusal(sheared(0.02), (6, 5, 4)) == "E0121"
    assert refusal(sheared(0.3), (2, 2, 1)) == "E0121"


@pytest.mark.parametrize(
    ("column", "code"),
    [
        ((0, 0, 0), "E0124"),
        ((np.nan, 0, 0), "E0121"),
        ((np.inf, 0, 0), "E0121"),
        ((1e200, 0, 0), "E0124"),
        ((0, 1.1, 0), "E0121"),
        ((1e-9, 0, 0), "E0125"),
        ((5e-4, 0, 0), "E0125"),
        ((101, 0, 0), "E0125"),
        ((1e6, 0, 0), "E0125"),
    ],
)
def test_an_axis_that_no_device_makes_is_refused(column: tuple, code: str) -> None:
    affine = np.diag([1.0, 1.1, 2.0, 1.0])
    affine[:3, 0] = column
    assert refusal(affine) == code


def test_an_origin_beyond_a_kilometre_is_refused() -> None:
    assert refusal(affine_ijk(origin=(0, 2e6, 0))) == "E0121"
    assert refusal(affine_ijk(origin=(0, np.nan, 0))) == "E0121"
    judge_affine(affine_ijk(origin=(0, 9e5, 0)), (3, 4, 5), "a")


def test_nanometres_are_believed_where_the_unit_is_named() -> None:
    affine = np.diag([4e-6, 4e-6, 5e-5, 1.0])
    assert refusal(affine) == "E0125"
    assert judge_affine(affine, (9, 8, 7), "a", NAMED_UNIT_SMALLEST_MM)[1] == ()


@pytest.mark.parametrize(("axes", "signs"), ORIENTATIONS)
def test_every_orientation_is_sound(axes: tuple, signs: tuple) -> None:
    array, affine = stored(*volume(), axes, signs)
    grid, problems = judge_affine(affine, array.shape, "a")
    assert problems == ()
    assert np.array_equal(nifti_affine(grid), affine)
