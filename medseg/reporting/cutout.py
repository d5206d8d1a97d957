"""Cut-out: a small 8-bit copy of a case's image and labels that the viewer in a report can show."""

from __future__ import annotations

import base64
import gzip
import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import count

import numpy as np
from numpy.typing import NDArray

from medseg.records.grid import Float3, Int3
from medseg.reporting import style
from medseg.reporting.scene import Labels, Scene, windowed

LONGEST = 160  # voxels along an axis; more than a screen shows of a view
MOST_BYTES = 1_500_000  # of a case, compressed
NOT_ANNOTATED = 255  # among labels
MOST_LABELS = 254


@dataclass(frozen=True, slots=True)
class Cutout:
    """A case for the viewer: uint8 volumes in C order (z, y, x), gzipped, in base64.

    ``names`` and ``colours`` are of the classes from 1 on; ``reduced`` is how many voxels of the file one voxel here
    stands for along each axis. ``window`` are the values of the file that the image's 0 and 255 stand for.
    """

    case: str
    shape: Int3
    spacing_mm: Float3
    oriented: bool
    reduced: Int3
    window: tuple[float, float]
    names: tuple[str, ...]
    colours: tuple[str, ...]
    image: str
    prediction: str
    reference: str | None

    @property
    def size(self) -> int:
        """Characters of the volumes."""
        return len(self.image) + len(self.prediction) + len(self.reference or "")


def cut_out(scene: Scene, case: str, label_names: Sequence[str], most_bytes: int = MOST_BYTES) -> Cutout | None:
    """The scene in 8 bits, reduced as often as it must be to fit ``most_bytes``; None if it has too many labels.

    The image is averaged over blocks of voxels, of labels the middle voxel of each block is kept.
    """
    if len(label_names) - 1 > MOST_LABELS:
        return None
    for finest in count(1):
        factors = _factors(scene.prediction.shape, scene.spacing_mm, finest)
        cutout = _pack(scene, case, label_names, factors)
        if cutout.size <= most_bytes or max(cutout.shape) <= 8:
            return cutout
    raise AssertionError


def _factors(shape: tuple[int, ...], spacing_mm: Float3, step: int) -> Int3:
    """Blocks of voxels per axis: towards equal sides in mm, and no axis longer than ``LONGEST`` / ``step``."""
    longest = LONGEST / step
    side = max(n * s for n, s in zip(shape, spacing_mm, strict=True)) / longest  # mm of a voxel that would fit
    z, y, x = (
        max(1, math.ceil(n / longest), min(n, math.floor(side / s))) for n, s in zip(shape, spacing_mm, strict=True)
    )
    return z, y, x


def _pack(scene: Scene, case: str, label_names: Sequence[str], factors: Int3) -> Cutout:
    grey = scene.image if scene.image.ndim == 3 else scene.image.mean(axis=-1)
    image = np.round(255 * windowed(_block_means(grey, factors), scene.window)).astype(np.uint8)
    prediction = _encode(_thinned(scene.prediction, factors))
    reference = None if scene.reference is None else _encode(_thinned(scene.reference, factors))
    z, y, x = (s * f for s, f in zip(scene.spacing_mm, factors, strict=True))
    return Cutout(
        case=case,
        shape=(image.shape[0], image.shape[1], image.shape[2]),
        spacing_mm=(z, y, x),
        oriented=scene.oriented,
        reduced=factors,
        window=scene.window,
        names=tuple(label_names[1:]),
        colours=tuple(style.hex_colour(index) for index in range(1, len(label_names))),
        image=_encode(image),
        prediction=prediction,
        reference=reference,
    )


def _block_means(image: NDArray[np.generic], factors: Int3) -> NDArray[np.float64]:
    """Means over blocks, those at the upper ends incomplete; voxels that are no numbers do not count.

    Block by block along the first axis: a float64 copy of a large CT would not fit in memory.
    """
    return np.concatenate([_one_thick(image[z : z + factors[0]], factors) for z in range(0, len(image), factors[0])])


def _one_thick(slab: NDArray[np.generic], factors: Int3) -> NDArray[np.float64]:
    values = np.asarray(slab, dtype=np.float64)
    numbers = np.isfinite(values)
    sums, counts = np.where(numbers, values, 0.0), numbers.astype(np.float64)
    for axis, factor in enumerate(factors):
        starts = np.arange(0, values.shape[axis], factor)
        sums, counts = np.add.reduceat(sums, starts, axis), np.add.reduceat(counts, starts, axis)
    return np.where(counts > 0, sums / np.maximum(counts, 1), -np.inf)


def _thinned(labels: Labels, factors: Int3) -> NDArray[np.uint8]:
    z, y, x = (np.minimum(np.arange(0, n, f) + f // 2, n - 1) for n, f in zip(labels.shape, factors, strict=True))
    thin = labels[np.ix_(z, y, x)]
    return np.where(thin < 0, NOT_ANNOTATED, thin).astype(np.uint8)


def _encode(array: NDArray[np.uint8]) -> str:
    return base64.b64encode(gzip.compress(array.tobytes(), 9, mtime=0)).decode("ascii")
