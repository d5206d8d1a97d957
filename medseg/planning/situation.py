"""Situation: what all configurations of one data set share, and the networks that its preset makes of a topology."""

from __future__ import annotations

import math
from dataclasses import dataclass

from medseg.planning.memory import convs_per_stage, features_per_stage
from medseg.planning.presets import Preset
from medseg.planning.sides import Sides
from medseg.planning.topology import Topology
from medseg.records.grid import Float3
from medseg.records.plan import Budget, NetworkPlan, Normalisation
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

    @property
    def voxels(self) -> float:
        """Voxels of the data set: median shape times cases."""
        return math.prod(self.shape) * self.cases


def network_of(found: Topology, preset: Preset) -> NetworkPlan:
    """The network that a preset builds on a topology."""
    stages = len(found.strides)
    return NetworkPlan(
        name=preset.network,
        features=features_per_stage(stages, preset.base_features, preset.scale(len(found.patch)).max_features),
        kernels=found.kernels,
        strides=found.strides,
        convs_encoder=convs_per_stage(preset.convs_encoder, stages),
        convs_decoder=(preset.convs_decoder,) * (stages - 1),
    )
