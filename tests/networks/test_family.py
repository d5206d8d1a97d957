"""The networks of the U-Net family: sizes, training, and what papers and reference implementations say of them."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from tiny_networks import FLAT_OR_SOLID, FOUND, NAMES, planned
from torch import Tensor, nn

from medseg.networks.build import build_network, parameter_count
from medseg.networks.skip_unet import WithAttention, attention_maps
from medseg.networks.transformer import TransformerLayer, positions
from medseg.planning.networks import Variant, choice_of, input_patch, planned_network, rules_with
from medseg.planning.presets import MEDSEG
from medseg.planning.topology import topology
from medseg.records.network import NetworkPlan, TransformerPlan
from medseg.records.training import LOSS_NAMES
from medseg.training.loss import Choice, supervised_loss

BIG = {2: topology((1.0, 1.0), (512, 512), 4), 3: topology((1.0, 1.0, 1.0), (96, 96, 96), 4)}


def image(plan: NetworkPlan, dimensions: int, channels: int = 2, batch: int = 2) -> Tensor:
    size = input_patch(plan, FOUND[dimensions].patch)
    return torch.randn((batch, channels, *size), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(("name", "dimensions"), FLAT_OR_SOLID)
def test_every_network_gives_finest_logits_first_and_one_level_when_not_training(name, dimensions):
    plan = planned(name, dimensions)
    assert NetworkPlan.model_validate(plan.to_json()) == plan
    network, x = build_network(plan, 2, 3).train(), image(plan, dimensions)
    levels = network(x)
    size = plan.output_size(tuple(x.shape[2:]))
    assert tuple(levels[0].shape) == (2, 3, *size)
    voxels = [level[0, 0].numel() for level in levels]
    assert voxels == sorted(voxels, reverse=True)
    assert (len(levels) > 1) == plan.deep_supervision
    sum(level.square().mean() for level in levels).backward()
    lonely = [n for n, p in network.named_parameters() if p.grad is None and "cross_attn" not in n]
    assert [n for n in lonely if "out_blocks" not in n] == []  # MedNeXt: the level that does not divide the image
    (alone,) = network.eval()(x)
    assert alone.shape == levels[0].shape
    state = {key: value.shape for key, value in network.state_dict().items()}
    assert state == {k: v.shape for k, v in build_network(plan, 2, 3, seed=1).state_dict().items()}


@pytest.mark.parametrize(("name", "dimensions"), [(n, d) for n, d in FLAT_OR_SOLID if n not in ("plain", "residual")])
def test_sizes_that_no_stride_divides_come_back_as_they_were(name, dimensions):
    plan = planned(name, dimensions)
    if plan.padding == "valid":
        return
    size = tuple(n - 3 for n in FOUND[dimensions].patch)
    x = torch.randn((1, 1, *size), generator=torch.Generator().manual_seed(1))
    (logits,) = build_network(plan, 1, 2).eval()(x)
    assert tuple(logits.shape) == (1, 2, *size)


@pytest.mark.parametrize(("name", "dimensions"), FLAT_OR_SOLID)
def test_half_precision_gradients_are_those_of_float32(name, dimensions):
    plan = planned(name, dimensions)
    network, x = build_network(plan, 2, 2).train(), image(plan, dimensions)
    labels = (x[:, 0] > 0.3).long()
    gradients = []
    for half in (False, True):
        network.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=half):
            levels = network(x)
        supervised_loss(levels, labels, batch_dice=True, regions=None).backward()
        used = [p.grad for p in network.parameters() if p.grad is not None]
        gradients.append(torch.cat([g.flatten() for g in used]))
    exact, half = gradients
    assert torch.isfinite(half).all()
    least = 0.6 if "resnet" in name else 0.9  # which voxel wins a pooling hangs on the last bit
    assert float(F.cosine_similarity(exact, half, 0)) > least


@pytest.mark.parametrize("name", [n for n in NAMES if n not in ("unet2015-valid", "resnet18-unet")])
def test_checkpointing_changes_neither_loss_nor_gradients_nor_statistics(name):
    plan = planned(name, 3)
    x = image(plan, 3)
    labels = (x[:, 0] > 0.3).long()
    found = []
    for checkpointing in (False, True):
        network = build_network(plan.model_copy(update={"checkpointing": checkpointing}), 2, 2, seed=4).train()
        loss = supervised_loss(network(x), labels, batch_dice=True, regions=None)
        loss.backward()
        gradients = {n: p.grad for n, p in network.named_parameters() if p.grad is not None}
        found.append((loss.detach(), gradients, network.state_dict()))
    for (name_a, a), (name_b, b) in zip(found[0][2].items(), found[1][2].items(), strict=True):
        assert name_a == name_b
        assert torch.equal(a, b)
    assert torch.equal(found[0][0], found[1][0])
    assert found[0][1].keys() == found[1][1].keys()
    assert all(torch.equal(found[0][1][key], found[1][1][key]) for key in found[0][1])


def values_kept(network: nn.Module, x: Tensor) -> int:
    """Values that a pass forward keeps for the backward pass."""
    sizes: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: sizes.append(t.numel()) or t, lambda t: t):
        network(x)
    return sum(sizes)


def test_checkpointed_networks_keep_less_and_copies_of_them_stand_alone():
    plan, kept = planned("plain", 3), {}
    x = image(plan, 3)
    for checkpointing in (False, True):
        network = build_network(plan.model_copy(update={"checkpointing": checkpointing}), 2, 2).train()
        kept[checkpointing] = values_kept(network, x)
    assert kept[True] < 0.7 * kept[False]
    twin = copy.deepcopy(network)
    with torch.no_grad():
        for p in network.parameters():
            p.zero_()
    assert any(level.any() for level in twin(x))


@pytest.mark.parametrize("name", [n for n in NAMES if n not in ("unet2015-valid", "resnet18-unet", "resnet50-unet")])
@pytest.mark.parametrize("loss", LOSS_NAMES)
def test_a_few_steps_learn_one_image_by_heart(name, loss):
    plan = planned(name, 2, norm="batch" if name.startswith("unet2015") else "instance")
    network = build_network(plan, 1, 2, seed=2).train()
    x = image(plan, 2, channels=1, batch=1)
    labels = torch.zeros(x[:, 0].shape, dtype=torch.int64)
    labels[:, 3:9, 4:12], labels[:, 10:14, 13:21] = 1, 1
    x = 0.3 * x + labels.unsqueeze(1)
    choice, first = Choice(loss, (0.5, 1.5)), None
    optimizer = torch.optim.Adam(network.parameters(), 1e-2)
    for _ in range(18):
        value = supervised_loss(network(x), labels, batch_dice=True, regions=None, choice=choice)
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
        first = value.detach() if first is None else first
        if value < first - 0.25 * first.abs():
            return
    pytest.fail(f"the loss fell from {first:.3f} to {value:.3f} only")


def paper(name: str, dimensions: int) -> NetworkPlan:
    return planned_network(BIG[dimensions], rules_with(MEDSEG, Variant(name)))


@pytest.mark.parametrize(
    ("name", "channels", "outputs", "expected"),
    [
        ("unet2015", 3, 1, 31_037_633),  # the common PyTorch implementations, with batch norm
        ("unet2015-linear", 3, 1, 17_262_977),
        ("resnet18-unet", 3, None, 11_176_512),  # torchvision's ResNets without their last, fully connected layer
        ("resnet-unet", 3, None, 21_284_672),
        ("resnet50-unet", 3, None, 23_508_032),
    ],
)
def test_parameters_are_as_many_as_in_the_reference_implementations(name, channels, outputs, expected):
    with torch.device("meta"):
        network = build_network(paper(name, 2), channels, outputs or 1)
    assert parameter_count(network if outputs else network.encoder) == expected


def test_parameters_per_level_follow_the_way_up():
    plan = paper("unet2015", 2)
    counts = []
    for linear in range(5):
        mixed = ("linear",) * linear + ("transposed",) * (4 - linear)
        counts.append(parameter_count(build_network(plan.model_copy(update={"up": mixed}), 3, 1)))
    assert counts == sorted(counts, reverse=True)
    assert (counts[0], counts[-1]) == (31_037_633, 17_262_977)


def test_without_padding_572_voxels_become_388():
    plan = paper("unet2015-valid", 2)
    assert plan.output_size((572, 572)) == (388, 388)
    thin = plan.model_copy(update={"features": (2, 2, 2, 2, 2)})
    (logits,) = build_network(thin, 1, 2).eval()(torch.zeros(1, 1, 572, 572))
    assert tuple(logits.shape) == (1, 2, 388, 388)
    with pytest.raises(ValueError, match="would halve 279"):
        plan.output_size((570, 572))


def test_the_unet_of_2015_equals_a_forward_pass_written_out():
    plan = planned("unet2015", 2, up=("linear", "transposed"))
    network, x = build_network(plan, 2, 3).eval(), torch.randn(1, 2, 15, 22)
    values = network.state_dict()

    def stage(x: Tensor, name: str, first: int) -> Tensor:
        for index in (first, first + 2):
            x = F.conv2d(x, values[f"{name}.{index}.weight"], padding=1)
            norm = f"{name}.{index + 1}.norm"
            mean, variance = values[f"{norm}.running_mean"], values[f"{norm}.running_var"]
            x = F.relu(F.batch_norm(x, mean, variance, values[f"{norm}.weight"], values[f"{norm}.bias"]))
        return x

    fine = stage(x, "encoder.0", 1)
    middle = stage(F.max_pool2d(fine, 2), "encoder.1", 1)
    coarse = stage(F.max_pool2d(middle, 2), "encoder.2", 1)
    up = F.interpolate(coarse, scale_factor=2, mode="bilinear", align_corners=False)
    up = F.pad(up, (0, middle.shape[3] - up.shape[3], 0, middle.shape[2] - up.shape[2]))
    up = stage(torch.cat((up, middle), 1), "decoder.0", 0)
    up = F.conv_transpose2d(up, values["up.1.weight"], values["up.1.bias"], 2)
    up = F.pad(up, (0, fine.shape[3] - up.shape[3], 0, fine.shape[2] - up.shape[2]))
    expected = F.conv2d(
        stage(torch.cat((up, fine), 1), "decoder.1", 0), values["heads.0.weight"], values["heads.0.bias"]
    )
    torch.testing.assert_close(network(x)[0], expected)


def copied(pairs: list[tuple[nn.Module, nn.Module]]) -> None:
    """Weights of the second modules into the first, in the order of their parameters and statistics."""
    for target, source in pairs:
        values = list(source.state_dict().values())
        assert [v.shape for v in target.state_dict().values()] == [v.shape for v in values]
        target.load_state_dict(dict(zip(target.state_dict(), values, strict=True)))


def shuffled(network: nn.Module) -> nn.Module:
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for p in network.parameters():
            p.add_(torch.randn(p.shape, generator=generator) * 0.1)
    return network


def test_attention_equals_monais_attention_unet():
    from monai.networks.nets import AttentionUnet

    plan = NetworkPlan(
        name="attention",
        features=(4, 6, 8),
        kernels=((3, 3, 3),) * 3,
        strides=((1, 1, 1), (1, 2, 2), (2, 2, 2)),
        convs_encoder=(2, 2, 2),
        convs_decoder=(1, 1),
        norm="batch",
        deep_supervision=False,
    )
    ours = shuffled(build_network(plan, 2, 3)).train()
    theirs = AttentionUnet(3, 2, 3, (4, 6, 8), ((1, 2, 2), (2, 2, 2)))
    head, level, reduce = theirs.model
    inner = level.submodule[1]
    for layer, below, here, stride in ((level, 6, 4, (1, 2, 2)), (inner, 8, 6, (2, 2, 2))):
        layer.upconv = nn.ConvTranspose3d(below, here, stride, stride)  # MONAI's has kernels of 3
        layer.merge = nn.Sequential(
            nn.Conv3d(2 * here, here, 3, padding=1, bias=False), nn.BatchNorm3d(here), nn.ReLU()
        )
    for block in theirs.modules():  # ours have no bias in front of a norm
        if isinstance(block, nn.Conv3d) and block.kernel_size == (3, 3, 3):
            block.bias = None
    pairs = [(head, ours.encoder[0]), (level.submodule[0], ours.encoder[1]), (inner.submodule, ours.encoder[2])]
    for layer, index in ((inner, 0), (level, 1)):
        pairs += [(layer.attention.W_g, ours.gates[index].signal), (layer.attention.W_x, ours.gates[index].skip)]
        pairs += [(layer.attention.psi, ours.gates[index].score), (layer.upconv, ours.up[index])]
        pairs += [(layer.merge, ours.decoder[index])]
    copied([*pairs, (reduce, ours.heads[0])])
    for layer, index in ((inner, 0), (level, 1)):  # theirs joins skip and risen features in the other order
        here = layer.merge[0].weight.shape[0]
        weight = ours.decoder[index][0].weight
        layer.merge[0].weight = nn.Parameter(torch.cat((weight[:, here:], weight[:, :here]), 1))
    x = torch.randn(2, 2, 6, 12, 8, generator=torch.Generator().manual_seed(2))
    torch.testing.assert_close(ours(x)[0], theirs.train()(x), rtol=1e-4, atol=1e-5)


def test_gates_tell_what_they_let_pass():
    plan = planned("attention", 2)
    network, x = build_network(plan, 2, 3).eval(), image(plan, 2)
    maps = attention_maps(network, x)
    assert [tuple(m.shape) for m in maps] == [(2, 1, *x.shape[2:]), (2, 1, *(n // 2 for n in x.shape[2:]))]
    assert all(0 < float(m.min()) < float(m.max()) < 1 for m in maps)
    assert attention_maps(build_network(planned("plain", 2), 2, 3), x) == []


def test_nested_equals_monais_unet_plus_plus():
    from monai.networks.nets import BasicUNetPlusPlus
    from monai.networks.nets.basic_unet import UpCat

    widths = (4, 8, 16, 32, 64)
    plan = NetworkPlan(
        name="unetpp",
        features=widths,
        kernels=((3, 3),) * 5,
        strides=((1, 1), *[(2, 2)] * 4),
        convs_encoder=(2,) * 5,
        convs_decoder=(2,) * 4,
    )
    ours = shuffled(build_network(plan, 1, 2)).train()
    norm, act = ("instance", {"affine": True}), ("LeakyReLU", {"inplace": True, "negative_slope": 0.01})
    theirs = BasicUNetPlusPlus(2, 1, 2, (*widths, 4), deep_supervision=True, bias=False, norm=norm, act=act)
    pairs: list[tuple[nn.Module, nn.Module]] = []
    for stage in range(5):
        block = getattr(theirs, f"conv_{stage}_0")
        if stage:  # MONAI pools; ours strides
            block.max_pooling = nn.Identity()
            block.convs.conv_0.conv.stride = (2, 2)
        pairs.append((block, ours.encoder[stage]))
    for column in range(1, 5):
        for stage in range(5 - column):
            name = f"{stage}_{column}"
            if stage == 0:  # MONAI keeps twice as many features there
                theirs.add_module(
                    f"upcat_{name}", UpCat(2, widths[1], column * widths[0], widths[0], act, norm, bias=False)
                )
            block = getattr(theirs, f"upcat_{name}")
            pairs += [(block.upsample, ours.up[name]), (block.convs, ours.nodes[name])]
        pairs.append((getattr(theirs, f"final_conv_0_{column}"), ours.heads[column - 1]))
    copied(pairs)
    x = torch.randn(2, 1, 48, 32, generator=torch.Generator().manual_seed(2))
    expected = theirs(x)
    for found, wanted in zip(ours(x), expected[::-1], strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)
    ours.prune(2)
    torch.testing.assert_close(ours.eval()(x)[0], expected[1], rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="1 to 4"):
        ours.prune(5)


@pytest.mark.parametrize("name", ["resnet18-unet", "resnet50-unet"])
def test_resnet_encoders_equal_those_of_monai(name):
    from monai.networks.nets import resnet18, resnet50

    plan = paper(name, 2).model_copy(update={"norm": "batch"})
    ours = shuffled(build_network(plan, 3, 1)).encoder.train()
    make = resnet18 if plan.block == "basic" else resnet50
    kind = {"shortcut_type": "B", "bias_downsample": False}
    theirs = make(spatial_dims=2, n_input_channels=3, conv1_t_stride=2, feed_forward=False, **kind).train()
    pairs: list[tuple[nn.Module, nn.Module]] = [(nn.Sequential(theirs.conv1, theirs.bn1), ours[1])]
    for layer, stage in zip((theirs.layer1, theirs.layer2, theirs.layer3, theirs.layer4), ours[2:], strict=True):
        blocks = [b for b in stage if hasattr(b, "shortcut")]
        for block, own in zip(layer, blocks, strict=True):
            halves = [block.conv1, block.bn1, block.conv2, block.bn2]
            halves += [block.conv3, block.bn3] if plan.block == "bottleneck" else []
            pairs.append((nn.Sequential(*halves), nn.Sequential(own.first, own.last, own.norm)))
            if block.downsample is not None:
                pairs.append((block.downsample, own.shortcut))
    copied(pairs)
    x = torch.randn(2, 3, 64, 96, generator=torch.Generator().manual_seed(2))
    found = x
    for stage in ours:
        found = stage(found)
    expected = theirs.maxpool(theirs.act(theirs.bn1(theirs.conv1(x))))
    for layer in (theirs.layer1, theirs.layer2, theirs.layer3, theirs.layer4):
        expected = layer(expected)
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)


def test_transformer_layers_equal_those_of_torch():
    plan = TransformerPlan(layers=1, heads=3, width=24, mlp=40)
    ours = shuffled(TransformerLayer(plan))
    theirs = nn.TransformerEncoderLayer(24, 3, 40, 0.0, "gelu", batch_first=True, norm_first=True)
    theirs.self_attn.in_proj_weight.data = ours.queries_keys_values.weight.data
    theirs.self_attn.in_proj_bias.data = ours.queries_keys_values.bias.data
    copied(
        [
            (theirs.self_attn.out_proj, ours.merge),
            (theirs.linear1, ours.mlp[0]),
            (theirs.linear2, ours.mlp[2]),
            (theirs.norm1, ours.norm_attention),
            (theirs.norm2, ours.norm_mlp),
        ]
    )
    x = torch.randn(2, 7, 24, generator=torch.Generator().manual_seed(2))
    torch.testing.assert_close(ours(x), theirs(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("size", [(3, 5), (2, 3, 4)])
def test_no_two_voxels_have_the_same_position_code(size):
    code = positions(size, 26, torch.device("cpu"))[0]
    assert code.shape == (torch.Size(size).numel(), 26)
    assert float(torch.pdist(code).min()) > 0.1


@pytest.mark.parametrize("dimensions", [2, 3])
@pytest.mark.parametrize("name", NAMES)
def test_networks_are_known_by_the_name_that_asked_for_them(name, dimensions):
    for found in (FOUND[dimensions], BIG[dimensions]):
        assert choice_of(planned_network(found, rules_with(MEDSEG, Variant(name)))) == name


def calls_of(network: nn.Module, x: Tensor) -> tuple[list[Tensor], set[str]]:
    """What a network gives, and the names of the modules with weights that it asked."""
    asked: set[str] = set()
    hooks = [
        module.register_forward_hook(lambda _m, _i, _o, name=name: asked.add(name))
        for name, module in network.named_modules()
        if next(module.parameters(recurse=False), None) is not None
    ]
    levels = network(x)
    for hook in hooks:
        hook.remove()
    return levels, asked


@pytest.mark.parametrize("dimensions", [2, 3])
def test_unetpp_cut_at_a_depth_gives_that_heads_output_and_asks_nothing_else(dimensions):
    plan = planned("unetpp", dimensions)
    network, x = build_network(plan, 2, 3).train(), image(plan, dimensions)
    levels, _ = calls_of(network, x)  # deepest first
    deepest = len(levels)
    assert deepest >= 2
    before: set[str] = set()
    for depth in range(1, deepest + 1):
        network.prune(depth)
        (found,), asked = calls_of(network.eval(), x)
        torch.testing.assert_close(found, levels[deepest - depth])  # instance norm: training changes nothing
        nodes = {name.split(".")[1] for name in asked if name.startswith("nodes.")}
        assert nodes == {f"{stage}_{column}" for column in range(1, depth + 1) for stage in range(depth - column + 1)}
        assert len({name.split(".")[1] for name in asked if name.startswith("encoder.")}) == depth + 1
        assert {name for name in asked if name.startswith("heads.")} == {f"heads.{depth - 1}"}
        assert before < asked | {f"heads.{depth - 2}"}
        before = asked


def test_attention_maps_of_a_wrapped_network_are_what_its_gates_let_pass():
    plan = planned("attention", 3)
    network, x = build_network(plan, 2, 3).eval(), image(plan, 3)
    (seen,) = WithAttention(network)(x)
    gates = attention_maps(network, x)
    assert seen.shape[1] == 3 + len(gates)
    torch.testing.assert_close(seen[:, :3], network(x)[0])
    for number, gate in enumerate(gates):
        wide = F.interpolate(gate, x.shape[2:], mode="trilinear", align_corners=False)
        torch.testing.assert_close(seen[:, 3 + number], wide[:, 0])
