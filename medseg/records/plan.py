"""Plan: every decision that the planner took, editable by hand and validated on reading.

Spatial tuples follow the prepared array's axes: (z, y, x) after ``transpose``; the 2d configuration has (y, x).
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal, Self, get_args

from pydantic import BaseModel, Field, SerializerFunctionWrapHandler, model_serializer, model_validator

from medseg.records.base import Record
from medseg.records.fingerprint import Intensity
from medseg.records.task import Task
from medseg.records.transfer import Origin

Orientation = Literal["canonical", "file"]
Scheme = Literal["zscore", "ct", "none", "rescale_0_1", "rgb_0_1"]
NetworkName = Literal[
    "plain",
    "residual",
    "unet2015",
    "attention",
    "unetpp",
    "resnet-unet",
    "transunet",
    "swinunetr",
    "unetr",
    "segresnet",
    "mednext",
]
LossName = Literal[
    "dice-ce",
    "dice",
    "ce",
    "weighted-ce",
    "focal",
    "dice-focal",
    "iou",
    "tversky",
    "generalized-dice",
    "dice-topk",
    "border-ce",
    "boundary",
]
LOSS_NAMES: tuple[LossName, ...] = get_args(LossName)
ForegroundBy = Literal["voxel", "component"]
Up = Literal["transposed", "linear"]
PADDING_NETWORKS = ("swinunetr", "unetr", "segresnet", "mednext")  # their strides are fixed: they pad what is odd


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


class TransformerPlan(Record):
    """Self-attention over all voxels of the last stage: layers, heads, features of a token and of its perceptron."""

    layers: int = Field(default=8, ge=1, le=64)
    heads: int = Field(default=6, ge=1, le=64)
    width: int = Field(default=384, ge=4, le=8192)
    mlp: int = Field(default=1536, ge=1, le=32768)

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.width % self.heads:
            raise ValueError(f"width {self.width} must be a multiple of the {self.heads} heads")
        return self


class NetworkPlan(Record):
    """A U-Net by stages, finest first. Kernels and strides per stage and axis; stride of stage 0 is 1.

    ``convs_encoder`` are convolutions per stage of a plain network, and blocks of two convolutions per stage of a
    residual one; ``convs_decoder`` are convolutions per stage of both, coarsest first. What follows
    ``deep_supervision`` matters to some networks only and is written where it is not the default: ``up`` per decoder
    stage, () for the network's own way; ``block`` of a ResNet; ``input_size`` that position embeddings are made for;
    ``checkpointing`` computes stages again in the backward pass instead of keeping their values.
    """

    name: NetworkName = "plain"
    features: tuple[int, ...] = Field(min_length=1, max_length=16)
    kernels: tuple[tuple[int, ...], ...]
    strides: tuple[tuple[int, ...], ...]
    convs_encoder: tuple[int, ...]
    convs_decoder: tuple[int, ...]
    deep_supervision: bool = True
    norm: Literal["instance", "batch", "none"] = "instance"
    up: tuple[Up, ...] = ()
    padding: Literal["same", "valid"] = "same"
    block: Literal["basic", "bottleneck"] = "basic"
    transformer: TransformerPlan | None = None
    input_size: tuple[int, ...] | None = None
    checkpointing: bool = False

    @model_serializer(mode="wrap")
    def _write(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        return without_defaults(self, handler(self), NETWORK_OPTIONS)

    @model_validator(mode="after")
    def _check(self) -> Self:
        stages = len(self.features)
        if not len(self.kernels) == len(self.strides) == len(self.convs_encoder) == stages:
            raise ValueError(f"features, kernels, strides and convs_encoder must all have {stages} stages")
        if len(self.convs_decoder) != stages - 1:
            raise ValueError(f"convs_decoder needs {stages - 1} entries")
        dimensions = len(self.strides[0])
        if dimensions not in (2, 3) or any(len(t) != dimensions for t in (*self.kernels, *self.strides)):
            raise ValueError("kernels and strides must all have 2 or all have 3 axes")
        if set(self.strides[0]) != {1}:
            raise ValueError("the stride of the first stage must be 1")
        if any(k < 1 or k > 15 or k % 2 == 0 for t in self.kernels for k in t):
            raise ValueError("kernel sizes must be odd, 1 to 15")
        if any(s not in (1, 2) for t in self.strides for s in t):
            raise ValueError("strides must be 1 or 2")
        if any(f < 1 or f > 4096 for f in self.features):
            raise ValueError("features must lie in 1 to 4096")
        if any(c < 1 or c > 32 for c in (*self.convs_encoder, *self.convs_decoder)):
            raise ValueError("convolutions or blocks per stage must lie in 1 to 32")
        self._check_options(stages, dimensions)
        return self

    def _check_options(self, stages: int, dimensions: int) -> None:
        if self.up and len(self.up) != stages - 1:
            raise ValueError(f"up needs {stages - 1} entries, or none")
        if self.padding == "valid" and (self.name != "unet2015" or self.deep_supervision):
            raise ValueError("only unet2015 without deep supervision can do without padding")
        if (self.transformer is not None) != (self.name == "transunet"):
            raise ValueError("transunet, and no other network, needs a transformer")
        if (self.input_size is not None) != (self.name == "unetr"):
            raise ValueError("unetr, and no other network, needs an input_size")
        if self.input_size is not None and (len(self.input_size) != dimensions or any(n % 16 for n in self.input_size)):
            raise ValueError(f"input_size must be {dimensions} multiples of 16")
        if stages < {"resnet-unet": 3, "unetr": 5, "swinunetr": 6}.get(self.name, 1):
            raise ValueError(f"{self.name} needs more than {stages} stages")

    def output_size(self, patch: tuple[int, ...]) -> tuple[int, ...]:
        """Size of the logits for a patch: the same, but for convolutions without padding its centre.

        Raises:
            ValueError: without padding, the patch is too small, or a stage would halve an odd size.
        """
        if self.padding == "same":
            return patch
        return tuple(self.valid_size(axis, size) for axis, size in enumerate(patch))

    def valid_size(self, axis: int, size: int) -> int:
        """The same for one axis of convolutions without padding."""
        n = size
        for kernel, stride, convs in zip(self.kernels, self.strides, self.convs_encoder, strict=True):
            if n % stride[axis]:
                raise ValueError(f"patch size {size} of axis {axis}: a stage without padding would halve {n}")
            n = n // stride[axis] - convs * (kernel[axis] - 1)
        for level, convs in zip(range(len(self.features) - 2, -1, -1), self.convs_decoder, strict=True):
            n = n * self.strides[level + 1][axis] - convs * (self.kernels[level][axis] - 1)
        if n < 1:
            raise ValueError(f"patch size {size} of axis {axis} is too small without padding")
        return n


def ways_up(network: NetworkPlan) -> tuple[Up, ...]:
    """How each decoder level is reached, coarsest first: as the plan says, or as the network does."""
    default: Up = "linear" if network.name in ("resnet-unet", "transunet") else "transposed"
    return network.up or (default,) * (len(network.features) - 1)


NETWORK_OPTIONS = ("norm", "up", "padding", "block", "transformer", "input_size", "checkpointing")
TRAINING_OPTIONS = ("loss", "class_weights", "growth", "accumulate", "elastic", "foreground_by")


TRANSFER_OPTIONS = ("orientation", "origin")


def without_defaults(record: BaseModel, values: dict[str, Any], names: tuple[str, ...]) -> dict[str, Any]:
    """What is written of a record: of the fields in ``names`` only those that were chosen otherwise."""
    fields = type(record).model_fields
    return {key: v for key, v in values.items() if key not in names or getattr(record, key) != fields[key].default}


@dataclass(frozen=True, slots=True)
class Swap:
    """What mirroring ``axis`` of the patch does to labels: the order of classes and of outputs that undoes it."""

    axis: int
    classes: tuple[int, ...]
    outputs: tuple[int, ...]


class Laterality(Record):
    """Labels that change places when ``axis`` of the patch is mirrored: pairs of class indices, left and right."""

    axis: int = Field(ge=0, le=2)
    pairs: tuple[tuple[int, int], ...] = Field(min_length=1)

    def swap(self, task: Task) -> Swap:
        """For each class, and for each output of the network, the one it is in a mirrored image.

        Raises:
            ValueError: a region has no counterpart.
        """
        order = list(range(len(task.labels)))
        for left, right in self.pairs:
            order[left], order[right] = right, left
        if not task.regions:
            return Swap(self.axis, tuple(order), tuple(order))
        swapped = {value: task.values[order[index]] for index, value in enumerate(task.values)}
        places = {frozenset(region.values): index for index, region in enumerate(task.regions)}
        try:
            outputs = tuple(places[frozenset(swapped[v] for v in region.values)] for region in task.regions)
        except KeyError as error:
            raise ValueError("laterality: a region has no counterpart on the other side") from error
        return Swap(self.axis, tuple(order), outputs)


class Phase(Record):
    """Patch and batch of a training until the share ``until`` of it is over."""

    until: float = Field(gt=0, lt=1)
    patch_size: tuple[int, ...] = Field(min_length=2, max_length=3)
    batch_size: int = Field(ge=1, le=100_000)


class TrainingPlan(Record):
    """How a configuration is trained; the defaults are the recipe of ``training/``.

    ``foreground_jitter`` is how far, in shares of the patch, a voxel that a patch was chosen for may lie from its
    centre. ``laterality`` says what mirroring an axis of ``mirror_axes`` does to labels. ``class_weights``, one for
    each class, are those of the losses that weigh classes, by default all the same. ``growth`` are smaller patches
    that the training begins with. ``accumulate`` is how many parts a batch is computed in, one after the other.
    ``elastic`` is the probability of an elastic deformation. ``foreground_by`` says what of a class is as likely as any
    other to be what a patch is chosen for: each voxel, or each connected component, however small.
    """

    batch_dice: bool = True
    foreground_share: float = Field(default=1 / 3, ge=0, le=1)
    initial_lr: float = Field(default=1e-2, gt=0, le=10)
    momentum: float = Field(default=0.99, ge=0, lt=1)
    weight_decay: float = Field(default=3e-5, ge=0, le=1)
    iterations_per_epoch: int = Field(default=250, ge=1, le=100_000)
    epochs: int = Field(default=1000, ge=1, le=1_000_000)
    foreground_jitter: float = Field(default=0.0, ge=0, le=0.5)
    mirror_axes: tuple[int, ...] = ()
    laterality: Laterality | None = None
    loss: LossName = "dice-ce"
    class_weights: tuple[float, ...] | None = None
    growth: tuple[Phase, ...] = ()
    accumulate: int = Field(default=1, ge=1, le=1024)
    elastic: float = Field(default=0.0, ge=0, le=1)
    foreground_by: ForegroundBy = "voxel"

    @model_serializer(mode="wrap")
    def _write(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        return without_defaults(self, handler(self), TRAINING_OPTIONS)

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.class_weights is not None and not (min(self.class_weights, default=-1) >= 0 < max(self.class_weights)):
            raise ValueError("class_weights must be 0 or more, and not all 0")
        if any(late.until <= early.until for early, late in pairwise(self.growth)):
            raise ValueError("growth: each phase must end later than the one before")
        if self.laterality is not None and self.laterality.axis not in self.mirror_axes:
            raise ValueError(f"laterality is about axis {self.laterality.axis}, which mirror_axes do not name")
        return self


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
