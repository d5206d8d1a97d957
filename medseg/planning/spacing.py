"""Spacing: the grid that all cases are resampled to, the order of its axes, and the shapes that come of it."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from medseg.imaging.resample import resampled_shape
from medseg.planning.presets import Preset
from medseg.planning.wording import AXES, number, times
from medseg.records.fingerprint import Fingerprint
from medseg.records.grid import Float3, Int3
from medseg.records.plan import Reason

ABOVE_OTHERS_MM = 1e-5  # keeps the coarse axis the coarsest one when its spacing is raised to that of the others


def target_spacing(fingerprint: Fingerprint, preset: Preset) -> tuple[Float3, Reason]:
    """Spacing of ``3d_fullres`` in mm, axes as in the fingerprint.

    Per axis the median of all cases. Where one axis is coarse (its spacing more than ``preset.anisotropy`` times the
    largest other one) and short (its size times that factor below the smallest other one), that axis takes a low
    percentile of its spacings instead, so that thin-sliced cases are not thrown away, but never less than the other
    axes (nnU-Net, default_experiment_planner.py:155-196).
    """
    spacings = np.array([case.spacing_mm for case in fingerprint.cases], dtype=np.float64)
    sizes = np.array([case.shape_after_crop for case in fingerprint.cases], dtype=np.float64)
    spacing = np.percentile(spacings, 50, 0)
    size = np.percentile(sizes, 50, 0)
    text = f"spacing {times(spacing)} mm: median of {_cases(fingerprint)}"
    worst = int(np.argmax(spacing))
    other = float(np.delete(spacing, worst).max())
    coarse = spacing[worst] > preset.anisotropy * other
    short = size[worst] * preset.anisotropy < np.delete(size, worst).min()
    if coarse and short:
        low = float(np.percentile(spacings[:, worst], preset.coarse_percentile))
        chosen = low if low >= other else other + ABOVE_OTHERS_MM
        why = f"{AXES[worst]} is more than {number(preset.anisotropy)} times coarser and shorter than the other axes"
        percentile = f"percentile {number(preset.coarse_percentile)} of its spacings is {number(low)} mm"
        text += f"; {why}, {percentile}, so {number(chosen)} mm is taken along {AXES[worst]}"
        spacing[worst] = chosen
    return _float3(spacing), Reason(topic="spacing", text=text)


def median_shape(fingerprint: Fingerprint, spacing_mm: Float3) -> tuple[Float3, Reason]:
    """Median over the cases of their shapes resampled to ``spacing_mm``; may end in .5, is never below 1."""
    shapes = [resampled_shape(case.shape_after_crop, case.spacing_mm, spacing_mm) for case in fingerprint.cases]
    shape = _float3(np.median(shapes, 0))
    text = f"median shape {times(shape)} voxels: {_cases(fingerprint)} cropped and resampled to {times(spacing_mm)} mm"
    return shape, Reason(topic="median shape", text=text)


def transpose_order(spacing_mm: Float3, shape: Float3, preset: Preset) -> tuple[Int3, Reason]:
    """Order of the axes in the prepared arrays: the axis that a 2D network does not see goes first.

    That is the axis with the largest target spacing (nnU-Net, default_experiment_planner.py:215-226). With
    ``preset.single_slices_first`` an axis of a single voxel goes before all others: nnU-Net cuts lines, not slices,
    out of a data set of single slices whose slice thickness is below the pixel size.
    """
    single = [axis for axis in range(3) if shape[axis] == 1 and preset.single_slices_first]
    first = max(single or range(3), key=lambda axis: spacing_mm[axis])
    a, b = (axis for axis in range(3) if axis != first)
    why = "it is a single slice" if single else f"its spacing of {number(spacing_mm[first])} mm is the largest"
    order = " ".join(AXES[axis] for axis in (first, a, b))
    return (first, a, b), Reason(topic="transpose", text=f"axes in the order {order}: {AXES[first]} first, {why}")


def reorder(values: Sequence[float], order: Int3) -> Float3:
    """``values`` per axis, in the order of the prepared arrays."""
    a, b, c = (float(values[axis]) for axis in order)
    return a, b, c


def _float3(values: np.ndarray) -> Float3:
    z, y, x = (float(value) for value in values)
    return z, y, x


def _cases(fingerprint: Fingerprint) -> str:
    return f"{len(fingerprint.cases)} case{'s' if len(fingerprint.cases) > 1 else ''}"
