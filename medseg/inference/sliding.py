"""Sliding window: image on the network's grid → logits on the same grid."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, combinations

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from medseg.inference.windows import STEP, importance, windows
from medseg.networks.device import Device, place_batch
from medseg.networks.one_hot import one_hot
from medseg.records.grid import Int3
from medseg.records.plan import ConfigurationPlan, Swap

TILE_BATCH_VOXELS = 128 * 1024  # small tiles go through the network together, up to about this many voxels


@dataclass(frozen=True, slots=True)
class PreviousLabels:
    """Labels of the stage before: (Z, Y, X) class indices on the grid of the image, and how many classes there are."""

    labels: NDArray[np.integer]
    classes: int


@dataclass(frozen=True, slots=True)
class Mirroring:
    """The axes of the tile (2D: y, x) to flip in all combinations, () for none, and what that does to labels."""

    axes: tuple[int, ...] = ()
    swap: Swap | None = None


PLAIN = Mirroring()


@torch.inference_mode()
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
    """Mean logits of ``networks`` and mirrored views, every voxel divided by the true sum of its weights.

    Args:
        networks: the folds' networks, in evaluation mode on ``device``.
        image: (C, Z, Y, X) float32, prepared.
        configuration: gives the tile; a 2d configuration goes slice by slice.
        device: where the networks are.
        mirroring: mirrored views to average over.
        step: distance of tiles in shares of the tile.
        previous: for the second stage of a cascade.

    Returns:
        (outputs, Z, Y, X) float32 on the CPU.
    """
    flat = configuration.dimensions == 2
    sizes = (1, *configuration.patch_size) if flat else configuration.patch_size
    tile: Int3 = (sizes[0], sizes[1], sizes[2])
    padded, inner = _pad(torch.from_numpy(image), tile)
    before = None if previous is None else _pad(torch.from_numpy(np.array(previous.labels[None])), tile)[0]
    shape: Int3 = (padded.shape[1], padded.shape[2], padded.shape[3])
    weight = torch.from_numpy(importance(tile).copy())
    total, weights = None, torch.zeros(shape)
    starts = windows(shape, tile, step)
    for group in _groups(starts, max(1, TILE_BATCH_VOXELS // int(np.prod(tile)))):
        boxes = [tuple(slice(s, s + t) for s, t in zip(start, tile, strict=True)) for start in group]
        batch = torch.stack([padded[(slice(None), *box)] for box in boxes])
        if previous is not None and before is not None:
            labels = torch.stack([before[0][box] for box in boxes])
            batch = torch.cat((batch, one_hot(labels, previous.classes, 1)), 1)
        logits = _mean_logits(networks, batch.squeeze(2) if flat else batch, len(image), device, mirroring)
        logits = logits.unsqueeze(2) if flat else logits
        if total is None:
            total = torch.zeros((logits.shape[1], *shape))
        for box, one in zip(boxes, logits, strict=True):
            total[(slice(None), *box)].addcmul_(one, weight)
            weights[box] += weight
    assert total is not None
    total /= weights
    return total[(slice(None), *inner)]


def _mean_logits(
    networks: Sequence[nn.Module], batch: Tensor, images: int, device: Device, mirroring: Mirroring
) -> Tensor:
    """(B, C, ...) → (B, outputs, ...) float32 on the CPU, averaged over networks and mirrored views.

    Of the C channels the first ``images`` are intensities, the others labels of the stage before.
    """
    swap, plain = mirroring.swap, place_batch(batch, device)
    swapped = plain if swap is None or batch.shape[1] == images else plain[:, _swapped_channels(swap, images)]
    views = list(chain.from_iterable(combinations(mirroring.axes, n) for n in range(len(mirroring.axes) + 1)))
    total: Tensor | None = None
    with torch.autocast(device.torch_device.type, device.dtype, enabled=device.half):
        for network in networks:
            for view in views:
                axes = [axis + 2 for axis in view]
                changes_sides = swap is not None and swap.axis in view
                shown = swapped if changes_sides else plain
                seen = network(shown.flip(axes) if axes else shown)[0].float()
                seen = seen.flip(axes) if axes else seen
                seen = seen[:, list(swap.outputs)] if swap is not None and changes_sides else seen
                total = seen if total is None else total.add_(seen)
    assert total is not None
    return (total / (len(networks) * len(views))).cpu()


def _swapped_channels(swap: Swap, images: int) -> list[int]:
    """The input's channels with left and right exchanged in the labels of the stage before."""
    return [*range(images), *(images + index - 1 for index in swap.classes[1:])]


def _groups(starts: list[Int3], size: int) -> Iterator[list[Int3]]:
    for first in range(0, len(starts), size):
        yield starts[first : first + size]


def _pad(image: Tensor, tile: Int3) -> tuple[Tensor, tuple[slice, ...]]:
    """Pad (C, Z, Y, X) with zeros on both sides to at least the tile; also the box of the image in the result."""
    missing = [max(0, t - n) for t, n in zip(tile, image.shape[1:], strict=True)]
    before = [m // 2 for m in missing]
    inner = tuple(slice(b, b + n) for b, n in zip(before, image.shape[1:], strict=True))
    if not any(missing):
        return image, inner
    sides = [side for b, m in zip(reversed(before), reversed(missing), strict=True) for side in (b, m - b)]
    return F.pad(image, sides), inner
