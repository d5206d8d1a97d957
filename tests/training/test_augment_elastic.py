"""Elastic deformation: against scipy's splines, never folded, in plane for thick slices, off unless asked for."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy import ndimage as ndi
from scipy import stats
from scipy.interpolate import BSpline

from medseg.training.augment import Augmentation, Box, Geometry, apply_spatial, draw
from medseg.training.warp import INTERVALS, LARGEST_SPREAD, Elastic, Spatial, spline_weights

PATCH = (9, 14, 11)
CPU = torch.device("cpu")
STRONG = Spatial((0, 0, 0), 1.0, False, Elastic(LARGEST_SPREAD, 5))


def displacements(spatial: Spatial, patch: tuple[int, int, int]) -> np.ndarray:
    """(3, *patch) in patch voxels, by scipy's B-splines on a grid that goes one interval beyond the patch."""
    assert spatial.elastic is not None
    field = spatial.elastic.controls(patch, spatial.flat)
    for axis, size in enumerate(patch):
        if field.shape[axis + 1] == 1:
            field = field.repeat(size, axis + 1)
            continue
        interval = (size - 1) / INTERVALS
        knots = (np.arange(INTERVALS + 7) - 3) * interval
        field = BSpline(knots, np.moveaxis(field, axis + 1, 0), 3)(np.arange(size))
        field = np.moveaxis(field, 0, axis + 1)
    return field


def positions(spatial: Spatial, patch: tuple[int, int, int], centre: tuple[float, ...]) -> np.ndarray:
    """(3, *patch) in voxels of the box."""
    offsets = np.stack(np.meshgrid(*[np.arange(n) - (n - 1) / 2 for n in patch], indexing="ij"))
    moved = offsets + displacements(spatial, patch)
    return np.einsum("ij,j...->i...", spatial.matrix(), moved) + np.reshape(centre, (3, 1, 1, 1))


@pytest.mark.parametrize(
    "spatial",
    [
        STRONG,
        Spatial((0.5, -0.3, 0.2), 1.3, False, Elastic(0.05, 1)),
        Spatial((2.5, 0, 0), 0.8, True, Elastic(LARGEST_SPREAD, 2)),
    ],
)
def test_images_and_labels_are_sampled_where_scipys_splines_say(spatial):
    shape, centre = (15, 22, 19), (7.3, 10.1, 9.6)
    rng = np.random.default_rng(0)
    image = rng.normal(size=shape).astype(np.float32)
    labels = rng.integers(0, 3, (4, 6, 5)).repeat(4, 0).repeat(4, 1).repeat(4, 2)[:15, :22, :19].astype(np.int8)
    box = Box(torch.from_numpy(image[None]), torch.from_numpy(labels[None]), ((1, 2),), centre)
    found, found_labels = apply_spatial(box, spatial, PATCH)
    where = positions(spatial, PATCH, centre)
    expected = ndi.map_coordinates(image.astype(float), where, order=1, mode="grid-constant")
    np.testing.assert_allclose(found[0].numpy(), expected, atol=5e-5)
    shares = [ndi.map_coordinates((labels == v).astype(float), where, order=1, mode="grid-constant") for v in (1, 2)]
    stacked = np.stack([1 - sum(shares), *shares])
    ranked = np.sort(stacked, axis=0)
    clear = ranked[-1] - ranked[-2] > 1e-3
    assert clear.mean() > 0.9
    assert np.array_equal(found_labels[0].numpy()[clear], stacked.argmax(0)[clear])


@pytest.mark.parametrize(("size", "controls"), [(9, 5), (40, 5), (7, 8), (2, 5), (1, 5), (6, 1)])
def test_weights_are_a_partition_of_one(size, controls):
    weights = spline_weights(size, controls)
    assert weights.shape == (size, controls)
    assert (weights >= 0).all()
    np.testing.assert_allclose(weights.sum(1), 1)


@pytest.mark.parametrize("patch", [(9, 14, 11), (24, 40, 32), (5, 5, 5)])
@pytest.mark.parametrize("flat", [False, True])
def test_nothing_is_folded(patch, flat):
    for seed in range(40):
        where = positions(Spatial((0, 0, 0), 1.0, flat, Elastic(LARGEST_SPREAD, seed)), patch, (0, 0, 0))
        jacobian = np.stack([np.stack(np.gradient(one), -1) for one in where], -2)
        assert np.linalg.det(jacobian).min() > 0


@pytest.mark.parametrize("flat", [False, True])
def test_no_voxel_goes_further_than_the_reach_says(flat):
    for seed in range(40):
        spatial = Spatial((0.4, 0, 0), 1.2, flat, Elastic(LARGEST_SPREAD, seed))
        furthest = np.abs(positions(spatial, PATCH, (0, 0, 0))).max(axis=(1, 2, 3))
        assert (furthest <= spatial.reach(PATCH) + 1e-9).all()
        assert (spatial.reach(PATCH) > replace(spatial, elastic=None).reach(PATCH))[1:].all()


def test_thick_slices_are_deformed_in_plane_and_alike():
    moved = displacements(Spatial((0, 0, 0), 1.0, True, Elastic(0.05, 3)), PATCH)
    assert not moved[0].any()
    assert (moved == moved[:, :1]).all()
    assert np.abs(moved[1:]).max() > 0.1


def test_displacements_follow_the_edges_of_the_patch():
    small, large = (np.abs(Elastic(0.05, 3).controls(p, False)) for p in ((9, 14, 11), (17, 27, 21)))
    np.testing.assert_allclose(large, 2 * small)


def test_a_patch_of_one_voxel_along_an_axis_is_sampled():
    for patch in ((1, 8, 6), (4, 1, 6), (1, 1, 1)):
        grid = STRONG.grid(patch, (3.0, 4.0, 5.0), (7, 9, 11), CPU)
        assert grid.shape == (*patch, 3)
        assert torch.isfinite(grid).all()


def draws(elastic: float, count: int = 6000) -> list[Augmentation]:
    rng = np.random.default_rng(4)
    return [draw(rng, Geometry.of((24, 40, 32), elastic), 1, (0, 1)) for _ in range(count)]


def test_it_happens_as_often_as_asked_for_and_fills_its_range():
    drawn = [a.spatial.elastic for a in draws(0.3) if a.spatial is not None and a.spatial.elastic is not None]
    assert stats.binomtest(len(drawn), 6000, 0.3).pvalue > 1e-4
    spreads = np.array([one.spread for one in drawn]) / LARGEST_SPREAD
    assert stats.kstest(spreads, "uniform").pvalue > 1e-4
    assert len({one.seed for one in drawn}) == len(drawn)


def test_rotation_and_zoom_are_as_likely_with_it_as_without():
    drawn = draws(1.0)
    assert all(a.spatial is not None for a in drawn)
    turned = sum(any(a.spatial.angles) for a in drawn if a.spatial is not None)
    zoomed = sum(a.spatial.zoom != 1 for a in drawn if a.spatial is not None)
    assert stats.binomtest(turned, 6000, 0.2).pvalue > 1e-4
    assert stats.binomtest(zoomed, 6000, 0.2).pvalue > 1e-4


def test_nothing_else_is_drawn_where_it_is_off():
    rng, other = np.random.default_rng(4), np.random.default_rng(4)
    for _ in range(200):
        off = draw(rng, Geometry.of((24, 40, 32)), 1, (0, 1))
        assert off == draw(other, Geometry.of((24, 40, 32), 0.0), 1, (0, 1))
        assert off.spatial is None or off.spatial.elastic is None


def test_the_same_record_gives_the_same_deformation():
    box = Box(torch.randn(1, 12, 18, 15), torch.zeros(1, 12, 18, 15, dtype=torch.int8), ((),), (5.5, 8.5, 7.0))
    first, again = (apply_spatial(box, STRONG, PATCH)[0] for _ in range(2))
    other, _ = apply_spatial(box, replace(STRONG, elastic=Elastic(LARGEST_SPREAD, 6)), PATCH)
    assert torch.equal(first, again)
    assert not torch.allclose(first, other)
