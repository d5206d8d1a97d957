"""Ensemble: labels from the mean of several predictions' probabilities, or from the votes of their label files."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import nibabel as nib
import numpy as np
from nibabel.filebasedimages import ImageFileError
from numpy.typing import NDArray

from medseg import __version__
from medseg.artefacts import owned
from medseg.errors import EnvironmentFailure, InputError, Problem, Stopped, UsageError
from medseg.evaluation.probabilities import FOLDER as PROBABILITIES
from medseg.evaluation.probabilities import map_files, read_probabilities
from medseg.imaging.geometry import compare_grids
from medseg.imaging.volumes import IMAGE_ENDINGS, label_ending, read_volume, strip_ending, write_labels
from medseg.inference.ensemble import Map, labels_of_maps, labels_of_votes, mean_map
from medseg.pipeline.outputs import label_values
from medseg.pipeline.predict_case import failed, problems_of
from medseg.preparation.prepare import class_indices
from medseg.progress import SILENT, Progress, never
from medseg.records.base import write_record
from medseg.records.grid import Volume
from medseg.records.run import CaseOutcome, RunManifest
from medseg.records.task import Channel, Label, Task

MANIFEST = "ensemble.json"

By = Literal["probabilities", "vote"]


@dataclass(frozen=True, slots=True)
class EnsembleOptions:
    """How folders are joined; ``weights`` () are equal; ``task`` is needed for regions and nnU-Net's ``.npz``."""

    by: By = "probabilities"
    weights: tuple[float, ...] = ()
    task: Task | None = None


def ensemble_folders(
    folders: Sequence[Path],
    output: Path,
    options: EnsembleOptions | None = None,
    progress: Progress = SILENT,
    stop_signal: Callable[[], int | None] = never,
) -> RunManifest:
    """Join predictions of the same cases; one label file per case in ``output`` and ``ensemble.json`` about all.

    Args:
        folders: two or more outputs of ``medseg predict --probabilities`` (``probabilities/CASE/label_V.nii.gz`` beside
            ``CASE.nii.gz``), or of nnU-Net with ``CASE.npz``; for votes label files are enough.
        output: a folder of its own.
        options: what is joined and how.
        progress: told of every case.
        stop_signal: asked before every case.

    Returns:
        How every case ended. A case that is not in all folders, or does not fit, failed.

    Raises:
        UsageError: E0001 fewer than two folders, weights that do not fit, or ``output`` is one of ``folders``.
        InputError: E0100 no such folder; E0146 no label files in the first.
        Stopped: by ``stop_signal``.
    """
    options = options or EnsembleOptions()
    _check(folders, output, options)
    by_case = [_label_files(folder) for folder in folders]
    cases = sorted(set().union(*by_case))
    if not by_case[0]:
        raise InputError(Problem("E0146", f"no label files in {folders[0]}", "", "predict into it"))
    outcomes = []
    with owned(output):
        progress.begin("ensemble", len(cases), "cases")
        try:
            for done, case in enumerate(cases, start=1):
                if (stop := stop_signal()) is not None:
                    raise Stopped(Problem("E1300", f"stopped after {done - 1} cases", "", ""), stop)
                outcomes.append(_join(case, folders, by_case, output, options))
                progress.update(done, f"{case} {outcomes[-1].status}")
        finally:
            progress.end()
            manifest = RunManifest(
                command="ensemble",
                medseg_version=__version__,
                inputs={str(number): str(folder) for number, folder in enumerate(folders)},
                settings={"by": options.by, "weights": " ".join(f"{w:g}" for w in _weights(folders, options))},
                cases=tuple(outcomes),
            )
            write_record(output / MANIFEST, manifest)
    return manifest


def _check(folders: Sequence[Path], output: Path, options: EnsembleOptions) -> None:
    if len(folders) < 2:
        raise UsageError(Problem("E0001", f"{len(folders)} folder to join", "two or more", "name more"))
    if options.weights and (len(options.weights) != len(folders) or min(options.weights) <= 0):
        raise UsageError(Problem("E0001", f"weights {options.weights}", f"{len(folders)} numbers above 0"))
    if options.weights and options.by == "vote":
        raise UsageError(Problem("E0001", "weights with votes", "", "votes count equally"))
    for folder in folders:
        if not folder.is_dir():
            raise InputError(Problem("E0100", f"{folder} is no folder", "", "check the path"))
        if folder.resolve() == output.resolve():
            raise UsageError(Problem("E0001", f"{output} would be overwritten", "", "choose another -o"))


def _weights(folders: Sequence[Path], options: EnsembleOptions) -> list[float]:
    weights = options.weights or (1.0,) * len(folders)
    return [weight / sum(weights) for weight in weights]


def _label_files(folder: Path) -> dict[str, Path]:
    files = [p for p in sorted(folder.iterdir()) if p.is_file() and not p.name.startswith(".")]
    return {strip_ending(p.name): p for p in files if p.name.lower().endswith(IMAGE_ENDINGS)}


def _join(
    case: str, folders: Sequence[Path], by_case: Sequence[dict[str, Path]], output: Path, options: EnsembleOptions
) -> CaseOutcome:
    try:
        missing = [str(folder) for folder, found in zip(folders, by_case, strict=True) if case not in found]
        if missing:
            raise InputError(Problem("E0100", f"no prediction in {', '.join(missing)}", "", "predict it", case))
        volume = read_volume(by_case[0][case])
        task = options.task or _task_of(case, folders[0], by_case, options.by)
        if options.by == "vote":
            labels = labels_of_votes([_indices(found[case], volume, task) for found in by_case])
        else:
            sources = [_open(case, folder, volume, task) for folder in folders]
            scales = _weights(folders, options)
            labels = labels_of_maps((mean_map([s(o) for s in sources], scales) for o in range(task.outputs)), task)
        name = f"{case}{label_ending(by_case[0][case].name)}"
        values = label_values(labels, task)
        digest = write_labels(output / name, values, volume.grid, volume.source, task.labels)
    except EnvironmentFailure:
        raise
    except Exception as error:
        return failed(case, problems_of(error, case))
    return CaseOutcome(id=case, status="done", outputs={name: digest})


def _task_of(case: str, folder: Path, by_case: Sequence[dict[str, Path]], by: By) -> Task:
    """A task without regions from the names of a case's maps, or for votes from the values in its label files."""
    if by == "vote":
        found = {int(v) for files in by_case for v in np.unique(read_volume(files[case]).array)}
    else:
        maps = folder / PROBABILITIES / case
        names = [path.name for path in maps.glob("*.nii.gz")] if maps.is_dir() else []
        if not names or any(not name.startswith("label_") for name in names):
            what = "maps of regions" if names else f"no maps of classes in {maps}"
            raise InputError(Problem("E0100", what, "", "add --task DATASET_JSON, or --vote to join labels", case))
        found = {int(name.removeprefix("label_").removesuffix(".nii.gz")) for name in names}
    values = sorted(found | {0})
    values += [values[-1] + 1] * (len(values) < 2)
    return Task(channels=(Channel(name="image"),), labels=tuple(Label(name=f"label {v}", value=v) for v in values))


def _indices(path: Path, first: Volume, task: Task) -> NDArray[np.int16]:
    volume = read_volume(path)
    _check_grid(volume, first, path)
    return class_indices(volume.array[0], task.model_copy(update={"ignore_value": None}))


def _check_grid(volume: Volume, first: Volume, path: Path) -> None:
    problem = compare_grids(first.grid, volume.grid, f"{path.parent.name}/{path.name}")
    if problem is not None and problem.severity == "error":
        raise InputError(problem)


def _open(case: str, folder: Path, first: Volume, task: Task) -> Callable[[int], Map]:
    """A function that reads the map of one output, from 0 to 1."""
    archive = folder / f"{case}.npz"
    if archive.is_file() and not (folder / PROBABILITIES / case).is_dir():
        array = read_probabilities(archive, task, first.grid.shape)
        return lambda output: array[output].astype(np.float32)
    names = list(map_names(case, task))

    def read(output: int) -> Map:
        path = folder / names[output]
        if not path.is_file():
            raise InputError(Problem("E0100", f"no {names[output]} in {folder}", "", "predict with --probabilities"))
        try:
            image = nib.load(path)
            values: Map = image.get_fdata(dtype=np.float32, caching="unchanged").T
        except (OSError, EOFError, ValueError, ImageFileError) as error:
            raise InputError(Problem("E0102", f"{path}: {error}", "a map", "predict it again")) from error
        if values.shape != first.grid.shape:
            raise InputError(Problem("E0119", f"{path.name} {values.shape}", f"labels {first.grid.shape}"))
        return values

    return read


def map_names(case: str, task: Task) -> Iterator[str]:
    """Where ``medseg predict --probabilities`` writes the map of every output, below its folder."""
    return (f"{PROBABILITIES}/{case}/{name}" for name in map_files(task))
