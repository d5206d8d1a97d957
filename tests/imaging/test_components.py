"""Components against scikit-image and SimpleITK, and drawn by hand."""

from __future__ import annotations

import numpy as np
import pytest
import SimpleITK
from scipy import ndimage
from skimage import measure

from medseg.imaging.components import bounding_box, components, count_components, keep_largest, remove_smaller

SHAPES = [(7, 11, 13), (1, 17, 23), (5, 1, 19), (1, 1, 9), (1, 1, 1)]


def drawing(*rows: str) -> np.ndarray:
    return np.array([[character == "#" for character in row] for row in rows])[None]


def blobs(rng: np.random.Generator, shape: tuple[int, ...], density: float) -> np.ndarray:
    return rng.random(shape) < density


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("density", [0.0, 0.03, 0.1, 0.3, 1.0])
def test_the_largest_component_is_that_of_scikit_image(shape, density):
    for seed in range(5):
        mask = blobs(np.random.default_rng(seed), shape, density)
        numbers = measure.label(mask, connectivity=mask.ndim)
        expected = np.zeros_like(mask)
        if mask.any():
            sizes = np.bincount(numbers.ravel())[1:]
            expected = numbers == 1 + np.argmax(sizes)  # scikit-image numbers in scan order: the first of equals
        np.testing.assert_array_equal(keep_largest(mask), expected)
        assert count_components(mask) == numbers.max()


def test_simpleitk_counts_the_same_components_and_removes_the_same_small_ones():
    mask = ndimage.gaussian_filter(np.random.default_rng(3).normal(size=(12, 20, 31)), 1.2) > 0.18
    image = SimpleITK.ConnectedComponent(SimpleITK.GetImageFromArray(mask.astype(np.uint8)), True)  # fully connected
    numbers = SimpleITK.GetArrayFromImage(image)
    assert count_components(mask) == numbers.max() > 5
    for min_voxels in (1, 2, 10, 40, 100_000):
        relabelled = SimpleITK.RelabelComponent(image, minimumObjectSize=min_voxels)
        np.testing.assert_array_equal(remove_smaller(mask, min_voxels), SimpleITK.GetArrayFromImage(relabelled) > 0)


def test_pieces_that_touch_at_a_corner_are_one_piece():
    mask = drawing("##...", "..#..", "....#")
    assert count_components(mask) == 2
    np.testing.assert_array_equal(keep_largest(mask), drawing("##...", "..#..", "....."))


def test_the_first_of_two_equal_pieces_stays_in_whatever_memory_order_the_mask_comes():
    mask = np.zeros((3, 4, 6), dtype=bool)
    mask[0, 3, 4:] = True  # first in scan order
    mask[2, 0, :2] = True
    expected = np.zeros_like(mask)
    expected[0, 3, 4:] = True
    flipped_view = np.asfortranarray(mask[::-1, ::-1, ::-1])[::-1, ::-1, ::-1]
    for same in (mask, np.asfortranarray(mask), flipped_view):
        np.testing.assert_array_equal(keep_largest(same), expected)


def test_an_empty_mask_has_no_box_and_no_components_and_stays_empty():
    mask = np.zeros((4, 5, 6), dtype=bool)
    assert bounding_box(mask) is None
    assert count_components(mask) == 0
    for result in (keep_largest(mask), remove_smaller(mask, 3)):
        assert result.shape == mask.shape
        assert not result.any()


def test_the_sizes_are_those_of_the_numbered_pieces():
    numbers, sizes = components(drawing("##..#", "....#", "#...#"))
    assert sizes.tolist() == [9, 2, 3, 1]
    assert numbers[0, 0, 4] == 2


def test_the_arguments_are_left_alone():
    mask = blobs(np.random.default_rng(0), (5, 6, 7), 0.2)
    before = mask.copy()
    whole = np.ones((2, 3, 4), dtype=bool)
    keep_largest(whole)[0] = False
    keep_largest(mask)
    remove_smaller(mask, 2)
    np.testing.assert_array_equal(mask, before)
    assert whole.all()
