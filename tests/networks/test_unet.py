"""The U-Net against MONAI's DynUNet, against a forward pass written out with torch.nn.functional, and its shapes."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from tiny_models import FLAT_KERNELS, TWO_D
from torch import Tensor, nn

from medseg.networks.build import build_network, parameter_count
from medseg.records.network import NetworkPlan

REFERENCES = Path(__file__).resolve().parents[2] / "plans" / "reference"
ISOTROPIC = NetworkPlan(  # all kernels 3: only then do nnU-Net and DynUNet agree on the decoder
    features=(4, 6, 8, 10),
    kernels=((3, 3, 3),) * 4,
    strides=((1, 1, 1), (2, 2, 2), (1, 2, 2), (1, 2, 1)),
    convs_encoder=(2, 2, 2, 2),
    convs_decoder=(2, 2, 2),
)


def shuffled(network: nn.Module, seed: int = 5) -> nn.Module:
    """Every value changed, so that affine parameters and biases matter."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in network.parameters():
            p.add_(torch.randn(p.shape, generator=generator) * 0.1)
    return network


def forward_by_hand(network: nn.Module, plan: NetworkPlan, x: Tensor) -> list[Tensor]:
    """The plan's U-Net from its definition: same padding, stride first, transposed kernel = stride, skip kernels."""
    values = network.state_dict()
    flat = len(plan.strides[0]) == 2
    convolve, transpose = (F.conv2d, F.conv_transpose2d) if flat else (F.conv3d, F.conv_transpose3d)

    def stage(x: Tensor, name: str, kernel: tuple[int, ...], stride: tuple[int, ...], convs: int) -> Tensor:
        for index in range(convs):
            weight = values[f"{name}.{2 * index}.weight"]
            assert tuple(weight.shape[2:]) == kernel
            step = stride if index == 0 else (1,) * len(stride)
            x = convolve(x, weight, None, step, tuple((k - 1) // 2 for k in kernel))
            scale, shift = values[f"{name}.{2 * index + 1}.weight"], values[f"{name}.{2 * index + 1}.bias"]
            x = F.leaky_relu(F.instance_norm(x, weight=scale, bias=shift, eps=1e-5), 0.01)
        return x

    skips = []
    for level in range(len(plan.features)):
        x = stage(x, f"encoder.{level}", plan.kernels[level], plan.strides[level], plan.convs_encoder[level])
        skips.append(x)
    logits = []
    for up, level in enumerate(reversed(range(len(plan.features) - 1))):
        stride = plan.strides[level + 1]
        x = transpose(x, values[f"up.{up}.weight"], values[f"up.{up}.bias"], stride)
        x = torch.cat((x, skips[level]), 1)
        x = stage(x, f"decoder.{up}", plan.kernels[level], (1,) * len(stride), plan.convs_decoder[up])
        logits.insert(0, convolve(x, values[f"heads.{up}.weight"], values[f"heads.{up}.bias"]))
    return logits


@pytest.mark.parametrize(
    ("plan", "shape"), [(FLAT_KERNELS, (2, 2, 6, 12, 8)), (TWO_D, (2, 2, 10, 7)), (ISOTROPIC, (1, 2, 4, 16, 8))]
)
def test_outputs_equal_a_forward_pass_written_out_by_hand(plan, shape):
    network = shuffled(build_network(plan, 2, 3)).double().train()
    x = torch.randn(shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    found, expected = network(x), forward_by_hand(network, plan, x)
    assert len(found) == len(expected) == len(plan.features) - 1
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)


def test_isotropic_kernels_equal_dynunet_of_monai_at_every_level():
    from monai.networks.nets import DynUNet

    ours = shuffled(build_network(ISOTROPIC, 2, 3))
    theirs = DynUNet(
        3,
        2,
        3,
        kernel_size=[list(k) for k in ISOTROPIC.kernels],
        strides=[list(s) for s in ISOTROPIC.strides],
        upsample_kernel_size=[list(s) for s in ISOTROPIC.strides[1:]],
        filters=list(ISOTROPIC.features),
        norm_name=("instance", {"affine": True, "eps": 1e-5}),
        act_name=("leakyrelu", {"negative_slope": 0.01}),
        deep_supervision=True,
        deep_supr_num=2,
        trans_bias=True,
    )
    stages = [theirs.input_block, *theirs.downsamples, theirs.bottleneck]
    blocks = [*stages, *(u.conv_block for u in theirs.upsamples)]
    pairs: list[tuple[nn.Module, nn.Module]] = []
    for block, stage in zip(blocks, [*ours.encoder, *ours.decoder], strict=True):
        pairs += zip([block.conv1.conv, block.norm1, block.conv2.conv, block.norm2], stage, strict=True)
    pairs += zip([u.transp_conv.conv for u in theirs.upsamples], ours.up, strict=True)
    heads = [theirs.output_block, *theirs.deep_supervision_heads]  # finest first; ours are coarsest first
    pairs += zip([h.conv.conv for h in heads], list(ours.heads)[::-1], strict=True)
    for target, source in pairs:
        target.load_state_dict(source.state_dict())
    x = torch.randn(2, 2, 4, 16, 8, generator=torch.Generator().manual_seed(2))
    stacked = theirs.train()(x)
    for level, logits in enumerate(ours.train()(x)):
        same_size = F.interpolate(logits, x.shape[2:], mode="nearest")
        torch.testing.assert_close(same_size, stacked[:, level], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(ours.eval()(x)[0], theirs.eval()(x), rtol=1e-4, atol=1e-5)


def test_training_gives_every_level_at_its_own_resolution_finest_first():
    outputs = build_network(FLAT_KERNELS, 1, 5).train()(torch.zeros(2, 1, 6, 12, 8))
    assert [tuple(o.shape) for o in outputs] == [(2, 5, 6, 12, 8), (2, 5, 6, 6, 4)]


def test_evaluation_gives_the_finest_level_only_and_the_same_values():
    network = shuffled(build_network(FLAT_KERNELS, 1, 5))
    x = torch.randn(1, 1, 6, 12, 8, generator=torch.Generator().manual_seed(0))
    finest = network.train()(x)[0]
    outputs = network.eval()(x)
    assert len(outputs) == 1
    assert torch.equal(outputs[0], finest)


def test_without_deep_supervision_training_gives_the_finest_level_only():
    plan = FLAT_KERNELS.model_copy(update={"deep_supervision": False})
    outputs = build_network(plan, 1, 2).train()(torch.zeros(1, 1, 2, 4, 6))
    assert [tuple(o.shape) for o in outputs] == [(1, 2, 2, 4, 6)]


@pytest.mark.parametrize("kernel", [(3, 1, 5), (3, 5)])
def test_a_network_of_one_stage_is_an_encoder_with_a_head(kernel):
    one = (1,) * len(kernel)
    plan = NetworkPlan(features=(4,), kernels=(kernel,), strides=(one,), convs_encoder=(2,), convs_decoder=())
    network = build_network(plan, 2, 3)
    shape = (5, 4, 7)[: len(kernel)]
    for mode in (True, False):
        outputs = network.train(mode)(torch.zeros(1, 2, *shape))
        assert [tuple(o.shape) for o in outputs] == [(1, 3, *shape)]


def test_only_convolutions_without_a_norm_behind_them_have_a_bias():
    network = build_network(FLAT_KERNELS, 2, 3)
    for stage in [*network.encoder, *network.decoder]:
        assert all(layer.bias is None for layer in stage if isinstance(layer, nn.Conv3d))
    assert all(layer.bias is not None for layer in [*network.up, *network.heads])


def expected_parameters(plan: NetworkPlan, channels: int, outputs: int) -> int:
    features, total = plan.features, 0
    for level, width in enumerate(features):
        fan_in = channels if level == 0 else features[level - 1]
        kernel = math.prod(plan.kernels[level])
        convs = plan.convs_encoder[level]
        total += kernel * width * (fan_in + (convs - 1) * width) + 2 * width * convs
    for convs, level in zip(plan.convs_decoder, reversed(range(len(features) - 1)), strict=True):
        width, kernel = features[level], math.prod(plan.kernels[level])
        total += features[level + 1] * width * math.prod(plan.strides[level + 1]) + width
        total += kernel * width * (2 * width + (convs - 1) * width) + 2 * width * convs
        total += outputs * (width + 1)
    return total


@pytest.mark.parametrize("plan", [FLAT_KERNELS, TWO_D, ISOTROPIC])
def test_the_number_of_parameters_follows_from_the_plan(plan):
    assert parameter_count(build_network(plan, 3, 4)) == expected_parameters(plan, 3, 4)


def reference_configurations() -> list[tuple[str, dict]]:
    return [
        (f"{path.stem} {preset} {name}", configuration)
        for path in sorted(REFERENCES.glob("*.json"))
        for preset, plan in json.loads(path.read_text())["plans"].items()
        for name, configuration in plan["configurations"].items()
        if configuration.get("network") == "PlainConvUNet"
    ]


def test_every_reference_plan_builds_a_network_that_maps_its_patch_to_all_levels():
    configurations = reference_configurations()
    assert len(configurations) > 30
    for name, c in configurations:
        plan = NetworkPlan(
            features=c["features_per_stage"],
            kernels=c["kernel_sizes"],
            strides=c["strides"],
            convs_encoder=c["blocks_encoder"],
            convs_decoder=c["blocks_decoder"],
        )
        with torch.device("meta"):  # shapes without memory
            network = build_network(plan, 2, 5)
            outputs = network(torch.empty(2, 2, *c["patch_size"]))
        assert parameter_count(network) == expected_parameters(plan, 2, 5), name
        shape, expected = list(c["patch_size"]), []
        for stride in c["strides"][:-1]:
            shape = [n // s for n, s in zip(shape, stride, strict=True)]
            expected.append((2, 5, *shape))
        assert [tuple(o.shape) for o in outputs] == expected, name


def test_equal_seeds_give_equal_weights_and_leave_the_global_generator_alone():
    before = torch.random.get_rng_state()
    first, again, other = (build_network(FLAT_KERNELS, 1, 2, seed).state_dict() for seed in (3, 3, 4))
    assert torch.equal(before, torch.random.get_rng_state())
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["encoder.0.0.weight"], other["encoder.0.0.weight"])


def test_weights_begin_with_the_spread_of_he_and_biases_with_zero():
    plan = ISOTROPIC.model_copy(update={"features": (32, 48, 32, 32)})
    network = build_network(plan, 1, 2)
    weight = network.encoder[1][2].weight  # 48 × 48 × 27 values
    expected = math.sqrt(2 / (1 + 0.01**2) / (48 * 27))
    assert float(weight.std().detach()) == pytest.approx(expected, rel=0.02)
    assert all(not layer.bias.any() for layer in [*network.up, *network.heads])
