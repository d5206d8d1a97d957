"""Transfer: the plan of a model carried over to another data set, whose networks will begin from its weights."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

from medseg.artefacts import sha256_of_json
from medseg.errors import IncompatibleError, Problem
from medseg.planning.cost import step_memory_bytes
from medseg.planning.layers import layers_of
from medseg.planning.matching import Asked, Matched, match_tasks, told_all
from medseg.planning.networks import Variant
from medseg.planning.normalisation import normalisations
from medseg.planning.presets import Preset
from medseg.planning.sides import Sides, find_sides
from medseg.planning.sizing import USABLE
from medseg.planning.spacing import median_shape, reorder
from medseg.planning.weights import WEIGHTED, class_weights
from medseg.planning.wording import gigabytes, times
from medseg.records.fingerprint import Fingerprint
from medseg.records.grid import Float3
from medseg.records.plan import Budget, ConfigurationPlan, Orientation, Plan, Reason
from medseg.records.task import Task
from medseg.records.training import TrainingPlan
from medseg.records.transfer import Origin

TAKEN_OVER = "taken over"  # topic of what is told of channels and labels


@dataclass(frozen=True, slots=True)
class Given:
    """What a model gives: its plan with the trained configurations alone, and the SHA-256 of their folds' weights."""

    plan: Plan
    orientation: Orientation
    weights: Mapping[str, Mapping[str, str]]


@dataclass(frozen=True, slots=True)
class Wishes:
    """What may be chosen beside the model: memory and time, rules for what the model says nothing about, the loss."""

    budget: Budget
    preset: Preset
    variant: Variant = field(default_factory=Variant)


def origin_of(given: Given, task: Task, asked: Asked) -> Origin:
    """What the model gives to a task.

    Raises:
        UsageError: E0001 a name that was asked for is not there.
    """
    found = match_tasks(task, given.plan.task, asked)
    weights = {name: dict(folds) for name, folds in given.weights.items()}
    return Origin(channels=found.channels, labels=found.labels, outputs=found.outputs, weights=weights)


def carried_plan(fingerprint: Fingerprint, task: Task, given: Given, origin: Origin, wishes: Wishes) -> Plan:
    """The model's configurations for another data set.

    Theirs are network, patch, spacing, order of axes, resampling, orientation and recipe; and of the channels that are
    taken over, normalisation and intensities, for the weights expect images that look as they did. The data set's are
    the task, what mirroring means, weights of classes, and all that new channels need. The batch is the model's, or as
    much of it as memory holds.

    Args:
        fingerprint: of the data set.
        task: its channels and labels.
        given: the model.
        origin: of ``origin_of``.
        wishes: budget, preset and variant.

    Raises:
        IncompatibleError: E0802 a 3D model for single slices.
    """
    order = given.plan.transpose
    sides, sides_why = find_sides(task, fingerprint, order, wishes.preset)
    fresh, fresh_why = normalisations(task, fingerprint.median_relative_size_after_cropping, wishes.preset)
    places = origin.channels.places
    configurations, reasons = {}, [*_told(task, origin), sides_why]
    if None in places:
        reasons.append(fresh_why.model_copy(update={"text": f"of new channels: {fresh_why.text}"}))
    for name, old in given.plan.configurations.items():
        taken = [old.normalisation[place] if place is not None else n for place, n in zip(places, fresh, strict=True)]
        changes = {
            "median_shape": _median_shape(fingerprint, old, given),
            "normalisation": tuple(taken),
            "training": _training(fingerprint, task, old, sides, given.orientation, wishes.variant),
        }
        if wishes.variant.checkpointing:
            changes["network"] = old.network.model_copy(update={"checkpointing": True})
        sized, why = _with_batch(old.model_copy(update=changes), task, wishes.budget)
        configurations[name] = sized
        reasons.append(why)
    intensities = zip(places, fingerprint.intensities, strict=True)
    return Plan(
        preset=given.plan.preset,
        task=task,
        budget=wishes.budget,
        transpose=order,
        intensities=tuple(given.plan.intensities[place] if place is not None else own for place, own in intensities),
        configurations=configurations,
        reasons=tuple(reasons),
        fingerprint_sha256=sha256_of_json(fingerprint.to_json()),
        orientation=given.orientation,
        origin=origin,
    )


def _told(task: Task, origin: Origin) -> list[Reason]:
    found = Matched(origin.channels, origin.labels, origin.outputs)
    return [Reason(topic=TAKEN_OVER, text=text) for text in told_all(task, found)]


def _median_shape(fingerprint: Fingerprint, old: ConfigurationPlan, given: Given) -> tuple[float, ...]:
    """On the model's grid; along the axis that a 2D network does not see, on the data set's own."""
    order, dimensions = given.plan.transpose, old.dimensions
    own = np.median([case.spacing_mm for case in fingerprint.cases], 0).tolist()
    spacing = (*reorder(own, order)[: 3 - dimensions], *old.spacing_mm)
    back = [order.index(axis) for axis in range(3)]
    target: Float3 = (spacing[back[0]], spacing[back[1]], spacing[back[2]])
    sizes = np.median([case.shape_after_crop for case in fingerprint.cases], 0)
    if dimensions == 3 and sizes.min() == 1:
        measured = f"{old.name} of the model is 3D, and most cases are single slices of {times(sizes)} voxels"
        raise IncompatibleError(Problem("E0802", measured, "volumes", "begin from a 2D model"))
    return reorder(median_shape(fingerprint, target)[0], order)[3 - dimensions :]


def _training(
    fingerprint: Fingerprint,
    task: Task,
    old: ConfigurationPlan,
    sides: Sides,
    orientation: Orientation,
    variant: Variant,
) -> TrainingPlan:
    """The model's, with what depends on the labels made anew; no axis is mirrored that the model's training did not."""
    axes, laterality = sides.mirroring(old.dimensions)
    if orientation == "file" and sides.axis is not None:  # which axis runs from left to right differs from file to file
        axes, laterality = (), None
    kept = tuple(axis for axis in axes if axis in old.training.mirror_axes)
    loss = variant.loss or old.training.loss
    asked = {"elastic": variant.elastic, "foreground_by": variant.foreground_by}
    changes = {name: value for name, value in asked.items() if value is not None} | {
        "mirror_axes": kept,
        "laterality": laterality if laterality is not None and laterality.axis in kept else None,
        "loss": loss,
        "class_weights": class_weights(fingerprint, task) if loss in WEIGHTED else None,
    }
    return old.training.model_copy(update=changes)


def _with_batch(configuration: ConfigurationPlan, task: Task, budget: Budget) -> tuple[ConfigurationPlan, Reason]:
    """The model's batch, or as many samples as memory holds."""
    channels, training = configuration.input_channels(task), configuration.training
    layers = layers_of(configuration.network, configuration.patch_size, channels, task.outputs)
    allowed = USABLE * budget.memory_gb * 1e9
    planned, parts = configuration.batch_size, training.accumulate

    def needed(batch: int) -> float:
        return step_memory_bytes(layers, batch, budget, configuration.dimensions)

    part = math.ceil(planned / parts)
    fixed = needed(0)
    fitting = max(1, min(part, int((allowed - fixed) / (needed(1) - fixed))))
    text = f"batch {planned}, as the model's: a step takes about {gigabytes(needed(part))} of {gigabytes(allowed)}"
    if fitting < part:
        size = parts * fitting
        text = f"batch {size} instead of the model's {planned}: that takes about {gigabytes(needed(part))}, "
        text += f"this {gigabytes(needed(fitting))} of {gigabytes(allowed)}"
        changes = {"batch_size": size, "training": training.model_copy(update={"growth": ()})}
        configuration = configuration.model_copy(update=changes)
    return configuration, Reason(topic=f"{configuration.name} batch", text=text)
