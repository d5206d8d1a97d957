"""Arrays in, arrays out: what ``import medseg`` offers to programs that have an image in memory."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from medseg.errors import InputError, Problem
from medseg.evaluation.postprocessing import apply
from medseg.imaging.geometry import judge_affine
from medseg.inference.backend import BackendName
from medseg.inference.ladder import Ladder
from medseg.inference.model import Model, prepare_stages, segment
from medseg.inference.model import load_model as load
from medseg.inference.sliding import Blending
from medseg.networks.device import DeviceName, PrecisionName, choose_device
from medseg.pipeline.outputs import label_values
from medseg.pipeline.predict import post_processing
from medseg.pipeline.predict_settings import PredictOptions, Speed, accelerated, check_options, limited
from medseg.records.grid import Volume

log = logging.getLogger(__name__)

MANY = 1000  # images that a model is thought to be loaded for: finding the fastest backend may take its time


def load_model(
    path: str | Path,
    *,
    device: DeviceName = "auto",
    precision: PrecisionName = "auto",
    configuration: str | None = None,
    folds: Sequence[str] = (),
    backend: BackendName = "auto",
) -> Model:
    """Load a model once, for many calls of ``predict``: a run, or a configuration's or a fold's folder of one.

    Args:
        path: of the model.
        device: as ``medseg predict --device``.
        precision: as ``medseg predict --precision``.
        configuration: of a run that has several.
        folds: () means the model of all cases, else all trained folds.
        backend: as ``medseg predict --backend``; "auto" compares what is there on a few tiles.

    Raises:
        InputError: E0100 no trained model is there.
        UsageError: E0001 several configurations and none is named, a fold is not there, no such device, or no such
            backend on it.
        IntegrityError: E0701, E0711 weights or card are damaged.
    """
    loaded = load(Path(path), choose_device(device, precision), configuration, folds)
    return accelerated(loaded, PredictOptions(backend=backend), MANY)


def predict(
    array: NDArray[Any],
    affine: NDArray[Any],
    model: str | Path | Model,
    *,
    speed: Speed = "balanced",
    tta: bool | None = None,
    step: float | None = None,
) -> NDArray[np.integer]:
    """Segment an image in memory; no files, no processes.

    Args:
        array: (i, j, k), or (C, i, j, k) with the model's channels, of any numeric type; axes as nibabel gives them.
        affine: (4, 4), voxel index (i, j, k, 1) → RAS millimetres, as nibabel gives it. Any orientation.
        model: of ``load_model``, or its path (then loaded at every call).
        speed: as ``medseg predict --speed``.
        tta: whether to average mirrored views; None as ``speed`` says.
        step: distance of tiles in shares of a tile; None as ``speed`` says.

    Returns:
        The task's label values (i, j, k), uint8 or uint16, on the grid given; post-processed as chosen for the model.

    Raises:
        InputError: E0111 not (i, j, k) or (C, i, j, k), E0133 wrong number of channels, E0110 voxels not finite, E0121,
            E0124 the affine is no grid in space.
        NonFiniteError: E1002 the network's output is not finite.
    """
    options = PredictOptions(speed=speed, tta=None if tta is None else "mirror" if tta else "none", step=step)
    check_options(options)
    if isinstance(model, Model):
        loaded = limited(model, options)
    else:
        loaded = accelerated(limited(load(Path(model), choose_device()), options), options, 1)
    volume = _volume(array, affine)
    prepared = prepare_stages(loaded, volume)
    blending = Blending(options.tile_step)
    steps = post_processing(loaded)
    labels = Ladder(loaded).run(
        lambda used, how: segment(used, prepared, mirror=options.mirror, blending=how, refinement=steps.refinement),
        blending,
    )
    values = label_values(apply(labels, steps, volume.grid.spacing_mm), loaded.plan.task)
    return np.ascontiguousarray(values.transpose())


def _volume(array: NDArray[Any], affine: NDArray[Any]) -> Volume:
    array, matrix = np.asarray(array), np.asarray(affine, dtype=np.float64)
    if array.ndim not in (3, 4) or 0 in array.shape or array.dtype.kind not in "biuf":
        found = f"an array of shape {array.shape} and type {array.dtype}"
        raise InputError(Problem("E0111", found, "(i, j, k) or (C, i, j, k) of numbers", "see medseg.predict"))
    if matrix.shape != (4, 4):
        raise InputError(Problem("E0121", f"an affine of shape {matrix.shape}", "(4, 4)", "see medseg.predict"))
    channels = array if array.ndim == 4 else array[None]
    grid, notes = judge_affine(matrix, channels.shape[1:], "the affine")
    for note in notes:
        log.warning("%s", note)
    turned: NDArray[np.generic] = channels.transpose(0, 3, 2, 1)
    return Volume(turned, grid)
