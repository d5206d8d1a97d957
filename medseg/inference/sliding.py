"""Sliding window: image on the network's grid → logits on the same grid, slab by slab."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import chain

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from medseg.errors import NonFiniteError, Problem
from medseg.inference.accumulator import Accumulator
from medseg.inference.backend import TORCH, Backend
from medseg.inference.passes import PLAIN, Head, Mirroring, Passes, groups, split_heads, voxels_together
from medseg.inference.windows import STEP, importance, windows
from medseg.networks.device import Device
from medseg.networks.one_hot import one_hot
from medseg.records.grid import Int3
from medseg.records.plan import ConfigurationPlan


@dataclass(frozen=True, slots=True)
class PreviousLabels:
    """Labels of the stage before: (Z, Y, X) class indices on the grid of the image, and how many classes there are."""

    labels: NDArray[np.integer]
    classes: int


@dataclass(frozen=True, slots=True)
class Blending:
    """How tiles are laid and blended.

    ``step`` is their distance in shares of the tile; ``together`` how many voxels go through a network at once, None
    for what the device takes; ``on_device`` whether they are blended where the network is, not on the CPU. With
    ``disagreement`` one more channel than outputs tells how far the networks' probabilities lie apart.
    """

    step: float = STEP
    together: int | None = None
    on_device: bool = True
    disagreement: bool = False
    regions: bool = False


def predict_logits(
    networks: Sequence[nn.Module],
    image: NDArray[np.float32],
    configuration: ConfigurationPlan,
    device: Device,
    *,
    mirroring: Mirroring = PLAIN,
    step: float = STEP,
    previous: PreviousLabels | None = None,
) -> Tensor:
    """All of ``stream_logits`` at once: (outputs, Z, Y, X) float32 on the CPU."""
    slabs = stream_logits(
        networks, image, configuration, device, mirroring=mirroring, blending=Blending(step), previous=previous
    )
    total: Tensor | None = None
    row = 0
    for slab in slabs:
        if total is None:
            total = torch.empty((len(slab), *image.shape[1:]))
        total[:, row : row + slab.shape[1]] = slab
        row += slab.shape[1]
    assert total is not None
    return total


@torch.inference_mode()
def stream_logits(
    networks: Sequence[nn.Module],
    image: NDArray[np.float32],
    configuration: ConfigurationPlan,
    device: Device,
    *,
    mirroring: Mirroring = PLAIN,
    blending: Blending | None = None,
    previous: PreviousLabels | None = None,
    backend: Backend = TORCH,
) -> Iterator[Tensor]:
    """Mean logits of ``networks`` and mirrored views, every voxel divided by the true sum of its weights.

    Only as many rows as a tile has are held at once. Where the networks have fewer features in front of their last
    layer than outputs, the features are blended and the layer comes after: it is linear, the result the same.

    Args:
        networks: the folds' networks, in evaluation mode on ``device``.
        image: (C, Z, Y, X) float32, prepared.
        configuration: gives the tile; a 2d configuration goes slice by slice.
        device: where the networks are.
        mirroring: mirrored views to average over.
        blending: distance of tiles, and what memory allows.
        previous: for the second stage of a cascade.
        backend: what computes the networks.

    Yields:
        Slabs (outputs, rows, Y, X) float32 where they were blended, from the first row to the last.

    Raises:
        NonFiniteError: E1002 logits are NaN or infinite.
    """
    blending = blending or Blending()
    flat = configuration.dimensions == 2
    seen = _three(configuration.patch_size)
    tile = _three(configuration.network.output_size(configuration.patch_size))
    padded, inner = _pad(torch.from_numpy(image), tile)
    before = None if previous is None else _pad(torch.from_numpy(np.array(previous.labels[None])), tile)[0]
    shape: Int3 = (padded.shape[1], padded.shape[2], padded.shape[3])
    split = None if blending.disagreement else split_heads(networks, mirroring)
    bodies, head = (networks, None) if split is None else split
    together = blending.together or voxels_together(device)
    engines = [backend.engine(body) for body in bodies]
    passes = Passes(engines, device, mirroring, len(image), together, head is not None)
    passes = replace(passes, disagreement=blending.disagreement, regions=blending.regions)
    if seen != tile:  # convolutions without padding: tiles of the output overlap in what the network sees
        padded, before = _surround(padded, seen, tile), None if before is None else _surround(before, seen, tile)
    tiles = _Tiles(passes, padded, before, 0 if previous is None else previous.classes, seen, flat)
    weight = torch.from_numpy(importance(tile).copy())
    blend, row = None, 0
    for group in groups(windows(shape, tile, blending.step), max(1, together // int(np.prod(tile)))):
        for start, one in zip(group, tiles.of(group), strict=True):
            if blend is None:
                blend = Accumulator(one if blending.on_device else one.cpu(), shape, weight)
            if start[0] > blend.first:
                for slab in blend.advance(start[0]):
                    yield from _finished(slab, row, inner, head)
                    row += slab.shape[1]
            blend.add(one, start)
    assert blend is not None
    for slab in blend.advance(shape[0]):
        yield from _finished(slab, row, inner, head)
        row += slab.shape[1]


def _finished(slab: Tensor, row: int, inner: tuple[slice, ...], head: Head | None) -> Iterator[Tensor]:
    """The part of a blended slab, whose first row is ``row``, that is not padding, as logits."""
    rows = slice(max(0, inner[0].start - row), max(0, inner[0].stop - row))
    part = slab[:, rows, inner[1], inner[2]]
    if not part.numel():
        return
    part = part if head is None else head(part)
    low, high = torch.aminmax(part)
    if not (torch.isfinite(low) and torch.isfinite(high)):
        measured = "the network's output is not a number or infinite"
        raise NonFiniteError(Problem("E1002", measured, "finite", "try --precision float32, or look at the image"))
    yield part.contiguous()


class _Tiles:
    """The networks' output for tiles of a volume; that of constant tiles, air for instance, is computed once."""

    def __init__(
        self, passes: Passes, image: Tensor, before: Tensor | None, classes: int, tile: Int3, flat: bool
    ) -> None:
        self.passes, self.image, self.before, self.classes = passes, image, before, classes
        self.tile, self.flat = tile, flat
        self.constant: tuple[tuple[float, ...], Tensor] | None = None

    def of(self, starts: Sequence[Int3]) -> list[Tensor]:
        """(channels, *tile) of each, to be overwritten by whoever gets it; without padding, of its centre."""
        boxes = [tuple(slice(s, s + t) for s, t in zip(start, self.tile, strict=True)) for start in starts]
        values = [self._constant_values(box) for box in boxes]
        different = [box for box, value in zip(boxes, values, strict=True) if value is None]
        computed = chain.from_iterable(self._compute(group) for group in groups(different, len(different)))
        return [
            next(computed) if value is None else self._constant(value, box)
            for box, value in zip(boxes, values, strict=True)
        ]

    def _constant_values(self, box: tuple[slice, ...]) -> tuple[float, ...] | None:
        """The value of each input channel, or None if one of them varies."""
        inputs = [*self.image, *(() if self.before is None else self.before)]
        corners = [channel[box][0, 0, 0] for channel in inputs]
        for channel, corner in zip(inputs, corners, strict=True):
            part = channel[box]
            if part[-1, -1, -1] != corner or not bool((part == corner).all()):
                return None
        return tuple(float(corner) for corner in corners)

    def _constant(self, values: tuple[float, ...], box: tuple[slice, ...]) -> Tensor:
        if self.constant is None or self.constant[0] != values:
            self.constant = (values, self._compute([box])[0])
        return self.constant[1].clone()

    def _compute(self, boxes: Sequence[tuple[slice, ...]]) -> list[Tensor]:
        batch = torch.stack([self.image[(slice(None), *box)] for box in boxes])
        if self.before is not None:
            labels = torch.stack([self.before[0][box] for box in boxes])
            batch = torch.cat((batch, one_hot(labels, self.classes, 1)), 1)
        found = self.passes(batch.squeeze(2) if self.flat else batch)
        return list(found.unsqueeze(2) if self.flat else found)


def _three(size: tuple[int, ...]) -> Int3:
    """(z, y, x) of a patch; z is 1 in 2D."""
    z, y, x = (1, *size) if len(size) == 2 else size
    return z, y, x


def _surround(image: Tensor, seen: Int3, tile: Int3) -> Tensor:
    """(C, Z, Y, X) with what a network sees around a tile, mirrored at the image's borders (U-Net 2015)."""
    margins = [(s - t, (s - t) // 2) for s, t in zip(seen, tile, strict=True)]
    sides = [(0, 0), *((before, total - before) for total, before in margins)]
    return torch.from_numpy(np.pad(image.numpy(), sides, mode="reflect"))


def _pad(image: Tensor, tile: Int3) -> tuple[Tensor, tuple[slice, ...]]:
    """Pad (C, Z, Y, X) with zeros on both sides to at least the tile; also the box of the image in the result."""
    missing = [max(0, t - n) for t, n in zip(tile, image.shape[1:], strict=True)]
    before = [m // 2 for m in missing]
    inner = tuple(slice(b, b + n) for b, n in zip(before, image.shape[1:], strict=True))
    if not any(missing):
        return image, inner
    sides = [side for b, m in zip(reversed(before), reversed(missing), strict=True) for side in (b, m - b)]
    return F.pad(image, sides), inner
