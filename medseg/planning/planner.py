"""Planner: fingerprint, task and budget in, plan out. Pure: the same input gives the same plan.

The rules and constants are those of nnU-Net 2.8.1's default planner; ``tests/planning`` compares the plans of both
field by field. The one place where they part on purpose is ``spacing.transpose_order``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from medseg.artefacts import sha256_of_json
from medseg.errors import IncompatibleError, InputError, Problem
from medseg.planning.memory import allowed_values, counted_classes, features_per_stage, plain_unet_values
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
    fingerprint: Fingerprint, task: Task, budget: Budget | None = None, preset: Preset | str = "nnunet"
) -> Plan:
    """The plan for a data set: configuration ``2d``, and ``3d_fullres`` unless its cases are single slices.

    Raises:
        UsageError: E0001 unknown preset.
        IncompatibleError: E0802 fingerprint and task have different numbers of channels.
        InputError: E0124, E0125 spacings for which no plan can be made.
    """
    budget = budget or Budget()
    rules = preset_named(preset) if isinstance(preset, str) else preset
    _check(fingerprint, task)
    spacing, spacing_why = target_spacing(fingerprint, rules)
    shape, shape_why = median_shape(fingerprint, spacing)
    order, order_why = transpose_order(spacing, shape)
    schemes, schemes_why = normalisations(task, fingerprint.median_relative_size_after_cropping, rules)
    situation = Situation(
        task, budget, rules, reorder(spacing, order), reorder(shape, order), len(fingerprint.cases), schemes
    )
    _check_target(situation.spacing_mm, situation.shape)
    two, reasons = plan_2d(situation)
    configurations = {two.name: two}
    if situation.shape[0] == 1:
        reasons += (Reason(topic="configurations", text="only 2d: the median case is a single slice"),)
    else:
        three, three_why = plan_3d_fullres(situation)
        configurations[three.name] = three
        reasons += three_why
    return Plan(
        preset=rules.name,
        task=task,
        budget=budget,
        transpose=order,
        intensities=fingerprint.intensities,
        configurations=configurations,
        reasons=(spacing_why, shape_why, order_why, schemes_why, *reasons),
        fingerprint_sha256=sha256_of_json(fingerprint.to_json()),
    )


def plan_2d(situation: Situation) -> tuple[ConfigurationPlan, tuple[Reason, ...]]:
    """Configuration ``2d``: slices across the first axis. Dice is taken over the batch, for it holds many slices."""
    planned, reasons = _plan("2d", situation, situation.spacing_mm[1:], situation.shape[1:], situation.voxels)
    return _with_batch_dice(planned, True), reasons


def plan_3d_fullres(situation: Situation) -> tuple[ConfigurationPlan, tuple[Reason, ...]]:
    """Configuration ``3d_fullres``.

    Dice is taken over the batch if the patch is so small against the cases that a low-resolution stage is due
    (nnU-Net, default_experiment_planner.py:476-490): single patches then often hold no object at all.
    """
    planned, reasons = _plan("3d_fullres", situation, situation.spacing_mm, situation.shape, situation.voxels)
    lowres = plan_3d_lowres(situation, planned)
    share = math.prod(planned.patch_size) / math.prod(situation.shape)
    text = f"the patch covers {100 * share:.3g} % of the median case"
    if lowres is None:
        text += ": Dice per sample, no low-resolution stage is due"
    else:
        text += f": Dice over the batch; a low-resolution stage at {times(lowres.spacing_mm)} mm would be due"
    return _with_batch_dice(planned, lowres is not None), (*reasons, Reason(topic="3d_fullres batch Dice", text=text))


def plan_3d_lowres(situation: Situation, fullres: ConfigurationPlan) -> ConfigurationPlan | None:
    """Configuration ``3d_lowres``, or None where no low-resolution stage is due.

    The spacing grows step by step, first along axes more than twice finer than the coarsest, until a patch covers
    ``lowres_below`` of the median case; a stage that saves less than a factor ``lowres_min_gain`` in voxels is
    dropped (nnU-Net, default_experiment_planner.py:448-475).
    """
    preset = situation.preset
    voxels = full_voxels = math.prod(situation.shape)
    spacing = list(fullres.spacing_mm)
    lowres = None
    patch: Sequence[int] = fullres.patch_size
    while math.prod(patch) / voxels < preset.lowres_below and max(spacing) * preset.lowres_step <= SPACING_RANGE_MM[1]:
        coarsest = max(spacing)
        finer = [coarsest / s > 2 for s in spacing]
        spacing = [s * preset.lowres_step if f or not any(finer) else s for s, f in zip(spacing, finer, strict=True)]
        exact = [full / low * n for full, low, n in zip(fullres.spacing_mm, spacing, situation.shape, strict=True)]
        voxels = math.prod(exact)
        shape = [float(max(1, round(n))) for n in exact]
        lowres, _ = _plan("3d_lowres", situation, spacing, shape, voxels * situation.cases)
        patch = lowres.patch_size
    if lowres is None or full_voxels / voxels < preset.lowres_min_gain:
        return None
    return _with_batch_dice(lowres, False)


def _plan(
    name: str, situation: Situation, spacing_mm: Sequence[float], shape: Sequence[float], dataset_voxels: float
) -> tuple[ConfigurationPlan, tuple[Reason, ...]]:
    """Patch, stages and batch for a spacing, all of them by the same rules."""
    preset, dimensions = situation.preset, len(spacing_mm)
    scale = preset.scale(dimensions)
    allowed = allowed_values(preset, situation.budget, dimensions)

    def values(found: Topology) -> int:
        features = features_per_stage(len(found.strides), preset.base_features, scale.max_features)
        convs = (preset.convs_encoder, preset.convs_decoder)
        return plain_unet_values(found.patch, found.strides, features, convs, counted_classes(situation.task))

    found = shrink_to_fit(
        spacing_mm, shape, preset, lambda candidate: values(candidate) / scale.reference_batch * 2 <= allowed
    )
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
        features=features_per_stage(stages, preset.base_features, preset.scale(len(found.patch)).max_features),
        kernels=found.kernels,
        strides=found.strides,
        convs_encoder=(preset.convs_encoder,) * stages,
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
