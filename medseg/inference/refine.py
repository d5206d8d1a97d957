"""Refinement: mean field in a random field over neighbouring voxels, which draws borders along edges of the image.

The model is that of Krähenbühl and Koltun (2011, arXiv 1210.5644): the network's logits, and for every pair of voxels
with different labels a penalty that falls with their distance (smoothness), and one that falls with their distance and
their difference in the image (appearance). Two things differ, so that volumes are done in bounded memory and time:
pairs count only up to twice the width of their Gaussian, and voxels of which the network is certain keep their
probabilities. Without far pairs, what a row becomes depends on a known number of rows around it: the logits are refined
slab by slab as they come, with the result of doing all at once.

It works on the network's grid: there the image is normalised, so that one difference of intensities means the same in
every case, and few voxels lie far from their neighbours.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import product

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from medseg.errors import Problem, UsageError
from medseg.records.grid import Float3, Int3
from medseg.records.model import Refinement

REACH = 2.0  # widths: a Gaussian has fallen to 0.14 there
APPEARANCE_WIDTH = 1.5  # finest spacings, where no width in mm is given; of the smoothness, one
MOST = 5000  # neighbours in the box around a voxel
SURE = 4.0  # nats: what a certain voxel may lose at most leaves its label a probability of 0.98
BLOCK_BYTES = 128 * 2**20  # of logits refined at a time, or the rows that two blocks share, if that is more
KEPT_BYTES = 256 * 2**20  # of weights of pairs that are not computed anew in every iteration
TOGETHER = 2048  # voxels


@dataclass(frozen=True, slots=True, eq=False)
class Scene:
    """What is refined beside logits: image (C, Z, Y, X) float32, spacing of its axes, what the channels are, where."""

    image: NDArray[np.float32]
    spacing_mm: Float3
    outputs: int
    regions: bool
    device: torch.device


@dataclass(frozen=True, slots=True, eq=False)
class Neighbourhood:
    """The neighbours of a voxel: steps (K, 3), and weights (K,) of both terms, each of which adds up to its own."""

    steps: tuple[Int3, ...]
    smoothness: Tensor
    appearance: Tensor

    @property
    def radius(self) -> Int3:
        """The longest step along each axis."""
        z, y, x = (0, 0, 0) if not self.steps else (max(step[axis] for step in self.steps) for axis in range(3))
        return z, y, x


def neighbourhood(refinement: Refinement, spacing_mm: Float3, shape: Int3) -> Neighbourhood:
    """Neighbours within ``REACH`` widths along the axes of ``shape`` that have any.

    A term whose width reaches no neighbour has no weight.

    Raises:
        UsageError: E0001 so wide that every voxel would have ``MOST`` neighbours or more.
    """
    finest = min(s for s, n in zip(spacing_mm, shape, strict=True) if n > 1) if max(shape) > 1 else 1.0
    widths = (refinement.smoothness_mm or finest, refinement.appearance_mm or APPEARANCE_WIDTH * finest)
    reach = REACH * max(widths) * (1 + 1e-6)
    furthest = [int(reach / s) if n > 1 else 0 for s, n in zip(spacing_mm, shape, strict=True)]
    if (many := math.prod(2 * n + 1 for n in furthest)) > MOST:
        measured = f"refinement with widths of {widths[0]:g} and {widths[1]:g} mm: {many} neighbours"
        raise UsageError(Problem("E0001", measured, f"up to {MOST}", "choose smaller widths"))
    steps, squared = [], []
    for z, y, x in product(*(range(-n, n + 1) for n in furthest)):
        distance = math.hypot(z * spacing_mm[0], y * spacing_mm[1], x * spacing_mm[2])
        if 0 < distance <= reach:
            steps.append((z, y, x))
            squared.append(distance * distance)
    square = torch.tensor(squared, dtype=torch.float64)
    terms = []
    for width, weight in zip(widths, (refinement.smoothness_weight, refinement.appearance_weight), strict=True):
        term = torch.exp(-square / (2 * width * width)) * (square <= (REACH * width * (1 + 1e-6)) ** 2)
        terms.append((weight * term / term.sum().clamp_min(1e-300)).float())
    return Neighbourhood(tuple(steps), terms[0], terms[1])


def refine(slabs: Iterable[Tensor], scene: Scene, refinement: Refinement) -> Iterator[Tensor]:
    """Refined logits of logits that come in slabs (channels, rows, Y, X), from the first row to the last.

    Channels after ``scene.outputs`` are handed on. At most a block and the rows that its ends depend on are held.
    """
    shape = (scene.image.shape[1], scene.image.shape[2], scene.image.shape[3])
    near = neighbourhood(refinement, scene.spacing_mm, shape)
    rows, shared = shape[0], refinement.iterations * near.radius[0]
    held, first, done = None, 0, 0
    for slab in slabs:
        held = slab if held is None else torch.cat((held, slab), 1)
        block = _block(held[:, 0].numel(), shared)
        while done < (stop := min(rows, done + block)) and first + held.shape[1] >= min(rows, stop + shared):
            low, high = max(0, done - shared), min(rows, stop + shared)
            part = held[:, low - first : high - first]
            image = torch.from_numpy(scene.image[:, low:high]).to(scene.device)
            logits = part[: scene.outputs].to(scene.device)
            found = mean_field(logits, image, near, refinement, regions=scene.regions)[:, done - low : stop - low]
            yield torch.cat((found.to(part.device), part[scene.outputs :, done - low : stop - low])).contiguous()
            done = stop
            held, first = held[:, max(0, done - shared) - first :].clone(), max(first, done - shared)


def refine_bytes(refinement: Refinement, outputs: int, channels: int, shape: Int3, spacing_mm: Float3) -> int:
    """About the memory that ``refine`` takes beside what it is given and gives, where every voxel is uncertain."""
    near = neighbourhood(refinement, spacing_mm, shape)
    shared, plane = refinement.iterations * near.radius[0], shape[1] * shape[2]
    rows = min(shape[0], _block(outputs * plane, shared) + 2 * shared)
    each = 4 * (7 * outputs + channels + 1) + 8 * 5  # logits, beliefs, messages; places of voxels
    return rows * plane * each + min(KEPT_BYTES, 4 * len(near.steps) * rows * plane) + 24 * len(near.steps) * TOGETHER


def _block(row: int, shared: int) -> int:
    """Rows of ``row`` values that are refined at a time, ``shared`` more on either side deciding with them."""
    return max(1, 2 * shared, BLOCK_BYTES // (4 * row))


def mean_field(logits: Tensor, image: Tensor, near: Neighbourhood, refinement: Refinement, *, regions: bool) -> Tensor:
    """(outputs, Z, Y, X) logits plus what the neighbours say after the iterations; certain voxels as they are.

    All voxels are updated at once, from the probabilities of the iteration before. Of regions, each is a field of its
    own with two labels.
    """
    at_stake = float(near.smoothness.sum() + near.appearance.sum())  # no neighbour can say more against a label
    uncertain = (_margin(logits, regions) <= at_stake + SURE).nonzero()
    if not len(uncertain) or not near.steps:
        return logits
    radius = near.radius
    sides = [side for r in reversed(radius) for side in (r, r)]
    shape = [n + 2 * r for n, r in zip(logits.shape[1:], radius, strict=True)]
    strides = torch.tensor([shape[1] * shape[2], shape[2], 1], device=logits.device)
    voxels = ((uncertain + torch.tensor(radius, device=logits.device)) * strides).sum(1)
    jumps = (torch.tensor(near.steps, device=logits.device).view(-1, 3) * strides).sum(1)
    beliefs = F.pad(_beliefs(logits, 0, regions), sides).flatten(1).T.contiguous()  # outside: nothing is said
    pairs = _Pairs(F.pad(image, sides).flatten(1), jumps, near, refinement.appearance_intensity)
    own = logits[(slice(None), *uncertain.T)].T
    parts = voxels.split(TOGETHER)
    kept = [pairs.weights(part) for part in parts] if 4 * len(jumps) * len(voxels) <= KEPT_BYTES else None
    found = own
    for _ in range(refinement.iterations):
        said = []
        for number, part in enumerate(parts):
            weights = pairs.weights(part) if kept is None else kept[number]
            neighbours = part[:, None] + jumps
            said.append(F.embedding_bag(neighbours, beliefs, mode="sum", per_sample_weights=weights))
        found = own + torch.cat(said)
        beliefs[voxels] = _beliefs(found, 1, regions)
    refined = logits.clone()
    refined[(slice(None), *uncertain.T)] = found.T
    return refined


def _margin(logits: Tensor, regions: bool) -> Tensor:
    """(Z, Y, X): how far the likeliest label is ahead, in nats; of regions, the least sure one."""
    if regions:
        return logits.abs().amin(0)
    if len(logits) == 1:
        return torch.full_like(logits[0], math.inf)
    best = logits.topk(2, 0).values
    return best[0] - best[1]


def _beliefs(logits: Tensor, axis: int, regions: bool) -> Tensor:
    """What a voxel says for each label: its probability; of regions, how much likelier it is inside than outside."""
    return 2 * logits.sigmoid() - 1 if regions else logits.softmax(axis)


@dataclass(frozen=True, slots=True, eq=False)
class _Pairs:
    """Weights of voxels and their neighbours: ``pixels`` (channels, voxels of the padded block), K ``jumps`` there."""

    pixels: Tensor
    jumps: Tensor
    near: Neighbourhood
    width: float

    def weights(self, part: Tensor) -> Tensor:
        """(voxels, K): both terms together; images of several channels differ by the mean of their squares."""
        neighbours = part[:, None] + self.jumps
        apart = torch.zeros(neighbours.shape, device=self.pixels.device)
        for channel in self.pixels:
            apart += channel[neighbours].sub_(channel[part][:, None]).square_()
        similar = apart.mul_(-0.5 / (self.width * self.width * len(self.pixels))).exp_()
        return similar.mul_(self.near.appearance.to(similar.device)).add_(self.near.smoothness.to(similar.device))
