"""Intensity normalisation: raw voxel values to what the network sees, one scheme per channel."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from medseg.errors import InputError, Problem
from medseg.records.fingerprint import Intensity
from medseg.records.plan import Normalisation

SMALLEST_STD = 1e-8  # as nnU-Net: a standard deviation below it divides by it


def normalise(
    image: NDArray[np.generic],
    normalisations: Sequence[Normalisation],
    intensities: Sequence[Intensity],
    mask: NDArray[np.bool_] | None = None,
) -> NDArray[np.float32]:
    """Normalise every channel by its scheme. The rules are nnU-Net's (default_normalization_schemes.py).

    Statistics are taken in float64. A constant channel becomes zeros under ``zscore`` and ``rescale_0_1``.

    Args:
        image: (C, Z, Y, X) of any numeric type, finite; not changed.
        normalisations: one per channel.
        intensities: foreground statistics of the data set, one per channel; read by ``ct`` only.
        mask: (Z, Y, X), for channels with ``use_mask``.

    Returns:
        A new float32 array of the same shape.

    Raises:
        InputError: E0111 values outside 0 to 255 under ``rgb_0_1``.
        ValueError: the sequences do not have one entry per channel, or a mask is needed and not given.
    """
    if not len(image) == len(normalisations) == len(intensities):
        raise ValueError(
            f"{len(image)} channels, {len(normalisations)} normalisations, {len(intensities)} intensity records"
        )
    result = np.empty(image.shape, dtype=np.float32)
    for index, (normalisation, intensity) in enumerate(zip(normalisations, intensities, strict=True)):
        channel = result[index]
        if normalisation.scheme == "ct":
            _ct(image[index], intensity, channel)
            continue
        np.copyto(channel, image[index], casting="unsafe")
        match normalisation.scheme:
            case "zscore" if normalisation.use_mask:
                _zscore_in_mask(channel, mask)
            case "zscore":
                _zscore(channel, channel)
            case "rescale_0_1":
                _rescale(channel)
            case "rgb_0_1":
                _rgb(channel, index)
            case "none":
                pass
    return result


def _zscore(channel: NDArray[np.float32], sample: NDArray[np.float32]) -> None:
    """With mean and standard deviation of ``sample``."""
    mean, std = _mean_and_std(sample)
    channel -= np.float32(mean)
    channel /= np.float32(max(std, SMALLEST_STD))


def _zscore_in_mask(channel: NDArray[np.float32], mask: NDArray[np.bool_] | None) -> None:
    """Statistics and result inside the mask; outside stays the zero that made it outside."""
    if mask is None:
        raise ValueError("zscore with use_mask needs the nonzero mask")
    if mask.any():
        _zscore(channel, channel[mask])
    np.copyto(channel, 0, where=~mask)


def _ct(channel: NDArray[np.generic], intensity: Intensity, out: NDArray[np.float32]) -> None:
    """Slice by slice: each stays in the cache from one step to the next."""
    for source, plane in zip(channel, out, strict=True):
        np.copyto(plane, source, casting="unsafe")
        np.clip(plane, intensity.percentile_00_5, intensity.percentile_99_5, out=plane)
        plane -= np.float32(intensity.mean)
        plane /= np.float32(max(intensity.std, SMALLEST_STD))


def _rescale(channel: NDArray[np.float32]) -> None:
    low, high = channel.min(), channel.max()
    channel -= low
    if high > low:
        channel /= np.float32(float(high) - float(low))


def _rgb(channel: NDArray[np.float32], index: int) -> None:
    low, high = float(channel.min()), float(channel.max())
    if low < 0 or high > 255:
        raise InputError(
            Problem(
                "E0111",
                f"channel {index} has values {low:g} to {high:g}",
                "0 to 255 of an RGB image",
                "choose another channel name in dataset.json, for instance 'zscore'",
            )
        )
    channel /= np.float32(255)


def _mean_and_std(values: NDArray[np.float32]) -> tuple[float, float]:
    """Mean and population standard deviation in float64, without a float64 copy of the whole array.

    Exactly zero for constant values: a rounded mean must not turn a constant into noise divided by 1e-8.
    """
    low, high = float(values.min()), float(values.max())
    if low == high:
        return low, 0.0
    mean = float(values.mean(dtype=np.float64))
    pieces = np.array_split(values.reshape(-1), max(1, values.size >> 20))
    squares = sum(float(np.square(piece.astype(np.float64) - mean).sum()) for piece in pieces)
    return mean, float(np.sqrt(squares / values.size))
