"""Intensity normalisation: raw voxel values to what the network sees, one scheme per channel.

Every scheme clips, shifts and divides, so a channel can be normalised slice by slice where it is read, and a
normalised copy of a large image need not exist.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from medseg.errors import InputError, Problem
from medseg.records.fingerprint import Intensity
from medseg.records.grid import Int3
from medseg.records.plan import Normalisation

SMALLEST_STD = 1e-8  # as nnU-Net: a standard deviation below it divides by it

Bounds = tuple[float, float]


@dataclass(frozen=True, slots=True, eq=False)
class Channel:
    """A channel as the network sees it, computed where it is read: (value clipped - shift) / divisor.

    ``voxels`` (Z, Y, X) are of any numeric type. Outside of ``mask`` the result is 0. ``ends`` are the smallest and
    largest voxel (in the mask), where they are known.
    """

    voxels: NDArray[np.generic]
    clip: Bounds | None = None
    shift: float = 0.0
    divisor: float = 1.0
    mask: NDArray[np.bool_] | None = None
    ends: Bounds | None = None

    @property
    def shape(self) -> Int3:
        """(z, y, x)."""
        z, y, x = self.voxels.shape
        return z, y, x

    def planes(self, axis: int, start: int, stop: int) -> NDArray[np.float32]:
        """Slices ``start`` to ``stop`` across ``axis``, which comes first, as a new C-contiguous float32 array."""
        source = np.moveaxis(self.voxels, axis, 0)[start:stop]
        planes = np.empty(source.shape, dtype=np.float32)
        np.copyto(planes, source, casting="unsafe")
        self._scale(planes)
        if self.mask is not None:
            np.copyto(planes, 0, where=~np.moveaxis(self.mask, axis, 0)[start:stop])
        return planes

    def bounds(self) -> Bounds:
        """Smallest and largest value of the whole channel: scaling keeps the order of values."""
        raw = self.ends
        if raw is None and self.mask is not None:
            raw = _statistics(self.voxels, self.mask)[2]
        ends = np.array(raw or (self.voxels.min(), self.voxels.max())).astype(np.float32)
        self._scale(ends)
        outside = self.mask is not None and not self.mask.all()
        values = [*ends.tolist(), *([0.0] if outside else [])]
        return min(values), max(values)

    def _scale(self, values: NDArray[np.float32]) -> None:
        if self.clip is not None:
            np.clip(values, *self.clip, out=values)
        if self.shift != 0:
            values -= np.float32(self.shift)
        if self.divisor != 1:
            values /= np.float32(self.divisor)


def normalise(
    image: NDArray[np.generic],
    normalisations: Sequence[Normalisation],
    intensities: Sequence[Intensity],
    mask: NDArray[np.bool_] | None = None,
) -> NDArray[np.float32]:
    """``normalised`` as a new float32 array of the same shape."""
    result = np.empty(image.shape, dtype=np.float32)
    for channel, out in zip(normalised(image, normalisations, intensities, mask), result, strict=True):
        for z, plane in enumerate(out):
            plane[...] = channel.planes(0, z, z + 1)[0]
    return result


def normalised(
    image: NDArray[np.generic],
    normalisations: Sequence[Normalisation],
    intensities: Sequence[Intensity],
    mask: NDArray[np.bool_] | None = None,
) -> list[Channel]:
    """Normalise every channel by its scheme. The rules are nnU-Net's (default_normalization_schemes.py).

    Statistics are taken in float64. A constant channel becomes zeros under ``zscore`` and ``rescale_0_1``.

    Args:
        image: (C, Z, Y, X) of any numeric type, finite; not changed, and not copied.
        normalisations: one per channel.
        intensities: foreground statistics of the data set, one per channel; read by ``ct`` only.
        mask: (Z, Y, X), for channels with ``use_mask``.

    Raises:
        InputError: E0111 values outside 0 to 255 under ``rgb_0_1``.
        ValueError: the sequences do not have one entry per channel, or a mask is needed and not given.
    """
    if not len(image) == len(normalisations) == len(intensities):
        raise ValueError(
            f"{len(image)} channels, {len(normalisations)} normalisations, {len(intensities)} intensity records"
        )
    result = []
    for index, (normalisation, intensity) in enumerate(zip(normalisations, intensities, strict=True)):
        voxels = image[index]
        match normalisation.scheme:
            case "ct":
                clip = intensity.percentile_00_5, intensity.percentile_99_5
                result.append(Channel(voxels, clip, intensity.mean, max(intensity.std, SMALLEST_STD)))
            case "zscore" if normalisation.use_mask:
                result.append(_zscore_in_mask(voxels, mask))
            case "zscore":
                mean, std, ends = _statistics(voxels)
                result.append(Channel(voxels, None, mean, max(std, SMALLEST_STD), None, ends))
            case "rescale_0_1":
                low, high = (float(np.float32(value)) for value in (voxels.min(), voxels.max()))
                result.append(Channel(voxels, None, low, float(np.float32(high - low)) or 1.0))
            case "rgb_0_1":
                result.append(_rgb(voxels, index))
            case "none":
                result.append(Channel(voxels))
    return result


def _zscore_in_mask(voxels: NDArray[np.generic], mask: NDArray[np.bool_] | None) -> Channel:
    """Statistics and result inside the mask; outside stays the zero that made it outside."""
    if mask is None:
        raise ValueError("zscore with use_mask needs the nonzero mask")
    mean, std, ends = _statistics(voxels, mask)
    return Channel(voxels, None, mean, max(std, SMALLEST_STD), mask, ends)


def _rgb(voxels: NDArray[np.generic], index: int) -> Channel:
    low, high = float(voxels.min()), float(voxels.max())
    if low < 0 or high > 255:
        raise InputError(
            Problem(
                "E0111",
                f"channel {index} has values {low:g} to {high:g}",
                "0 to 255 of an RGB image",
                "choose another channel name in dataset.json, for instance 'zscore'",
            )
        )
    return Channel(voxels, None, 0.0, 255.0)


def _statistics(voxels: NDArray[np.generic], mask: NDArray[np.bool_] | None = None) -> tuple[float, float, Bounds]:
    """Mean, population standard deviation, and smallest and largest value (in the mask), in one pass in float64.

    The deviation is exactly zero for constant values: a rounded mean must not turn a constant into noise divided by
    1e-8. Squares are summed about the mean of the first slice, so that large values with little spread lose nothing.
    """
    count, total, squares, low, high = 0, 0.0, 0.0, np.inf, -np.inf
    centre: float | None = None
    for z, plane in enumerate(voxels):
        values = (plane if mask is None else plane[mask[z]]).astype(np.float32, copy=False).reshape(-1)
        if not values.size:
            continue
        low, high = min(low, float(values.min())), max(high, float(values.max()))
        centre = float(values.mean(dtype=np.float64)) if centre is None else centre
        away = values.astype(np.float64)
        away -= centre
        count += values.size
        total += float(away.sum())
        squares += float(np.square(away, out=away).sum())
    if centre is None or low == high:
        return (0.0, 1.0, (0.0, 0.0)) if centre is None else (low, 0.0, (low, high))
    off = total / count
    return centre + off, float(np.sqrt(max(0.0, squares / count - off * off))), (low, high)
