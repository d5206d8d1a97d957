"""Pictures: predictions drawn over their images, with the true outlines where there are any."""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from medseg.dataset.layouts import scan_inputs
from medseg.errors import MedsegError
from medseg.imaging.geometry import canonical_axes, canonical_grid, to_canonical
from medseg.imaging.volumes import IMAGE_ENDINGS, read_channels, read_volume, strip_ending
from medseg.preparation.prepare import class_indices
from medseg.records.case import Case
from medseg.records.task import Task
from medseg.reporting.figures import overlay_picture

log = logging.getLogger(__name__)

MOST = 12  # pictures; enough to look at


def draw_pictures(images: Path, predictions: Path, references: Path, task: Task, output: Path) -> tuple[Path, ...]:
    """Draw up to ``MOST`` cases as ``output/CASE.png``; a case that cannot be drawn is logged and left out.

    Args:
        images: folder of the images.
        predictions: folder of label files named after the cases.
        references: the same with true labels; need not exist.
        task: channels and labels.
        output: folder of the pictures.
    """
    predicted, true = _by_case(predictions), _by_case(references)
    drawn = []
    for case in [case for case in scan_inputs(images, task).cases if case.id in predicted][:MOST]:
        picture = output / f"{case.id}.png"
        try:
            _draw(case, predicted[case.id], true.get(case.id), task, picture)
        except MedsegError as error:
            log.warning("%s is not drawn: %s", case.id, error)
        else:
            drawn.append(picture)
    return tuple(drawn)


def _draw(case: Case, prediction: Path, reference: Path | None, task: Task, picture: Path) -> None:
    image = read_channels(case.images)
    axes, flipped = canonical_axes(image.grid)

    def labels(path: Path) -> NDArray[np.int16]:
        return to_canonical(class_indices(read_volume(path).array[0], task), axes, flipped)

    overlay_picture(
        picture,
        to_canonical(image.array, axes, flipped),
        labels(prediction),
        labels(reference) if reference else None,
        canonical_grid(image.grid).spacing_mm,
        case.id,
        [label.name for label in task.labels],
    )


def _by_case(folder: Path) -> dict[str, Path]:
    if not folder.is_dir():
        return {}
    return {strip_ending(p.name): p for p in sorted(folder.iterdir()) if p.name.lower().endswith(IMAGE_ENDINGS)}
