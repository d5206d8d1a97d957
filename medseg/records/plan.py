"""Plan: every decision that the planner took, editable by hand and validated on reading.

Spatial tuples follow the prepared array's axes: (z, y, x) after ``transpose``; the 2d configuration has (y, x).
"""

from __future__ import annotations

from typing import Any, Literal, Self

from pydantic import Field, SerializerFunctionWrapHandler, model_serializer, model_validator

from medseg.records.base import Record, without_defaults
from medseg.records.fingerprint import Intensity
from medseg.records.network import PADDING_NETWORKS, NetworkPlan
from medseg.records.task import Task
from medseg.records.training import Swap, TrainingPlan
from medseg.records.transfer import Origin

Orientation = Literal["canonical", "file"]
Scheme = Literal["zscore", "ct", "none", "rescale_0_1", "rgb_0_1"]
TRANSFER_OPTIONS = ("orientation", "origin")


class Price(Record):
    """What measuring a training step told: seconds per 10¹² operations, and memory in shares of the prediction."""

    seconds_per_tflop: float = Field(gt=0)
    memory_factor: float = Field(default=1.0, gt=0)


class Budget(Record):
    """What the plan may use. The presets of nnU-Net know ``memory_gb`` only, to which their proxy is scaled.

    ``device`` and ``half`` (number type of the convolutions) say where it will be trained, ``seconds`` for how long,
    None if that is open. ``flat`` and ``solid`` are what 2D and 3D steps were measured to cost there.
    """

    memory_gb: float = Field(default=8.0, gt=0, le=1024)
    device: Literal["cpu", "cuda"] = "cuda"
    half: bool = True
    seconds: float | None = Field(default=None, gt=0)
    flat: Price | None = None
    solid: Price | None = None

    def asked_for(self) -> Budget:
        """The budget without what was measured."""
        return self.model_copy(update={"flat": None, "solid": None})


class Reason(Record):
    """One decision in one sentence."""

    topic: str
    text: str


class Normalisation(Record):
    """How one channel is normalised; ``use_mask`` restricts z-score statistics to the nonzero mask."""

    scheme: Scheme
    use_mask: bool = False


class Resampling(Record):
    """Spline orders in plane and along a separately treated axis; ``force_separate_z`` None means by the rule."""

    image_order: int = Field(default=3, ge=0, le=3)
    image_order_z: int = Field(default=0, ge=0, le=3)
    label_order: int = Field(default=1, ge=0, le=1)
    label_order_z: int = Field(default=0, ge=0, le=1)
    probability_order: int = Field(default=1, ge=0, le=1)
    probability_order_z: int = Field(default=0, ge=0, le=1)
    force_separate_z: bool | None = None


class ConfigurationPlan(Record):
    """One trainable configuration, for instance ``3d_fullres``.

    The network of a cascade's second stage also sees the labels that ``previous_stage`` predicts, one channel for each
    foreground label.
    """

    name: str = Field(min_length=1, max_length=64, pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$")
    spacing_mm: tuple[float, ...] = Field(min_length=2, max_length=3)
    patch_size: tuple[int, ...] = Field(min_length=2, max_length=3)
    batch_size: int = Field(ge=1, le=100_000)
    median_shape: tuple[float, ...] = Field(min_length=2, max_length=3)
    normalisation: tuple[Normalisation, ...] = Field(min_length=1)
    resampling: Resampling = Resampling()
    network: NetworkPlan
    training: TrainingPlan = TrainingPlan()
    previous_stage: str | None = None

    @model_validator(mode="after")
    def _check(self) -> Self:
        dimensions = len(self.patch_size)
        if not len(self.spacing_mm) == len(self.median_shape) == len(self.network.strides[0]) == dimensions:
            raise ValueError("spacing_mm, patch_size, median_shape and the network must have the same number of axes")
        if any(not 1e-3 <= s <= 1e4 for s in self.spacing_mm):
            raise ValueError(f"spacing_mm {self.spacing_mm} must lie in 0.001 to 10000")
        mirrored = self.training.mirror_axes
        if len(set(mirrored)) < len(mirrored) or any(not 0 <= axis < dimensions for axis in mirrored):
            raise ValueError(f"mirror_axes {mirrored} must be different axes from 0 to {dimensions - 1}")
        for sizes in (self.patch_size, *(phase.patch_size for phase in self.training.growth)):
            self._check_patch(sizes)
        if self.training.growth and self.network.input_size is not None:
            raise ValueError("growth: this network takes patches of one size only")
        least = min((self.batch_size, *(phase.batch_size for phase in self.training.growth)))
        if self.training.accumulate > least:
            raise ValueError(f"accumulate {self.training.accumulate} parts of a batch of {least}")
        return self

    def _check_patch(self, sizes: tuple[int, ...]) -> None:
        if len(sizes) != len(self.patch_size):
            raise ValueError(f"patch_size {sizes} must have {len(self.patch_size)} axes")
        self.network.output_size(sizes)
        for axis, size in enumerate(sizes):
            divisor = 1
            for stride in self.network.strides:
                divisor *= stride[axis]
            if self.network.padding == "valid" or self.network.name in PADDING_NETWORKS:
                divisor = 1
            if size < divisor or size > 65536 or size % divisor:
                raise ValueError(f"patch_size {size} of axis {axis} must be a multiple of {divisor}, at most 65536")

    @property
    def dimensions(self) -> int:
        """2 or 3."""
        return len(self.patch_size)

    def input_channels(self, task: Task) -> int:
        """Channels of the network's input: those of the images, and of the labels of a previous stage."""
        return len(task.channels) + (len(task.foreground) if self.previous_stage else 0)

    def swap(self, task: Task) -> Swap | None:
        """What mirroring does to labels; None if nothing."""
        laterality = self.training.laterality
        return None if laterality is None else laterality.swap(task)


class Plan(Record):
    """Task, budget and configurations, with the reasons; ``fingerprint_sha256`` ties it to the data.

    Fine-tuning has an ``origin``, and the ``orientation`` of the model that it begins from: the axes on which networks
    see volumes, canonical ones or those of the file.
    """

    schema_version: int = Field(default=1, ge=1, le=1)
    preset: str
    task: Task
    budget: Budget = Budget()
    transpose: tuple[int, int, int] = (0, 1, 2)
    intensities: tuple[Intensity, ...]
    configurations: dict[str, ConfigurationPlan] = Field(min_length=1)
    reasons: tuple[Reason, ...] = ()
    fingerprint_sha256: str = ""
    orientation: Orientation = "canonical"
    origin: Origin | None = None

    @model_serializer(mode="wrap")
    def _write(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        return without_defaults(self, handler(self), TRANSFER_OPTIONS)

    @model_validator(mode="after")
    def _check(self) -> Self:
        if sorted(self.transpose) != [0, 1, 2]:
            raise ValueError(f"transpose {self.transpose} is not an order of the axes 0, 1, 2")
        channels = len(self.task.channels)
        if len(self.intensities) != channels:
            raise ValueError(f"{len(self.intensities)} intensity records for {channels} channels")
        for key, configuration in self.configurations.items():
            if key != configuration.name:
                raise ValueError(f"configuration {key!r} calls itself {configuration.name!r}")
            weights = configuration.training.class_weights
            if weights is not None and len(weights) != len(self.task.labels):
                raise ValueError(f"{key}: {len(weights)} class_weights for {len(self.task.labels)} classes")
            if len(configuration.normalisation) != channels:
                raise ValueError(f"{key}: {len(configuration.normalisation)} normalisations for {channels} channels")
            self._check_stage(configuration)
            _check_laterality(configuration, self.task)
        self._check_origin()
        return self

    def _check_origin(self) -> None:
        if self.origin is None:
            return
        task, origin = self.task, self.origin
        counts = {"channels": len(task.channels), "labels": len(task.labels), "outputs": task.outputs}
        for what, count in counts.items():
            places = getattr(origin, what).places
            if len(places) != count:
                raise ValueError(f"origin: places of {len(places)} {what} for the task's {count}")
        if unknown := sorted(origin.weights.keys() - self.configurations.keys()):
            raise ValueError(f"origin: weights of {', '.join(unknown)}, which is not in the plan")

    def _check_stage(self, configuration: ConfigurationPlan) -> None:
        if configuration.previous_stage is None:
            return
        previous = self.configurations.get(configuration.previous_stage)
        if previous is None or previous.previous_stage is not None:
            there = f"{configuration.previous_stage!r} is not a configuration of its own"
            raise ValueError(f"{configuration.name}: previous_stage {there}")
        if previous.dimensions != 3 or configuration.dimensions != 3:
            raise ValueError(f"{configuration.name}: both stages of a cascade must be 3D")


def _check_laterality(configuration: ConfigurationPlan, task: Task) -> None:
    laterality = configuration.training.laterality
    if laterality is None:
        return
    paired = [index for pair in laterality.pairs for index in pair]
    if len(set(paired)) < len(paired) or not set(paired) <= set(range(1, len(task.labels))):
        raise ValueError(f"{configuration.name}: laterality must pair different foreground classes")
    laterality.swap(task)
