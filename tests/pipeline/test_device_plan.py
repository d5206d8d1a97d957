"""A plan for the device: measured only where that decides something, remembered, and made again from what it says."""

from __future__ import annotations

import pytest
import torch

import medseg.training.cost
from medseg.networks.device import Device
from medseg.pipeline import device_plan
from medseg.pipeline.device_plan import Request, device_budget, file_budget, plan_for_device, probe_of
from medseg.planning.cost import step_memory_bytes, step_seconds, step_tflop
from medseg.planning.layers import layers_of
from medseg.planning.planner import make_plan
from medseg.planning.presets import MEDSEG
from medseg.records.fingerprint import CasePrint, Fingerprint, Intensity
from medseg.records.plan import Budget
from medseg.records.task import Channel, Label, Task
from medseg.training.cost import StepCost

CPU = Device(torch.device("cpu"), torch.bfloat16, "test")
INTENSITY = Intensity(mean=1, median=1, std=1, min=0, max=2, percentile_00_5=0, percentile_99_5=2)
TASK = Task(channels=(Channel(name="CT"),), labels=tuple(Label(name=f"l{v}", value=v) for v in range(5)))


def fingerprint(shape, spacing, cases=20) -> Fingerprint:
    case = CasePrint(id="c", shape_after_crop=shape, spacing_mm=spacing, relative_size_after_cropping=1)
    return Fingerprint(cases=(case,) * cases, intensities=(INTENSITY,), median_relative_size_after_cropping=1)


SMALL = fingerprint((20, 28, 32), (2.0, 1.1, 0.9))
LARGE = fingerprint((300, 400, 420), (1.0, 0.8, 0.7))


@pytest.fixture
def measured(monkeypatch):
    """What was measured; each measurement finds three times the seconds and 1.4 times the memory predicted."""
    seen = []

    def measure(configuration, task, device):
        seen.append(configuration)
        layers = layers_of(configuration.network, configuration.patch_size, 1, 5)
        budget = Budget(device="cpu")
        memory = step_memory_bytes(layers, configuration.batch_size, budget, configuration.dimensions)
        seconds = step_seconds(layers, configuration.batch_size, budget, configuration.dimensions)
        return StepCost(3 * seconds, round(1.4 * memory))

    monkeypatch.setattr(medseg.training.cost, "measure_apart", measure)
    return seen


def test_small_data_sets_need_no_measurement(measured):
    plan = plan_for_device(SMALL, TASK, Request(device=CPU), "medseg")
    assert not measured
    assert (plan.budget.device, plan.budget.solid, plan.preset) == ("cpu", None, "medseg")


def test_nnunets_presets_never_look_at_the_device(measured):
    plan = plan_for_device(LARGE, TASK, Request(memory_gb=6, seconds=600, device=CPU), "nnunet")
    assert not measured
    assert plan == make_plan(LARGE, TASK, Budget(memory_gb=6), "nnunet")


def test_what_was_measured_is_in_the_plan_which_can_be_made_again_from_it(measured):
    request = Request(memory_gb=4, seconds=900, device=CPU)
    plan = plan_for_device(LARGE, TASK, request, "medseg")
    assert [configuration.dimensions for configuration in measured] == [3]  # 2D steps are short enough either way
    assert plan.budget.solid.memory_factor == pytest.approx(1.4, rel=0.01)
    assert plan.budget.solid.seconds_per_tflop == pytest.approx(3 * 2.5, rel=0.01)
    assert make_plan(LARGE, TASK, plan.budget, "medseg") == plan
    unmeasured = make_plan(LARGE, TASK, plan.budget.asked_for(), "medseg")
    sizes = [p.configurations["3d_fullres"].patch_size for p in (plan, unmeasured)]
    assert torch.tensor(sizes[0]).prod() < torch.tensor(sizes[1]).prod()


def test_memory_on_a_cpu_is_known_and_on_a_gpu_it_is_measured(measured, monkeypatch):
    plan_for_device(LARGE, TASK, Request(memory_gb=4, device=CPU), "medseg")
    assert not measured
    gpu = Device(torch.device("cuda"), torch.bfloat16, "test")
    plan = plan_for_device(LARGE, TASK, Request(memory_gb=4, device=gpu), "medseg")
    assert len(measured) == 2
    assert plan.budget.device == "cuda"


def test_time_shrinks_the_patch_until_enough_steps_fit(measured):
    plan = plan_for_device(LARGE, TASK, Request(memory_gb=8, seconds=1800, device=CPU), "medseg")
    configuration = plan.configurations["3d_fullres"]
    layers = layers_of(configuration.network, configuration.patch_size, 1, 5)
    assert 1800 / step_seconds(layers, 2, plan.budget, 3) >= MEDSEG.least_steps
    text = next(reason.text for reason in plan.reasons if reason.topic == "3d_fullres patch")
    assert "steps in 30 min" in text


def test_the_step_of_a_probe_is_short_and_fits_its_network():
    plan = make_plan(LARGE, TASK, Budget(memory_gb=16, device="cpu"), "medseg")
    whole, probe = plan.configurations["3d_fullres"], probe_of(plan, "3d_fullres", 2)
    assert probe.network == whole.network
    assert probe.batch_size == 2
    assert type(probe).model_validate(probe.to_json()) == probe
    layers = layers_of(probe.network, probe.patch_size, 1, 5)
    assert step_tflop(layers, 2) * 2.5 <= device_plan.PROBE_S
    assert all(n <= m for n, m in zip(probe.patch_size, whole.patch_size, strict=True))


def test_a_step_that_cannot_be_measured_leaves_the_prediction(monkeypatch):
    monkeypatch.setattr(medseg.training.cost, "measure_apart", lambda *arguments: None)
    plan = plan_for_device(LARGE, TASK, Request(memory_gb=4, seconds=1800, device=CPU), "medseg")
    assert plan == make_plan(LARGE, TASK, Budget(memory_gb=4, device="cpu", seconds=1800), "medseg")


def test_the_budget_of_a_cpu_leaves_half_of_its_memory(monkeypatch):
    for total_gb, expected in ((64, 8.0), (6, 3.0), (0.5, 1.0)):
        monkeypatch.setattr(device_plan, "total_memory_bytes", lambda total_gb=total_gb: int(total_gb * 1e9))
        assert device_budget(Request(), CPU) == Budget(memory_gb=expected, device="cpu", half=True)
    assert device_budget(Request(memory_gb=3, seconds=60), CPU).memory_gb == 3


def test_without_a_device_a_gpu_is_assumed():
    assert file_budget(Request(memory_gb=12), "medseg") == Budget(memory_gb=12, device="cuda")
    assert file_budget(Request(device=CPU), "medseg") == Budget(memory_gb=8, device="cpu")
    assert file_budget(Request(device=CPU, seconds=5), "resenc-l") == Budget(memory_gb=24)
