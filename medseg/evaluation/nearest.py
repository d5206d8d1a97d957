"""Nearest: from border voxels to the nearest border voxel of the same group on the other side, in mm.

Borders of a useful prediction lie a few voxels apart. So the neighbourhood is searched first, for the borders of all
groups at once: one byte per voxel says whose border it is, and offsets are tried from the nearest to the farthest, so
that the first hit is the nearest voxel. What is farther away is looked up group by group, in a tree of border voxels
or, where many are asked for in a small box, by a distance transform.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage
from scipy.spatial import cKDTree

from medseg.evaluation.groups import Numbers
from medseg.evaluation.outlines import Outline, flat_step
from medseg.records.grid import Float3, Int3

Index = NDArray[np.signedinteger]
Distances = NDArray[np.float64]

MOST_OFFSETS = 250  # a ball of radius 4 for cubic voxels
# A tree query costs about 1 µs per point, a distance transform 0.1 µs per voxel of the box (measured).
_VOXELS_PER_QUERY = 20
_LARGEST_TRANSFORM = 2**22  # voxels; scipy's transform holds some 60 bytes for each
_CHUNK = 2**17


@lru_cache(maxsize=16)
def neighbourhood(
    spacing_mm: Float3, flat: tuple[bool, bool, bool]
) -> tuple[tuple[tuple[float, tuple[Int3, ...]], ...], Int3]:
    """Offsets (z, y, x) in shells of equal distance in mm, from (0, 0, 0) on; and how far they reach, at least one.

    Every voxel that is nearer than the farthest shell is in it. Nothing is looked for along ``flat`` axes.
    """
    steps = [s for s, none in zip(spacing_mm, flat, strict=True) if not none] or [1.0]
    unit_ball = (2, math.pi, 4 / 3 * math.pi)[len(steps) - 1]
    radius = (MOST_OFFSETS * math.prod(steps) / unit_ball) ** (1 / len(steps))
    reach = [0 if none else math.floor(radius / s) for s, none in zip(spacing_mm, flat, strict=True)]
    reach = [min(r, MOST_OFFSETS) for r in reach]
    grid = np.stack(np.meshgrid(*[np.arange(-r, r + 1) for r in reach], indexing="ij"), -1).reshape(-1, 3)
    distances = np.sqrt(((grid * spacing_mm) ** 2).sum(axis=1))
    order = np.argsort(distances, kind="stable")
    order = order[distances[order] <= radius][:MOST_OFFSETS]
    shells: dict[float, list[Int3]] = {}
    for place in order:
        z, y, x = (int(n) for n in grid[place])
        shells.setdefault(float(distances[place]), []).append((z, y, x))
    far = np.abs(grid[order]).max(axis=0)
    pad: Int3 = (max(1, int(far[0])), max(1, int(far[1])), max(1, int(far[2])))
    return tuple((mm, tuple(offsets)) for mm, offsets in shells.items()), pad


def nearest_mm(
    queries: Outline, targets: Outline, shape: Int3, spacing_mm: Float3, flat: tuple[bool, bool, bool]
) -> Distances:
    """For every place of ``queries`` the distance to the nearest of ``targets`` of its group; infinite without any.

    ``shape`` is that of the padded volume, which both outlines refer to and whose pad is ``neighbourhood``'s.
    """
    result = np.full(len(queries.index), np.inf)
    if not len(queries.index) or not len(targets.index):
        return result
    marked = np.zeros(math.prod(shape), targets.groups.dtype)
    marked[targets.index] = targets.groups
    shells = [
        (mm, [flat_step(offset, shape) for offset in offsets]) for mm, offsets in neighbourhood(spacing_mm, flat)[0]
    ]
    for start in range(0, len(result), _CHUNK):
        part = slice(start, start + _CHUNK)
        result[part] = _near(queries.index[part], queries.groups[part], marked, shells)
    del marked
    far = np.flatnonzero(np.isinf(result))
    if len(far):
        count = int(max(queries.groups.max(), targets.groups.max()))
        (asked, asked_from), (there, there_from) = split(queries.groups[far], count), split(targets.groups, count)
        for group in range(1, count + 1):
            places = far[asked[asked_from[group] : asked_from[group + 1]]]
            own = targets.index[there[there_from[group] : there_from[group + 1]]]
            if len(places) and len(own):
                result[places] = _far(queries.index[places], own, shape, spacing_mm)
    return result


def split(groups: Numbers, count: int) -> tuple[NDArray[np.intp], NDArray[np.intp]]:
    """Places sorted by group, and where the groups 0 to ``count`` start: g is ``order[starts[g] : starts[g + 1]]``."""
    order = np.argsort(groups, kind="stable")
    return order, np.concatenate([[0], np.cumsum(np.bincount(groups, minlength=count + 1))])


def _near(index: Index, groups: Numbers, marked: Numbers, shells: Sequence[tuple[float, list[int]]]) -> Distances:
    """Distances within the neighbourhood, infinite beyond."""
    result = np.full(len(index), np.inf)
    here, left = index.astype(np.intp), np.arange(len(index))
    for mm, steps in shells:
        hit = marked[here + steps[0]] == groups
        for step in steps[1:]:
            hit |= marked[here + step] == groups
        if not hit.any():
            continue
        result[left[hit]] = mm
        stay = ~hit
        here, groups, left = here[stay], groups[stay], left[stay]
        if not len(left):
            break
    return result


def _far(queries: Index, targets: Index, shape: Int3, spacing_mm: Float3) -> Distances:
    asked, there = np.unravel_index(queries, shape), np.unravel_index(targets, shape)
    corner = [min(int(a.min()), int(b.min())) for a, b in zip(asked, there, strict=True)]
    size = [max(int(a.max()), int(b.max())) + 1 - c for a, b, c in zip(asked, there, corner, strict=True)]
    voxels = math.prod(size)
    if len(queries) * _VOXELS_PER_QUERY > voxels and voxels <= _LARGEST_TRANSFORM:
        free = np.ones(size, bool)
        free[tuple(t - c for t, c in zip(there, corner, strict=True))] = False
        distances = ndimage.distance_transform_edt(free, sampling=spacing_mm)
        return np.asarray(distances[tuple(a - c for a, c in zip(asked, corner, strict=True))])
    points, asked_mm = (
        np.stack([i * step for i, step in zip(place, spacing_mm, strict=True)], axis=-1) for place in (there, asked)
    )
    tree = cKDTree(points, leafsize=32, balanced_tree=False, compact_nodes=False)
    return np.asarray(tree.query(asked_mm)[0])
