"""Convolutions in bfloat16 on the CPU: gradients are right where the kernel is longer than the image, too."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from medseg.networks.unet import convolution


def fill_free_memory() -> None:
    """What is freed here holds large numbers, so that values that nobody wrote are seen."""
    for size in (64, 512, 4096, 32768):
        torch.full((size,), 1e8)


@pytest.mark.parametrize(
    ("kernel", "stride", "size"),
    [
        ((3, 3, 3), (1, 1, 1), (2, 4, 5)),
        ((3, 1, 3), (1, 1, 1), (2, 2, 3)),
        ((3, 3, 3), (1, 2, 2), (2, 6, 4)),
        ((5, 3, 3), (1, 1, 1), (4, 4, 5)),
        ((5, 3, 3), (2, 1, 1), (3, 4, 5)),
        ((3, 5, 3), (1, 1, 1), (4, 1, 5)),
        ((3, 3, 3), (1, 1, 1), (1, 1, 1)),
        ((3, 3, 3), (2, 2, 2), (4, 6, 8)),
    ],
)
def test_values_and_gradients_under_autocast_are_those_of_float32_within_rounding(kernel, stride, size):
    generator = torch.Generator().manual_seed(0)
    layer = convolution(8, 12, kernel, stride, bias=False).to(memory_format=torch.channels_last_3d)
    x = torch.randn(2, 8, *size, generator=generator).to(memory_format=torch.channels_last_3d).requires_grad_()
    expected = F.conv3d(x, layer.weight, None, stride, tuple(k // 2 for k in kernel))
    gradient = torch.randn(expected.shape, generator=generator)
    expected = (expected.detach(), *torch.autograd.grad(expected, (x, layer.weight), gradient))
    for _ in range(3):
        fill_free_memory()
        with torch.autocast("cpu", torch.bfloat16):
            y = layer(x)
        assert y.dtype == torch.bfloat16
        found = (y.detach(), *torch.autograd.grad(y, (x, layer.weight), gradient.bfloat16()))
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            inferred = layer(x)
        for a, b in zip((*found, inferred), (*expected, expected[0]), strict=True):
            assert float((a.float() - b).norm() / b.norm()) < 0.01


def test_where_the_kernel_fits_autocast_is_left_to_torch():
    layer = convolution(3, 4, (1, 3, 3), (1, 1, 1), bias=True)
    x = torch.randn(1, 3, 2, 5, 4, generator=torch.Generator().manual_seed(0))
    with torch.autocast("cpu", torch.bfloat16):
        found = layer(x)
        expected = F.conv3d(x, layer.weight, layer.bias, padding=(0, 1, 1))
    assert torch.equal(found, expected)


def test_float32_is_left_to_torch():
    layer = convolution(3, 4, (3, 3, 3), (1, 1, 1), bias=True)
    x = torch.randn(1, 3, 2, 5, 4, generator=torch.Generator().manual_seed(0))
    assert torch.equal(layer(x), F.conv3d(x, layer.weight, layer.bias, padding=1))
