"""Plans for every network and loss: made, written, read, and sized; how far networks see."""

from __future__ import annotations

import pytest
import torch
from planning_phantoms import fingerprint, task
from torch import nn

from medseg.networks.build import build_network
from medseg.planning.cost import step_memory_bytes, step_tflop
from medseg.planning.field import CONVOLUTIONAL, receptive_field
from medseg.planning.layers import layers_of
from medseg.planning.networks import NETWORK_PLANS, Variant, choice_of, planned_network, rules_with, variant_differences
from medseg.planning.planner import make_plan
from medseg.planning.presets import MEDSEG, NNUNET, RESENC_M
from medseg.planning.topology import topology
from medseg.planning.weights import MOST_UNEQUAL, class_weights
from medseg.records.fingerprint import Fingerprint
from medseg.records.network import NetworkPlan
from medseg.records.plan import Budget, Plan
from medseg.records.training import LOSS_NAMES

CASES = fingerprint([((30, 180, 150), (3.0, 0.8, 0.8))] * 20)
PICTURES = fingerprint([((1, 300, 260), (999.0, 1.0, 1.0))] * 20)


@pytest.mark.parametrize("preset", [MEDSEG, NNUNET, RESENC_M])
@pytest.mark.parametrize("name", NETWORK_PLANS)
def test_every_network_can_be_planned_for_flat_and_anisotropic_data(name, preset):
    for data in (CASES, PICTURES):
        plan = make_plan(data, task(), Budget(memory_gb=8), rules_with(preset, Variant(name)))
        assert Plan.model_validate(plan.to_json()) == plan
        for configuration in plan.configurations.values():
            network = configuration.network
            assert choice_of(network) == name
            assert min(network.output_size(configuration.patch_size)) >= 1


@pytest.mark.parametrize("name", NETWORK_PLANS)
def test_every_network_can_be_built_for_data_too_small_to_be_halved(name):
    for size in ((1, 5, 6), (3, 4, 5)):
        plan = make_plan(
            fingerprint([(size, (1.0, 1.0, 1.0))] * 3), task(), Budget(), rules_with(MEDSEG, Variant(name))
        )
        plan = Plan.model_validate(plan.to_json())
        for configuration in plan.configurations.values():
            network = build_network(configuration.network, 1, 2).eval()
            patch = configuration.patch_size
            (logits,) = network(torch.zeros(1, 1, *patch))
            assert tuple(logits.shape[2:]) == configuration.network.output_size(patch)


def test_the_presets_own_network_is_not_changed_by_asking_for_it():
    assert rules_with(RESENC_M, Variant("residual")) == RESENC_M
    assert rules_with(MEDSEG, Variant()) == MEDSEG
    residual = rules_with(MEDSEG, Variant("residual"))
    assert (residual.convs_encoder, residual.convs_decoder) == ((1, 3, 4, 6), 1)


def test_losses_and_checkpointing_are_written_into_the_plan_and_defaults_are_not():
    for loss in LOSS_NAMES:
        rules = rules_with(MEDSEG, Variant(loss=loss, checkpointing=True))
        configuration = make_plan(CASES, task(), Budget(), rules).configurations["3d_fullres"]
        assert (configuration.training.loss, configuration.network.checkpointing) == (loss, True)
    plain = make_plan(CASES, task(), Budget(), MEDSEG).configurations["3d_fullres"].to_json()
    assert not {"loss", "class_weights"} & set(plain["training"])
    assert not {"norm", "checkpointing", "transformer"} & set(plain["network"])


def test_a_plan_tells_what_it_was_not_made_with():
    plan = make_plan(CASES, task(), Budget(), rules_with(MEDSEG, Variant("resnet18-unet", "focal")))
    assert variant_differences(plan, Variant()) == []
    assert variant_differences(plan, Variant("resnet18-unet", "focal")) == []
    expected = ["--network resnet18-unet", "--loss focal", "no --checkpointing"]
    assert variant_differences(plan, Variant("resnet-unet", "ce", True)) == expected


def test_augmentation_and_sampling_are_written_where_they_were_asked_for():
    asked = Variant(elastic=0.3, foreground_by="component")
    plan = make_plan(CASES, task(), Budget(), rules_with(MEDSEG, asked))
    for configuration in plan.configurations.values():
        assert (configuration.training.elastic, configuration.training.foreground_by) == (0.3, "component")
    assert Plan.model_validate(plan.to_json()) == plan
    assert variant_differences(plan, asked) == []
    assert variant_differences(plan, Variant(elastic=0.0)) == ["--elastic 0.3"]
    plain = make_plan(CASES, task(), Budget(), MEDSEG)
    assert not {"elastic", "foreground_by"} & set(plain.configurations["3d_fullres"].to_json()["training"])
    assert variant_differences(plain, Variant(elastic=0.3, foreground_by="component")) == [
        "--elastic 0",
        "--foreground-by voxel",
    ]


def counted(*counts: dict[int, int]) -> Fingerprint:
    base = fingerprint([((10, 10, 10), (1, 1, 1))] * len(counts))
    cases = [c.model_copy(update={"voxels_per_label": n}) for c, n in zip(base.cases, counts, strict=True)]
    return base.model_copy(update={"cases": tuple(cases)})


def test_classes_weigh_in_inverse_proportion_to_their_voxels():
    data, asked = counted({1: 100, 2: 300}, {1: 100}), task(classes=3)
    found = class_weights(data, asked)
    assert found is not None
    background, one, two = found
    assert sum(found) == pytest.approx(3, rel=1e-3)
    assert one / background == pytest.approx(1500 / 200, rel=1e-3)
    assert one / two == pytest.approx(300 / 200, rel=1e-3)
    rare = class_weights(counted({1: 1}), asked)
    assert rare is not None
    assert rare[1] == rare[2] == pytest.approx(MOST_UNEQUAL * rare[0], rel=1e-2)
    assert class_weights(fingerprint([((10, 10, 10), (1, 1, 1))]), asked) is None


def test_checkpointing_is_planned_with_less_memory_and_a_pass_more():
    network = planned_network(topology((1, 1, 1), (64, 64, 64), 4), MEDSEG)
    repeated = network.model_copy(update={"checkpointing": True})
    kept, again = (layers_of(n, (64, 64, 64), 1, 2) for n in (network, repeated))
    assert sum(layer.parameters for layer in kept) == sum(layer.parameters for layer in again)
    budget = Budget(device="cpu", half=False)
    assert step_memory_bytes(again, 4, budget, 3) < 0.8 * step_memory_bytes(kept, 4, budget, 3)
    assert 1 < step_tflop(again, 4) / step_tflop(kept, 4) < 4 / 3


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"padding": "valid"}, "without padding"),
        ({"up": ("linear",)}, "up needs 2 entries"),
        ({"name": "transunet"}, "needs a transformer"),
        ({"name": "unetr"}, "needs an input_size"),
        ({"transformer": {"width": 10, "heads": 3}}, "multiple of the 3 heads"),
    ],
)
def test_networks_that_cannot_be_are_refused(changes, message):
    plan = planned_network(topology((1.0, 1.0), (16, 24), 4), MEDSEG)
    with pytest.raises(ValueError, match=message):
        NetworkPlan.model_validate(plan.to_json() | changes)


@pytest.mark.parametrize("name", [n for n in NETWORK_PLANS if n.removesuffix("-linear") in CONVOLUTIONAL])
def test_gradients_reach_as_far_as_the_receptive_field_says(name):
    """All weights 1 and no norms: a voxel has a gradient where any path leads."""
    found = topology((1.0, 2.5), (32, 40), 8)
    plan = planned_network(found, rules_with(MEDSEG, Variant(name)))
    plan = plan.model_copy(update={"features": (1,) * len(plan.features)})
    if name == "residual":
        plan = plan.model_copy(update={"convs_encoder": (1,) * len(plan.features)})
    network = build_network(plan, 1, 1).eval()
    for module in list(network.modules()):
        for child, kind in list(module.named_children()):
            if "Norm" in type(kind).__name__:
                setattr(module, child, _Open())
        if isinstance(module, nn.Conv2d | nn.ConvTranspose2d):
            nn.init.ones_(module.weight)
    field = receptive_field(plan)
    assert field is not None
    size = tuple(16 * (f // 8 + 2) for f in field)
    reach = [0, 0]
    for shift in range(4):
        x = torch.rand(1, 1, *size, dtype=torch.float64, requires_grad=True)
        (logits,) = network.double()(x)
        logits[0, 0, size[0] // 2 + shift, size[1] // 2 + shift].backward()
        touched = x.grad[0, 0] != 0
        for axis in (0, 1):
            places = touched.any(1 - axis).nonzero()
            reach[axis] = max(reach[axis], int(places[-1] - places[0]) + 1)
    for found_here, said in zip(reach, field, strict=True):
        assert 0.6 * said < found_here <= said


class _Open(nn.Module):
    """In place of a norm with its activation: the shortcut is added, nothing else."""

    def forward(self, x, shortcut=None):
        return x if shortcut is None else x + shortcut


def test_attention_sees_the_whole_patch_and_foreign_networks_do_not_say():
    found = topology((1.0, 1.0), (32, 48), 4)
    for name in ("transunet", "unetr", "segresnet", "mednext"):
        assert receptive_field(planned_network(found, rules_with(MEDSEG, Variant(name)))) is None
