"""Near-ties: how far nnU-Net's half-precision sums can be from ours, voxel by voxel, and where labels differ by more.

nnU-Net 2.8.1 blends tiles in half precision, on the CPU too (inference/predict_from_raw_data.py,
``_internal_predict_sliding_window_return_logits``): of a voxel that T tiles cover, with weights w and logits l,

    sum ← half(sum + w·l)  T times,   N ← half(N + w)  T times,   logit = half(sum / N).

A rounding to half changes a number s by at most max(u·|s|, 2⁻²⁵), u = 2⁻¹¹: half the distance of neighbours, which
below 2⁻¹⁴ no longer shrinks (weights in the corners of a tile lie there). No partial sum exceeds A = Σ w·|l|, so that
the sum is off by at most T·(u·A + 2⁻²⁵). What happens to N is the same for all classes: it orders no two of them anew.
The division adds u·|logit|. So each class's logit is known up to

    T·(u·A + 2⁻²⁵) / N + u·|logit|,

and once more u·|logit| where logits are resampled, for nnU-Net rounds the result to half again. Mirrored views are
summed in float32 and add nothing. For a voxel that one tile covers this is about 2u = 2⁻¹⁰ of its logit.

Interpolation takes means, of bounds as of logits. Where two classes' logits lie closer together than the sum of their
bounds, nnU-Net may take either: a near-tie. Sums of the convolutions in another order, in float32, are some hundred
times smaller and not allowed for.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from medseg.inference.export import Ready, decide, interpolate, interpolation
from medseg.inference.model import Model, mirroring_of
from medseg.inference.passes import PLAIN
from medseg.inference.sliding import predict_logits
from medseg.inference.windows import importance, windows
from medseg.preparation.prepare import Prepared
from medseg.preparation.restore import paste_back

HALF = 2.0**-11
SMALLEST = 2.0**-25


@dataclass(frozen=True, slots=True)
class Differing:
    """Voxels whose labels differ from nnU-Net's: how many of how many; and of those, by what share of the bound.

    ``worst`` is the largest gap between the two classes' logits in shares of its bound: at most 1 if all are near-ties.
    """

    voxels: int
    differing: int
    worst: float
    largest_gap: float


class _WithSize(nn.Module):
    """A network, and the sizes of its logits as more channels."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: Tensor) -> list[Tensor]:
        logits = self.network(x)[0]
        return [torch.cat((logits, logits.abs()), 1)]


def logits_and_bounds(model: Model, prepared: Prepared, *, mirror: bool) -> tuple[Tensor, Tensor]:
    """Logits (outputs, Z, Y, X) on the cropped grid of the file, and how far nnU-Net's may be from each."""
    assert len(model.networks) == 1, "nnU-Net adds folds in half precision, too: not counted here"
    configuration, outputs = model.configuration, model.plan.task.outputs
    views = mirroring_of(model) if mirror else PLAIN
    networks = [_WithSize(model.networks[0])]
    both = predict_logits(networks, prepared.image, configuration, model.device, mirroring=views)
    logits, sizes = both[:outputs], both[outputs:]
    tiles, weight = _coverage(tuple(prepared.image.shape[1:]), (1, *configuration.patch_size)[-3:])
    bounds = tiles * (HALF * sizes + SMALLEST / weight) + HALF * logits.abs()
    way = interpolation(prepared.preparation, configuration.resampling)
    rows = slice(0, way.shape[0])
    found, around = (interpolate(Ready(rows, one, 0), way, rows) for one in (logits, bounds))
    if way.shape != tuple(logits.shape[1:]):
        around += HALF * found.abs()
    return found, around


def _coverage(shape: tuple[int, ...], tile: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """Of every voxel the number of tiles and the sum of their weights; an image smaller than a tile is padded."""
    z, y, x = tile
    padded = [max(n, t) for n, t in zip(shape, tile, strict=True)]
    tiles, weight = torch.zeros(padded), torch.zeros(padded)
    for start in windows((padded[0], padded[1], padded[2]), (z, y, x)):
        box = tuple(slice(s, s + t) for s, t in zip(start, tile, strict=True))
        tiles[box] += 1
        weight[box] += torch.from_numpy(importance((z, y, x)).copy())
    begin = [(p - n) // 2 for p, n in zip(padded, shape, strict=True)]
    inner = tuple(slice(b, b + n) for b, n in zip(begin, shape, strict=True))
    return tiles[inner], weight[inner]


def differing(model: Model, prepared: Prepared, theirs: NDArray[np.integer], *, mirror: bool) -> Differing:
    """Compare our labels with nnU-Net's, which are class indices on the axes of the file.

    Classes only: of regions each is decided alone.
    """
    task = model.plan.task
    assert not task.regions
    logits, bounds = logits_and_bounds(model, prepared, mirror=mirror)
    ours = decide(logits[None], task)[0]
    on_file = paste_back(np.arange(1, ours.numel() + 1, dtype=np.int64).reshape(ours.shape), prepared.preparation)
    places = on_file.ravel()
    expected = np.zeros(ours.numel() + 1, np.int64)
    expected[places] = theirs.ravel()  # outside of the crop box both are background
    wrong = np.flatnonzero(expected[1:] != ours.numpy().ravel())
    outside = int((theirs.ravel()[places == 0] != 0).sum())
    assert outside == 0, f"{outside} voxels outside of the crop box are labelled"
    if not len(wrong):
        return Differing(theirs.size, 0, 0.0, 0.0)
    at = torch.from_numpy(wrong)
    taken, other = ours.flatten()[at].long(), torch.from_numpy(expected[1:][wrong])
    flat, around = logits.flatten(1), bounds.flatten(1)
    gap = flat[taken, at] - flat[other, at]
    bound = around[taken, at] + around[other, at]
    return Differing(theirs.size, len(wrong), float((gap / bound).max()), float(gap.max()))
