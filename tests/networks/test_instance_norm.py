"""Instance norm + leaky ReLU against torch's own in float64: values, all gradients, layouts, number types."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from medseg.networks.instance_norm import InstanceNormLeakyReLU, _PerSample

CASES = [
    pytest.param((1, 5, 3, 6, 4), torch.contiguous_format, id="3d-contiguous-1"),
    pytest.param((3, 5, 3, 6, 4), torch.contiguous_format, id="3d-contiguous-3"),
    pytest.param((1, 5, 3, 6, 4), torch.channels_last_3d, id="3d-channels-last-1"),
    pytest.param((3, 5, 3, 6, 4), torch.channels_last_3d, id="3d-channels-last-3"),
    pytest.param((1, 4, 7, 5), torch.contiguous_format, id="2d-contiguous-1"),
    pytest.param((3, 4, 7, 5), torch.contiguous_format, id="2d-contiguous-3"),
    pytest.param((1, 4, 7, 5), torch.channels_last, id="2d-channels-last-1"),
    pytest.param((3, 4, 7, 5), torch.channels_last, id="2d-channels-last-3"),
]


def sample(shape: tuple[int, ...], layout: torch.memory_format, dtype: torch.dtype = torch.float32) -> Tensor:
    """Channels of different mean and spread, different in every sample."""
    generator = torch.Generator().manual_seed(sum(shape))
    x = torch.randn(shape, generator=generator)
    spread = torch.rand(shape[:2], generator=generator).view(*shape[:2], *[1] * (len(shape) - 2)) * 3 + 0.2
    return (x * spread + 2 * spread - 1).to(dtype).to(memory_format=layout)


def module(channels: int) -> InstanceNormLeakyReLU:
    generator = torch.Generator().manual_seed(channels)
    norm = InstanceNormLeakyReLU(channels)
    with torch.no_grad():
        norm.weight.copy_(torch.randn(channels, generator=generator))
        norm.bias.copy_(torch.randn(channels, generator=generator))
    return norm


def run(x: Tensor, gradient: Tensor, norm: nn.Module) -> tuple[Tensor, ...]:
    """Output and the gradients of input, weight and bias."""
    x = x.detach().requires_grad_()
    y = norm(x)
    return (y.detach(), *torch.autograd.grad(y, (x, norm.weight, norm.bias), gradient.to(y.dtype)))


def expected(x: Tensor, gradient: Tensor, norm: nn.Module) -> tuple[Tensor, ...]:
    """The same by torch's instance norm in float64."""
    x = x.detach().double().requires_grad_()
    weight, bias = (p.detach().double().requires_grad_() for p in (norm.weight, norm.bias))
    y = F.leaky_relu(F.instance_norm(x, weight=weight, bias=bias, eps=1e-5), 0.01)
    return (y.detach(), *torch.autograd.grad(y, (x, weight, bias), gradient.double()))


def gradient_like(x: Tensor) -> Tensor:
    return torch.randn(x.shape, generator=torch.Generator().manual_seed(9))


@pytest.mark.parametrize(("shape", "layout"), CASES)
def test_values_and_gradients_equal_those_of_torch_in_float64(shape, layout):
    x, norm = sample(shape, layout), module(shape[1])
    found = run(x, gradient_like(x), norm)
    for a, b in zip(found, expected(x, gradient_like(x), norm), strict=True):
        assert a.dtype == torch.float32
        torch.testing.assert_close(a.double(), b, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize(("shape", "layout"), CASES)
def test_bfloat16_stays_bfloat16_and_within_its_rounding(shape, layout):
    x, norm = sample(shape, layout, torch.bfloat16), module(shape[1])
    y, grad_x, grad_weight, grad_bias = run(x, gradient_like(x), norm)
    wanted = expected(x, gradient_like(x).bfloat16(), norm)
    assert (y.dtype, grad_x.dtype) == (torch.bfloat16, torch.bfloat16)
    assert (grad_weight.dtype, grad_bias.dtype) == (torch.float32, torch.float32)
    for a, b in zip((y, grad_x, grad_weight, grad_bias), wanted, strict=True):
        assert float((a.double() - b).norm() / b.norm()) < 0.015


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("shape", "layout"), CASES)
def test_the_memory_layout_is_kept_in_both_directions(shape, layout, dtype):
    x, norm = sample(shape, layout, dtype), module(shape[1])
    y, grad_x, *_ = run(x, gradient_like(x).to(memory_format=layout), norm)
    assert y.is_contiguous(memory_format=layout)
    assert grad_x.is_contiguous(memory_format=layout)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last_3d])
def test_the_input_is_not_changed(layout):
    x, norm = sample((2, 3, 4, 5, 6), layout), module(3)
    kept = x.clone()
    norm(x)
    assert torch.equal(x, kept)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last_3d])
def test_each_sample_is_normalised_on_its_own(layout):
    x, norm = sample((3, 4, 2, 5, 6), layout), module(4)
    together = norm(x)
    for i in range(3):
        torch.testing.assert_close(together[i : i + 1], norm(x[i : i + 1].contiguous()), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last_3d])
def test_inference_mode_gives_the_same_values(layout):
    x, norm = sample((2, 3, 4, 5, 6), layout), module(3)
    with torch.inference_mode():
        inferred = norm(x)
    assert torch.equal(inferred, norm(x).detach())


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last_3d])
def test_under_autocast_it_takes_what_the_convolution_gives(layout):
    convolution, norm = nn.Conv3d(2, 3, (1, 3, 3), bias=False), module(3)
    x = sample((2, 2, 4, 5, 6), layout)
    convolution.to(memory_format=layout)
    with torch.autocast("cpu", torch.bfloat16):
        features = convolution(x)
        y = norm(features)
    assert features.dtype == y.dtype == torch.bfloat16
    y.float().sum().backward()
    assert norm.weight.grad is not None
    assert norm.weight.grad.dtype == convolution.weight.grad.dtype == torch.float32
    reference = F.leaky_relu(
        F.instance_norm(features.detach().float(), weight=norm.weight, bias=norm.bias, eps=1e-5), 0.01
    )
    torch.testing.assert_close(y.float(), reference, rtol=0.02, atol=0.02)


def test_the_written_backward_passes_the_gradient_check():
    generator = torch.Generator().manual_seed(4)
    x = torch.randn(2, 3, 2, 3, 4, generator=generator, dtype=torch.float64).to(memory_format=torch.channels_last_3d)
    weight = torch.tensor([0.7, -1.3, 2.0], dtype=torch.float64, requires_grad=True)
    bias = torch.tensor([0.1, -0.4, 0.3], dtype=torch.float64, requires_grad=True)
    shortcut = torch.randn(x.shape, generator=generator, dtype=torch.float64).requires_grad_()
    x.requires_grad_()
    assert torch.autograd.gradcheck(_PerSample.apply, (x, weight, bias, None))
    assert torch.autograd.gradcheck(_PerSample.apply, (x, weight, bias, shortcut))


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last_3d])
def test_a_constant_channel_becomes_its_shift(layout):
    norm = module(3)
    y = norm(torch.full((2, 3, 4, 5, 6), 7.5).to(memory_format=layout))
    shift = F.leaky_relu(norm.bias, 0.01).view(1, 3, 1, 1, 1).expand_as(y)
    rounding = 7.5 * 2**-24 / 1e-5**0.5  # of the value, in standard deviations of a channel that has none
    torch.testing.assert_close(y, shift, rtol=0, atol=rounding)


def test_statistics_of_many_voxels_are_as_exact_as_single_precision_allows():
    x, norm = sample((2, 8, 48, 80, 64), torch.channels_last_3d), module(8)
    with torch.inference_mode():
        y = norm(x)
        wanted = F.instance_norm(x.double(), weight=norm.weight.double(), bias=norm.bias.double(), eps=1e-5)
    torch.testing.assert_close(y.double(), F.leaky_relu(wanted, 0.01), rtol=0, atol=5e-6)  # plain sums: 5e-4


def test_a_channels_last_tensor_of_one_channel_is_right_though_it_also_counts_as_contiguous():
    x, norm = sample((2, 1, 3, 5, 4), torch.channels_last_3d), module(1)
    for a, b in zip(run(x, gradient_like(x), norm), expected(x, gradient_like(x), norm), strict=True):
        torch.testing.assert_close(a.double(), b, rtol=2e-5, atol=2e-5)
