"""Statistics of labels: volume, voxels, connected pieces, and intensities of images within each label."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import prod

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from medseg.evaluation.tables import csv_of
from medseg.imaging.components import count_components
from medseg.records.grid import Float3
from medseg.records.stats import Intensities, LabelStatistics, Statistics

Row = tuple[str, ...]

MM3_PER_ML = 1000


def measure_labels(
    case: str,
    labels: NDArray[np.integer],
    spacing_mm: Float3,
    names: Mapping[int, str] | None = None,
    images: Mapping[str, NDArray[np.generic]] | None = None,
) -> list[LabelStatistics]:
    """Measure every label of a case.

    Args:
        case: id.
        labels: (Z, Y, X) values from 0 to 65535, 0 is background and not measured.
        spacing_mm: of the grid.
        names: the labels by value; those are measured whether they occur or not. None: what occurs, named by value.
        images: (Z, Y, X) on the same grid, by name.
    """
    images = images or {}
    kept = {value: name for value, name in (names or {}).items() if value != 0}
    boxes = {value: box for value, box in enumerate(ndimage.find_objects(labels), start=1) if box is not None}
    kept |= {value: str(value) for value in boxes if value not in kept}
    rows = []
    for value, name in sorted(kept.items()):
        if (box := boxes.get(value)) is None:
            rows.append(LabelStatistics(case=case, label=name, value=value, voxels=0, volume_ml=0, components=0))
            continue
        mask = labels[box] == value
        voxels = int(np.count_nonzero(mask))
        rows.append(
            LabelStatistics(
                case=case,
                label=name,
                value=value,
                voxels=voxels,
                volume_ml=voxels * prod(spacing_mm) / MM3_PER_ML,
                components=count_components(mask),
                intensities=tuple(_intensities(image, array[box][mask]) for image, array in images.items()),
            )
        )
    return rows


def _intensities(image: str, values: NDArray[np.generic]) -> Intensities:
    exact = values.astype(np.float64)
    low, middle, high = np.percentile(exact, (5, 50, 95))
    return Intensities(
        image=image,
        mean=float(exact.mean()),
        sd=float(exact.std()),
        minimum=float(exact.min()),
        percentile_05=float(low),
        median=float(middle),
        percentile_95=float(high),
        maximum=float(exact.max()),
    )


_MEASURES = ("mean", "sd", "minimum", "percentile_05", "median", "percentile_95", "maximum")


def statistics_csv(statistics: Statistics) -> str:
    """One row per case and label; columns of intensities begin with the image's name."""
    images = list(dict.fromkeys(found.image for row in statistics.rows for found in row.intensities))
    header = ["case", "label", "value", "voxels", "volume_ml", "components"]
    header += [f"{image}_{measure}" for image in images for measure in _MEASURES]
    return csv_of([header, *(_cells(row, images) for row in statistics.rows)])


def _cells(row: LabelStatistics, images: Sequence[str]) -> list[object]:
    by_image = {found.image: found for found in row.intensities}
    cells: list[object] = [row.case, row.label, row.value, row.voxels, row.volume_ml, row.components]
    for image in images:
        found = by_image.get(image)
        cells += [None if found is None else getattr(found, measure) for measure in _MEASURES]
    return cells


def statistics_table(statistics: Statistics) -> list[Row]:
    """Header and one row per case and label, for people to read."""
    images = list(dict.fromkeys(found.image for row in statistics.rows for found in row.intensities))
    several = len(images) > 1
    header = ["case", "label", "voxels", "ml", "pieces"]
    header += [f"{image} {what}" if several else what for image in images for what in ("mean", "median")]
    rows: list[Row] = [tuple(header)]
    for row in statistics.rows:
        by_image = {found.image: found for found in row.intensities}
        cells = [row.case, row.label, str(row.voxels), f"{row.volume_ml:.3f}", str(row.components)]
        for image in images:
            found = by_image.get(image)
            cells += ["", ""] if found is None else [f"{found.mean:.4g}", f"{found.median:.4g}"]
        rows.append(tuple(cells))
    return rows
