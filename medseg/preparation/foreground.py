"""Foreground locations: where each class, and each of its components, lies in a prepared case, for drawing patches."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from medseg.imaging.components import components

IGNORE = -1
ANNOTATED = -1  # key of all voxels that are not ignored; there only if the case has ignored voxels
LEAST_SAMPLES = 10_000
LEAST_SHARE_PERCENT = 1
PART = 2**22  # voxels that are looked at together; positions of all would take eight bytes and more for each voxel

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
    ignored = bool(flat.size) and int(flat.min()) == IGNORE
    counts = _counts(flat, ignored)
    ranks = {index: _draw(count, case_id, index) for index, count in counts.items()}
    drawn: dict[int, list[NDArray[np.intp]]] = {index: [] for index in counts}
    seen = dict.fromkeys(counts, 0)
    for start, groups in _parts(flat, ignored):
        for index in counts.keys() & groups.keys():
            positions, before = groups[index], seen[index]
            seen[index] += len(positions)
            low, high = np.searchsorted(ranks[index], [before, seen[index]])
            drawn[index].append(start + positions[ranks[index][low:high] - before])
    kind = np.dtype(np.int32 if flat.size <= np.iinfo(np.int32).max else np.int64)
    pieces = [piece for index in counts for piece in drawn[index]]
    return counts, np.concatenate([np.zeros(0, kind), *pieces], dtype=kind, casting="unsafe")


def _counts(flat: NDArray[np.signedinteger[Any]], ignored: bool) -> dict[int, int]:
    """Voxels of each class that occurs, ascending, and of ANNOTATED."""
    counts: dict[int, int] = {}
    for start in range(0, flat.size, PART):
        part = flat[start : start + PART]
        per_class = np.bincount(part[part > 0])
        if ignored:
            counts[ANNOTATED] = counts.get(ANNOTATED, 0) + int(np.count_nonzero(part != IGNORE))
        for index in np.flatnonzero(per_class).tolist():
            counts[index] = counts.get(index, 0) + int(per_class[index])
    return {index: counts[index] for index in sorted(counts) if counts[index]}


def _parts(flat: NDArray[np.signedinteger[Any]], ignored: bool) -> Iterator[tuple[int, dict[int, NDArray[np.intp]]]]:
    """Part by part, for memory: where the part starts, and ascending positions in it of each class, and ANNOTATED."""
    for start in range(0, flat.size, PART):
        part = flat[start : start + PART]
        places = np.flatnonzero(part > 0)
        classes = part[places]
        per_class = np.bincount(classes)
        present = np.flatnonzero(per_class)
        if len(present) > 1:
            places = places[np.argsort(classes, kind="stable")]
        ends = np.cumsum(per_class[present])
        groups = {int(c): places[end - per_class[c] : end] for c, end in zip(present, ends, strict=True)}
        if ignored:
            groups[ANNOTATED] = np.flatnonzero(part != IGNORE)
        yield start, groups


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


@dataclass(frozen=True, slots=True)
class Components:
    """Locations of the connected components of a class: all drawn ones, and where each component's end."""

    locations: Locations
    ends: NDArray[np.int64]

    def one(self, rng: np.random.Generator) -> Locations:
        """The locations of a component, each as likely as any other."""
        chosen = int(rng.integers(len(self.ends)))
        return self.locations[0 if chosen == 0 else self.ends[chosen - 1] : self.ends[chosen]]


def locate_components(labels: NDArray[np.signedinteger[Any]], case_id: str) -> dict[int, Components]:
    """Locations of each component of each foreground class, connected through faces, edges and corners.

    Args:
        labels: (Z, Y, X) class indices, IGNORE (-1) where ignored.
        case_id: enters the seed.

    Returns:
        By class, of those that occur: linear indices (C order) of ``sample_size`` voxels of each component.
    """
    kind = np.dtype(np.int32 if labels.size <= np.iinfo(np.int32).max else np.int64)
    result = {}
    for index, box in enumerate(ndimage.find_objects(labels), start=1):
        if box is None:
            continue
        numbers, _ = components(labels[box] == index)
        corner = [axis.start for axis in box]
        found = []
        for number, part in enumerate(ndimage.find_objects(numbers), start=1):
            places = np.flatnonzero(numbers[part] == number)
            inside = np.unravel_index(places[_draw(len(places), case_id, index)], numbers[part].shape)
            place = tuple(i + s.start + c for i, s, c in zip(inside, part, corner, strict=True))
            found.append(np.ravel_multi_index(place, labels.shape).astype(kind))
        result[index] = Components(np.concatenate(found), np.cumsum([len(one) for one in found]))
    return result


def _draw(count: int, case_id: str, index: int) -> NDArray[np.int64]:
    """Which of a class's voxels are kept: ``sample_size(count)`` ascending ranks of 0 to ``count`` - 1."""
    seed = int.from_bytes(hashlib.sha256(f"{case_id}\n{index}".encode()).digest()[:16], "little")
    size = sample_size(count)
    if size == count:
        return np.arange(count)
    return np.sort(np.random.default_rng(seed).choice(count, size, replace=False, shuffle=False))
