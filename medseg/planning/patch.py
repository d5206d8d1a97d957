"""Patch: how large a piece of a case the network sees."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from medseg.planning.presets import Preset
from medseg.planning.topology import Topology, topology

MAX_EDGE = 65536  # of ConfigurationPlan.patch_size


def initial_patch(spacing_mm: Sequence[float], shape: Sequence[float], preset: Preset) -> tuple[float, ...]:
    """The patch that shrinking starts from: the same length in mm along every axis, at most the median shape.

    Before clipping it holds ``initial_voxels`` of the preset, far more than fits (nnU-Net,
    default_experiment_planner.py:251-268). No edge is below 1 or above what a plan may hold.
    """
    dimensions = len(spacing_mm)
    resolution = 1 / np.array(spacing_mm, dtype=np.float64)
    factor = (preset.scale(dimensions).initial_voxels / np.prod(resolution)) ** (1 / dimensions)
    edges = (min(max(1, round(float(edge))), MAX_EDGE) for edge in resolution * factor)
    return tuple(float(min(edge, limit)) for edge, limit in zip(edges, shape, strict=True))


def shrink_to_fit(
    spacing_mm: Sequence[float],
    shape: Sequence[float],
    preset: Preset,
    fits: Callable[[Topology], bool],
) -> Topology:
    """The topology of the first patch that ``fits``, shrinking from the initial one step by step.

    Each step shortens the axis that covers most of the median shape, by what the shortened axis must be divisible
    by (nnU-Net, default_experiment_planner.py:315-368). Where no step is left, the smallest patch seen is returned:
    a plan is made for any budget.
    """
    found = topology(spacing_mm, initial_patch(spacing_mm, shape, preset), preset.min_edge)
    seen = {found.patch}
    while not fits(found):
        smaller = _shortened(found, spacing_mm, shape, preset.min_edge)
        if smaller is None or smaller.patch in seen:
            break
        seen.add(smaller.patch)
        found = smaller
    return found


def _shortened(found: Topology, spacing_mm: Sequence[float], shape: Sequence[float], min_edge: int) -> Topology | None:
    """One step down along the axis that covers most of the median shape; the last of equals, of those above 1."""
    shares = [size / limit if size > 1 else 0.0 for size, limit in zip(found.patch, shape, strict=True)]
    axis = max(range(len(shares)), key=lambda a: (shares[a], a))
    if shares[axis] == 0:
        return None
    tentative = topology(spacing_mm, _less(found.patch, axis, found.divisors[axis]), min_edge)
    return topology(spacing_mm, _less(found.patch, axis, tentative.divisors[axis]), min_edge)


def _less(patch: tuple[int, ...], axis: int, step: int) -> tuple[int, ...]:
    return tuple(max(1, size - step) if a == axis else size for a, size in enumerate(patch))
