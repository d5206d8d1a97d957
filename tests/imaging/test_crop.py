"""The nonzero region of an image."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import ndimage as ndi

from medseg.imaging.crop import box_slices, fill_holes, nonzero_box, nonzero_mask


def blobs(seed: int, shape: tuple[int, ...] = (2, 11, 17, 23)) -> np.ndarray:
    rng = np.random.default_rng(seed)
    smooth = ndi.gaussian_filter(rng.normal(size=shape), (0, 1, 2, 2))
    return np.where(smooth > 1.2 * smooth.std(), np.round(smooth * 1000), 0).astype(np.int16)


@pytest.mark.parametrize("seed", range(5))
def test_the_box_is_that_of_the_union_of_channels_with_holes_filled(seed):
    image = blobs(seed)
    expected = ndi.find_objects(ndi.binary_fill_holes((image != 0).any(axis=0)).astype(int))[0]
    assert box_slices(nonzero_box(image)) == tuple(slice(int(s.start), int(s.stop)) for s in expected)


def test_the_box_is_tight_and_asymmetric():
    image = np.zeros((1, 9, 10, 11), np.float32)
    image[0, 2, 3:7, 10] = -0.5
    assert nonzero_box(image) == ((2, 3), (3, 7), (10, 11))


@pytest.mark.parametrize("shape", [(1, 1, 1, 1), (3, 1, 4, 5), (1, 6, 5, 4)])
def test_an_image_of_zeros_keeps_its_whole_box(shape):
    assert nonzero_box(np.zeros(shape)) == tuple((0, size) for size in shape[1:])
    assert not nonzero_mask(np.zeros(shape)).any()


def test_the_mask_fills_holes_but_not_bays():
    image = np.zeros((2, 7, 8, 9), np.uint8)
    image[0, 1:6, 1:7, 1:8] = 5
    image[0, 2:4, 2:4, 2:4] = 0  # a hole
    image[0, 4:, 5, 5] = 0  # a bay that opens below
    mask = nonzero_mask(image)
    assert mask[2:4, 2:4, 2:4].all()
    assert not mask[4:, 5, 5].any()


@pytest.mark.parametrize("shape", [(9, 14, 11), (1, 20, 17), (3, 1, 5), (1, 1, 1), (2, 2, 2)])
@pytest.mark.parametrize("share", [0.0, 0.4, 0.6, 0.9, 1.0])
def test_holes_are_filled_as_scipy_does(shape, share):
    mask = np.random.default_rng(3).uniform(size=shape) < share
    np.testing.assert_array_equal(fill_holes(mask), ndi.binary_fill_holes(mask))


def test_filling_after_cropping_is_filling_before_cropping():
    for seed in range(5):
        image = blobs(seed)
        box = box_slices(nonzero_box(image))
        np.testing.assert_array_equal(nonzero_mask(image[(slice(None), *box)]), nonzero_mask(image)[box])


def test_views_with_negative_strides_are_read_in_their_own_order():
    image = blobs(1)
    view = image[:, ::-1].transpose(0, 3, 1, 2)
    assert nonzero_box(view) == nonzero_box(view.copy())
