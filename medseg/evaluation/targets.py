"""Targets: what is scored — every label but the background, and every region of a task."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from medseg.records.scores import TargetKind
from medseg.records.task import Task


@dataclass(frozen=True, slots=True)
class Target:
    """One label, or one region of several. ``indices`` are class indices, ``values`` the values in label files."""

    name: str
    kind: TargetKind
    indices: tuple[int, ...]
    values: tuple[int, ...]

    def mask(self, labels: NDArray[np.integer]) -> NDArray[np.bool_]:
        """Where class indices of any shape belong to the target."""
        if len(self.indices) == 1:
            return np.asarray(labels == self.indices[0])
        return np.isin(labels, self.indices)


def targets(task: Task) -> tuple[Target, ...]:
    """The labels of a task without its background, then its regions (background is no part of a region)."""
    index_of = {value: index for index, value in enumerate(task.values)}
    labels = [Target(label.name, "label", (index_of[label.value],), (label.value,)) for label in task.foreground]
    regions = []
    for region in task.regions:
        values = tuple(sorted(set(region.values) - {0}))
        if values:
            regions.append(Target(region.name, "region", tuple(index_of[v] for v in values), values))
    return (*labels, *regions)
