"""Draw predictions over their images, with the true outlines where there are any: one PNG per case.

python scripts/draw_cases.py DATASET PREDICTIONS PICTURES

The images are those of ``DATASET/imagesTs``, the true labels those of ``DATASET/labelsTs``.
"""

from __future__ import annotations

import argparse
import logging
import sys
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from medseg.dataset.declaration import read_declaration, task_of
from medseg.dataset.layouts import find_inputs
from medseg.errors import MedsegError
from medseg.imaging.geometry import canonical_axes, canonical_grid, to_canonical
from medseg.imaging.volumes import read_channels, read_volume, strip_ending
from medseg.preparation.prepare import class_indices
from medseg.records.case import Case
from medseg.records.task import Task
from medseg.reporting.figures import overlay_picture

MOST = 12  # pictures; enough to look at


def by_name(folder: Path) -> dict[str, Path]:
    """Files of a folder by their name without ending; empty where there is no folder."""
    return {strip_ending(path.name): path for path in folder.iterdir()} if folder.is_dir() else {}


def draw(case: Case, prediction: Path, reference: Path | None, task: Task, picture: Path) -> None:
    """One case in canonical orientation, as the figure wants it."""
    image = read_channels(case.images)
    axes = canonical_axes(image.grid)

    def labels(path: Path) -> NDArray[np.int16]:
        return to_canonical(class_indices(read_volume(path).array[0], task), *axes)

    overlay_picture(
        picture,
        to_canonical(image.array, *axes),
        labels(prediction),
        labels(reference) if reference else None,
        canonical_grid(image.grid).spacing_mm,
        case.id,
        [label.name for label in task.labels],
    )


def main() -> int:
    """Parse, draw, say where."""
    parser = argparse.ArgumentParser(description="Draw predictions over their images, one PNG per case.")
    for name in ("dataset", "predictions", "pictures"):
        parser.add_argument(name, type=Path)
    options = parser.parse_args()
    logging.getLogger("medseg").setLevel(logging.ERROR)  # what is odd about the files has been said before
    try:
        task = task_of(read_declaration(options.dataset))
        predictions, references = by_name(options.predictions), by_name(options.dataset / "labelsTs")
        cases = [case for case in find_inputs(options.dataset / "imagesTs", task) if case.id in predictions]
        for case in cases[:MOST]:
            picture = options.pictures / f"{case.id}.png"
            draw(case, predictions[case.id], references.get(case.id), task, picture)
    except MedsegError as error:
        print(f"draw_cases: {error}", file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
