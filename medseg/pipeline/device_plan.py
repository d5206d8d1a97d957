"""Device plan: a plan for the machine at hand, with training steps measured on it where that decides something."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from medseg.machine import total_memory_bytes
from medseg.planning.cost import SECONDS_PER_TFLOP, step_memory_bytes, step_seconds, step_tflop
from medseg.planning.layers import Layer, layers_of
from medseg.planning.planner import make_plan
from medseg.planning.presets import Preset, preset_named
from medseg.planning.wording import times
from medseg.progress import SILENT, Progress
from medseg.records.fingerprint import Fingerprint
from medseg.records.plan import Budget, ConfigurationPlan, Plan, Price
from medseg.records.task import Task

if TYPE_CHECKING:
    from medseg.networks.device import Device

PROBE_S = 1.0  # a probe's step should not take longer
DOUBT = 2.0  # predictions of seconds, and of memory on a GPU, may be wrong by this factor before anything was measured
CPU_MEMORY_GB = 8.0  # at most, unless asked for: what nnU-Net's rules were made for
CPU_SHARE = 0.5  # of all memory: what is free changes from plan to plan

PROBED = {"flat": "2d", "solid": "3d_fullres"}  # configuration to measure, by the budget's field for its price


@dataclass(frozen=True, slots=True)
class Request:
    """What was asked of the budget; None leaves it to the device and the preset."""

    memory_gb: float | None = None
    seconds: float | None = None
    device: Device | None = None


def plan_for_device(
    fingerprint: Fingerprint, task: Task, request: Request, preset: Preset | str, progress: Progress = SILENT
) -> Plan:
    """A plan by the preset's rules; those that size by cost get the device's memory and speed.

    A step is measured only if the plan would be another one with steps twice as costly or cheap as predicted.
    """
    rules = preset_named(preset) if isinstance(preset, str) else preset
    if rules.sizing != "cost":
        return make_plan(fingerprint, task, file_budget(request, rules), rules)
    from medseg.networks.device import choose_device

    device = request.device or choose_device()
    budget = device_budget(request, device)
    plan = make_plan(fingerprint, task, budget, rules)
    for field, name in PROBED.items():
        if name not in plan.configurations or not _matters(fingerprint, plan, rules, field):
            continue
        probe = probe_of(plan, name, rules.min_batch)
        price = measure_price(probe, task, budget, device)
        if price is None:
            progress.say(f"{name}: a training step could not be measured; predictions are taken")
            continue
        progress.say(
            f"{name}: measured steps of patch {times(probe.patch_size)}: {price.seconds_per_tflop:.3g} s per 10¹² "
            f"operations, {price.memory_factor:.2f} times the memory predicted"
        )
        budget = plan.budget.model_copy(update={field: price})
        plan = make_plan(fingerprint, task, budget, rules)
    return plan


def device_budget(request: Request, device: Device) -> Budget:
    """The budget on a device: all of a GPU's memory, on a CPU at most half of all there is."""
    if request.memory_gb is not None:
        memory_gb = request.memory_gb
    elif device.torch_device.type == "cuda":
        import torch

        memory_gb = torch.cuda.get_device_properties(device.torch_device).total_memory / 1e9
    else:
        memory_gb = max(1.0, min(CPU_MEMORY_GB, CPU_SHARE * total_memory_bytes() / 1e9))
    kind: Literal["cpu", "cuda"] = "cuda" if device.torch_device.type == "cuda" else "cpu"
    return Budget(memory_gb=round(memory_gb, 1), device=kind, half=device.half, seconds=request.seconds)


def file_budget(request: Request, preset: Preset | str) -> Budget | None:
    """The budget where no device is looked at: a GPU of the memory asked for, or of what the preset is made for."""
    rules = preset_named(preset) if isinstance(preset, str) else preset
    memory_gb = request.memory_gb or rules.reference_memory_gb
    if rules.sizing != "cost":
        return Budget(memory_gb=memory_gb)
    kind: Literal["cpu", "cuda"] = "cuda"
    if request.device is not None and request.device.torch_device.type == "cpu":
        kind = "cpu"
    return Budget(memory_gb=memory_gb, device=kind, seconds=request.seconds)


def _matters(fingerprint: Fingerprint, plan: Plan, rules: Preset, field: str) -> bool:
    """Whether the plan would change if steps cost ``DOUBT`` times more or less.

    Memory on a CPU is not in doubt: there the predictions were fitted, and hold within 13 % (``planning/cost.py``).
    """
    for factor in (1 / DOUBT, DOUBT):
        seconds = factor * SECONDS_PER_TFLOP[plan.budget.device]
        price = Price(seconds_per_tflop=seconds, memory_factor=1.0 if plan.budget.device == "cpu" else factor)
        other = make_plan(fingerprint, plan.task, plan.budget.model_copy(update={field: price}), rules)
        if other.configurations != plan.configurations:
            return True
    return False


def probe_of(plan: Plan, name: str, batch_size: int) -> ConfigurationPlan:
    """A configuration of that batch size, its patch halved until a step should take ``PROBE_S`` at most."""
    found = plan.configurations[name].model_copy(update={"batch_size": batch_size})
    divisors = [math.prod(stride[axis] for stride in found.network.strides) for axis in range(found.dimensions)]
    while step_seconds(_layers(found, plan.task), found.batch_size, plan.budget, found.dimensions) > PROBE_S:
        parts = [size // divisor for size, divisor in zip(found.patch_size, divisors, strict=True)]
        axis = parts.index(max(parts))
        if parts[axis] < 2:
            break
        patch = list(found.patch_size)
        patch[axis] = parts[axis] // 2 * divisors[axis]
        found = found.model_copy(update={"patch_size": tuple(patch)})
    return found


def measure_price(probe: ConfigurationPlan, task: Task, budget: Budget, device: Device) -> Price | None:
    """Measure steps of a configuration in a process of their own; None if they cannot be taken there."""
    from medseg.training.cost import measure_apart

    found = measure_apart(probe, task, device)
    if found is None:
        return None
    layers = _layers(probe, task)
    predicted = step_memory_bytes(layers, probe.batch_size, budget.asked_for(), probe.dimensions)
    factor = found.memory_bytes / predicted if found.memory_bytes else 1.0
    seconds = found.seconds / step_tflop(layers, probe.batch_size)
    return Price(seconds_per_tflop=float(f"{seconds:.4g}"), memory_factor=float(f"{factor:.3g}"))


def _layers(configuration: ConfigurationPlan, task: Task) -> list[Layer]:
    channels = configuration.input_channels(task)
    return layers_of(configuration.network, configuration.patch_size, channels, task.outputs)
