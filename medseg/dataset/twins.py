"""Twins: images that are equal voxel by voxel, and the cases that share one."""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Iterable, Mapping

import numpy as np
from numpy.typing import NDArray


def voxels_sha256(voxels: NDArray[np.generic]) -> str:
    """Equal for arrays that are equal voxel by voxel, however their files are compressed; "" for constant ones."""
    if voxels.min() == voxels.max():
        return ""
    digest = hashlib.sha256(f"{voxels.dtype.str} {voxels.shape}".encode())
    digest.update(np.ascontiguousarray(voxels).data)
    return digest.hexdigest()


def identical_cases(hashes: Mapping[str, Iterable[str]]) -> tuple[tuple[str, ...], ...]:
    """Sorted groups of two or more cases that share an image, from the ``voxels_sha256`` of each case's images."""
    sharing: dict[str, set[str]] = defaultdict(set)
    for case, of_case in hashes.items():
        for digest in of_case:
            if digest:
                sharing[digest].add(case)
    return tuple(sorted({tuple(sorted(cases)) for cases in sharing.values() if len(cases) > 1}))
