"""Intensity normalisation."""

from __future__ import annotations

import numpy as np
import pytest

from medseg.errors import InputError
from medseg.imaging.crop import nonzero_mask
from medseg.imaging.normalise import normalise
from medseg.records.fingerprint import Intensity
from medseg.records.plan import Normalisation

INTENSITY = Intensity(mean=80.0, median=75, std=40.0, min=-900, max=2000, percentile_00_5=-50.0, percentile_99_5=190.0)


def one(image: np.ndarray, scheme: str, use_mask: bool = False, mask: np.ndarray | None = None) -> np.ndarray:
    result = normalise(image[None], [Normalisation(scheme=scheme, use_mask=use_mask)], [INTENSITY], mask)
    assert result.dtype == np.float32
    assert result.shape == (1, *image.shape)
    return result[0]


@pytest.fixture
def image() -> np.ndarray:
    return np.random.default_rng(0).normal(300, 120, (5, 7, 9)).astype(np.float32)


def test_zscore_has_the_mean_and_deviation_of_the_whole_channel(image):
    exact = image.astype(np.float64)
    np.testing.assert_allclose(one(image, "zscore"), (exact - exact.mean()) / exact.std(), atol=2e-6)


def test_zscore_in_the_mask_takes_its_statistics_there_and_leaves_zero_outside(image):
    image[:, :3] = 0
    image[2, 5, 4] = 0  # a hole: part of the mask
    mask = nonzero_mask(image[None])
    inside = image[mask].astype(np.float64)
    expected = np.zeros(image.shape)
    expected[mask] = (inside - inside.mean()) / inside.std()
    assert mask[2, 5, 4]
    np.testing.assert_allclose(one(image, "zscore", True, mask), expected, atol=2e-6)


def test_zscore_in_an_empty_mask_is_zero(image):
    assert not one(image * 0, "zscore", True, np.zeros(image.shape, bool)).any()


def test_zscore_that_needs_a_mask_and_has_none_is_refused(image):
    with pytest.raises(ValueError, match="mask"):
        one(image, "zscore", True)


def test_ct_clips_to_the_percentiles_and_uses_the_statistics_of_the_data_set(image):
    expected = (np.clip(image.astype(np.float64), -50, 190) - 80) / 40
    np.testing.assert_allclose(one(image, "ct"), expected, atol=1e-6)


def test_ct_without_spread_does_not_divide_by_zero(image):
    flat = Intensity(mean=3, median=3, std=0, min=3, max=3, percentile_00_5=3, percentile_99_5=3)
    assert not normalise(image[None], [Normalisation(scheme="ct")], [flat]).any()


def test_rescale_spans_zero_to_one(image):
    result = one(image, "rescale_0_1")
    assert (result.min(), result.max()) == (0, 1)
    np.testing.assert_allclose(result, (image - image.min()) / np.ptp(image), atol=1e-6)


def test_none_only_changes_the_type():
    raw = np.array([[[-3, 7, 32000]]], np.int16)
    np.testing.assert_array_equal(one(raw, "none"), raw)


def test_rgb_divides_by_255():
    raw = np.array([[[0, 51, 255]]], np.uint8)
    np.testing.assert_allclose(one(raw, "rgb_0_1"), [[[0, 0.2, 1]]], atol=1e-7)


@pytest.mark.parametrize("value", [-1, 256])
def test_rgb_refuses_what_no_picture_holds(value):
    with pytest.raises(InputError, match="E0111"):
        one(np.array([[[value, 5]]], np.int16), "rgb_0_1")


@pytest.mark.parametrize("scheme", ["zscore", "rescale_0_1"])
@pytest.mark.parametrize("value", [0, 0.1, 1e-30, -3e30, 1 / 3])
def test_a_constant_channel_becomes_zeros(scheme, value):
    assert not one(np.full((3, 4, 5), value, np.float32), scheme).any()


def test_channels_are_normalised_each_by_its_scheme_and_the_input_stays_as_it_was(image):
    both = np.stack([image, image])
    before = both.copy()
    result = normalise(both, [Normalisation(scheme="zscore"), Normalisation(scheme="none")], [INTENSITY] * 2)
    np.testing.assert_array_equal(result[0], one(image, "zscore"))
    np.testing.assert_array_equal(result[1], image)
    np.testing.assert_array_equal(both, before)


def test_statistics_are_exact_far_from_zero():
    image = (1e6 + np.random.default_rng(1).normal(0, 1, (64, 128, 160))).astype(np.float32)
    exact = image.astype(np.float64)
    np.testing.assert_allclose(one(image, "zscore"), (exact - exact.mean()) / exact.std(), atol=0.04)
    assert abs(one(image, "zscore").std(dtype=np.float64) - 1) < 1e-3


def test_a_scheme_per_channel_is_needed(image):
    with pytest.raises(ValueError, match="1 channels, 2 normalisations"):
        normalise(image[None], [Normalisation(scheme="none")] * 2, [INTENSITY] * 2)
