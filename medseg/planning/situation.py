"""Situation: what all configurations of one data set share."""

from __future__ import annotations

import math
from dataclasses import dataclass

from medseg.planning.presets import Preset
from medseg.planning.sides import Sides
from medseg.records.grid import Float3
from medseg.records.plan import Budget, Normalisation
from medseg.records.task import Task


@dataclass(frozen=True, slots=True)
class Situation:
    """What all configurations of one data set share. ``spacing_mm`` and ``shape`` are in the transposed order."""

    task: Task
    budget: Budget
    preset: Preset
    spacing_mm: Float3
    shape: Float3
    cases: int
    normalisation: tuple[Normalisation, ...]
    sides: Sides
    class_weights: tuple[float, ...] | None = None

    @property
    def voxels(self) -> float:
        """Voxels of the data set: median shape times cases."""
        return math.prod(self.shape) * self.cases
