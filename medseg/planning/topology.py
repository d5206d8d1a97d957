"""Topology: where a U-Net halves which axis, and with which kernels, for a patch of a given spacing."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from medseg.planning.wording import times
from medseg.records.plan import Reason

MAX_STAGES = 16  # of NetworkPlan.features; no reference data set comes near
SAME_SCALE = 2.0  # axes belong together while their spacings differ by less than this factor


@dataclass(frozen=True, slots=True)
class Topology:
    """Kernels and strides per stage and axis, finest first; ``patch`` is the patch padded to what they divide."""

    patch: tuple[int, ...]
    kernels: tuple[tuple[int, ...], ...]
    strides: tuple[tuple[int, ...], ...]
    divisors: tuple[int, ...]


def topology(spacing_mm: Sequence[float], patch: Sequence[float], min_edge: int) -> Topology:
    """The stages for a patch (nnU-Net, network_topology.py:30-108).

    A stage halves every axis that is still at least ``2·min_edge`` long and whose spacing, after the halvings so
    far, is below twice the finest of those; an axis left alone must be ``3·min_edge`` long. A kernel is 1 along an
    axis until its spacing has come below twice the finest of all; the last stage has 3 everywhere.

    Args:
        spacing_mm: per axis, positive.
        patch: per axis, at least 1; the median shape that limits it may end in .5.
        min_edge: edge that halving does not go below.
    """
    dimensions = len(patch)
    spacing, size = list(spacing_mm), list(patch)
    kernel, halvings = [1] * dimensions, [0] * dimensions
    kernels: list[tuple[int, ...]] = []
    strides: list[tuple[int, ...]] = [(1,) * dimensions]
    while len(strides) < MAX_STAGES:
        halved = _axes_to_halve(spacing, size, min_edge)
        if not halved:
            break
        finest = min(spacing)
        kernel = [3 if s / finest < SAME_SCALE else k for s, k in zip(spacing, kernel, strict=True)]
        kernels.append(tuple(kernel))
        strides.append(tuple(2 if axis in halved else 1 for axis in range(dimensions)))
        for axis in halved:
            spacing[axis] *= 2
            size[axis] = math.ceil(size[axis] / 2)
            halvings[axis] += 1
    kernels.append((3,) * dimensions)
    divisors = tuple(2**n for n in halvings)
    padded = tuple(math.ceil(n / d) * d for n, d in zip(patch, divisors, strict=True))
    return Topology(padded, tuple(kernels), tuple(strides), divisors)


def _axes_to_halve(spacing: Sequence[float], size: Sequence[float], min_edge: int) -> list[int]:
    long_enough = [axis for axis, n in enumerate(size) if n >= 2 * min_edge]
    if not long_enough:
        return []
    finest = min(spacing[axis] for axis in long_enough)
    axes = [axis for axis in long_enough if spacing[axis] / finest < SAME_SCALE]
    return [] if len(axes) == 1 and size[axes[0]] < 3 * min_edge else axes


def topology_reason(name: str, found: Topology, min_edge: int) -> Reason:
    """The sentence about a configuration's stages."""
    edges = times(n // d for n, d in zip(found.patch, found.divisors, strict=True))
    halvings = times(d.bit_length() - 1 for d in found.divisors)
    flat = sum(1 in kernel for kernel in found.kernels)
    text = f"{len(found.strides)} stages, axes halved {halvings} times: {times(found.patch)} voxels become {edges}"
    text += f" (edges stay at {min_edge} or above where they can)"
    if flat:
        first = "the first stage has" if flat == 1 else f"the first {flat} stages have"
        text += f"; {first} kernels of 1 along coarse axes, until the spacings are within a factor {SAME_SCALE:g}"
    return Reason(topic=f"{name} stages", text=text)
