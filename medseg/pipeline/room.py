"""Room: whether there is memory for a case, asked when its image is read and before anything is computed."""

from __future__ import annotations

from medseg.errors import Problem, ResourceError
from medseg.imaging.crop import nonzero_box
from medseg.imaging.geometry import canonical_axes
from medseg.inference.model import Model
from medseg.inference.need import Need, case_need
from medseg.machine import free_memory_bytes
from medseg.pipeline.predict_settings import PredictOptions
from medseg.records.grid import Int3, Volume
from medseg.records.model import Refinement

GB = 1e9


class NoRoomYetError(ResourceError):
    """The case does not fit beside what else is in memory."""


def need_of(
    case: str,
    volume: Volume,
    model: Model,
    options: PredictOptions,
    refinement: Refinement | None = None,
    *,
    alone: bool,
) -> Need:
    """The need of a volume or, if that is too much, of the box of it that is not zero.

    Args:
        case: its name.
        volume: as read.
        model: that will segment it.
        options: how.
        refinement: of the logits.
        alone: whether nothing else is in memory meanwhile; otherwise the next case and the last one are.

    Raises:
        NoRoomYetError: E0600 there is too little memory.
    """
    need = _need(volume, volume.grid.shape, model, options, refinement)
    if _bytes(need, alone=alone) > free_memory_bytes():
        need = _need(volume, _box_shape(volume), model, options, refinement)
    taken, free = _bytes(need, alone=alone), free_memory_bytes()
    if taken > free:
        measured = f"needs about {taken / GB:.1f} GB of memory"
        action = "free memory, or use a larger machine"
        raise NoRoomYetError(Problem("E0600", measured, f"{free / GB:.1f} GB free", action, case))
    return need


def _bytes(need: Need, *, alone: bool) -> int:
    return need.alone_bytes if alone else need.together_bytes


def _need(volume: Volume, shape: Int3, model: Model, options: PredictOptions, refinement: Refinement | None) -> Need:
    axes = canonical_axes(volume.grid)[0] if model.orientation == "canonical" else (0, 1, 2)
    z, y, x = (axes[axis] for axis in model.plan.transpose)
    spacing = volume.grid.spacing_mm
    return case_need(
        model,
        (shape[z], shape[y], shape[x]),
        (spacing[z], spacing[y], spacing[x]),
        options.tile_step,
        mirror=options.mirror,
        mapped=options.wanted.any,
        voxel_bytes=volume.array.itemsize,
        refinement=refinement,
    )


def _box_shape(volume: Volume) -> Int3:
    (a, b), (c, d), (e, f) = nonzero_box(volume.array)
    return b - a, d - c, f - e
