"""Pictures: predictions drawn over their images, with the true outlines where there are any."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from medseg.dataset.layouts import scan_inputs
from medseg.errors import EnvironmentFailure, InputError, MedsegError, Problem, Stopped
from medseg.imaging.geometry import canonical_axes, canonical_grid, compare_grids, to_canonical
from medseg.imaging.volumes import IMAGE_ENDINGS, read_channels, read_volume, strip_ending
from medseg.pipeline.outputs import predicted_files
from medseg.preparation.prepare import class_indices
from medseg.progress import SILENT, Progress, never
from medseg.records.case import Case
from medseg.records.grid import Float3
from medseg.records.run import RunManifest
from medseg.records.task import Task

log = logging.getLogger(__name__)

PREVIEWS = "previews"
MOST = 12  # pictures of a run; enough to look at


@dataclass(frozen=True, slots=True, eq=False)
class Seen:
    """A case as it is drawn: image (C, Z, Y, X), class indices (Z, Y, X), all in canonical orientation."""

    image: NDArray[np.generic]
    prediction: NDArray[np.int16]
    reference: NDArray[np.int16] | None
    spacing_mm: Float3


def see_case(case: Case, prediction: Path, reference: Path | None, task: Task) -> Seen:
    """Read a case with its labels, which must lie on the image's grid.

    Raises:
        InputError: E0119, E0120 they do not; or a file cannot be read.
    """
    image = read_channels(case.images)
    axes, flipped = canonical_axes(image.grid)

    def labels(path: Path) -> NDArray[np.int16]:
        volume = read_volume(path)
        problem = compare_grids(image.grid, volume.grid, f"{path.name} on its image")
        if problem is not None and problem.severity == "error":
            raise InputError(problem)
        return to_canonical(class_indices(volume.array[0], task), axes, flipped)

    return Seen(
        to_canonical(image.array, axes, flipped),
        labels(prediction),
        labels(reference) if reference else None,
        canonical_grid(image.grid).spacing_mm,
    )


def draw_pictures(images: Path, predictions: Path, references: Path, task: Task, output: Path) -> tuple[Path, ...]:
    """Draw up to ``MOST`` cases as ``output/CASE.png``; a case that cannot be drawn is logged and left out.

    Args:
        images: folder of the images.
        predictions: folder of label files named after the cases.
        references: the same with true labels; need not exist.
        task: channels and labels.
        output: folder of the pictures.
    """
    predicted, true = label_files(predictions), label_files(references)
    cases = [case for case in scan_inputs(images, task).cases if case.id in predicted][:MOST]
    drawn = [_draw(case, predicted[case.id], true.get(case.id), task, output) for case in cases]
    return tuple(picture for picture in drawn if picture is not None)


def draw_previews(
    cases: Iterable[Case],
    predictions: Mapping[str, Path],
    task: Task,
    output: Path,
    progress: Progress = SILENT,
    stop_signal: Callable[[], int | None] = never,
) -> tuple[Path, ...]:
    """Draw every case that has a prediction as ``output/CASE.png``; one that cannot be drawn is logged and left out.

    Raises:
        EnvironmentFailure: E0501, E0502 the pictures cannot be written.
        Stopped: by ``stop_signal``, asked before every case.
    """
    chosen = [case for case in cases if case.id in predictions]
    drawn = []
    progress.begin("preview", len(chosen), "cases")
    for done, case in enumerate(chosen, start=1):
        if (stop := stop_signal()) is not None:
            raise Stopped(Problem("E1300", "stopped while drawing", "", "the same command goes on here"), stop)
        drawn.append(_draw(case, predictions[case.id], None, task, output))
        progress.update(done, case.id)
    progress.end()
    return tuple(picture for picture in drawn if picture is not None)


def preview(
    cases: Iterable[Case],
    manifest: RunManifest,
    output: Path,
    task: Task,
    progress: Progress = SILENT,
    stop_signal: Callable[[], int | None] = never,
) -> tuple[Path, ...]:
    """Draw what was segmented into ``output`` now, and cases of earlier commands that have no picture there yet.

    Raises:
        As ``draw_previews``.
    """
    folder = output / PREVIEWS
    new = {case.id for case in manifest.cases if case.status == "done" or not (folder / f"{case.id}.png").is_file()}
    files = {case: path for case, path in predicted_files(output, manifest).items() if case in new}
    return draw_previews(cases, files, task, folder, progress, stop_signal)


def _draw(case: Case, prediction: Path, reference: Path | None, task: Task, output: Path) -> Path | None:
    """The picture; None if the case cannot be drawn. A disk that is full is an error of all cases."""
    from medseg.reporting.overlay import overlay_picture  # loads matplotlib, which most predictions do not need

    picture = output / f"{case.id}.png"
    try:
        seen = see_case(case, prediction, reference, task)
        names = [label.name for label in task.labels]
        overlay_picture(picture, seen.image, seen.prediction, seen.reference, seen.spacing_mm, case.id, names)
    except EnvironmentFailure:
        raise
    except MedsegError as error:
        log.warning("%s is not drawn: %s", case.id, error)
        return None
    return picture


def label_files(folder: Path) -> dict[str, Path]:
    """Image files of a folder by the name of their case; none if there is no such folder."""
    if not folder.is_dir():
        return {}
    return {strip_ending(p.name): p for p in sorted(folder.iterdir()) if p.name.lower().endswith(IMAGE_ENDINGS)}
