"""Windows: where the tiles of a sliding window lie, and how much each of their voxels counts."""

from __future__ import annotations

import math
from functools import lru_cache
from itertools import product

import numpy as np
from numpy.typing import NDArray

from medseg.records.grid import Int3

SIGMA = 1 / 8  # nnU-Net: width of the Gaussian in shares of the tile
PEAK = 10  # nnU-Net: weight of the middle of the tile, which keeps small ones within half precision
STEP = 0.5  # nnU-Net: distance of neighbouring tiles in shares of the tile


def window_starts(size: int, tile: int, step: float = STEP) -> list[int]:
    """First voxels of the tiles along one axis: evenly spread, at most ``step`` tiles apart, flush with both ends.

    The rule is nnU-Net's ``compute_steps_for_sliding_window``. ``size`` must be at least ``tile``.
    """
    count = math.ceil((size - tile) / max(1.0, tile * step)) + 1  # at least a voxel: slices of 2d come once
    if count == 1:
        return [0]
    distance = (size - tile) / (count - 1)
    return [round(distance * i) for i in range(count)]


def windows(shape: Int3, tile: Int3, step: float = STEP) -> list[Int3]:
    """First voxel (z, y, x) of every tile of a volume, in scan order."""
    z, y, x = (window_starts(n, t, step) for n, t in zip(shape, tile, strict=True))
    return list(product(z, y, x))


@lru_cache(maxsize=8)
def importance(tile: Int3) -> NDArray[np.float32]:
    """(z, y, x) weights of a tile: nnU-Net's Gaussian, ``PEAK`` in the middle and never 0.

    As in its inference/sliding_window_prediction.py, the middle of an even side is its upper
    voxel, the Gaussian ends after four widths, and weights are what half precision makes of them. In the corners of a
    tile, where weights fall below that precision, another rounding would give other logits.
    """
    profiles = [_profile(n) for n in tile]
    weights = PEAK * (profiles[0][:, None, None] * profiles[1][:, None] * profiles[2])
    rounded = weights.astype(np.float16).astype(np.float32)
    never_zero: NDArray[np.float32] = np.maximum(rounded, rounded[rounded > 0].min())
    never_zero.setflags(write=False)
    return never_zero


def _profile(size: int) -> NDArray[np.float64]:
    distance = np.arange(size) - size // 2
    profile = np.exp(-0.5 * (distance / (size * SIGMA)) ** 2)
    return np.where(np.abs(distance) <= int(4 * size * SIGMA + 0.5), profile, 0.0)
