"""Quantise: measure the ranges that int8 needs on some images, and on others what int8 costs and gains."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from medseg import __version__
from medseg.artefacts import owned
from medseg.dataset.layouts import scan_inputs
from medseg.errors import InputError, Problem, Stopped, UsageError
from medseg.evaluation.metrics import Overlap
from medseg.imaging.volumes import read_channels
from medseg.inference.backend import check_backend
from medseg.inference.int8 import watched
from medseg.inference.model import Model, load_model, prepare_stages, segment
from medseg.networks.device import Device, choose_device
from medseg.pipeline.predict_settings import PredictOptions, accelerated
from medseg.pipeline.recipe import recipe_models, recipe_of
from medseg.pipeline.room import need_of
from medseg.preparation.prepare import Prepared
from medseg.progress import SILENT, Progress, never
from medseg.records.base import write_record
from medseg.records.case import Case
from medseg.records.int8 import INT8, Int8Ranges

MANY = 1000  # cases that a model is thought to be compared for: finding what is fastest otherwise may take its time


@dataclass(frozen=True, slots=True)
class Quantised:
    """What was measured for one model, and how int8 compares with the precision that is taken otherwise.

    ``dice`` is that of the labels in int8 against the others, by label: the mean over the cases ``compared`` that have
    the label. ``seconds`` are those of segmenting these, otherwise and in int8.
    """

    configuration: str
    files: tuple[Path, ...]
    measured: tuple[str, ...]
    compared: tuple[str, ...]
    dice: dict[str, float]
    otherwise: str
    seconds: tuple[float, float]


def quantise_model(
    model_path: Path,
    inputs: Path | Sequence[Path],
    cases: int = 4,
    configuration: str | None = None,
    folds: tuple[str, ...] = (),
    device: Device | None = None,
    progress: Progress = SILENT,
    stop_signal: Callable[[], int | None] = never,
) -> list[Quantised]:
    """Write ``int8.json`` beside the weights of every network that a prediction would take; see ``Quantised``.

    The networks segment ``cases`` images, evenly spread over those given, as ever, while it is watched between which
    values the inputs of their convolutions lie. As many others, if there are any, are segmented twice to compare.

    Args:
        model_path: as for ``predict_files``, as are ``configuration`` and ``folds``.
        inputs: images like those to be predicted; labels are not needed.
        cases: how many are measured, and at most how many are compared.
        configuration: needed if several were trained and none was selected.
        folds: () for those that a prediction takes.
        device: a CPU; int8 is for CPUs.
        progress: told of every case.
        stop_signal: asked before every case.

    Raises:
        InputError: no images, or no model.
        UsageError: E0001 OpenVINO is not installed, ``device`` is a GPU or a processor without VNNI, or a network has
            no convolution that could compute in int8.
        ResourceError: E0600 there is too little memory for an image.
        EnvironmentFailure: E0501, E0502 the ranges cannot be written.
        OwnershipError: E0901 the network is being trained.
        Stopped: by ``stop_signal``; ranges that are written stay.
    """
    device = device or choose_device("cpu")
    check_backend("int8", device)
    recipe = recipe_of(model_path, configuration)
    if recipe is None:
        models = [load_model(model_path, device, configuration, folds)]
    else:
        models = list(recipe_models(model_path, recipe, device, folds).values())
    scan = scan_inputs(inputs, models[0].plan.task)
    if not scan.cases:
        raise InputError(scan.problems)
    chosen = _spread(scan.cases, 2 * cases)
    measured, compared = (chosen[::2], chosen[1::2]) if len(chosen) > 1 else (chosen, chosen)
    return [_quantise(model, measured, compared, progress, stop_signal) for model in models]


def _spread(cases: Sequence[Case], count: int) -> list[Case]:
    count = min(count, len(cases))
    return [cases[index * len(cases) // count] for index in range(count)]


def _quantise(
    model: Model,
    measured: Sequence[Case],
    compared: Sequence[Case],
    progress: Progress,
    stop_signal: Callable[[], int | None],
) -> Quantised:
    networks = [(stage, number) for stage in model.stages for number in range(len(stage.networks))]
    with ExitStack() as stack:
        watches = [stack.enter_context(watched(stage.networks[number])) for stage, number in networks]
        for _, prepared in _each(model, measured, "measure", progress, stop_signal):
            segment(model, prepared)
    names, files = tuple(case.id for case in measured), []
    for (stage, number), layers in zip(networks, watches, strict=True):
        path, weights = stage.fold_folders[number] / INT8, stage.cards[number].weights_sha256
        if not layers:
            told = f"{stage.configuration.name}: its network has no convolution that could compute in int8"
            raise UsageError(Problem("E0001", told, "", "predict it as it is"))
        ranges = Int8Ranges(weights_sha256=weights, medseg_version=__version__, cases=names, layers=layers)
        with owned(path.parent):
            write_record(path, ranges)
        files.append(path)
    return _compared(model, tuple(files), names, compared, progress, stop_signal)


def _compared(
    model: Model,
    files: tuple[Path, ...],
    measured: tuple[str, ...],
    cases: Sequence[Case],
    progress: Progress,
    stop_signal: Callable[[], int | None],
) -> Quantised:
    labels = model.plan.task.labels
    ways = [accelerated(model, PredictOptions(backend=name), MANY) for name in ("auto", "int8")]
    seconds, dice = [0.0, 0.0], dict[str, list[float]]()
    for _, prepared in _each(model, cases, "compare", progress, stop_signal):
        found: list[NDArray[np.int16]] = []
        for which, way in enumerate(ways):
            begun = time.monotonic()
            found.append(segment(way, prepared))
            seconds[which] += time.monotonic() - begun
        for index, label in enumerate(labels):
            if index and (one := _overlap(found[1] == index, found[0] == index)).expected + one.predicted:
                dice.setdefault(label.name, []).append(one.dice)
    return Quantised(
        model.configuration.name,
        files,
        measured,
        tuple(case.id for case in cases),
        {label: sum(values) / len(values) for label, values in dice.items()},
        f"{ways[0].backend.name}, {ways[0].device.precision}",
        (seconds[0], seconds[1]),
    )


def _each(
    model: Model,
    cases: Sequence[Case],
    stage: str,
    progress: Progress,
    stop_signal: Callable[[], int | None],
) -> Iterator[tuple[Case, tuple[Prepared, ...]]]:
    """The cases as the model sees them, one after the other."""
    progress.begin(stage, len(cases), "cases")
    for done, case in enumerate(cases, start=1):
        if (stop := stop_signal()) is not None:
            raise Stopped(Problem("E1300", "stopped", "", "the same command begins again"), stop)
        volume = read_channels(case.images)
        need_of(case.id, volume, model, PredictOptions(), alone=True)
        yield case, prepare_stages(model, volume)
        progress.update(done, case.id)
    progress.end()


def _overlap(predicted: NDArray[np.bool_], expected: NDArray[np.bool_]) -> Overlap:
    both = int(np.count_nonzero(predicted & expected))
    return Overlap(both, int(np.count_nonzero(predicted)) - both, int(np.count_nonzero(expected)) - both)
