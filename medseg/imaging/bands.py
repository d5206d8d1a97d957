"""Bands: a volume resampled as it streams by, slice after slice, with one banded matrix per axis.

A few slices at a time are resampled in their plane; the last ones are kept, and as soon as they hold all that the next
slices of the result take, those are made. Neither a copy of the input nor anything between the axes is ever whole in
memory, and what is computed stays in the processor's cache.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from medseg.imaging.axes import AxisBlock, axis_blocks, nearest_indices
from medseg.imaging.normalise import Bounds, Channel

Floats = NDArray[np.float32]

PLANES = 4  # that are resampled in their plane together
# Products of up to this many terms stay on this thread in OpenBLAS (65 536 x 4, interface/gemm.c). Its own threads gain
# nothing here and cost a factor of ten where other processes are busy (measured).
MOST_TERMS = 2**18


@dataclass(frozen=True, slots=True)
class Way:
    """How a channel goes to ``shape``: slices across ``outer`` one after the other, a spline order within and across.

    ``clip`` is the bounds of the result; "plane" are those that each slice had before it was resampled in its plane.
    """

    shape: tuple[int, int, int]
    outer: int
    order: int
    order_outer: int
    clip: Bounds | Literal["plane"] | None

    @property
    def rows(self) -> int:
        """Slices of the result."""
        return self.shape[self.outer]

    @property
    def plane(self) -> tuple[int, int]:
        """Shape of a slice of the result."""
        first, second = (size for axis, size in enumerate(self.shape) if axis != self.outer)
        return first, second


def parts(size: int, way: Way, count: int) -> list[slice]:
    """Rows of the result in at most ``count`` parts, cut where blocks of rows are; any cut gives the same result."""
    if _is_chosen(size, way):
        starts = list(range(way.rows))
    else:
        starts = [block.rows.start for block in axis_blocks(size, way.rows, way.order_outer)]
    cuts = [starts[i * len(starts) // count] for i in range(count)] + [way.rows]
    return [slice(a, b) for a, b in itertools.pairwise(cuts) if a < b]


def fill(channel: Channel, way: Way, rows: slice, out: Floats) -> None:
    """Compute ``rows`` of the result, (rows, A, B), into those rows of ``out``, which has ``way.outer`` first."""
    if _is_chosen(channel.shape[way.outer], way):
        _choose(channel, way, rows, out)
    else:
        _combine(channel, way, rows, out)


def _is_chosen(size: int, way: Way) -> bool:
    """Whether each slice of the result is one of the slices, not a sum of some."""
    return size == way.rows or way.order_outer == 0


def _choose(channel: Channel, way: Way, rows: slice, out: Floats) -> None:
    chosen = nearest_indices(channel.shape[way.outer], way.rows)[rows]
    for source in np.unique(chosen).tolist():
        plane = _planes(channel, way, source, source + 1)[0]
        places = rows.start + np.flatnonzero(chosen == source)
        out[places[0] : places[-1] + 1] = plane


def _combine(channel: Channel, way: Way, rows: slice, out: Floats) -> None:
    blocks = axis_blocks(channel.shape[way.outer], way.rows, way.order_outer)
    most = max(block.columns.stop - block.columns.start for block in blocks)
    # Slice i lies at i modulo most. What lies there from before has weight 0; it must be finite.
    kept = np.zeros((most, *way.plane), dtype=np.float32)
    known = 0
    for block in blocks:
        if not rows.start <= block.rows.start < rows.stop:
            continue
        known = max(known, block.columns.start)
        while known < block.columns.stop:
            stop = min(known + PLANES, block.columns.stop)
            for place, plane in enumerate(_planes(channel, way, known, stop), start=known):
                kept[place % most] = plane
            known = stop
        target = out[block.rows]
        _multiply(_turned(block, most), kept.swapaxes(0, 1), target.swapaxes(0, 1))
        if isinstance(way.clip, tuple):  # while it is in the cache
            np.clip(target, *way.clip, out=target)


def _turned(block: AxisBlock, most: int) -> Floats:
    """The block's weights (rows, most), each where its slice lies."""
    weights = np.zeros((len(block.weights), most), dtype=np.float32)
    weights[:, np.arange(block.columns.start, block.columns.stop) % most] = block.weights
    return weights


def _planes(channel: Channel, way: Way, start: int, stop: int) -> Floats:
    """Some slices, each resampled in its plane and clipped."""
    source = planes = channel.planes(way.outer, start, stop)
    for axis in shrinking_first(source.shape[1:], way.plane):
        n, m = source.shape[1 + axis], way.plane[axis]
        if n == m:
            continue
        if way.order == 0:
            planes = np.take(planes, nearest_indices(n, m), axis=1 + axis)
            continue
        result = np.empty((len(planes), m, planes.shape[2]) if axis == 0 else (*planes.shape[:2], m), np.float32)
        inputs, outputs = (planes, result) if axis == 0 else (planes.swapaxes(1, 2), result.swapaxes(1, 2))
        for block in axis_blocks(n, m, way.order):
            _multiply(block.weights, inputs[:, block.columns], outputs[:, block.rows])
        planes = result
    if way.order and planes is not source:
        if way.clip == "plane":
            low, high = source.min(axis=(1, 2), keepdims=True), source.max(axis=(1, 2), keepdims=True)
            np.clip(planes, low, high, out=planes)
        elif isinstance(way.clip, tuple) and _is_chosen(channel.shape[way.outer], way):
            np.clip(planes, *way.clip, out=planes)
    return planes


def _multiply(weights: Floats, source: Floats, target: Floats) -> None:
    """(R, K) times each of (S, K, N) into (S, R, N), in pieces of N that are small enough."""
    width = max(1, MOST_TERMS // weights.size)
    for start in range(0, source.shape[2], width):
        piece = slice(start, start + width)
        np.matmul(weights, source[:, :, piece], out=target[:, :, piece])


def shrinking_first(shape: Sequence[int], target: Sequence[int]) -> list[int]:
    """Axes in the order that keeps the arrays in between small."""
    return sorted(range(len(shape)), key=lambda axis: target[axis] / shape[axis])
