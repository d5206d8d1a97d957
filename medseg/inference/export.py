"""Export: logits on the network's grid → labels on the cropped grid of the file, slab by slab.

Labels are those of interpolating all logits linearly (nnU-Net: order 1) and deciding then, but logits are interpolated
only at borders (see ``borders``). Beside the logits given, memory is that of the labels and of one layer per thread,
whatever the number of classes.

Logits on a GPU are all interpolated there, some rows at a time: only labels leave it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from medseg.imaging.axes import Neighbours, linear_neighbours, nearest_indices
from medseg.imaging.resample import separate_axis
from medseg.inference import borders
from medseg.records.grid import Int3
from medseg.records.plan import Resampling
from medseg.records.preparation import Preparation
from medseg.records.task import Task

LAYERS_AT_A_TIME = 16  # of the network's grid, decided by one thread
GPU_BYTES = 256 * 2**20  # of interpolated logits at a time, where they are on a GPU; several copies live at once

Axis = tuple[NDArray[np.int32], NDArray[np.int32], NDArray[np.float32], NDArray[np.float32]]


@dataclass(frozen=True, slots=True, eq=False)
class Ready:
    """Rows of the cropped grid that can be made from the logits (outputs, z, y, x), which begin at row ``first``."""

    rows: slice
    logits: Tensor
    first: int


Observer = Callable[["Interpolation", Ready, NDArray[np.int16]], None]


@dataclass(frozen=True, slots=True, eq=False)
class Interpolation:
    """The neighbours of every voxel of the cropped grid along z, y, x, and which axes are interpolated linearly."""

    axes: tuple[Neighbours, Neighbours, Neighbours]
    linear: tuple[bool, bool, bool]

    @property
    def shape(self) -> Int3:
        """Of the cropped grid."""
        z, y, x = (len(axis.lower) for axis in self.axes)
        return z, y, x


def interpolation(preparation: Preparation, resampling: Resampling) -> Interpolation:
    """How logits come back to the cropped grid: nnU-Net's coordinates, and its orders for a separate axis."""
    small, large = preparation.target_shape, preparation.cropped_shape
    orders = [resampling.probability_order] * 3
    separate = separate_axis(preparation.target_spacing_mm, preparation.spacing_mm, resampling.force_separate_z)
    if separate is not None and small != large:
        orders[separate] = resampling.probability_order_z
    linear = tuple(order == 1 and n != m for order, n, m in zip(orders, small, large, strict=True))
    axes = tuple(
        linear_neighbours(n, m) if is_linear else _nearest(n, m)
        for is_linear, n, m in zip(linear, small, large, strict=True)
    )
    return Interpolation((axes[0], axes[1], axes[2]), (linear[0], linear[1], linear[2]))


def _nearest(n: int, m: int) -> Neighbours:
    index = nearest_indices(n, m)
    return Neighbours(index, index, np.ones(m), np.zeros(m))


def decide(logits: Tensor, task: Task) -> Tensor:
    """(N, outputs, ...) logits → (N, ...) int16 class indices.

    Classes: the largest logit. Regions: those with probability > 0.5 are painted one after the other in
    ``regions_order``, later over earlier.
    """
    if not task.regions:
        return logits.argmax(1).to(torch.int16)
    labels = torch.zeros((logits.shape[0], *logits.shape[2:]), dtype=torch.int16, device=logits.device)
    for region, value in zip(logits.unbind(1), task.regions_order, strict=True):
        labels.masked_fill_(region > 0, task.values.index(value))
    return labels


def labels_from_logits(
    logits: Tensor, preparation: Preparation, resampling: Resampling, task: Task
) -> NDArray[np.int16]:
    """(outputs, z, y, x) float32 on the target grid → (Z, Y, X) class indices on the cropped grid.

    An axis that nnU-Net's rule treats separately on the way back is interpolated with ``probability_order_z``.
    """
    return labels_from_slabs([logits], preparation, resampling, task)


def labels_from_slabs(
    slabs: Iterable[Tensor],
    preparation: Preparation,
    resampling: Resampling,
    task: Task,
    observe: Observer | None = None,
) -> NDArray[np.int16]:
    """``labels_from_logits`` of logits that come in slabs (outputs, rows, y, x), from the first row to the last.

    ``observe`` is shown every part of the labels with the logits that it was made from. Channels after the outputs are
    for it alone.
    """
    way = interpolation(preparation, resampling)
    labels = np.empty(way.shape, np.int16)
    for ready in ready_rows(slabs, way.axes[0]):
        decide_rows = _decide_rows if ready.logits.device.type == "cpu" else decide_rows_there
        decide_rows(ready, way, task, labels[ready.rows])
        if observe is not None:
            observe(way, ready, labels[ready.rows])
    return labels


def ready_rows(slabs: Iterable[Tensor], z: Neighbours) -> Iterator[Ready]:
    """The rows of the cropped grid as soon as the slabs hold what they need; what later rows need is carried on."""
    carried: Tensor | None = None
    first = done = 0
    for slab in slabs:
        part = slab if carried is None else torch.cat((carried, slab), 1)
        stop = int(np.searchsorted(z.upper, first + part.shape[1], side="left"))
        if stop > done:
            yield Ready(slice(done, stop), part, first)
            done = stop
        passed = part.shape[1] if done == len(z.lower) else min(int(z.lower[done]) - first, part.shape[1])
        carried = part[:, passed:].clone() if passed < part.shape[1] else None
        first += passed


def _decide_rows(ready: Ready, way: Interpolation, task: Task, labels: NDArray[np.int16]) -> None:
    """Fill ``labels`` (rows, Y, X), the rows shared among as many threads as torch uses."""
    logits = np.ascontiguousarray(ready.logits[: task.outputs].numpy(force=True), dtype=np.float32)
    z, count = way.axes[0], ready.rows.stop - ready.rows.start
    span = int(z.upper[ready.rows.stop - 1]) - int(z.lower[ready.rows.start]) + 1
    pieces = max(1, -(-span // LAYERS_AT_A_TIME), min(torch.get_num_threads(), span // 2))
    cuts = [count * i // pieces for i in range(pieces + 1)]

    def work(start: int, stop: int) -> None:
        if start == stop:
            return
        rows = slice(ready.rows.start + start, ready.rows.start + stop)
        low, high = int(z.lower[rows.start]), int(z.upper[rows.stop - 1]) + 1
        part = logits[:, low - ready.first : high - ready.first]
        _decide_part(
            part, (_axis(z, rows, low), _axis(way.axes[1]), _axis(way.axes[2])), way.linear, task, labels[start:stop]
        )

    with ThreadPoolExecutor(torch.get_num_threads(), "medseg-export") as pool:
        list(pool.map(work, cuts[:-1], cuts[1:]))


def _decide_part(
    logits: NDArray[np.float32],
    axes: tuple[Axis, Axis, Axis],
    linear: tuple[bool, bool, bool],
    task: Task,
    labels: NDArray[np.int16],
) -> None:
    """Codes of the voxels, codes of the cells, labels."""
    cells = np.empty(logits.shape[1:], np.uint16)
    winners = borders.winners_of_regions if task.regions else borders.winners_of_classes
    for layer, codes in enumerate(cells):
        winners(logits[:, layer].reshape(len(logits), -1), codes.reshape(-1))
    for axis, step in enumerate(((1, 0, 0), (0, 1, 0), (0, 0, 1))):
        if linear[axis]:
            borders.merge_corners(cells, *step)
    if task.regions:
        table = np.array([0, *(task.values.index(value) for value in task.regions_order)], np.int16)
        borders.fill_regions(logits, cells, *axes, table, labels)
    else:
        borders.fill_classes(logits, cells, *axes, linear, labels)


def decide_rows_there(ready: Ready, way: Interpolation, task: Task, labels: NDArray[np.int16]) -> None:
    """Fill ``labels`` (rows, Y, X) where the logits are, to the same bits: the same steps in the same order."""
    for rows in portions(ready.rows, GPU_BYTES, task.outputs, way):
        own = Ready(rows, ready.logits[: task.outputs], ready.first)
        found = decide(interpolate(own, way, rows).unsqueeze(0), task)[0]
        labels[rows.start - ready.rows.start : rows.stop - ready.rows.start] = found.numpy(force=True)


def portions(rows: slice, size: int, channels: int, way: Interpolation) -> Iterator[slice]:
    """``rows`` of the cropped grid in pieces whose interpolated float32 channels take at most ``size`` bytes."""
    at_most = max(1, size // (4 * channels * math.prod(way.shape[1:])))
    for start in range(rows.start, rows.stop, at_most):
        yield slice(start, min(start + at_most, rows.stop))


def _axis(axis: Neighbours, rows: slice = slice(None), first: int = 0) -> Axis:
    """Indices from ``first`` on and weights of some rows, as the compiled functions take them."""
    lower, upper = ((index[rows] - first).astype(np.int32) for index in (axis.lower, axis.upper))
    return lower, upper, axis.lower_weight[rows].astype(np.float32), axis.upper_weight[rows].astype(np.float32)


def interpolate(ready: Ready, way: Interpolation, rows: slice) -> Tensor:
    """All logits (outputs, rows, Y, X) of ``rows`` of the cropped grid, which ``ready`` holds the neighbours of."""
    part = ready.logits
    for axis, (neighbours, linear) in enumerate(zip(way.axes, way.linear, strict=True), start=1):
        chosen, first = (rows, ready.first) if axis == 1 else (slice(None), 0)
        lower, upper, low, up = _axis(neighbours, chosen, first)
        there = [torch.from_numpy(values).to(part.device) for values in (lower, upper, low, up)]
        taken = part.index_select(axis, there[0])
        if linear:
            shape = [1, *(-1 if a == axis else 1 for a in (1, 2, 3))]
            taken = taken.mul_(there[2].view(shape))
            taken += part.index_select(axis, there[1]).mul_(there[3].view(shape))
        part = taken
    return part
