"""Planner: fingerprint, task and budget in, plan out. Pure: the same input gives the same plan.

The rules are those of nnU-Net 2.8.1's planners, the constants those of the preset; ``tests/planning`` compares the
plans of both field by field.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from medseg.artefacts import sha256_of_json
from medseg.errors import IncompatibleError, InputError, Problem
from medseg.planning.memory import (
    allowed_values,
    convs_per_stage,
    counted_classes,
    features_per_stage,
    plain_maps,
    residual_maps,
    unet_values,
)
from medseg.planning.normalisation import normalisations
from medseg.planning.patch import batch_size, patch_reason, shrink_to_fit
from medseg.planning.presets import Preset, preset_named
from medseg.planning.spacing import median_shape, reorder, target_spacing, transpose_order
from medseg.planning.topology import Topology, topology_reason
from medseg.planning.wording import times
from medseg.records.fingerprint import Fingerprint
from medseg.records.grid import Float3
from medseg.records.plan import (
    Budget,
    ConfigurationPlan,
    NetworkPlan,
    Normalisation,
    Plan,
    Reason,
    TrainingPlan,
)
from medseg.records.task import Task

SPACING_RANGE_MM = (1e-3, 1e4)  # of ConfigurationPlan.spacing_mm
ENCODER_MAPS = {"plain": plain_maps, "residual": residual_maps}


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

    @property
    def voxels(self) -> float:
        """Voxels of the data set: median shape times cases."""
        return math.prod(self.shape) * self.cases


def make_plan(
    fingerprint: Fingerprint,
    task: Task,
    budget: Budget | None = None,
    preset: Preset | str = "nnunet",
    training_cases: int | None = None,
) -> Plan:
    """The plan for a data set.

    It has the configuration ``2d``; ``3d_fullres`` unless its cases are single slices; and ``3d_lowres`` and
    ``3d_cascade_fullres`` where a patch of ``3d_fullres`` covers too little of a case.

    Args:
        fingerprint: of the data set.
        task: its channels and labels.
        budget: memory to plan for; by default what the preset was made for.
        preset: rules, by name or as a record.
        training_cases: how many there are, if the fingerprint does not hold all of them.

    Raises:
        UsageError: E0001 unknown preset.
        IncompatibleError: E0802 fingerprint and task have different numbers of channels.
        InputError: E0124, E0125 spacings for which no plan can be made.
    """
    rules = preset_named(preset) if isinstance(preset, str) else preset
    budget = budget or Budget(memory_gb=rules.reference_memory_gb)
    _check(fingerprint, task)
    spacing, spacing_why = target_spacing(fingerprint, rules)
    shape, shape_why = median_shape(fingerprint, spacing)
    order, order_why = transpose_order(spacing, shape, rules)
    schemes, schemes_why = normalisations(task, fingerprint.median_relative_size_after_cropping, rules)
    cases = training_cases or len(fingerprint.cases)
    situation = Situation(task, budget, rules, reorder(spacing, order), reorder(shape, order), cases, schemes)
    _check_target(situation.spacing_mm, situation.shape)
    configurations, reasons = _configurations(situation)
    return Plan(
        preset=rules.name,
        task=task,
        budget=budget,
        transpose=order,
        intensities=fingerprint.intensities,
        configurations={configuration.name: configuration for configuration in configurations},
        reasons=(spacing_why, shape_why, order_why, schemes_why, *reasons),
        fingerprint_sha256=sha256_of_json(fingerprint.to_json()),
    )


def _configurations(situation: Situation) -> tuple[list[ConfigurationPlan], tuple[Reason, ...]]:
    """All that the data set needs, coarse to fine, with the reasons."""
    flat, reasons = plan_2d(situation)
    if situation.shape[0] == 1:
        return [flat], (*reasons, Reason(topic="configurations", text="only 2d: the median case is a single slice"))
    full, full_why = plan_3d_fullres(situation)
    low, low_why = plan_3d_lowres(situation, full)
    full = _with_batch_dice(full, low is not None)
    if low is None:
        return [flat, full], (*reasons, *full_why, *low_why)
    cascade, cascade_why = plan_cascade(low, full)
    return [flat, low, full, cascade], (*reasons, *full_why, *low_why, cascade_why)


def plan_2d(situation: Situation) -> tuple[ConfigurationPlan, tuple[Reason, ...]]:
    """Configuration ``2d``: slices across the first axis. Dice is taken over the batch, for it holds many slices."""
    planned, reasons = _plan("2d", situation, situation.spacing_mm[1:], situation.shape[1:], situation.voxels)
    return _with_batch_dice(planned, True), reasons


def plan_3d_fullres(situation: Situation) -> tuple[ConfigurationPlan, tuple[Reason, ...]]:
    """Configuration ``3d_fullres``."""
    return _plan("3d_fullres", situation, situation.spacing_mm, situation.shape, situation.voxels)


def plan_3d_lowres(
    situation: Situation, fullres: ConfigurationPlan
) -> tuple[ConfigurationPlan | None, tuple[Reason, ...]]:
    """Configuration ``3d_lowres``, or None where no low-resolution stage is due.

    The spacing grows step by step, first along axes more than twice finer than the coarsest, until a patch covers
    ``lowres_below`` of the median case; a stage that saves less than a factor ``lowres_min_gain`` in voxels is
    dropped (nnU-Net, default_experiment_planner.py:448-475). Where there is one, the patches of ``3d_fullres`` are
    so small against the cases that single ones often hold no object: its Dice is then taken over the batch (:476-490).
    """
    preset = situation.preset
    voxels = full_voxels = math.prod(situation.shape)
    spacing = list(fullres.spacing_mm)
    planned = None
    patch: Sequence[int] = fullres.patch_size
    while math.prod(patch) / voxels < preset.lowres_below and max(spacing) * preset.lowres_step <= SPACING_RANGE_MM[1]:
        coarsest = max(spacing)
        finer = [coarsest / s > 2 for s in spacing]
        spacing = [s * preset.lowres_step if f or not any(finer) else s for s, f in zip(spacing, finer, strict=True)]
        exact = [full / low * n for full, low, n in zip(fullres.spacing_mm, spacing, situation.shape, strict=True)]
        voxels = math.prod(exact)
        shape = [float(max(1, round(n))) for n in exact]
        planned = _plan("3d_lowres", situation, spacing, shape, voxels * situation.cases)
        patch = planned[0].patch_size
    share = 100 * math.prod(fullres.patch_size) / full_voxels
    gain = full_voxels / voxels
    lowres, reasons = planned if planned is not None and gain >= preset.lowres_min_gain else (None, ())
    return (lowres and _with_batch_dice(lowres, False)), (_lowres_reason(lowres, share, gain, preset), *reasons)


def plan_cascade(lowres: ConfigurationPlan, fullres: ConfigurationPlan) -> tuple[ConfigurationPlan, Reason]:
    """Configuration ``3d_cascade_fullres``: ``3d_fullres`` that also sees the labels of ``3d_lowres`` (:533-537)."""
    text = f"{lowres.name} sees the whole, {fullres.name} the detail: a second stage refines the labels of the first"
    update = {"name": "3d_cascade_fullres", "previous_stage": lowres.name}
    return fullres.model_copy(update=update), Reason(topic="3d_cascade_fullres", text=text)


def _lowres_reason(lowres: ConfigurationPlan | None, share: float, gain: float, preset: Preset) -> Reason:
    """Whether there is a low-resolution stage, and so over what the Dice of ``3d_fullres`` is taken."""
    least = f"{100 * preset.lowres_below:.3g} %"
    text = f"a patch of 3d_fullres covers {share:.3g} % of the median case, "
    if lowres is not None:
        text += f"less than {least}: a low-resolution stage at {times(lowres.spacing_mm)} mm, {gain:.3g} times fewer "
        return Reason(topic="3d_lowres", text=text + "voxels; Dice of 3d_fullres over the batch")
    if share < 100 * preset.lowres_below:
        text += f"less than {least}, but a low-resolution stage would have only {gain:.3g} times fewer voxels"
    else:
        text += f"at least {least}: no low-resolution stage"
    return Reason(topic="3d_lowres", text=text + "; Dice of 3d_fullres per sample")


def _plan(
    name: str, situation: Situation, spacing_mm: Sequence[float], shape: Sequence[float], dataset_voxels: float
) -> tuple[ConfigurationPlan, tuple[Reason, ...]]:
    """Patch, stages and batch for a spacing, all of them by the same rules."""
    preset, dimensions = situation.preset, len(spacing_mm)
    scale = preset.scale(dimensions)
    allowed = allowed_values(preset, situation.budget, dimensions)

    classes = counted_classes(situation.task)

    def values(found: Topology) -> int:
        stages = len(found.strides)
        features = features_per_stage(stages, preset.base_features, scale.max_features)
        maps = ENCODER_MAPS[preset.network](found.strides, features, convs_per_stage(preset.convs_encoder, stages))
        return unet_values(found.patch, found.strides, features, maps, preset.convs_decoder, classes)

    share = scale.reference_batch / scale.patch_batch
    found = shrink_to_fit(spacing_mm, shape, preset, lambda candidate: values(candidate) / share <= allowed)
    batch, batch_why = batch_size(name, found.patch, values(found), allowed, dataset_voxels, preset)
    configuration = ConfigurationPlan(
        name=name,
        spacing_mm=tuple(spacing_mm),
        patch_size=found.patch,
        batch_size=batch,
        median_shape=tuple(shape),
        normalisation=situation.normalisation,
        network=_network(found, preset),
        training=TrainingPlan(mirror_axes=tuple(range(dimensions))),
    )
    patch_why = patch_reason(name, found, values(found), allowed, preset, shape)
    return configuration, (patch_why, topology_reason(name, found, preset.min_edge), batch_why)


def _network(found: Topology, preset: Preset) -> NetworkPlan:
    stages = len(found.strides)
    return NetworkPlan(
        name=preset.network,
        features=features_per_stage(stages, preset.base_features, preset.scale(len(found.patch)).max_features),
        kernels=found.kernels,
        strides=found.strides,
        convs_encoder=convs_per_stage(preset.convs_encoder, stages),
        convs_decoder=(preset.convs_decoder,) * (stages - 1),
    )


def _with_batch_dice(configuration: ConfigurationPlan, batch_dice: bool) -> ConfigurationPlan:
    training = configuration.training.model_copy(update={"batch_dice": batch_dice})
    return configuration.model_copy(update={"training": training})


def _check(fingerprint: Fingerprint, task: Task) -> None:
    channels = len(fingerprint.intensities)
    if channels != len(task.channels):
        expected = f"{len(task.channels)} in the task"
        measured = f"the fingerprint has {channels} channels"
        raise IncompatibleError(Problem("E0802", measured, expected, "measure the data set again"))
    problems = [
        Problem("E0124", f"spacing {times(case.spacing_mm)} mm", "above 0", "correct the header", case.id)
        for case in fingerprint.cases
        if min(case.spacing_mm) <= 0
    ]
    if problems:
        raise InputError(problems)


def _check_target(spacing_mm: Float3, shape: Float3) -> None:
    """Refuse what no configuration may hold; the thickness of single slices, often made up, does not matter."""
    used = spacing_mm[1:] if shape[0] == 1 else spacing_mm
    low, high = SPACING_RANGE_MM
    if any(not low <= spacing <= high for spacing in used):
        measured = f"the median spacing of the cases is {times(used)} mm"
        raise InputError(Problem("E0125", measured, f"{low} to {high} mm", "correct the unit of the headers"))
