"""Resampling against scipy and skimage, which compute in float64 and in another way."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage as ndi
from skimage.transform import resize

from medseg.imaging.axes import axis_blocks
from medseg.imaging.bands import MOST_TERMS
from medseg.imaging.normalise import Channel
from medseg.imaging.resample import (
    resample_channels,
    resample_image,
    resample_labels,
    resampled_shape,
    separate_axis,
)
from medseg.records.plan import Resampling

ISOTROPIC = (1.0, 1.1, 0.9)
THICK = (5.0, 1.1, 0.9)
SHAPES = [
    ((7, 20, 31), (9, 13, 40)),  # up and down
    ((40, 12, 26), (13, 31, 9)),  # strong shrinking
    ((1, 20, 31), (1, 13, 40)),  # one slice
    ((1, 1, 31), (3, 1, 40)),  # axes of one voxel, one of them grown
    ((9, 5, 1), (1, 2, 1)),  # shrunk to one voxel
    ((2, 3, 4), (70, 3, 41)),  # few voxels to many
    ((300, 4, 3), (20, 5, 3)),  # long axis, several blocks
    ((1, 1, 1), (4, 2, 3)),
]


def noise(shape: tuple[int, ...], seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(40, 30, shape).astype(np.float32)


def skimage_volume(volume: np.ndarray, shape: tuple[int, ...], order: int) -> np.ndarray:
    return resize(volume.astype(np.float64), shape, order, mode="edge", clip=True, anti_aliasing=False)


def skimage_slices(volume: np.ndarray, shape: tuple[int, int, int], axis: int, order: int, order_z: int) -> np.ndarray:
    """nnU-Net's separate z, naively: slice by slice, then a map of coordinates in which only ``axis`` changes."""
    in_plane = tuple(np.delete(shape, axis))
    slices = [skimage_volume(np.take(volume, i, axis), in_plane, order) for i in range(volume.shape[axis])]
    stack = np.stack(slices, axis)
    grid = np.meshgrid(
        *[n / m * (np.arange(m) + 0.5) - 0.5 for n, m in zip(stack.shape, shape, strict=True)], indexing="ij"
    )
    return ndi.map_coordinates(stack, grid, order=order_z, mode="nearest")


def relative_error(result: np.ndarray, expected: np.ndarray, source: np.ndarray) -> float:
    return float(np.abs(result - expected).max() / max(np.ptp(source), 1e-30))


@pytest.mark.parametrize("order", [0, 1, 2, 3])
@pytest.mark.parametrize(("shape", "target"), SHAPES)
def test_volumes_are_resampled_as_skimage_does(shape, target, order):
    image = noise((2, *shape))
    result = resample_image(image, target, ISOTROPIC, ISOTROPIC, Resampling(image_order=order))
    assert result.dtype == np.float32
    for channel, resampled in zip(image, result, strict=True):
        assert relative_error(resampled, skimage_volume(channel, target, order), image) < 1e-6


@pytest.mark.parametrize("axis", [0, 1, 2])
@pytest.mark.parametrize("order_z", [0, 1, 3])
@pytest.mark.parametrize(("depth", "new_depth"), [(6, 10), (10, 6), (7, 7), (1, 4), (5, 20)])
def test_thick_slices_are_resampled_one_by_one_then_between(axis, order_z, depth, new_depth):
    shape, target = list(np.insert([21, 17], axis, depth)), tuple(np.insert([16, 26], axis, new_depth))
    spacing = tuple(np.insert([1.0, 1.1], axis, 5.0))
    image = noise((1, *shape))
    result = resample_image(image, target, spacing, spacing, Resampling(image_order_z=order_z))
    assert relative_error(result[0], skimage_slices(image[0], target, axis, 3, order_z), image) < 1e-6


@settings(max_examples=40, deadline=None)
@given(st.tuples(*[st.integers(1, 24)] * 3), st.tuples(*[st.integers(1, 40)] * 3), st.sampled_from([1, 3]))
def test_any_shape_to_any_shape_as_skimage_does(shape, target, order):
    image = noise((1, *shape), seed=sum(shape))
    result = resample_image(image, target, ISOTROPIC, ISOTROPIC, Resampling(image_order=order))
    assert relative_error(result[0], skimage_volume(image[0], target, order), image) < 1e-6


@pytest.mark.parametrize(("n", "m"), [(50, 31), (31, 50), (700, 650), (640, 33), (5, 5)])
def test_blocks_are_the_rows_of_the_matrix_that_zooms_unit_impulses(n, m):
    for order in (1, 2, 3):
        matrix = np.zeros((m, n))
        for block in axis_blocks(n, m, order):
            matrix[block.rows, block.columns] = block.weights
        dense = ndi.zoom(np.eye(n), (m / n, 1), order=order, mode="nearest", grid_mode=True)
        np.testing.assert_allclose(matrix, dense, atol=1e-7)


@pytest.mark.parametrize("value", [0.0, 1e-3, -1234.56789, 3e30])
def test_a_constant_stays_exactly_that_constant(value):
    image = np.full((1, 9, 14, 11), value, np.float32)
    for spacing in (ISOTROPIC, THICK):
        assert np.unique(resample_image(image, (13, 9, 31), spacing, spacing, Resampling())) == np.float32(value)


def test_the_range_of_the_input_is_kept_per_channel_and_per_thick_slice():
    image = np.stack([noise((6, 20, 20)), 100 * noise((6, 20, 20), 1)])
    image[0, 3] += 1000
    result = resample_image(image, (6, 33, 33), THICK, THICK, Resampling())
    assert (result.min(axis=(2, 3)) >= image.min(axis=(2, 3))).all()
    assert (result.max(axis=(2, 3)) <= image.max(axis=(2, 3))).all()


def test_an_unchanged_shape_is_copied_bit_by_bit():
    image = noise((2, 5, 6, 7))
    result = resample_image(image, (5, 6, 7), THICK, ISOTROPIC, Resampling())
    np.testing.assert_array_equal(result, image)
    assert not np.shares_memory(result, image)
    assert resample_image(image.astype(np.int16), (5, 6, 7), THICK, THICK, Resampling()).dtype == np.float32


def test_flipping_and_permuting_commute_with_resampling():
    image = noise((1, 9, 14, 21))
    shape = (13, 10, 30)
    plain = resample_image(image, shape, ISOTROPIC, ISOTROPIC, Resampling())
    turned = resample_image(image[:, ::-1].transpose(0, 3, 1, 2), (30, 13, 10), ISOTROPIC, ISOTROPIC, Resampling())
    np.testing.assert_allclose(turned.transpose(0, 2, 3, 1)[:, ::-1], plain, atol=1e-4)


@pytest.mark.parametrize(
    ("spacing", "target", "force", "expected"),
    [
        ((5, 1, 1), (1, 1, 1), None, 0),
        ((1, 5, 1.2), (1, 1, 1), None, 1),
        ((1, 1, 1), (0.9, 0.8, 4), None, 2),
        ((3, 1, 1), (1, 1, 1), None, None),  # the ratio must exceed three
        ((0.2, 1, 1), (1, 1, 1), None, None),  # two axes tie
        ((0.2, 1, 1), (5, 1, 1), None, None),  # the current spacing decides first
        ((1, 1, 1), (0.2, 1, 1), None, None),
        ((2, 1, 1), (1, 1, 1), True, 0),
        ((1, 1, 1), (5, 1, 1), True, None),
        ((9, 1, 1), (9, 1, 1), False, None),
    ],
)
def test_the_axis_that_is_resampled_separately(spacing, target, force, expected):
    assert separate_axis(spacing, target, force) == expected


def test_the_new_shape_is_rounded_half_to_even_and_never_empty():
    assert resampled_shape((5, 7, 1), (1, 1, 1), (2, 2, 9)) == (2, 4, 1)
    assert resampled_shape((112, 101, 122), (3, 3, 3), (1.5, 1.5, 1.5)) == (224, 202, 244)


def anatomy_labels(shape: tuple[int, ...], classes: int, seed: int = 0) -> np.ndarray:
    field = ndi.gaussian_filter(np.random.default_rng(seed).normal(size=shape), 1.5)
    edges = np.quantile(field, np.linspace(0, 1, classes + 1)[1:-1])
    return (np.digitize(field, edges) - 1).astype(np.int16)  # from -1, as ignored voxels


def scores_of(labels: np.ndarray, target: tuple[int, ...]) -> dict[int, np.ndarray]:
    return {int(v): skimage_volume((labels == v).astype(float), target, 1) for v in np.unique(labels)}


@pytest.mark.parametrize("classes", [2, 5, 12])
@pytest.mark.parametrize(("shape", "target"), [*SHAPES, ((12, 14, 16), (24, 7, 48)), ((15, 21, 18), (10, 28, 27))])
def test_labels_win_by_their_interpolated_indicator_and_ties_go_to_the_nearest(shape, target, classes):
    labels = anatomy_labels(shape, classes)
    result = resample_labels(labels, target, ISOTROPIC, ISOTROPIC, Resampling())
    assert result.dtype == labels.dtype
    scores = scores_of(labels, target)
    best = np.max(list(scores.values()), axis=0)
    tied = {value: score == best for value, score in scores.items()}  # exactly, as nnU-Net does
    nearest = resize(labels, target, 0, mode="edge", anti_aliasing=False, preserve_range=True).astype(int)
    lowest = np.full(target, 99)
    for value in sorted(tied, reverse=True):
        lowest[tied[value]] = value
    nearest_is_tied = np.any([tied[v] & (nearest == v) for v in tied], axis=0)
    np.testing.assert_array_equal(result, np.where(nearest_is_tied, nearest, lowest))


@pytest.mark.parametrize("axis", [0, 1, 2])
@pytest.mark.parametrize(("depth", "new_depth"), [(6, 10), (10, 6), (7, 7)])
def test_labels_of_thick_slices_are_resampled_in_plane_then_taken_from_the_nearest_slice(axis, depth, new_depth):
    shape, target = tuple(np.insert([21, 17], axis, depth)), tuple(np.insert([16, 26], axis, new_depth))
    spacing = tuple(np.insert([1.0, 1.1], axis, 5.0))
    labels = anatomy_labels(shape, 4)
    in_plane = np.stack(
        [
            np.moveaxis(resample_labels(part, (1, *np.delete(target, axis)), ISOTROPIC, ISOTROPIC, Resampling()), 0, 0)[
                0
            ]
            for part in np.moveaxis(labels, axis, 0)[:, None]
        ],
        axis,
    )
    where = np.floor(depth / new_depth * (np.arange(new_depth) + 0.5)).astype(int)
    result = resample_labels(labels, target, spacing, spacing, Resampling())
    np.testing.assert_array_equal(result, np.take(in_plane, where, axis))
    linear = resample_labels(labels, target, spacing, spacing, Resampling(label_order_z=1))
    assert linear.shape == target
    assert set(np.unique(linear)) <= set(np.unique(labels))


def test_only_labels_that_are_there_come_out_and_a_single_one_stays_alone():
    labels = np.full((5, 6, 7), 41, np.int16)
    assert np.unique(resample_labels(labels, (9, 4, 13), ISOTROPIC, ISOTROPIC, Resampling())) == 41
    labels[2:, 3:] = 300
    assert set(np.unique(resample_labels(labels, (9, 4, 13), ISOTROPIC, ISOTROPIC, Resampling()))) == {41, 300}


def test_unchanged_labels_are_copied():
    labels = anatomy_labels((5, 6, 7), 3)
    result = resample_labels(labels, (5, 6, 7), THICK, ISOTROPIC, Resampling())
    np.testing.assert_array_equal(result, labels)
    assert not np.shares_memory(result, labels)


def test_a_label_of_one_voxel_survives_enlarging():
    labels = np.zeros((9, 10, 11), np.int16)
    labels[4, 5, 6] = 7
    result = resample_labels(labels, (27, 30, 33), ISOTROPIC, ISOTROPIC, Resampling())
    assert (result == 7).sum() >= 7
    assert result[13, 16, 19] == 7


def test_label_order_zero_takes_the_nearest_voxel():
    labels = anatomy_labels((9, 14, 11), 5)
    result = resample_labels(labels, (13, 9, 31), ISOTROPIC, ISOTROPIC, Resampling(label_order=0))
    expected = resize(labels, (13, 9, 31), 0, mode="edge", anti_aliasing=False, preserve_range=True)
    np.testing.assert_array_equal(result, expected)


@pytest.mark.parametrize("order_z", [0, 1])
@pytest.mark.parametrize(
    ("spacing", "shape"), [(ISOTROPIC, (37, 21, 44)), (THICK, (21, 37, 20)), (ISOTROPIC, (9, 60, 8))]
)
def test_threads_do_not_change_a_bit_and_normalising_on_the_way_hardly_any(spacing, shape, order_z):
    rng = np.random.default_rng(8)
    voxels = rng.integers(-1000, 1500, (23, 31, 40)).astype(np.int16)
    mask = rng.random(voxels.shape) < 0.9
    channels = [Channel(voxels, (-900.0, 1200.0), 40.0, 250.0), Channel(voxels[:, ::-1], None, 3.0, 70.0, mask)]
    resampling = Resampling(image_order_z=order_z)
    alone, several = (resample_channels(channels, shape, spacing, spacing, resampling, n) for n in (1, 3))
    np.testing.assert_array_equal(alone, several)
    before = np.stack(
        [(np.clip(voxels.astype(float), -900, 1200) - 40) / 250, np.where(mask, (voxels[:, ::-1] - 3.0) / 70, 0)]
    )
    expected = resample_image(before, shape, spacing, spacing, resampling)
    assert np.abs(alone - expected).max() < 1e-6 * np.ptp(before)


def test_products_stay_small_enough_for_one_thread_of_the_library(monkeypatch):
    sizes = []
    real = np.matmul

    def matmul(weights, source, out):
        sizes.append(weights.size * source.shape[-1])
        return real(weights, source, out=out)

    monkeypatch.setattr(np, "matmul", matmul)
    resample_image(np.zeros((1, 3, 700, 900)), (5, 400, 1000), ISOTROPIC, ISOTROPIC, Resampling())
    assert max(sizes) <= MOST_TERMS
