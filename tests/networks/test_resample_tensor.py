"""Resampling of tensors against the numpy form, which is tested against scipy and skimage."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from medseg.imaging.resample import resample_image
from medseg.networks import resample
from medseg.networks.resample import axis_matrix, resample_tensor
from medseg.records.plan import Resampling

CASES = [
    ((7, 20, 31), (9, 13, 40), (1.0, 1.1, 0.9), Resampling()),
    ((40, 12, 26), (13, 31, 9), (1.0, 1.1, 0.9), Resampling(image_order=1)),
    ((9, 14, 11), (13, 9, 31), (1.0, 1.1, 0.9), Resampling(image_order=0)),
    ((6, 21, 17), (10, 16, 26), (5.0, 1.1, 0.9), Resampling()),
    ((21, 6, 17), (16, 4, 26), (1.0, 5.0, 0.9), Resampling(image_order_z=1)),
    ((21, 17, 6), (16, 26, 9), (1.0, 1.1, 5.0), Resampling(image_order_z=3)),
    ((5, 6, 7), (5, 6, 7), (5.0, 1.1, 0.9), Resampling()),
    ((1, 1, 31), (3, 1, 40), (1.0, 1.1, 0.9), Resampling()),
]


def noise(shape: tuple[int, ...]) -> np.ndarray:
    return np.random.default_rng(0).normal(40, 30, (2, *shape)).astype(np.float32)


@pytest.mark.parametrize(("shape", "target", "spacing", "resampling"), CASES)
def test_on_the_cpu_it_is_the_numpy_form(shape, target, spacing, resampling):
    image = noise(shape)
    result = resample_tensor(torch.from_numpy(image), target, spacing, spacing, resampling)
    np.testing.assert_array_equal(result.numpy(), resample_image(image, target, spacing, spacing, resampling))


@pytest.mark.parametrize(("shape", "target", "spacing", "resampling"), CASES)
def test_the_form_for_other_devices_agrees_with_it(shape, target, spacing, resampling):
    image = noise(shape)
    expected = resample_image(image, target, spacing, spacing, resampling)
    for channel, wanted in zip(torch.from_numpy(image), expected, strict=True):
        result = resample._resample(channel, target, spacing, spacing, resampling)
        assert result.dtype == torch.float32
        assert float(np.abs(result.numpy() - wanted).max()) < 2e-6 * np.ptp(image)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize(("shape", "target", "spacing", "resampling"), CASES)
def test_on_a_gpu_it_agrees_with_the_numpy_form(shape, target, spacing, resampling):
    image = noise(shape)
    result = resample_tensor(torch.from_numpy(image).cuda(), target, spacing, spacing, resampling)
    assert result.device.type == "cuda"
    expected = resample_image(image, target, spacing, spacing, resampling)
    assert float(np.abs(result.cpu().numpy() - expected).max()) < 2e-6 * np.ptp(image)


def test_the_rows_of_an_axis_matrix_add_up_to_one():
    for order in (1, 2, 3):
        sums = axis_matrix(50, 31, order, torch.device("cpu")).sum(1)
        torch.testing.assert_close(sums, torch.ones(31), rtol=0, atol=1e-6)
