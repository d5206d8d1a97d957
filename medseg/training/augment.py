"""Augmentation: what is done to a sample is drawn as a record first, then applied deterministically.

Probabilities and ranges are nnU-Net's defaults (2.8.1, ``nnUNetTrainer.get_training_transforms``). The spatial part is
an affine map from the patch to the volume, so that only the voxels that are needed are read and interpolated once; the
intensity part works on the patch.

Samples are float32 tensors (C, Z, Y, X); 2D patches have Z = 1.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from medseg.records.grid import Float3, Int3

Drawn = TypeVar("Drawn")
PerChannel = tuple[float | None, ...]

ROTATION_P, SCALING_P, SCALING = 0.2, 0.2, (0.7, 1.4)
NOISE_P, NOISE_STD = 0.1, (0.0, 0.1)
BLUR_P, BLUR_CHANNEL_P, BLUR_SIGMA = 0.2, 0.5, (0.5, 1.0)
BRIGHTNESS_P, BRIGHTNESS = 0.15, (0.75, 1.25)
CONTRAST_P, CONTRAST = 0.15, (0.75, 1.25)
LOW_RESOLUTION_P, LOW_RESOLUTION_CHANNEL_P, LOW_RESOLUTION = 0.25, 0.5, (0.5, 1.0)
INVERTED_GAMMA_P, GAMMA_P, GAMMA = 0.1, 0.3, (0.7, 1.5)
ANISOTROPY = 3  # a patch this much longer than its first axis is rotated in plane only ("dummy 2D")


@dataclass(frozen=True, slots=True)
class Geometry:
    """Which rotations make sense for a patch: angle range in radians per axis (z, y, x)."""

    patch: Int3
    angles: tuple[float, float, float]

    @classmethod
    def of(cls, patch: Int3) -> Geometry:
        """±30° about every axis in 3D; in plane ±180°, or ±15° when the plane is longer than 1.5 times its width."""
        z, y, x = patch
        if z == 1:
            in_plane = math.radians(15 if max(y, x) / min(y, x) > 1.5 else 180)
            return cls(patch, (in_plane, 0.0, 0.0))
        if max(patch) / z > ANISOTROPY:
            return cls(patch, (math.pi, 0.0, 0.0))
        return cls(patch, (math.radians(30),) * 3)


@dataclass(frozen=True, slots=True)
class Spatial:
    """Rotation angles (z, y, x) in radians and one zoom factor; > 1 shows more of the volume."""

    angles: tuple[float, float, float]
    zoom: float
    flat: bool  # the first axis is neither rotated nor scaled

    def matrix(self) -> NDArray[np.float64]:
        """(3, 3): offset from the patch centre in patch voxels → offset in volume voxels, axes (z, y, x)."""
        about_z, about_y, about_x = (
            np.array([[math.cos(a), -math.sin(a)], [math.sin(a), math.cos(a)]]) for a in self.angles
        )
        turn = np.eye(3)
        for plane, rotation in (((1, 2), about_z), ((0, 2), about_y), ((0, 1), about_x)):
            step = np.eye(3)
            step[np.ix_(plane, plane)] = rotation
            turn = turn @ step
        return turn @ np.diag([1.0 if self.flat else self.zoom, self.zoom, self.zoom])


@dataclass(frozen=True, slots=True)
class Intensity:
    """What is done to the intensities, in the order of the fields, per channel but for the noise; None is nothing.

    Blur has a width for each axis.
    """

    noise_std: float | None
    blur_sigma: tuple[Float3 | None, ...]
    brightness: PerChannel
    contrast: PerChannel
    low_resolution: PerChannel
    inverted_gamma: PerChannel
    gamma: PerChannel
    noise_seed: int
    flat: bool = False  # the first axis keeps its resolution


@dataclass(frozen=True, slots=True)
class Augmentation:
    """Everything drawn for one sample."""

    spatial: Spatial | None
    intensity: Intensity
    flips: tuple[int, ...]


def draw(rng: np.random.Generator, geometry: Geometry, channels: int, mirror_axes: tuple[int, ...]) -> Augmentation:
    """Draw one sample's augmentation. ``mirror_axes`` index (z, y, x)."""

    def between(low: float, high: float) -> float:
        return float(rng.uniform(low, high))

    def around_one(low: float, high: float) -> float:
        """Below and above 1 equally often."""
        return between(low, 1.0) if rng.random() < 0.5 else between(1.0, high)

    def each(p: float, value: Callable[[], Drawn], channel_p: float = 1.0) -> tuple[Drawn | None, ...]:
        """With probability ``p`` a value for every channel, or for the share ``channel_p`` of them."""
        if rng.random() >= p:
            return (None,) * channels
        return tuple(value() if rng.random() < channel_p else None for _ in range(channels))

    spatial, flat = None, geometry.angles[1] == 0
    rotate, scale = rng.random() < ROTATION_P, rng.random() < SCALING_P
    if rotate or scale:
        a, b, c = (between(-limit, limit) if rotate else 0.0 for limit in geometry.angles)
        spatial = Spatial((a, b, c), around_one(*SCALING) if scale else 1.0, flat)
    intensity = Intensity(
        noise_std=between(*NOISE_STD) if rng.random() < NOISE_P else None,
        blur_sigma=each(
            BLUR_P, lambda: (between(*BLUR_SIGMA), between(*BLUR_SIGMA), between(*BLUR_SIGMA)), BLUR_CHANNEL_P
        ),
        brightness=each(BRIGHTNESS_P, lambda: around_one(*BRIGHTNESS)),
        contrast=each(CONTRAST_P, lambda: around_one(*CONTRAST)),
        low_resolution=each(LOW_RESOLUTION_P, lambda: between(*LOW_RESOLUTION), LOW_RESOLUTION_CHANNEL_P),
        inverted_gamma=each(INVERTED_GAMMA_P, lambda: around_one(*GAMMA)),
        gamma=each(GAMMA_P, lambda: around_one(*GAMMA)),
        noise_seed=int(rng.integers(2**62)),
        flat=flat,
    )
    return Augmentation(spatial, intensity, tuple(axis for axis in mirror_axes if rng.random() < 0.5))


def apply_spatial(
    image: Tensor, labels: Tensor, offset: Tensor, spatial: Spatial, patch: Int3
) -> tuple[Tensor, Tensor]:
    """Sample a patch from a box of the volume: linear for the image, linear indicators + argmax for label maps.

    Args:
        image: (C, z, y, x) float32, the box that was read.
        labels: (L, z, y, x) int64 of the same box: one or several label maps.
        offset: (3,) float64: the patch centre in voxel coordinates of the box.
        spatial: the drawn map.
        patch: size of the result.

    Returns:
        (C, *patch) float32, 0 outside the box, and (L, *patch) int64, 0 outside the box.
    """
    shape = torch.tensor(labels.shape[1:], dtype=torch.float64)
    centred = [torch.arange(n, dtype=torch.float64) - (n - 1) / 2 for n in patch]
    points = torch.stack(torch.meshgrid(*centred, indexing="ij"), -1)
    positions = points @ torch.from_numpy(spatial.matrix()).T + offset
    grid = ((2 * positions + 1) / shape - 1).flip(-1).float().unsqueeze(0)  # grid_sample wants (x, y, z) in [-1, 1]
    values = [_values(one) for one in labels]
    indicators = [(one == value).float() for one, there in zip(labels, values, strict=True) for value in there]
    both = torch.cat((image, torch.stack(indicators))) if indicators else image
    sampled = F.grid_sample(both[None], grid, mode="bilinear", padding_mode="zeros", align_corners=False)[0]
    shares = iter(sampled[len(image) :])
    winners = [_winner([(value, next(shares)) for value in there], patch) for there in values]
    return sampled[: len(image)], torch.stack(winners)


def _values(labels: Tensor) -> list[int]:
    """The values of a label map, but background."""
    return [value for value in torch.unique(labels).tolist() if value]


def _winner(shares: Sequence[tuple[int, Tensor]], patch: Int3) -> Tensor:
    """The value with the largest share, of equal ones the first; background has what the others leave."""
    best, winner = torch.ones(patch), torch.zeros(patch, dtype=torch.int64)
    for _, share in shares:
        best = best - share
    for value, share in shares:
        winner.masked_fill_(share > best, value)
        best = torch.maximum(best, share)
    return winner


def apply_intensity(image: Tensor, drawn: Intensity) -> Tensor:
    """The drawn intensity changes on (C, Z, Y, X) float32, in nnU-Net's order; the input is not changed."""
    if drawn.noise_std is not None:
        generator = torch.Generator().manual_seed(drawn.noise_seed)
        image = image + torch.randn(image.shape, generator=generator) * drawn.noise_std
    image = _per_channel(image, drawn.blur_sigma, _blur)
    image = _per_channel(image, drawn.brightness, torch.mul)
    image = _per_channel(image, drawn.contrast, _contrast)
    image = _per_channel(image, drawn.low_resolution, _flat_low_resolution if drawn.flat else _low_resolution)
    image = _per_channel(image, drawn.inverted_gamma, lambda channel, gamma: -_gamma(-channel, gamma))
    return _per_channel(image, drawn.gamma, _gamma)


def _per_channel(image: Tensor, values: Sequence[Drawn | None], change: Callable[[Tensor, Drawn], Tensor]) -> Tensor:
    if all(value is None for value in values):
        return image
    return torch.stack([c if v is None else change(c, v) for c, v in zip(image, values, strict=True)])


def _blur(channel: Tensor, sigmas: Float3) -> Tensor:
    """Gaussian blur of (Z, Y, X) with replicated borders, axis by axis; axes of one voxel stay."""
    for axis, (size, sigma) in enumerate(zip(channel.shape, sigmas, strict=True)):
        if size > 1:
            radius = max(1, math.ceil(3 * sigma))
            x = torch.arange(-radius, radius + 1, dtype=torch.float32)
            kernel = torch.exp(-0.5 * (x / sigma) ** 2)
            kernel /= kernel.sum()
            before = channel.narrow(axis, 0, 1).expand(*[radius if a == axis else -1 for a in range(3)])
            after = channel.narrow(axis, size - 1, 1).expand(*[radius if a == axis else -1 for a in range(3)])
            padded = torch.cat((before, channel, after), axis)
            parts = (padded.narrow(axis, i, size) * w for i, w in enumerate(kernel.tolist()))
            channel = sum(parts, start=torch.zeros_like(channel))
    return channel


def _contrast(channel: Tensor, factor: float) -> Tensor:
    """Stretch about the mean, kept within the old range."""
    low, high = channel.aminmax()
    mean = channel.mean()
    return ((channel - mean) * factor + mean).clamp(low, high)


def _low_resolution(channel: Tensor, zoom: float) -> Tensor:
    """Down by nearest neighbour, up again linearly; axes of one voxel stay."""
    return _down_and_up(channel, [max(1, round(n * zoom)) for n in channel.shape])


def _flat_low_resolution(channel: Tensor, zoom: float) -> Tensor:
    """The same in plane only."""
    return _down_and_up(channel, [channel.shape[0], *(max(1, round(n * zoom)) for n in channel.shape[1:])])


def _down_and_up(channel: Tensor, small: list[int]) -> Tensor:
    down = F.interpolate(channel[None, None], size=small, mode="nearest-exact")
    return F.interpolate(down, size=channel.shape, mode="trilinear", align_corners=False)[0, 0]


def _gamma(channel: Tensor, gamma: float) -> Tensor:
    """Gamma on the range scaled to [0, 1]; mean and standard deviation stay what they were."""
    low, high = channel.aminmax()
    mean, std = channel.mean(), channel.std()
    span = (high - low).clamp_min(1e-7)
    changed = ((channel - low) / span).clamp_min(0) ** gamma * span + low
    return (changed - changed.mean()) / changed.std().clamp_min(1e-7) * std + mean
