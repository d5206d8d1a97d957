"""Preparation of one case: from the volume as read to the array that the network sees, in training and inference."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from medseg.dataset.labels import INTEGER_TOLERANCE
from medseg.errors import InputError, Problem
from medseg.imaging.crop import Box, box_slices, nonzero_box, nonzero_mask
from medseg.imaging.geometry import canonical_axes, compare_grids, to_canonical
from medseg.imaging.nifti_header import stored_spacing_mm
from medseg.imaging.normalise import normalised
from medseg.imaging.resample import resample_channels, resample_labels, resampled_shape
from medseg.preparation.foreground import IGNORE
from medseg.records.grid import Float3, Grid, Int3, Volume
from medseg.records.plan import ConfigurationPlan, Orientation, Plan, Resampling
from medseg.records.preparation import Preparation
from medseg.records.task import Task

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, eq=False)
class Prepared:
    """image (C, Z, Y, X) float32 on the network's grid, and how it came there; ``outside`` see ``outside_mask``."""

    image: NDArray[np.float32]
    preparation: Preparation
    outside: NDArray[np.bool_] | None = None


def prepare(
    volume: Volume,
    plan: Plan,
    configuration: ConfigurationPlan,
    orientation: Orientation = "canonical",
    threads: int = 1,
) -> Prepared:
    """Bring a volume to the network's grid: orient, transpose, crop to nonzero, normalise, resample — in this order.

    Args:
        volume: (C, Z, Y, X) as read, one channel per ``plan.task.channels``; its missing channels become 0.
        plan: gives channels, axis order and intensities.
        configuration: gives normalisation and spacing; with two spacings (2d) the first axis keeps its own.
        orientation: "canonical" for our models; "file" leaves the axes as stored, for imported nnU-Net models.
        threads: that resample; they do not change the result.

    Raises:
        InputError: E0133 wrong number of channels, E0111 not a numeric type, E0110 voxels not finite.
    """
    names = [channel.name for channel in plan.task.channels]
    if len(volume.array) != len(names):
        raise InputError(
            Problem(
                "E0133",
                f"{len(volume.array)} channels",
                f"{len(names)} ({', '.join(names)})",
                "give one image per channel of the plan",
            )
        )
    axes, flipped = canonical_axes(volume.grid) if orientation == "canonical" else ((0, 1, 2), (False, False, False))
    order = plan.transpose
    image = _transposed(to_canonical(volume.array, axes, flipped), order)
    _check_values(image)
    box = nonzero_box(image)
    file_spacing = volume.grid.spacing_mm if orientation == "canonical" else _spacing_as_readers_say(volume)
    spacing = _reorder(_reorder(file_spacing, axes), order)
    target_spacing = _target_spacing(configuration, spacing)
    cropped = image[(slice(None), *box_slices(box))]
    preparation = Preparation(
        source_shape=volume.grid.shape,
        to_canonical=axes,
        flipped=flipped,
        transpose=order,
        uncropped_shape=_shape3(image),
        crop_box=box,
        spacing_mm=spacing,
        target_spacing_mm=target_spacing,
        target_shape=resampled_shape(cropped.shape[1:], spacing, target_spacing),
    )
    mask = nonzero_mask(cropped) if any(n.use_mask for n in configuration.normalisation) else None
    channels = normalised(cropped, configuration.normalisation, plan.intensities, mask)
    resampled = resample_channels(
        channels, preparation.target_shape, spacing, target_spacing, configuration.resampling, threads
    )
    resampled[list(volume.missing)] = 0
    return Prepared(resampled, preparation)


def outside_mask(volume: Volume, preparation: Preparation) -> NDArray[np.bool_]:
    """Where all channels are zero, holes filled: (Z, Y, X) on the cropped grid."""
    canonical = to_canonical(volume.array, preparation.to_canonical, preparation.flipped)
    image = _transposed(canonical, preparation.transpose)
    return ~nonzero_mask(image[(slice(None), *box_slices(preparation.crop_box))])


def prepare_labels(
    labels: Volume, task: Task, preparation: Preparation, resampling: Resampling
) -> NDArray[np.signedinteger[Any]]:
    """Bring a label volume to the network's grid, on the way that its image took.

    nnU-Net gives background outside of the nonzero mask a label of its own before it resamples. Where three labels
    meet there, background then loses votes: 8 voxels of 73 million in a CT. Here background is one label.

    Args:
        labels: (1, Z, Y, X) with the label values of ``task``, on the image's grid (see ``check_grids``).
        task: declares the values; ``ignore_value`` becomes IGNORE (-1).
        preparation: of the image.
        resampling: of the configuration.

    Returns:
        Class indices (Z, Y, X) on the target grid, int8 if that holds them, else int16.

    Raises:
        InputError: E0111 several channels, E0119 another shape, E0130 not integers, E0131 values not declared.
    """
    if len(labels.array) != 1:
        raise InputError(Problem("E0111", f"a label file with {len(labels.array)} channels", "1", "use label maps"))
    if labels.grid.shape != preparation.source_shape:
        raise InputError(
            Problem(
                "E0119",
                f"labels of shape {labels.grid.shape} (z, y, x)",
                f"{preparation.source_shape} of the image",
                "export both on the same grid",
            )
        )
    indices = _smallest_indices(labels.array[0], task)
    canonical = to_canonical(indices, preparation.to_canonical, preparation.flipped)
    cropped = _crop_labels(canonical.transpose(preparation.transpose), preparation.crop_box)
    return resample_labels(
        cropped, preparation.target_shape, preparation.spacing_mm, preparation.target_spacing_mm, resampling
    )


def check_grids(image: Grid, labels: Grid) -> None:
    """Refuse labels that do not lie where their image lies; up to half a voxel is only a warning in the log.

    Raises:
        InputError: E0119 shapes differ, E0120 corners lie too far apart.
    """
    problem = compare_grids(image, labels, "labels on their image")
    if problem is not None and problem.severity == "error":
        raise InputError(problem)
    if problem is not None:
        logger.warning("%s", problem)


def class_indices(values: NDArray[np.generic], task: Task) -> NDArray[np.int16]:
    """Label values to class indices (their places in ``task.labels``), int16; the ignore value to IGNORE (-1).

    Floats are whole numbers up to ``INTEGER_TOLERANCE``, as in ``label_values``.

    Raises:
        InputError: E0130 values are not integers, E0131 values are not declared, E0162 more than 32 767 classes.
    """
    return _smallest_indices(values, task).astype(np.int16, copy=False)


def _smallest_indices(values: NDArray[np.generic], task: Task) -> NDArray[np.signedinteger[Any]]:
    """``class_indices``, int8 if that holds them; labels 0, 1, 2 … in a file of bytes are what they are already."""
    count = len(task.labels)
    if count > np.iinfo(np.int16).max:
        raise InputError(Problem("E0162", f"{count} classes", "at most 32767", "merge classes"))
    if values.dtype.kind not in "biuf" or (values.dtype.kind == "f" and not _are_integers(values)):
        raise InputError(
            Problem("E0130", f"label values of type {values.dtype} that are not integers", "", "export as integers")
        )
    kind = np.dtype(np.int8 if count <= np.iinfo(np.int8).max else np.int16)
    if values.dtype == np.uint8 and kind == np.int8 and task.values == tuple(range(count)) and values.max() < count:
        return values.view(np.int8)
    undeclared = int(np.iinfo(np.int8 if kind == np.int8 else np.int16).min)
    table = np.full(max(*task.values, task.ignore_value or 0) + 2, undeclared, dtype=kind)
    table[list(task.values)] = np.arange(count)
    if task.ignore_value is not None:
        table[task.ignore_value] = IGNORE
    indices = np.empty(values.shape, dtype=kind)
    for stored, out in zip(values, indices, strict=True):
        out[...] = _looked_up(stored, table)
    if indices.min() == undeclared:
        raise InputError(_undeclared(values[indices == undeclared], task))
    return indices


def _looked_up(values: NDArray[Any], table: NDArray[Any]) -> NDArray[Any]:
    """The table's entries at whole numbers; its last entry for all that lie outside of it."""
    if values.dtype == np.uint8:  # nearly all label files, in a fraction of the time
        whole = np.full(256, table[-1], dtype=table.dtype)
        whole[: len(table)] = table[:256]
        return np.take(whole, values)
    places = np.rint(values) if values.dtype.kind == "f" else values
    inside = (places >= 0) & (places < table.size)
    return table[np.where(inside, places, table.size - 1).astype(np.intp)]


def _undeclared(wrong: NDArray[np.generic], task: Task) -> Problem:
    found, counts = np.unique(wrong, return_counts=True)
    listed = ", ".join(f"{value:g} ({count} voxels)" for value, count in list(zip(found, counts, strict=True))[:10])
    more = f" and {found.size - 10} more values" if found.size > 10 else ""
    declared = [*task.values, *([] if task.ignore_value is None else [task.ignore_value])]
    shown = ", ".join(map(str, declared[:20])) + (" …" if len(declared) > 20 else "")
    return Problem("E0131", f"label values {listed}{more}", shown, "correct the file, or declare them in dataset.json")


def _are_integers(values: NDArray[np.generic]) -> bool:
    with np.errstate(invalid="ignore"):  # infinity minus infinity
        return all(bool((np.abs(plane - np.rint(plane)) <= INTEGER_TOLERANCE).all()) for plane in values)


def _check_values(image: NDArray[np.generic]) -> None:
    if image.dtype.kind not in "biuf":
        raise InputError(Problem("E0111", f"voxels of type {image.dtype}", "integers or floats", "convert the image"))
    if image.dtype.kind != "f":
        return
    for index, channel in enumerate(image):
        largest = max(abs(float(channel.min())), abs(float(channel.max())))  # NaN in the channel makes both NaN
        if not largest <= np.finfo(np.float32).max:
            count = int(channel.size - np.isfinite(channel).sum())
            raise InputError(
                Problem("E0110", f"{count} voxels of channel {index} are not finite", "none", "repair the image")
            )


def _crop_labels(labels: NDArray[Any], box: Box) -> NDArray[Any]:
    cropped = np.ascontiguousarray(labels[box_slices(box)])
    lost = 0 if cropped.shape == labels.shape else np.count_nonzero(labels > 0) - np.count_nonzero(cropped > 0)
    if lost:
        logger.warning("%d labelled voxels lie where all images are zero and are cropped away", lost)
    return cropped


def _spacing_as_readers_say(volume: Volume) -> Float3:
    """Spacing to the last digit as other programs read it; the grid's where the header says something else (W0122)."""
    spacing, header = volume.grid.spacing_mm, volume.source.header
    stored = stored_spacing_mm(header) if header else spacing
    return stored if np.allclose(stored, spacing, rtol=1e-4, atol=0) else spacing


def _target_spacing(configuration: ConfigurationPlan, spacing: Float3) -> Float3:
    z, y, x = (
        configuration.spacing_mm if len(configuration.spacing_mm) == 3 else (spacing[0], *configuration.spacing_mm)
    )
    return z, y, x


def _transposed(image: NDArray[np.generic], order: Int3) -> NDArray[np.generic]:
    return image.transpose(0, *(axis + 1 for axis in order))


def _reorder(values: Float3, order: Int3) -> Float3:
    return values[order[0]], values[order[1]], values[order[2]]


def _shape3(image: NDArray[np.generic]) -> Int3:
    z, y, x = image.shape[-3:]
    return z, y, x
