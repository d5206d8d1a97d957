#!/usr/bin/env python3
"""Memory and seconds of training steps, measured, against what plans predict.

Plans for made-up data sets of five kinds, plain and residual networks, 2D and 3D; each step is taken in a process of
its own. Prints one line for each plan and the largest relative error. Takes some minutes on two cores; the memory does
not depend on how busy the machine is, the seconds do.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator

from medseg.networks.device import choose_device
from medseg.planning.cost import step_memory_bytes, step_tflop
from medseg.planning.layers import layers_of
from medseg.planning.planner import make_plan
from medseg.records.fingerprint import CasePrint, Fingerprint, Intensity
from medseg.records.plan import Budget, ConfigurationPlan
from medseg.records.task import Channel, Label, Task
from medseg.training.cost import measure_apart

DATA = {  # shape, spacing in mm, cases, channels, labels
    "hippocampus": ((36, 50, 35), (1.0, 1.0, 1.0), 200, 1, 3),
    "heart": ((10, 256, 216), (10.0, 1.5, 1.5), 60, 1, 4),
    "brain": ((140, 170, 140), (1.0, 1.0, 1.0), 100, 4, 4),
    "thorax": ((300, 500, 520), (1.0, 0.8, 0.8), 50, 1, 25),
    "cells": ((1, 256, 320), (1.0, 1.0, 1.0), 200, 3, 2),
}
BUDGETS = (("nnunet", 1.0), ("nnunet", 2.5), ("resenc-m", 1.5))


def data_set(name: str) -> tuple[Fingerprint, Task]:
    """A fingerprint and a task as of many equal cases."""
    shape, spacing, cases, channels, labels = DATA[name]
    case = CasePrint(id="case", shape_after_crop=shape, spacing_mm=spacing, relative_size_after_cropping=1)
    intensity = Intensity(mean=0, median=0, std=1, min=-1, max=1, percentile_00_5=-1, percentile_99_5=1)
    fingerprint = Fingerprint(
        cases=(case,) * cases, intensities=(intensity,) * channels, median_relative_size_after_cropping=1
    )
    task = Task(
        channels=tuple(Channel(name=f"MRI{n}") for n in range(channels)),
        labels=tuple(Label(name=f"label {n}", value=n) for n in range(labels)),
    )
    return fingerprint, task


def plans() -> Iterator[tuple[str, Task, ConfigurationPlan]]:
    """Every configuration of every data set and budget, once, with its name."""
    seen = set()
    for name in DATA:
        fingerprint, task = data_set(name)
        for preset, memory_gb in BUDGETS:
            plan = make_plan(fingerprint, task, Budget(memory_gb=memory_gb), preset)
            for configuration in plan.configurations.values():
                batch = min(configuration.batch_size, 4 if configuration.dimensions == 2 else 2)
                key = (name, configuration.network.name, configuration.patch_size)
                if configuration.previous_stage is None and key not in seen:
                    seen.add(key)
                    yield f"{name} {preset}", task, configuration.model_copy(update={"batch_size": batch})


def main() -> None:
    """Measure, print, and fail if a prediction is off by more than a quarter."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto")
    parser.add_argument("--precision", choices=["auto", "float32"], default="auto")
    options = parser.parse_args()
    device = choose_device(options.device, options.precision)
    kind = "cuda" if device.torch_device.type == "cuda" else "cpu"
    budget = Budget(device=kind, half=device.half)
    print(f"{device.torch_device}, {device.dtype}")
    print(
        f"{'plan':<24}{'patch':<18}{'batch':>5}{'predicted MB':>14}{'measured MB':>13}{'ratio':>7}"
        f"{'s/step':>8}{'s/TFLOP':>9}"
    )
    worst = 0.0
    for name, task, configuration in plans():
        layers = layers_of(configuration.network, configuration.patch_size, len(task.channels), task.outputs)
        batch = configuration.batch_size
        predicted = step_memory_bytes(layers, batch, budget, configuration.dimensions)
        found = measure_apart(configuration, task, device)
        patch = "×".join(map(str, configuration.patch_size))
        if found is None:
            print(f"{name:<24}{patch:<18}{batch:>5}{predicted / 1e6:>14.0f}  does not fit")
            continue
        ratio = predicted / found.memory_bytes
        worst = max(worst, abs(ratio - 1))
        print(
            f"{name:<24}{patch:<18}{batch:>5}{predicted / 1e6:>14.0f}{found.memory_bytes / 1e6:>13.0f}{ratio:>7.2f}"
            f"{found.seconds:>8.2f}{found.seconds / step_tflop(layers, batch):>9.1f}",
            flush=True,
        )
    print(f"largest relative error {worst:.0%}")
    raise SystemExit(worst > 0.25)


if __name__ == "__main__":
    main()
