"""Need: tiles, passes through networks and memory that segmenting a case takes, before any of it is done."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

from medseg.imaging.resample import resampled_shape
from medseg.inference import accumulator, maps
from medseg.inference.model import Model, mirroring_of
from medseg.inference.passes import PLAIN, split_heads, voxels_together
from medseg.inference.refine import refine_bytes
from medseg.inference.windows import windows
from medseg.records.grid import Float3, Int3
from medseg.records.model import Refinement

PROCESS_BYTES = 700 * 2**20  # torch, numba and the imaging libraries, measured; plus the weights
FINEST_MAPS = 6  # of as many features as the finest stage, alive at once in its decoder, measured


@dataclass(frozen=True, slots=True)
class Need:
    """What a case takes: bytes while it is prepared, segmented and written; tiles, and passes of tiles and views."""

    prepare_bytes: int
    segment_bytes: int
    write_bytes: int
    tiles: int
    passes: int

    @property
    def in_words(self) -> str:
        """Tiles and passes."""
        return f"{self.tiles} tile{'s' * (self.tiles != 1)} = {self.passes} pass{'es' * (self.passes != 1)}"

    @property
    def together_bytes(self) -> int:
        """While one such case is segmented, the next one prepared and the last one written."""
        return self.prepare_bytes + self.segment_bytes + self.write_bytes

    @property
    def alone_bytes(self) -> int:
        """While nothing else is done."""
        return max(self.prepare_bytes, self.segment_bytes, self.write_bytes)


def case_need(
    model: Model,
    shape: Int3,
    spacing_mm: Float3,
    step: float,
    *,
    mirror: bool,
    mapped: bool,
    voxel_bytes: int = 4,
    refinement: Refinement | None = None,
) -> Need:
    """The need of a case of ``shape`` and ``spacing_mm`` (z, y, x) of the prepared axes, nothing cropped away.

    Args:
        model: one or two stages.
        shape: of the volume.
        spacing_mm: of the volume.
        step: distance of tiles in shares of the tile.
        mirror: whether views are averaged.
        mapped: whether probabilities are computed on the file's grid.
        voxel_bytes: of the image as read.
        refinement: of the last stage.
    """
    channels, outputs = len(model.plan.task.channels), model.plan.task.outputs
    source = prod(shape)
    prepare = source * channels * voxel_bytes
    segment = tiles = passes = weights = 0
    for stage in model.stages:
        target = target_shape(stage, shape, spacing_mm)
        voxels = prod(target)
        prepare += 4 * channels * (source + voxels) + 8 * max(source, voxels)
        count = len(windows(_padded(target, tile_of(stage)), tile_of(stage), step))
        mirroring = mirroring_of(stage) if mirror else PLAIN
        tiles += count
        passes += count * len(mirroring.views) * len(stage.networks)
        weights += stage.backend.weight_bytes
        segment = max(segment, 8 * channels * voxels + _window_bytes(stage, target, mirror=mirror))
    if refinement is not None:
        target = target_shape(model, shape, spacing_mm)
        own = (spacing_mm[0], *model.configuration.spacing_mm)[-3:]
        segment += refine_bytes(refinement, outputs, channels, target, (own[0], own[1], own[2]))
    if mapped:
        row = 4 * outputs * prod(sorted(shape)[1:])
        segment += 6 * min(max(maps.ROWS_BYTES, row), 4 * outputs * source)
    return Need(prepare, segment + weights + 4 * source, 12 * source, tiles, passes)


def tile_of(stage: Model) -> Int3:
    """The tile of a stage as (z, y, x)."""
    sizes = (1, *stage.configuration.patch_size)[-3:]
    return sizes[0], sizes[1], sizes[2]


def target_shape(stage: Model, shape: Int3, spacing_mm: Float3) -> Int3:
    """The shape of a volume on the network's grid; a 2d configuration keeps the spacing of the first axis."""
    wanted = (spacing_mm[0], *stage.configuration.spacing_mm)[-3:]
    return resampled_shape(shape, spacing_mm, wanted)


def _padded(shape: Int3, tile: Int3) -> Int3:
    z, y, x = (max(n, t) for n, t in zip(shape, tile, strict=True))
    return z, y, x


def _window_bytes(stage: Model, target: Int3, *, mirror: bool) -> int:
    """Blended rows, slabs of logits, tiles on their way, and the network's own; on a GPU only what comes to the CPU."""
    tile, outputs = tile_of(stage), stage.plan.task.outputs
    split = split_heads(stage.networks, mirroring_of(stage) if mirror else PLAIN)
    blended = outputs if split is None else split[1].weight.shape[1]
    height, width = _padded(target, tile)[1:]
    row = 4 * blended * height * width
    slabs = 4 * min(max(accumulator.SLAB_BYTES, row), row * max(tile[0], target[0])) * max(1, outputs // blended)
    rows = 4 * (blended + 1) * tile[0] * height * width
    if stage.device.torch_device.type != "cpu":
        return slabs + rows
    together = max(1, voxels_together(stage.device) // prod(tile))
    return slabs + rows + together * (12 * blended * prod(tile) + _network_bytes(stage))


def _network_bytes(stage: Model) -> int:
    """Feature maps of one tile that live at once: what the decoder still waits for, and those of its finest level."""
    network, size = stage.configuration.network, list(stage.configuration.patch_size)
    values = FINEST_MAPS * network.features[0] * prod(size)
    for stride, features in zip(network.strides, network.features, strict=True):
        size = [n // s for n, s in zip(size, stride, strict=True)]
        values += features * prod(size)
    return values * (2 if stage.device.half else 4)
