"""Surface area against SimpleITK, marching cubes and the formulas of ball and ellipsoid."""

from __future__ import annotations

import math

import numpy as np
import pytest
import SimpleITK
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from skimage.measure import marching_cubes, mesh_surface_area

from medseg.evaluation.groups import masks_as_groups
from medseg.evaluation.measurement import measure
from medseg.evaluation.outlines import outlines
from medseg.evaluation.surface import areas_mm2


def surface_area_mm2(mask, spacing) -> float:
    leaving = outlines(masks_as_groups(mask, mask), (1, 1, 1))[0].leaving
    return float(areas_mm2(leaving, spacing)[1])


def ellipsoid(radii_mm, spacing, centre=(0.3, 0.1, 0.4)) -> np.ndarray:
    half = [math.ceil(r / s) + 2 for r, s in zip(radii_mm, spacing, strict=True)]
    axes = [(np.arange(-h, h + 1) + c) * s for h, s, c in zip(half, spacing, centre, strict=True)]
    z, y, x = np.meshgrid(*axes, indexing="ij")
    return (z / radii_mm[0]) ** 2 + (y / radii_mm[1]) ** 2 + (x / radii_mm[2]) ** 2 <= 1


def ellipsoid_area(a: float, b: float, c: float) -> float:
    """By integration of the surface element."""
    u, v = (np.arange(2000) + 0.5) / 2000 * math.pi, (np.arange(500) + 0.5) / 500 * 2 * math.pi
    su, cu = np.sin(u)[:, None], np.cos(u)[:, None]
    element = su * np.sqrt((b * c * su * np.cos(v)) ** 2 + (a * c * su * np.sin(v)) ** 2 + (a * b * cu) ** 2)
    return float(element.mean() * math.pi * 2 * math.pi)


@settings(max_examples=30, deadline=None)
@given(hnp.arrays(bool, st.tuples(st.integers(2, 5), st.integers(2, 6), st.integers(2, 7))), st.floats(0.2, 5))
def test_in_cubic_voxels_it_is_simpleitks_perimeter(mask, side):
    image = SimpleITK.GetImageFromArray(np.pad(mask, 2).astype(np.uint8))
    image.SetSpacing((side,) * 3)
    shape = SimpleITK.LabelShapeStatisticsImageFilter()
    shape.Execute(image)
    expected = shape.GetPerimeter(1) if mask.any() else 0.0
    assert surface_area_mm2(mask, (side,) * 3) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("spacing", [(1.0, 1.0, 1.0), (2.0, 0.8, 1.1), (4.0, 0.7, 0.7)])
def test_balls_and_ellipsoids_have_the_area_of_their_formula(spacing):
    assert surface_area_mm2(ellipsoid((18.0, 18.0, 18.0), spacing), spacing) == pytest.approx(
        4 * math.pi * 18**2, rel=0.03
    )
    radii = (22.0, 11.0, 15.0)
    assert surface_area_mm2(ellipsoid(radii, spacing), spacing) == pytest.approx(ellipsoid_area(*radii), rel=0.05)


def test_thick_slices_are_judged_better_than_with_the_weights_of_cubes():
    spacing, radius = (4.0, 0.7, 0.7), 18.0
    mask = ellipsoid((radius,) * 3, spacing)
    image = SimpleITK.GetImageFromArray(np.pad(mask, 2).astype(np.uint8))
    image.SetSpacing(spacing[::-1])
    shape = SimpleITK.LabelShapeStatisticsImageFilter()
    shape.Execute(image)
    true = 4 * math.pi * radius**2
    assert abs(surface_area_mm2(mask, spacing) - true) < abs(shape.GetPerimeter(1) - true)


def test_it_is_nearer_to_the_truth_than_the_area_of_a_mesh_that_follows_the_voxels():
    spacing, radii = (2.0, 0.8, 1.1), (22.0, 11.0, 15.0)
    mask = ellipsoid(radii, spacing)
    vertices, faces, *_ = marching_cubes(np.pad(mask, 1).astype(float), 0.5, spacing=spacing)
    true = ellipsoid_area(*radii)
    assert abs(surface_area_mm2(mask, spacing) - true) < abs(mesh_surface_area(vertices, faces) - true) < 0.12 * true


def test_axes_do_not_matter_nor_does_what_lies_at_the_edge():
    spacing = (2.0, 0.8, 1.1)
    mask = ellipsoid((9.0, 6.0, 7.0), spacing)[:, 4:, :-3]
    area = surface_area_mm2(mask, spacing)
    turned = np.transpose(mask, (2, 0, 1))[::-1, :, ::-1]
    assert surface_area_mm2(turned, (1.1, 2.0, 0.8)) == pytest.approx(area, rel=1e-9)
    assert surface_area_mm2(np.pad(mask, ((3, 1), (0, 2), (5, 0))), spacing) == pytest.approx(area, rel=1e-12)


def test_nothing_has_no_area_and_a_flat_image_none():
    assert surface_area_mm2(np.zeros((2, 3, 4), bool), (1.0, 2.0, 3.0)) == 0
    something = np.ones((1, 3, 4), bool)
    assert measure(masks_as_groups(something, something), (1.0, 2.0, 3.0))[0].areas_mm2 == (None, None)
