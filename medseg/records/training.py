"""Training plan: how a configuration is trained, and what mirroring does to labels."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal, Self, get_args

from pydantic import Field, SerializerFunctionWrapHandler, model_serializer, model_validator

from medseg.records.base import Record, without_defaults
from medseg.records.task import Task

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
TRAINING_OPTIONS = ("loss", "class_weights", "growth", "accumulate", "elastic", "foreground_by")


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
