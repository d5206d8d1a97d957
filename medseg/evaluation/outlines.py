"""Outlines: the border voxels of every group of a volume, and how often lines cross its surface, in one pass.

A voxel all of whose 26 neighbours are of its own group is neither border nor crossed, so only the others are looked at
one by one: some per cent of a volume of organs.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from medseg.evaluation.groups import Counts, Groups, Numbers
from medseg.records.grid import Int3

# one of each pair of opposite directions (z, y, x): those whose first step that is not 0 goes up
DIRECTIONS: tuple[Int3, ...] = tuple(
    (z, y, x) for z in (0, 1) for y in (-1, 0, 1) for x in (-1, 0, 1) if (z, y, x) > (0, 0, 0)
)
_FACES = tuple(index for index, direction in enumerate(DIRECTIONS) if sum(map(abs, direction)) == 1)


@dataclass(frozen=True, slots=True, eq=False)
class Outline:
    """The border voxels of all groups, by place, and what lines leave.

    ``index`` are places in the volume with ``pad`` voxels more on each side of each axis, ascending; ``groups`` the
    group of each; ``leaving`` (count + 1, 13) how many voxels have no neighbour of their group in each direction.
    """

    index: NDArray[np.signedinteger]
    groups: Numbers
    leaving: Counts


def outlines(groups: Groups, pad: Int3) -> tuple[Outline, Outline]:
    """The outlines of prediction and reference.

    Args:
        groups: what to look at; beyond its volume there is nothing.
        pad: voxels, at least one, that the places leave free on both sides of z, y and x.
    """
    parts: tuple[list[Outline], list[Outline]] = ([], [])
    shape = padded_shape(groups.reference.shape, pad)
    layers, plane = len(groups.reference), shape[1] * shape[2]
    for start, *sides in groups.slabs(halo=1):
        before = min(1, start)
        for numbers, found in zip(sides, parts, strict=True):
            after = 1 if start - before + len(numbers) < layers else 0
            rim = ((1 - before, 1 - after), (pad[1], pad[1]), (pad[2], pad[2]))
            outline = _outline_of_slab(np.pad(numbers, rim), pad, groups)
            first = (start + pad[0] - 1) * plane
            kind = np.int32 if shape[0] * plane <= np.iinfo(np.int32).max else np.int64
            found.append(Outline((outline.index + first).astype(kind), outline.groups, outline.leaving))
    return _joined(parts[0]), _joined(parts[1])


def padded_shape(shape: tuple[int, ...], pad: Int3) -> Int3:
    """The shape that places of an outline refer to."""
    z, y, x = (n + 2 * p for n, p in zip(shape, pad, strict=True))
    return z, y, x


def flat_step(offset: tuple[int, ...], shape: tuple[int, ...]) -> int:
    """How far an offset (z, y, x) is in the flattened array of ``shape``."""
    return (offset[0] * shape[1] + offset[1]) * shape[2] + offset[2]


def _joined(parts: list[Outline]) -> Outline:
    return Outline(
        np.concatenate([part.index for part in parts]),
        np.concatenate([part.groups for part in parts]),
        np.sum([part.leaving for part in parts], axis=0),
    )


def _outline_of_slab(numbers: Numbers, pad: Int3, groups: Groups) -> Outline:
    """The outline of ``numbers``, whose first and last layer and whose ``pad`` along y and x are only neighbours."""
    inner = (slice(1, -1), slice(pad[1], -pad[1]), slice(pad[2], -pad[2]))
    mixed = np.zeros(numbers.shape, bool)
    mixed[inner] = ~_alike(numbers[_grown(inner)], groups.flat) & (numbers[inner] > 0)
    index = np.flatnonzero(mixed)
    flat = numbers.ravel()
    own = flat[index]
    leaving = np.zeros((groups.count + 1, len(DIRECTIONS)), np.int64)
    bordering = np.zeros(len(index), bool)
    for number, direction in enumerate(DIRECTIONS):
        step = flat_step(direction, numbers.shape)
        other = flat[index + step] != own
        leaving[:, number] = np.bincount(own[other], minlength=groups.count + 1)
        if number in _FACES and not groups.flat[int(np.flatnonzero(direction)[0])]:
            bordering |= other
            bordering |= flat[index - step] != own
    return Outline(index[bordering], own[bordering], leaving)


def _grown(box: tuple[slice, ...]) -> tuple[slice, ...]:
    return tuple(slice(s.start - 1, s.stop + 1 or None) for s in box)


def _alike(numbers: Numbers, flat: tuple[bool, bool, bool]) -> NDArray[np.bool_]:
    """Where a voxel and its 26 neighbours are equal, of all but the outermost voxels; not looking along flat axes."""
    alike: NDArray[np.bool_] | None = None
    for axis in (2, 1, 0):
        there = np.moveaxis(numbers, axis, 0)
        inside = None if alike is None else np.moveaxis(alike, axis, 0)
        if flat[axis]:
            found = np.ones(there[1:-1].shape, bool) if inside is None else inside[1:-1]
        else:
            same = there[1:] == there[:-1]
            found = same[1:] & same[:-1]
            if inside is not None:
                found &= inside[1:-1]
                found &= inside[2:]
                found &= inside[:-2]
        alike = np.moveaxis(found, 0, axis)
        numbers = np.moveaxis(there[1:-1], 0, axis)
    assert alike is not None
    return alike
