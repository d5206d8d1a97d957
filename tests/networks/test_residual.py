"""The U-Nets, the residual one above all, against dynamic_network_architectures 0.4.4, which nnU-Net builds."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from medseg.networks.build import build_network, parameter_count
from medseg.networks.instance_norm import InstanceNorm, InstanceNormLeakyReLU
from medseg.networks.residual import ResidualBlock
from medseg.records.network import NetworkPlan

FLAT_THEN_CUBES = ((1, 3, 3), (1, 3, 3), (3, 3, 3), (3, 3, 3))
UNEQUAL = ((1, 1, 1), (1, 2, 2), (2, 2, 2), (1, 2, 2))
PLANS = {
    "plain 3d": NetworkPlan(
        features=(8, 16, 24, 24),
        kernels=FLAT_THEN_CUBES,
        strides=UNEQUAL,
        convs_encoder=(2, 2, 2, 2),
        convs_decoder=(2, 2, 2),
    ),
    "residual 2d": NetworkPlan(
        name="residual",
        features=(8, 16, 24, 24, 24),
        kernels=((3, 3),) * 5,
        strides=((1, 1), (2, 2), (2, 2), (2, 2), (1, 2)),
        convs_encoder=(1, 3, 4, 6, 6),
        convs_decoder=(1, 1, 1, 1),
    ),
    "residual 3d": NetworkPlan(
        name="residual",
        features=(8, 16, 24, 24),
        kernels=FLAT_THEN_CUBES,
        strides=UNEQUAL,
        convs_encoder=(1, 3, 4, 6),
        convs_decoder=(1, 1, 1),
    ),
}
SIZES = {"plain 3d": (10, 40, 56), "residual 2d": (40, 64), "residual 3d": (10, 40, 56)}
CHANNELS_CLASSES = {"plain 3d": (2, 3), "residual 2d": (3, 4), "residual 3d": (2, 3)}
RECORDED = {  # logits at the quarters of every level of the reference network, filled as ``wavy`` does
    "plain 3d": [
        [-0.7251, -0.47943, -1.23485, -1.44271],
        [0.3708, -0.08696, -0.53325, -0.07976],
        [-0.95785, -0.54401, -1.65315, -0.42068],
    ],
    "residual 2d": [
        [-0.02256, -0.43568, -1.98413, -1.35],
        [-0.45487, -0.03908, -0.5064, -0.01195],
        [-0.61824, -1.15963, -1.21345, -0.98355],
        [-0.51478, -1.46193, -0.29107, -1.63849],
    ],
    "residual 3d": [
        [-0.33513, -0.11257, -1.20175, -1.70298],
        [0.13553, -0.36138, 0.67268, -0.45464],
        [-0.548, -0.37153, -0.55288, -0.38947],
    ],
}
LAYOUTS = {2: torch.channels_last, 3: torch.channels_last_3d}


def wavy(network: nn.Module) -> nn.Module:
    """Weights that depend on the shape of a parameter alone, so that two implementations get the same."""
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            count = parameter.numel()
            wave = torch.sin(torch.arange(count, dtype=torch.float64) * 0.7 + count).reshape(parameter.shape)
            if parameter.ndim > 1:
                parameter.copy_(wave * (2 / parameter[0].numel()) ** 0.5)
            else:
                parameter.copy_(1 + wave / 2 if name.endswith("weight") else wave / 3)
    return network


def waves(channels: int, size: tuple[int, ...]) -> Tensor:
    shape = (2, channels, *size)
    count = torch.Size(shape).numel()
    return torch.cos(torch.arange(count, dtype=torch.float64) ** 1.5 / 50).reshape(shape).float()


@pytest.mark.parametrize("layout", ["contiguous", "channels last"])
@pytest.mark.parametrize("name", PLANS)
def test_the_logits_are_those_of_the_reference_implementation(name, layout):
    channels, classes = CHANNELS_CLASSES[name]
    network, images = wavy(build_network(PLANS[name], channels, classes)), waves(channels, SIZES[name])
    if layout == "channels last":
        network, images = (value.to(memory_format=LAYOUTS[len(SIZES[name])]) for value in (network, images))
    with torch.no_grad():
        levels = network.train()(images)
    found = [level.contiguous().flatten()[:: level.numel() // 4][:4].tolist() for level in levels]
    assert found == [pytest.approx(values, abs=5e-5) for values in RECORDED[name]]


@pytest.mark.parametrize("name", PLANS)
def test_every_level_keeps_the_shape_of_its_stage(name):
    plan, size = PLANS[name], SIZES[name]
    channels, classes = CHANNELS_CLASSES[name]
    network, images = build_network(plan, channels, classes).to("meta"), torch.empty(1, channels, *size, device="meta")
    shapes = []
    for stride in plan.strides[:-1]:
        size = tuple(n // s for n, s in zip(size, stride, strict=True))
        shapes.append((1, classes, *size))
    assert [tuple(level.shape) for level in network.train()(images)] == shapes
    assert [tuple(level.shape) for level in network.eval()(images)] == shapes[:1]


@pytest.mark.parametrize(
    ("name", "dimensions", "stages", "flat", "channels", "classes", "recorded", "cancelled"),
    [
        ("plain", 2, 8, False, 1, 3, 46_326_581, 9_088),
        ("plain", 3, 6, True, 4, 5, 31_116_377, 3_840),
        ("residual", 2, 8, False, 3, 2, 140_017_614, 31_168),
        ("residual", 3, 6, False, 1, 3, 102_350_575, 13_056),
        ("residual", 3, 6, True, 2, 4, 102_269_172, 13_056),
        ("residual", 3, 4, True, 1, 2, 25_812_870, 4_800),
    ],
)
def test_networks_have_the_parameters_of_nnunets_but_the_biases_that_a_norm_cancels(
    name, dimensions, stages, flat, channels, classes, recorded, cancelled
):
    kernels, strides = [(3,) * dimensions] * stages, [(1,) * dimensions] + [(2,) * dimensions] * (stages - 1)
    if flat:
        kernels[0], strides[1] = (1, 3, 3), (1, 2, 2)
    most = 512 if dimensions == 2 else 320
    plan = NetworkPlan(
        name=name,
        features=tuple(min(most, 32 * 2**stage) for stage in range(stages)),
        kernels=tuple(kernels),
        strides=tuple(strides),
        convs_encoder=(2,) * stages if name == "plain" else (1, 3, 4, *(6,) * (stages - 3)),
        convs_decoder=((2,) if name == "plain" else (1,)) * (stages - 1),
    )
    with torch.device("meta"):
        assert parameter_count(build_network(plan, channels, classes)) == recorded - cancelled


@pytest.mark.parametrize("name", PLANS)
def test_equal_seeds_give_equal_weights(name):
    one, same, other = (build_network(PLANS[name], 1, 2, seed).state_dict() for seed in (3, 3, 4))
    assert all(torch.equal(one[key], same[key]) for key in one)
    assert not all(torch.equal(one[key], other[key]) for key in one)


def test_a_new_residual_block_is_its_shortcut():
    encoder = build_network(PLANS["residual 3d"], 1, 2).encoder
    images = waves(8, (4, 12, 8))
    block, strided = encoder[1][1], encoder[1][0]
    with torch.no_grad():
        wide = waves(16, (4, 12, 8))
        torch.testing.assert_close(block(wide), F.leaky_relu(wide, 0.01))
        projected = strided.project(F.avg_pool3d(images, (1, 2, 2)))
        torch.testing.assert_close(strided(images), F.leaky_relu(projected, 0.01))


@pytest.mark.parametrize("name", ["residual 2d", "residual 3d"])
def test_gradients_reach_every_parameter(name):
    channels, classes = CHANNELS_CLASSES[name]
    network = wavy(build_network(PLANS[name], channels, classes)).train()
    sum(level.square().mean() for level in network(waves(channels, SIZES[name]))).backward()
    still = [key for key, parameter in network.named_parameters() if not parameter.grad.abs().sum() > 0]
    assert still == []
    assert all(parameter.grad.isfinite().all() for parameter in network.parameters())


@pytest.mark.parametrize("layout", ["contiguous", "channels last"])
@pytest.mark.parametrize("shape", [(2, 6, 9, 14), (3, 4, 3, 8, 10)])
def test_norm_shortcut_and_activation_are_those_of_torch_in_value_and_gradient(shape, layout):
    generator = torch.Generator().manual_seed(8)
    values = [torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(3)]
    weight, bias = (torch.randn(shape[1], generator=generator, dtype=torch.float64) for _ in range(2))
    for module, leaky in ((InstanceNorm(shape[1]), False), (InstanceNormLeakyReLU(shape[1]), True)):
        with torch.no_grad():
            module.weight.copy_(weight)
            module.bias.copy_(bias)
        x, r, g = (v.float() for v in values)
        if layout == "channels last":
            x, r, g = (v.to(memory_format=LAYOUTS[len(shape) - 2]) for v in (x, r, g))
        x.requires_grad_()
        r.requires_grad_()
        found = module(x, r) if leaky else module(x)
        assert found.stride() == x.stride()
        found.backward(g)
        exact, wanted_r = (v.clone().requires_grad_() for v in values[:2])
        normed = F.instance_norm(exact, weight=weight, bias=bias, eps=1e-5)
        wanted = F.leaky_relu(normed + wanted_r, 0.01) if leaky else normed
        wanted.backward(values[2])
        torch.testing.assert_close(found.double(), wanted, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(x.grad.double(), exact.grad, atol=1e-5, rtol=1e-4)
        if leaky:
            torch.testing.assert_close(r.grad.double(), wanted_r.grad, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("batch", [1, 2])
def test_a_channel_of_a_single_voxel_becomes_its_shift(batch):
    norm = wavy(InstanceNorm(3))
    torch.testing.assert_close(
        norm(waves(3, (1, 1, 1))[:batch]).flatten(1), norm.bias.expand(batch, 3), atol=1e-4, rtol=0
    )


def test_a_block_in_half_precision_is_close_to_float32():
    block = ResidualBlock(8, 12, (3, 3, 3), (1, 2, 2)).to(memory_format=torch.channels_last_3d)
    images = waves(8, (6, 16, 20)).to(memory_format=torch.channels_last_3d)
    with torch.no_grad():
        exact = block(images)
        with torch.autocast("cpu", torch.bfloat16):
            half = block(images)
    assert half.dtype == torch.bfloat16
    assert float((half.float() - exact).norm() / exact.norm()) < 0.02
