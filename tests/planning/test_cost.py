"""Layers, bytes and seconds of a step, without building the network: against networks that are built."""

from __future__ import annotations

from math import ceil, prod
from pathlib import Path

import numpy as np
import pytest
import torch
from planning_phantoms import fingerprint, task
from scipy.ndimage import label
from torch import nn

from medseg.networks.build import build_network, parameter_count
from medseg.networks.device import Device, choose_device
from medseg.planning.cost import step_memory_bytes, step_seconds, step_tflop
from medseg.planning.layers import layers_of
from medseg.planning.planner import make_plan
from medseg.records.plan import Budget, ConfigurationPlan, Price
from medseg.training.cost import CUBE, made_up, measure_apart

CASES = {
    "isotropic": [((60, 80, 72), (1.0, 1.0, 1.0))] * 20,
    "anisotropic": [((12, 160, 128), (8.0, 1.3, 1.3))] * 20,
    "slices": [((1, 200, 150), (5.0, 0.7, 0.8))] * 20,
    "tiny": [((5, 7, 6), (1.0, 1.2, 0.9))] * 3,
}


def configurations() -> list[ConfigurationPlan]:
    found = []
    for cases in CASES.values():
        for preset in ("nnunet", "resenc-m", "medseg"):
            plan = make_plan(fingerprint(cases, 2), task(("MRI", "CT"), 4), Budget(memory_gb=1), preset)
            found += plan.configurations.values()
    return found


def counted_flop(network: nn.Module, image: torch.Tensor) -> int:
    """Two operations per weight and output voxel of every convolution that runs."""
    total = 0

    def count(module, inputs, output):
        nonlocal total
        if isinstance(module, nn.ConvTranspose2d | nn.ConvTranspose3d):
            total += 2 * module.weight.numel() * inputs[0][0, 0].numel()
        else:
            total += 2 * module.weight.numel() * output[0, 0].numel()

    kinds = (nn.Conv2d, nn.Conv3d, nn.ConvTranspose2d, nn.ConvTranspose3d)
    hooks = [m.register_forward_hook(count) for m in network.modules() if isinstance(m, kinds)]
    with torch.no_grad():
        network(image)
    for hook in hooks:
        hook.remove()
    return total


@pytest.mark.parametrize("configuration", configurations(), ids=lambda c: f"{c.network.name} {c.name} {c.patch_size}")
def test_layers_are_those_of_the_network(configuration):
    layers = layers_of(configuration.network, configuration.patch_size, 2, 4)
    with torch.device("meta"):
        network = build_network(configuration.network, 2, 4).train()
        assert sum(layer.parameters for layer in layers) == parameter_count(network)
        found = counted_flop(network, torch.empty((1, 2, *configuration.patch_size)))
    assert sum(layer.flop for layer in layers) == found


def test_a_step_is_linear_in_the_batch_and_prices_scale_it():
    configuration = configurations()[1]
    layers = layers_of(configuration.network, configuration.patch_size, 2, 4)
    dimensions, budget = configuration.dimensions, Budget(device="cpu")
    memory = [step_memory_bytes(layers, batch, budget, dimensions) for batch in range(4)]
    assert memory[3] - memory[2] == pytest.approx(memory[1] - memory[0])
    priced = budget.model_copy(update={"solid": Price(seconds_per_tflop=7, memory_factor=1.5), "flat": None})
    assert step_memory_bytes(layers, 2, priced, 3) == pytest.approx(1.5 * memory[2])
    assert step_memory_bytes(layers, 2, priced, 2) == pytest.approx(memory[2])
    assert step_seconds(layers, 2, priced, 3) == pytest.approx(7 * step_tflop(layers, 2))
    assert step_tflop(layers, 2) == pytest.approx(3 * 2 * sum(layer.flop for layer in layers) / 1e12)
    assert step_memory_bytes(layers, 2, budget.model_copy(update={"half": False}), 3) > memory[2]


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="peak memory is measured on Linux only")
@pytest.mark.parametrize("name", ["2d", "3d_fullres"])
def test_a_measured_step_takes_what_is_predicted_within_a_quarter(name):
    """One of each here; scripts/bench/plan_memory.py measures many."""
    asked = task(("MRI",), 3)
    cases = [((10, 224, 192), (8.0, 1.3, 1.3))] if name == "2d" else [((40, 60, 52), (1.0, 1.0, 1.0))]
    plan = make_plan(fingerprint(cases * 20), asked, Budget(memory_gb=2, device="cpu"), "medseg")
    configuration = plan.configurations[name].model_copy(update={"batch_size": 2})
    device = Device(torch.device("cpu"), torch.float32, "test")
    found = measure_apart(configuration, asked, device)
    layers = layers_of(configuration.network, configuration.patch_size, 1, 3)
    budget = Budget(device="cpu", half=False)
    assert found is not None
    assert found.seconds > 0
    assert found.memory_bytes == pytest.approx(step_memory_bytes(layers, 2, budget, configuration.dimensions), rel=0.25)


def test_a_step_that_does_not_fit_is_told_from_one_that_does(monkeypatch):
    """The process that measures dies, as the system's memory killer would have it."""
    import medseg.training.cost as cost

    monkeypatch.setattr(cost, "_measure_here", _die)
    plan = make_plan(fingerprint(CASES["tiny"]), task(), Budget(memory_gb=1, device="cpu"), "medseg")
    assert cost.measure_apart(plan.configurations["2d"], task(), choose_device("cpu", "float32")) is None


def _die(*arguments):
    import os
    import signal

    os.kill(os.getpid(), signal.SIGKILL)


def test_labels_made_up_for_a_measurement_are_a_few_objects_of_every_class():
    """Losses of distances take the longer the more objects there are; single voxels would be thousands of them."""
    for configuration in configurations():
        labels = task(("MRI", "CT"), 4)
        batch = made_up(configuration, labels, 0)
        assert batch.image.shape == (configuration.batch_size, 2, *configuration.patch_size)
        most = prod(ceil(edge / CUBE) for edge in configuration.patch_size)
        for sample in batch.labels.numpy():
            assert label(sample > 0)[1] <= most
            assert set(np.unique(sample)) <= set(range(len(labels.labels)))
            assert (sample == 0).any() or max(configuration.patch_size) < CUBE
            if most >= len(labels.labels):
                assert len(np.unique(sample)) > 2
