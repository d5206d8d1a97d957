"""Planner: fingerprint, task and budget in, plan out. Pure: the same input gives the same plan.

The rules are those of nnU-Net 2.8.1's planners, the constants those of the preset; ``tests/planning`` compares the
plans of both field by field.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from medseg.artefacts import sha256_of_json
from medseg.errors import IncompatibleError, InputError, Problem
from medseg.planning.networks import input_patch, planned_network
from medseg.planning.normalisation import normalisations
from medseg.planning.patch import shrink_to_fit
from medseg.planning.presets import Preset, preset_named
from medseg.planning.sides import find_sides
from medseg.planning.situation import Situation
from medseg.planning.sizing import SIZINGS
from medseg.planning.spacing import median_shape, reorder, target_spacing, transpose_order
from medseg.planning.topology import topology_reason
from medseg.planning.weights import WEIGHTED, class_weights
from medseg.planning.wording import times
from medseg.records.fingerprint import Fingerprint
from medseg.records.grid import Float3
from medseg.records.plan import Budget, ConfigurationPlan, Plan, Reason, Resampling
from medseg.records.task import Task
from medseg.records.training import TrainingPlan

SPACING_RANGE_MM = (1e-3, 1e4)  # of ConfigurationPlan.spacing_mm


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
    sides, sides_why = find_sides(task, fingerprint, order, rules)
    target, median = reorder(spacing, order), reorder(shape, order)
    situation = Situation(task, budget, rules, target, median, cases, schemes, sides, class_weights(fingerprint, task))
    _check_target(situation.spacing_mm, situation.shape)
    configurations, reasons = _configurations(situation)
    return Plan(
        preset=rules.name,
        task=task,
        budget=budget,
        transpose=order,
        intensities=fingerprint.intensities,
        configurations={configuration.name: configuration for configuration in configurations},
        reasons=(spacing_why, shape_why, order_why, schemes_why, sides_why, *reasons),
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
    text = (
        f"{lowres.name} sees the whole at {times(lowres.spacing_mm)} mm, {fullres.name} the detail at "
        f"{times(fullres.spacing_mm)} mm: a second stage refines the labels of the first"
    )
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
    preset = situation.preset
    sizing = SIZINGS[preset.sizing](name, situation, shape)
    found = shrink_to_fit(spacing_mm, shape, preset, sizing.fits)
    batch, batch_why = sizing.batch_size(found, dataset_voxels)
    mirror_axes, laterality = situation.sides.mirroring(len(spacing_mm))
    network = planned_network(found, preset)
    configuration = ConfigurationPlan(
        name=name,
        spacing_mm=tuple(spacing_mm),
        patch_size=input_patch(network, found.patch),
        batch_size=batch,
        median_shape=tuple(shape),
        normalisation=situation.normalisation,
        resampling=Resampling(probability_order_z=preset.probability_order_z),
        network=network,
        training=TrainingPlan(
            mirror_axes=mirror_axes,
            laterality=laterality,
            foreground_jitter=preset.foreground_jitter,
            foreground_by=preset.foreground_by,
            elastic=preset.elastic,
            loss=preset.loss,
            class_weights=situation.class_weights if preset.loss in WEIGHTED else None,
        ),
    )
    return configuration, (sizing.patch_reason(found), topology_reason(name, found, preset.min_edge), batch_why)


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
