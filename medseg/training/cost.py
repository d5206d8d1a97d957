"""Cost: seconds and memory of a training step, measured on the device at hand."""

from __future__ import annotations

import sys
import time
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path

import torch

from medseg.networks.device import Device, choose_device
from medseg.records.plan import ConfigurationPlan
from medseg.records.task import Task
from medseg.training.batches import Batch
from medseg.training.loop import build
from medseg.training.loss import region_table
from medseg.training.schedule import Length
from medseg.training.settings import Settings
from medseg.training.step import take_step

_STATUS = Path("/proc/self/status")
CUBE, GAP = 32, 8  # voxels from one object to the next, and between them


@dataclass(frozen=True, slots=True)
class StepCost:
    """One training step: ``seconds``, and ``memory_bytes`` at its peak, weights and optimiser included.

    On a CPU the memory is what the process grew by; 0 where the system does not tell (not Linux).
    """

    seconds: float
    memory_bytes: int


def measure_step(configuration: ConfigurationPlan, task: Task, device: Device) -> StepCost:
    """Take a few steps on made-up images with a network that is thrown away: the fastest but the first, and the peak.

    Raises:
        torch.OutOfMemoryError, MemoryError: it does not fit.
    """
    cuda = device.torch_device.type == "cuda"
    before = _start_watching(cuda)
    settings = Settings(task, configuration, Length(steps=3), device)
    network, optimizer = build(settings)
    regions, fastest = region_table(task), float("inf")
    for step in range(3):
        batch = made_up(configuration, task, step)
        begun = time.monotonic()
        take_step(network, optimizer, batch, 1e-6, settings, regions, frugal=False)
        if cuda:
            torch.cuda.synchronize()
        if step > 0:
            fastest = min(fastest, time.monotonic() - begun)
    return StepCost(fastest, _peak(cuda) - before)


def measure_apart(configuration: ConfigurationPlan, task: Task, device: Device) -> StepCost | None:
    """The same in a process of its own, whose memory is nothing but the step's; None if it does not fit."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        job = pool.submit(_measure_here, configuration, task, device, torch.get_num_threads())
        try:
            return job.result()
        except (BrokenProcessPool, MemoryError, torch.OutOfMemoryError):
            return None


def _measure_here(configuration: ConfigurationPlan, task: Task, device: Device, threads: int) -> StepCost:
    torch.set_num_threads(threads)
    return measure_step(configuration, task, choose_device(str(device.torch_device), device.precision))


def made_up(configuration: ConfigurationPlan, task: Task, step: int) -> Batch:
    """A batch of the plan's size: (B, C, ...) normal images, (B, ...) labels in cubes with gaps of ``GAP`` voxels.

    Labels of single voxels would be as many objects, among which losses of distances look for the nearest.
    """
    generator = torch.Generator().manual_seed(step)
    size, patch = configuration.batch_size, configuration.patch_size
    image = torch.randn((size, configuration.input_channels(task), *patch), generator=generator)
    labels = torch.zeros(patch, dtype=torch.long)
    for axis, edge in enumerate(patch):
        places = torch.arange(edge).view([-1 if other == axis else 1 for other in range(len(patch))])
        labels += places // CUBE
    labels = 1 + labels % max(1, len(task.labels) - 1)
    for axis, edge in enumerate(patch):
        labels.index_fill_(axis, torch.arange(edge)[torch.arange(edge) % CUBE >= CUBE - GAP], 0)
    return Batch(step, image, labels.expand(size, *patch).clone(), ("made up",) * size)


def _start_watching(cuda: bool) -> int:
    """Forget earlier peaks; what is in use now."""
    if cuda:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_reserved()
    if sys.platform == "linux":
        Path("/proc/self/clear_refs").write_text("5")
    return _status("VmRSS")


def _peak(cuda: bool) -> int:
    return torch.cuda.max_memory_reserved() if cuda else _status("VmHWM")


def _status(field: str) -> int:
    """A line of ``/proc/self/status`` in bytes; 0 where there is none."""
    if sys.platform != "linux":
        return 0
    for line in _STATUS.read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    return 0
