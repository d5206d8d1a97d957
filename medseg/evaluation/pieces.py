"""Pieces: the connected parts of all groups of a volume, found from runs of equal voxels along x.

Voxels are connected through faces, edges and corners, as in ``medseg.imaging.components``, but for all groups at once
and in memory that grows with the number of runs, not with volume times groups.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import csr_matrix
from scipy.sparse.csgraph import connected_components

from medseg.evaluation.groups import Groups, Numbers

Integers = NDArray[np.int64]
Places = NDArray[np.signedinteger]  # int32, int64 where that is too small


@dataclass(frozen=True, slots=True, eq=False)
class Pieces:
    """The group of every piece, its voxels, and those of them that are of the same group on the other side."""

    groups: Numbers
    voxels: Integers
    covered: Integers


@dataclass(frozen=True, slots=True, eq=False)
class _Runs:
    """Runs of one group along x in order of place: first and last place, group, voxels of it on the other side.

    A place is a voxel's number in the volume with one voxel more on each side of y and x.
    """

    first: Places
    last: Places
    groups: Numbers
    covered: Places


def pieces(groups: Groups) -> tuple[Pieces, Pieces]:
    """The pieces of prediction and reference."""
    z, y, x = groups.reference.shape
    kind = np.dtype(np.int32 if (z + 2) * (y + 2) * (x + 2) + x + 3 <= np.iinfo(np.int32).max else np.int64)
    parts: list[list[_Runs]] = [[], []]
    for start, predicted, expected in groups.slabs():
        same = np.pad(predicted == expected, ((0, 0), (1, 1), (1, 1)))
        for numbers, found in ((predicted, parts[0]), (expected, parts[1])):
            runs = _runs(np.pad(numbers, ((0, 0), (1, 1), (1, 1))), same)
            place = start * (y + 2) * (x + 2)
            ends = (runs.first + place).astype(kind), (runs.last + place).astype(kind)
            found.append(_Runs(*ends, runs.groups, runs.covered.astype(kind)))
    row, plane = x + 2, (y + 2) * (x + 2)
    steps = (row, plane - row, plane, plane + row)  # to the next row of a layer, and to three rows of the next layer
    of_reference = _connected(_joined(parts.pop()), steps)
    return _connected(_joined(parts.pop()), steps), of_reference


def _runs(numbers: Numbers, same: NDArray[np.bool_]) -> _Runs:
    """The runs of a slab; places count from its first voxel."""
    flat = numbers.ravel()
    changes = np.flatnonzero(flat[1:] != flat[:-1])
    first, last = changes[flat[changes + 1] > 0] + 1, changes[flat[changes] > 0]
    if not len(first):
        none = np.zeros(0, np.int64)
        return _Runs(none, none, flat[:0], none)
    ends = np.stack([first, last + 1], axis=-1).ravel()
    covered = np.add.reduceat(same.ravel(), ends, dtype=np.int64)[::2]  # the rim keeps every end inside the array
    return _Runs(first, last, flat[first], covered)


def _joined(parts: list[_Runs]) -> _Runs:
    return _Runs(
        np.concatenate([part.first for part in parts]),
        np.concatenate([part.last for part in parts]),
        np.concatenate([part.groups for part in parts]),
        np.concatenate([part.covered for part in parts]),
    )


def _connected(runs: _Runs, steps: tuple[int, ...]) -> Pieces:
    """Join runs whose voxels touch: those of a row with those of the four neighbouring rows that come later."""
    count = len(runs.first)
    joined = [np.zeros((2, 0), np.int32)]
    for step in steps:
        low = np.searchsorted(runs.last, runs.first + runs.first.dtype.type(step - 1))
        high = np.searchsorted(runs.first, runs.last + runs.last.dtype.type(step + 1), side="right")
        many = np.maximum(high - low, 0)
        here = np.repeat(np.arange(count, dtype=np.int32), many)
        there = (np.arange(len(here)) + np.repeat(low - np.cumsum(many) + many, many)).astype(np.int32)
        alike = runs.groups[here] == runs.groups[there]
        joined.append(np.stack([here[alike], there[alike]]))
    here, there = np.concatenate(joined, axis=1)
    del joined
    graph = csr_matrix((np.ones(len(here), np.int8), (here, there)), shape=(count, count))
    found, names = connected_components(graph, directed=False)
    lengths = runs.last - runs.first + 1
    first_of = np.zeros(found, np.intp)
    first_of[names] = np.arange(count)
    return Pieces(
        runs.groups[first_of],
        np.bincount(names, weights=lengths, minlength=found).astype(np.int64),
        np.bincount(names, weights=runs.covered, minlength=found).astype(np.int64),
    )
