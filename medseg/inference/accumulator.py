"""Accumulator: overlapping tiles blended in a window of rows that moves along the slowest axis.

A row is final when no later tile touches it; only as many rows as a tile has are ever held.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from medseg.inference.compiled import compiled
from medseg.records.grid import Int3

SLAB_BYTES = 64 * 2**20
BLOCK = 256  # voxels whose channels stay in the cache


def _divide(total: NDArray[np.float32], weights: NDArray[np.float32], mean: NDArray[np.float32]) -> None:
    """(N, channels) over (N,) → (channels, N): a few times faster than torch, which turns the axes one by one."""
    count, channels = total.shape
    for start in range(0, count, BLOCK):
        stop = min(start + BLOCK, count)
        for c in range(channels):
            for v in range(start, stop):
                mean[c, v] = total[v, c] / weights[v]


divide = compiled(_divide)


class Accumulator:
    """Sums of tiles times weights, and of weights: rows ``first`` to ``first + tile[0]`` of a volume, as a ring."""

    def __init__(self, sample: Tensor, shape: Int3, weight: Tensor) -> None:
        """Begin at row 0 with the channels, device and memory layout of ``sample`` (channels, *tile)."""
        self.first = 0
        self.height = sample.shape[1]
        self.weight = weight.to(sample.device)
        plane = (self.height, *shape[1:])
        if sample.stride(0) == 1 and len(sample) > 1:  # channels last
            self.total = torch.zeros((*plane, len(sample)), device=sample.device).permute(3, 0, 1, 2)
        else:
            self.total = torch.zeros((len(sample), *plane), device=sample.device)
        self.weights = torch.zeros(plane, device=sample.device)

    def add(self, tile: Tensor, start: Int3) -> None:
        """Add (channels, *tile) at a place whose first row is ``first``; ``tile`` is overwritten."""
        assert start[0] == self.first
        tile = tile.to(self.total.device)
        tile = tile.mul_(self.weight) if tile.is_contiguous() or tile.stride(0) == 1 else tile * self.weight
        columns = tuple(slice(s, s + n) for s, n in zip(start[1:], tile.shape[2:], strict=True))
        for ring, rows in self._parts(self.height):
            self.total[(slice(None), ring, *columns)] += tile[:, rows]
            self.weights[(ring, *columns)] += self.weight[rows]

    def advance(self, first: int) -> Iterator[Tensor]:
        """The rows before ``first``, which are final, in slabs (channels, rows, Y, X); they make room for new ones."""
        at_most = max(1, SLAB_BYTES // (4 * self.total[:, 0].numel()))
        parts = self._parts(first - self.first)
        self.first = first
        for ring, _ in parts:
            for start in range(ring.start, ring.stop, at_most):
                rows = slice(start, min(start + at_most, ring.stop))
                yield self._mean(rows)
                self.total[:, rows] = 0
                self.weights[rows] = 0

    def _mean(self, rows: slice) -> Tensor:
        """(channels, rows, Y, X), contiguous."""
        total, weights = self.total[:, rows], self.weights[rows]
        if total.is_contiguous() or total.device.type != "cpu" or total.stride(0) != 1:
            return torch.div(total, weights).contiguous()
        mean = np.empty((len(total), weights.numel()), np.float32)
        divide(total.permute(1, 2, 3, 0).reshape(-1, len(total)).numpy(), weights.reshape(-1).numpy(), mean)
        return torch.from_numpy(mean).view(len(total), *weights.shape)

    def _parts(self, count: int) -> list[tuple[slice, slice]]:
        """Where in the ring the next ``count`` rows lie, and which of these rows they are: one or two pieces."""
        begin = self.first % self.height
        straight = min(count, self.height - begin)
        parts = [(slice(begin, begin + straight), slice(0, straight))]
        return parts if straight == count else [*parts, (slice(0, count - straight), slice(straight, count))]
