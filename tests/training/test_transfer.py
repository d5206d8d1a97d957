"""Weights carried to another task: what is known stays as it was, in every network; what does not fit is refused."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from tiny_models import FLAT_KERNELS, TWO_D, make_configuration, make_task
from tiny_networks import FOUND, NAMES, planned
from torch import Tensor, nn

from medseg.errors import IncompatibleError, IntegrityError, MedsegError
from medseg.networks.build import build_network
from medseg.networks.device import Device
from medseg.networks.weights import save_tensors, save_weights
from medseg.planning.networks import input_patch
from medseg.records.network import NetworkPlan
from medseg.training.schedule import Length
from medseg.training.settings import Settings
from medseg.training.transfer import Initial, Slots, begin_from, changing_axes

EVERY = [(name, 2 if name == "unet2015-valid" else 3) for name in NAMES] + [("plain", 2), ("mednext", 2)]
SAME = (Slots(2, (0, 1)),)
SAME_OUT = Slots(3, (0, 1, 2))


def trained(plan: NetworkPlan, channels: int = 2, outputs: int = 3) -> nn.Module:
    """A network whose norms and biases are not those of a fresh one either."""
    network = build_network(plan, channels, outputs, seed=5)
    generator = torch.Generator().manual_seed(6)
    with torch.no_grad():
        for tensor in network.state_dict().values():
            if tensor.is_floating_point():
                tensor += 0.05 * torch.rand(tensor.shape, generator=generator)
    return network.eval()


def carried(plan: NetworkPlan, old: nn.Module, folder, inputs=SAME, outputs=SAME_OUT) -> nn.Module:
    """The network for the new task, seeded otherwise, after it was given the old one's weights."""
    path = folder / "old.safetensors"
    initial = Initial(path, save_weights(path, old), inputs, outputs)
    network = build_network(plan, sum(len(s.places) for s in inputs), len(outputs.places), seed=7)
    begin_from(network, plan, initial)
    return network.eval()


def exact(network: nn.Module, x: Tensor) -> Tensor:
    """Logits in float64: sums in another order must not matter."""
    return logits(network.double(), x.double())


def image(plan: NetworkPlan, channels: int = 2) -> Tensor:
    size = input_patch(plan, FOUND[len(plan.strides[0])].patch)
    return torch.randn((1, channels, *size), generator=torch.Generator().manual_seed(1))


def logits(network: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad():
        return network(x)[0]


@pytest.mark.parametrize(("name", "dimensions"), EVERY)
def test_what_is_known_gives_the_same_logits_in_any_order_and_what_is_new_changes_nothing(name, dimensions, tmp_path):
    plan = planned(name, dimensions)
    old, x = trained(plan), image(plan)
    assert torch.equal(logits(carried(plan, old, tmp_path), x), logits(old, x))  # the same task: bit by bit
    inputs, outputs = (Slots(2, (1, None, 0)),), Slots(3, (0, 2, None, 1, None))
    new, expected = carried(plan, old, tmp_path, inputs, outputs), exact(old, x)
    noise = 9 * torch.rand(x[:, :1].shape, generator=torch.Generator().manual_seed(2))
    found = exact(new, torch.cat((x[:, 1:], noise, x[:, :1]), 1))
    torch.testing.assert_close(found[:, [0, 3, 1]], expected, rtol=1e-8, atol=1e-8)
    assert not torch.allclose(found[:, 2], found[:, 4])
    fresh = build_network(plan, 3, 5, seed=7).state_dict()
    for weights, axis in changing_axes(plan, fresh, 3, 5)[1].items():
        kept = new.state_dict()[weights].float()
        for label in (2, 4):  # fresh, in the heads of all levels
            assert torch.equal(kept.select(axis, label), fresh[weights].select(axis, label))


@pytest.mark.parametrize(("name", "dimensions"), [("residual", 3), ("unet2015-valid", 2), ("unetr", 3), ("mednext", 3)])
def test_channels_of_which_none_is_known_see_a_repeated_image_as_the_old_network_did(name, dimensions, tmp_path):
    plan = planned(name, dimensions)
    old, x = trained(plan, channels=2), image(plan, channels=1)
    new = carried(plan, old, tmp_path, (Slots(2, (None, None, None)),))
    expected = exact(old, x.expand(-1, 2, *x.shape[2:]))
    found = exact(new, x.expand(-1, 3, *x.shape[2:]))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_a_channel_that_is_not_there_any_more_is_the_same_as_one_of_zeros(tmp_path):
    plan = planned("residual", 3)
    old, x = trained(plan), image(plan)
    new = carried(plan, old, tmp_path, (Slots(2, (1,)),))
    without = torch.cat((torch.zeros_like(x[:, :1]), x[:, 1:]), 1)
    torch.testing.assert_close(exact(new, x[:, 1:]), exact(old, without), rtol=1e-8, atol=1e-8)


def test_labels_that_a_second_stage_sees_are_carried_beside_the_images_channels(tmp_path):
    plan = planned("plain", 3)
    old, x = trained(plan, channels=4), image(plan, channels=4)  # an image, labels a, b, c
    new = carried(plan, old, tmp_path, (Slots(1, (None,)), Slots(3, (2, None))))  # another image, labels c, d
    seen = torch.cat((x[:, :1], torch.zeros_like(x[:, :2]), x[:, 3:]), 1)
    found = exact(new, torch.cat((x[:, :1], x[:, 3:], x[:, 1:2]), 1))
    torch.testing.assert_close(found, exact(old, seen), rtol=1e-8, atol=1e-8)


def test_weights_of_another_network_are_refused_and_named(tmp_path):
    others = {
        "decoder.0.0.weight is (12, 24, 3, 3, 3) vs (6, 12, 3, 3, 3)": FLAT_KERNELS.model_copy(
            update={"features": (8, 12, 16)}
        ),
        "missing": FLAT_KERNELS.model_copy(update={"convs_encoder": (1, 1, 3)}),
        "none of this name": FLAT_KERNELS.model_copy(update={"convs_encoder": (3, 1, 3)}),
        "is (4, 8, 3, 3) vs (6, 12, 3, 3, 3)": TWO_D,
    }
    for words, other in others.items():
        path = tmp_path / "other.safetensors"
        sha256 = save_weights(path, build_network(other, 2, 3))
        network = build_network(FLAT_KERNELS, 2, 3)
        before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
        with pytest.raises(IncompatibleError, match="E0802") as error:
            begin_from(network, FLAT_KERNELS, Initial(path, sha256, SAME, SAME_OUT))
        assert words in str(error.value)
        assert all(torch.equal(before[name], tensor) for name, tensor in network.state_dict().items())


def test_weights_for_other_numbers_of_channels_or_labels_than_the_plan_says_are_refused(tmp_path):
    path = tmp_path / "old.safetensors"
    sha256 = save_weights(path, build_network(FLAT_KERNELS, 3, 2))
    for slots, outputs in ((SAME, Slots(2, (0, 1, None))), ((Slots(3, (0, 1)),), SAME_OUT)):
        with pytest.raises(IncompatibleError, match="weights to begin from"):
            begin_from(build_network(FLAT_KERNELS, 2, 3), FLAT_KERNELS, Initial(path, sha256, slots, outputs))


def spoil(path, how: str) -> None:
    if how == "missing":
        path.unlink()
    elif how == "truncated":
        path.write_bytes(path.read_bytes()[:-100])
    elif how == "pickle":
        torch.save({"weight": torch.zeros(3)}, path)
    else:
        save_tensors(path, {"weight": torch.zeros(3)})


@pytest.mark.parametrize("how", ["missing", "truncated", "pickle", "another"])
def test_a_file_that_is_not_the_planned_one_is_refused(how, tmp_path):
    path = tmp_path / "old.safetensors"
    initial = Initial(path, save_weights(path, build_network(FLAT_KERNELS, 2, 3)), SAME, SAME_OUT)
    spoil(path, how)
    with pytest.raises(IntegrityError, match="E0701"):
        begin_from(build_network(FLAT_KERNELS, 2, 3), FLAT_KERNELS, initial)


@pytest.mark.parametrize("how", ["truncated", "pickle"])
def test_a_file_that_is_vouched_for_but_is_no_weights_is_refused(how, tmp_path):
    from medseg.artefacts import sha256_of

    path = tmp_path / "old.safetensors"
    save_weights(path, build_network(FLAT_KERNELS, 2, 3))
    spoil(path, how)
    with pytest.raises(MedsegError, match="E0701"):
        begin_from(build_network(FLAT_KERNELS, 2, 3), FLAT_KERNELS, Initial(path, sha256_of(path), SAME, SAME_OUT))


def test_a_training_is_another_one_if_it_begins_from_other_weights_or_takes_over_others(tmp_path):
    cpu = Device(torch.device("cpu"), torch.float32, "test")
    fresh = Settings(make_task(), make_configuration((4, 8, 6), FLAT_KERNELS), Length(steps=1), cpu)
    initial = Initial(tmp_path / "a", "0" * 64, SAME, SAME_OUT)
    others = [
        replace(initial, sha256="1" * 64),
        replace(initial, inputs=(Slots(2, (1, 0)),)),
        replace(initial, outputs=Slots(3, (0, 2, None))),
    ]
    hashes = [replace(fresh, initial=i).sha256([]) for i in (None, initial, *others)]
    assert len(set(hashes)) == len(hashes)
    moved = replace(initial, path=tmp_path / "b")
    assert replace(fresh, initial=moved).sha256([]) == replace(fresh, initial=initial).sha256([])
