"""Weights: how much the voxels of each class count in the losses that weigh them."""

from __future__ import annotations

import math

from medseg.records.fingerprint import Fingerprint
from medseg.records.task import Task

WEIGHTED = ("weighted-ce", "border-ce")  # the losses that do
MOST_UNEQUAL = 100.0  # of two weights: beyond, single voxels of a tiny class rule every step


def class_weights(fingerprint: Fingerprint, task: Task) -> tuple[float, ...] | None:
    """Weights by class in inverse proportion to its share of all voxels, 1 on average; None without counts.

    A class that never occurs, and one more than ``MOST_UNEQUAL`` times rarer than the commonest, weighs as one that is
    just so rare. Voxels without a declared value (the ignore label) count as nothing.
    """
    counted = dict.fromkeys(task.values, 0)
    everything = 0
    for case in fingerprint.cases:
        everything += math.prod(case.shape_after_crop)
        for value, count in case.voxels_per_label.items():
            if value in counted:
                counted[value] += count
            elif value == task.ignore_value:
                everything -= count
    if not any(counted.values()):
        return None
    if not counted[0]:
        counted[0] = max(1, everything - sum(counted.values()))
    least = max(counted.values()) / MOST_UNEQUAL
    weights = [1 / max(count, least) for count in counted.values()]
    mean = sum(weights) / len(weights)
    return tuple(float(f"{weight / mean:.4g}") for weight in weights)
