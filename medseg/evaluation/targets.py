"""Targets: what is scored — every label but the background, and every region of a task."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from medseg.errors import Problem, UsageError
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

    def outputs(self, task: Task) -> tuple[int, ...]:
        """The network's outputs whose sum is the target's probability; () where it gives none.

        Classes exclude each other, so a region's probability is the sum of its classes'. A network that was trained on
        regions gives theirs only.
        """
        if not task.regions:
            return self.indices
        names = [region.name for region in task.regions]
        return (names.index(self.name),) if self.kind == "region" else ()


def targets(task: Task, names: Sequence[str] = ()) -> tuple[Target, ...]:
    """The labels of a task without its background, then its regions (background is no part of a region).

    With ``names`` only the labels and regions that are called so.

    Raises:
        UsageError: E0001 there is no target of a name.
    """
    index_of = {value: index for index, value in enumerate(task.values)}
    labels = [Target(label.name, "label", (index_of[label.value],), (label.value,)) for label in task.foreground]
    regions = []
    for region in task.regions:
        values = tuple(sorted(set(region.values) - {0}))
        if values:
            regions.append(Target(region.name, "region", tuple(index_of[v] for v in values), values))
    found = (*labels, *regions)
    unknown = sorted(set(names) - {target.name for target in found})
    if unknown:
        known = ", ".join(dict.fromkeys(target.name for target in found))
        raise UsageError(Problem("E0001", f"no label or region {', '.join(unknown)}", f"one of {known}"))
    return tuple(target for target in found if not names or target.name in names)
