"""Sizing: whether a patch fits the budget, and how many of them make a batch — by nnU-Net's count, or by cost."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from medseg.planning.cost import step_memory_bytes, step_seconds
from medseg.planning.layers import Layer, layers_of
from medseg.planning.memory import allowed_values, counted_classes, plain_maps, residual_maps, unet_values
from medseg.planning.networks import input_patch, planned_network
from medseg.planning.situation import Situation
from medseg.planning.topology import Topology
from medseg.planning.wording import duration, gigabytes, millions, number, times
from medseg.records.network import NetworkPlan
from medseg.records.plan import Reason

MAX_BATCH = 100_000  # of ConfigurationPlan.batch_size
USABLE = 0.9  # of the memory: the rest is for fragmentation and for others
LEAST_VOXELS = {2: 64**2, 3: 32**3}  # a patch that lack of time does not make smaller

_ENCODER_MAPS = {"plain": plain_maps, "residual": residual_maps}


class Sizing(Protocol):
    """The rule of a preset for one configuration of a data set."""

    def fits(self, found: Topology) -> bool:
        """Whether a network on this topology can be trained within the budget."""

    def batch_size(self, found: Topology, dataset_voxels: float) -> tuple[int, Reason]:
        """Samples per batch for the patch that was chosen."""

    def patch_reason(self, found: Topology) -> Reason:
        """The sentence about the patch."""


@dataclass(frozen=True, slots=True)
class ByValues:
    """nnU-Net's rule: values in the feature maps, against a reference that grows with the memory."""

    name: str
    situation: Situation
    shape: Sequence[float]

    def fits(self, found: Topology) -> bool:
        """Whether ``patch_batch`` samples fit (nnU-Net, default_experiment_planner.py:315-368)."""
        return self._values(found) <= self._limit

    def batch_size(self, found: Topology, dataset_voxels: float) -> tuple[int, Reason]:
        """Samples per batch: what memory allows, at most a share of the data set, at least ``preset.min_batch``.

        ``dataset_voxels`` is the median 3D shape times the number of cases, also for 2D (nnU-Net,
        default_experiment_planner.py:372-378).
        """
        reference_batch = self.situation.preset.scale(len(self.shape)).reference_batch
        by_memory = round(self._allowed / self._values(found) * reference_batch)
        return _batch(self.name, self.situation, found, by_memory, dataset_voxels)

    def patch_reason(self, found: Topology) -> Reason:
        """The sentence about the patch."""
        values = self._values(found)
        fits = "fit" if values <= self._limit else "do not fit, but no smaller patch exists:"
        text = (
            f"patch {times(found.patch)} of a median case of {times(self.shape)}: the feature maps of one sample hold "
            f"{millions(values)} values and {fits} the {millions(self._limit)} allowed"
        )
        return Reason(topic=f"{self.name} patch", text=text)

    @property
    def _allowed(self) -> float:
        return allowed_values(self.situation.preset, self.situation.budget, len(self.shape))

    @property
    def _limit(self) -> float:
        scale = self.situation.preset.scale(len(self.shape))
        return self._allowed * scale.reference_batch / scale.patch_batch

    def _values(self, found: Topology) -> int:
        preset = self.situation.preset
        network = planned_network(found, preset)
        classes = counted_classes(self.situation.task)
        if preset.network not in _ENCODER_MAPS:  # nnU-Net has no count for it: the outputs of all its convolutions
            layers = _layers_of_patch(network, found, self.situation)
            return sum(layer.values for layer in layers if layer.kind != "head") + classes * math.prod(found.patch)
        maps = _ENCODER_MAPS[preset.network](found.strides, network.features, network.convs_encoder)
        return unet_values(found.patch, found.strides, network.features, maps, preset.convs_decoder, classes)


@dataclass(frozen=True, slots=True)
class ByCost:
    """Our rule: bytes and seconds of a training step on the device at hand."""

    name: str
    situation: Situation
    shape: Sequence[float]

    def fits(self, found: Topology) -> bool:
        """Whether the least batch fits into memory, and ``preset.least_steps`` of it into the time."""
        least = self.situation.preset.min_batch
        enough_time = self._seconds(found, least) <= self._allowed_s
        small = math.prod(found.patch) <= LEAST_VOXELS[len(found.patch)]
        return self._bytes(found, least) <= self._allowed_bytes and (enough_time or small)

    def batch_size(self, found: Topology, dataset_voxels: float) -> tuple[int, Reason]:
        """Samples per batch: what memory allows, at most a share of the data set, at least ``preset.min_batch``."""
        fixed = self._bytes(found, 0)
        each = self._bytes(found, 1) - fixed
        by_memory = int((self._allowed_bytes - fixed) / each)
        return _batch(self.name, self.situation, found, by_memory, dataset_voxels)

    def patch_reason(self, found: Topology) -> Reason:
        """The sentence about the patch."""
        budget, least = self.situation.budget, self.situation.preset.min_batch
        needed, seconds = self._bytes(found, least), self._seconds(found, least)
        text = (
            f"patch {times(found.patch)} of a median case of {times(self.shape)}: a training step of {least} samples "
            f"takes about {gigabytes(needed)} of {gigabytes(self._allowed_bytes)}"
        )
        if needed > self._allowed_bytes:
            text += ", which is too much, but no smaller patch exists"
        if budget.seconds is not None:
            text += f", and {duration(seconds)}: {budget.seconds / seconds:.0f} steps in {duration(budget.seconds)}"
        return Reason(topic=f"{self.name} patch", text=text)

    @property
    def _allowed_bytes(self) -> float:
        return USABLE * self.situation.budget.memory_gb * 1e9

    @property
    def _allowed_s(self) -> float:
        seconds = self.situation.budget.seconds
        return math.inf if seconds is None else seconds / self.situation.preset.least_steps

    def _bytes(self, found: Topology, batch: int) -> float:
        return step_memory_bytes(self._layers(found), batch, self.situation.budget, len(found.patch))

    def _seconds(self, found: Topology, batch: int) -> float:
        return step_seconds(self._layers(found), batch, self.situation.budget, len(found.patch))

    def _layers(self, found: Topology) -> list[Layer]:
        return _layers_of_patch(planned_network(found, self.situation.preset), found, self.situation)


SIZINGS: dict[str, type[ByValues] | type[ByCost]] = {"values": ByValues, "cost": ByCost}


def _layers_of_patch(network: NetworkPlan, found: Topology, situation: Situation) -> list[Layer]:
    task = situation.task
    return layers_of(network, input_patch(network, found.patch), len(task.channels), task.outputs)


def _batch(
    name: str, situation: Situation, found: Topology, by_memory: int, dataset_voxels: float
) -> tuple[int, Reason]:
    preset = situation.preset
    by_share = round(dataset_voxels * preset.max_dataset_share / math.prod(found.patch))
    size = max(min(by_memory, by_share, MAX_BATCH), preset.min_batch)
    text = (
        f"batch {size}: memory allows {by_memory}, {number(100 * preset.max_dataset_share)} % of the data set's "
        f"{millions(dataset_voxels)} voxels are {by_share}, the least is {preset.min_batch}"
    )
    return size, Reason(topic=f"{name} batch", text=text)
