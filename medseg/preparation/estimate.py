"""Estimate: the memory and the time that preparing a case takes, before any file is read."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from math import prod

from medseg.imaging.resample import resampled_shape
from medseg.machine import free_memory_bytes, usable_cores
from medseg.records.fingerprint import CasePrint
from medseg.records.plan import ConfigurationPlan, Plan

# Measured on one core: a process with its imports, a case of no voxels, and voxels read or prepared.
PROCESS_BYTES = 150 * 2**20
SECONDS_TO_START, SECONDS_PER_CASE, SECONDS_PER_VOXEL = 1.0, 0.006, 1.5e-8
MEMORY_SHARE = 0.8  # of the free memory; the rest is for the page cache and for what others start


@dataclass(frozen=True, slots=True)
class Need:
    """What one case takes: memory at its peak, beside that of the process, and seconds on one core."""

    memory_bytes: int
    seconds: float


def case_need(measured: CasePrint | None, plan: Plan, configurations: Sequence[ConfigurationPlan]) -> Need:
    """What a case takes that is read once for all configurations, by its measured shape and spacing.

    Without them it is the plan's median case.
    """
    needs = [_need(measured, plan, configuration) for configuration in configurations]
    return Need(max(need.memory_bytes for need in needs), sum(need.seconds for need in needs))


def _need(measured: CasePrint | None, plan: Plan, configuration: ConfigurationPlan) -> Need:
    channels = len(plan.task.channels)
    if measured is None:
        source = cropped = target = int(prod(configuration.median_shape))
    else:
        cropped = prod(measured.shape_after_crop)
        source = int(cropped / measured.relative_size_after_cropping)
        spacing = [measured.spacing_mm[axis] for axis in plan.transpose]
        shape = [measured.shape_after_crop[axis] for axis in plan.transpose]
        wanted = (*spacing[: 3 - configuration.dimensions], *configuration.spacing_mm)
        target = prod(resampled_shape(shape, spacing, wanted))
    read = source * (4 * channels + 2)  # images of 2 or 4 bytes, labels of 1 or 2
    written = 4 * channels * target * 2 + 4 * target  # the result, compressed, its file's bytes; labels
    return Need(read + written, SECONDS_PER_CASE + SECONDS_PER_VOXEL * channels * (source + target))


def default_workers(needs: Iterable[Need]) -> int:
    """As many processes as there are cores and as the work is worth starting, at least 1; memory is seen to later."""
    seconds = [need.seconds for need in needs]
    worthwhile = 1 + int(sum(seconds) / 2 / SECONDS_TO_START)
    return max(1, min(usable_cores(), len(seconds), worthwhile))


def memory_for_cases(workers: int) -> int:
    """Bytes that cases may take together beside the processes that work on them."""
    return max(0, int(MEMORY_SHARE * free_memory_bytes()) - workers * PROCESS_BYTES)
