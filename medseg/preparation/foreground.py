"""Foreground locations: where each class lies in a prepared case, for drawing patches that hold it."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

IGNORE = -1
ANNOTATED = -1  # key of all voxels that are not ignored; there only if the case has ignored voxels
LEAST_SAMPLES = 10_000
LEAST_SHARE_PERCENT = 1

Locations = NDArray[np.signedinteger[Any]]  # int32, int64 where that is too small


def sample_size(voxels: int) -> int:
    """How many of a class's voxels are kept: 10 000, or all if there are fewer, but at least one per cent.

    nnU-Net's rule (default_preprocessor.py, _sample_foreground_locations).
    """
    return max(min(LEAST_SAMPLES, voxels), -(-voxels * LEAST_SHARE_PERCENT // 100))


def sample_foreground(labels: NDArray[np.signedinteger[Any]], case_id: str) -> tuple[dict[int, int], Locations]:
    """Count the voxels of each foreground class and draw locations of each without replacement.

    The draw is a function of the labels, the case id and the class alone.

    Args:
        labels: (Z, Y, X) class indices, IGNORE (-1) where ignored.
        case_id: enters the seed.

    Returns:
        Voxel counts by class, ascending, of the classes that occur; and one array with the linear indices (C order)
        of ``sample_size(count)`` voxels per class, classes one after the other, each ascending.
    """
    flat = labels.reshape(-1)
    positions = np.flatnonzero(flat > 0)
    classes = flat[positions]
    positions = positions[np.argsort(classes, kind="stable")]
    per_class = np.bincount(classes)
    counts = {int(c): int(per_class[c]) for c in np.flatnonzero(per_class)}
    groups = (
        dict(zip(counts, np.split(positions, np.cumsum(list(counts.values()))[:-1]), strict=True)) if counts else {}
    )
    if (flat == IGNORE).any():
        annotated = np.flatnonzero(flat != IGNORE)
        if annotated.size:
            counts = {ANNOTATED: int(annotated.size)} | counts
            groups[ANNOTATED] = annotated
    drawn = [_draw(groups[c], case_id, c) for c in counts]
    kind = np.dtype(np.int32 if flat.size <= np.iinfo(np.int32).max else np.int64)
    return counts, np.concatenate([np.zeros(0, kind), *drawn], dtype=kind, casting="unsafe")


def split_foreground(counts: Mapping[int, int], locations: Locations) -> dict[int, Locations]:
    """The locations by class, from what ``sample_foreground`` returned."""
    result = {}
    start = 0
    for index in sorted(counts):
        stop = start + sample_size(counts[index])
        result[index] = locations[start:stop]
        start = stop
    if start != len(locations):
        raise ValueError(f"{len(locations)} foreground locations where the counts say {start}")
    return result


def _draw(positions: NDArray[np.intp], case_id: str, index: int) -> NDArray[np.intp]:
    seed = int.from_bytes(hashlib.sha256(f"{case_id}\n{index}".encode()).digest()[:16], "little")
    size = sample_size(len(positions))
    if size == len(positions):
        return positions
    drawn = np.random.default_rng(seed).choice(len(positions), size, replace=False, shuffle=False)
    return positions[np.sort(drawn)]
