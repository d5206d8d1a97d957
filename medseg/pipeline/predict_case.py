"""One case of a prediction: read and prepared, segmented, written, each a step that another thread may take."""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from medseg.artefacts import sha256_of, sha256_of_json
from medseg.errors import EnvironmentFailure, MedsegError, Problem
from medseg.evaluation.postprocessing import apply
from medseg.imaging.volumes import read_channels, volume_sha256, write_labels
from medseg.inference.ladder import Ladder
from medseg.inference.maps import Maps
from medseg.inference.model import Model, how_to_predict, mirroring_of, prepare_stages, segment
from medseg.inference.need import Need
from medseg.inference.sliding import Blending
from medseg.pipeline.outputs import label_values, output_name
from medseg.pipeline.predict_settings import PredictOptions
from medseg.pipeline.room import need_of
from medseg.preparation.prepare import Prepared
from medseg.records.case import Case
from medseg.records.grid import Grid, Source
from medseg.records.model import PostProcessing
from medseg.records.run import CaseOutcome

log = logging.getLogger(__name__)

LABELS_VERSION = 1  # to be raised when a new release gives other labels for the same model, image and options


@dataclass(frozen=True, slots=True)
class Job:
    """What every case of one command shares."""

    model: Model
    ladder: Ladder
    postprocessing: PostProcessing
    options: PredictOptions
    output: Path

    def key(self, images_sha256: tuple[str, ...]) -> str:
        """Hash of all that labels depend on, and after "+" of the maps wanted: the same key, the same files."""
        labels = sha256_of_json(
            {
                "images": images_sha256,
                "stages": [self._stage(stage) for stage in self.model.stages],
                "postprocessing": self.postprocessing.model_copy(update={"evidence": ()}).to_json(),
                "step": self.options.tile_step,
                "precision": str(self.model.device.dtype),
                "device": self.model.device.torch_device.type,
                "version": LABELS_VERSION,
                "ending": self.options.ending,
            }
        )
        wanted = self.options.wanted
        return f"{labels}+{wanted.probabilities}{wanted.uncertainty}{wanted.attention}" if wanted.any else labels

    def _stage(self, stage: Model) -> list[object]:
        mirroring = mirroring_of(stage)
        views = [mirroring.axes, str(mirroring.swap)] if self.options.mirror else []
        depth = [] if self.options.depth is None else [self.options.depth]
        other = [stage.backend.labels] if stage.backend.labels else []
        weights = sorted(card.weights_sha256 for card in stage.cards)
        return [how_to_predict(stage.cards[0]), weights, views, *depth, *other]


@dataclass(frozen=True, slots=True, eq=False)
class ReadCase:
    """A case ready to be segmented; the volume itself is gone."""

    case: Case
    key: str
    grid: Grid
    source: Source
    prepared: tuple[Prepared, ...]
    need: Need


@dataclass(frozen=True, slots=True, eq=False)
class Segmented:
    """A case ready to be written: class indices on the file's axes, and maps that are wanted."""

    read: ReadCase
    labels: NDArray[np.int16]
    maps: Maps | None
    begun: float


def read_case(case: Case, job: Job, before: CaseOutcome | None, *, alone: bool) -> CaseOutcome | ReadCase:
    """The prepared case with its key; or its earlier outcome, if that still holds.

    Raises:
        NoRoomYetError: E0600 too large; ``alone`` with nothing else in memory, otherwise beside other cases.
    """
    key = job.key(tuple("" if path is None else volume_sha256(path) for path in dict.fromkeys(case.images)))
    if before is not None and _covers(before.key, key) and before.status != "failed" and _intact(before, job.output):
        return before.model_copy(update={"status": "skipped", "seconds": 0.0})
    volume = read_channels(case.images)
    need = need_of(case.id, volume, job.model, job.options, job.postprocessing.refinement, alone=alone)
    prepared = prepare_stages(job.model, volume)
    return ReadCase(case, key, volume.grid, volume.source, prepared, need)


def segment_case(read: ReadCase, job: Job) -> Segmented:
    """Labels of a case, with less of the GPU's memory if there is not enough, and its maps.

    Raises:
        NonFiniteError: E1002.
        EnvironmentFailure: E0501, E0502 no room for maps.
    """
    begun, options, task = time.monotonic(), job.options, job.model.plan.task

    def work(model: Model, blending: Blending) -> tuple[NDArray[np.int16], Maps | None]:
        preparation = read.prepared[-1].preparation
        maps = Maps(options.wanted, task, preparation, job.output) if options.wanted.any else None
        observe = None if maps is None else maps.observe
        try:
            labels = segment(
                model,
                read.prepared,
                mirror=options.mirror,
                blending=blending,
                observe=observe,
                refinement=job.postprocessing.refinement,
            )
            return labels, maps
        except BaseException:
            if maps is not None:
                maps.close()
            raise

    blending = Blending(options.tile_step, disagreement=options.uncertainty)
    labels, maps = job.ladder.run(work, blending)
    return Segmented(read, labels, maps, begun)


def write_case(segmented: Segmented, job: Job) -> CaseOutcome:
    """Post-process and commit labels and maps; a case that fails is told, a disk that fails is raised.

    Raises:
        EnvironmentFailure: E0501, E0502.
    """
    read, maps = segmented.read, segmented.maps
    case, declared = read.case, job.model.plan.task
    try:
        labels = apply(segmented.labels, job.postprocessing, read.grid.spacing_mm)
        name = output_name(case, job.options.ending)
        values = label_values(labels, declared)
        outputs = {name: write_labels(job.output / name, values, read.grid, read.source, declared.labels)}
        if maps is not None:
            outputs |= maps.write(job.output, case.id, read.grid)
    except EnvironmentFailure:
        raise
    except Exception as error:
        return failed(case.id, problems_of(error, case.id))
    finally:
        if maps is not None:
            maps.close()
    seconds = round(time.monotonic() - segmented.begun, 2)
    quality = None if maps is None else maps.quality()
    return CaseOutcome(id=case.id, status="done", key=read.key, outputs=outputs, seconds=seconds, quality=quality)


def problems_of(error: Exception, case: str) -> list[Problem]:
    """What an error of any kind means for its case."""
    if isinstance(error, MedsegError):
        return [replace(p, case=case) for p in error.problems]
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return [Problem("E0600", "not enough memory for this case", "", "free memory, or use --device cpu", case)]
    log.debug("case %s failed", case, exc_info=error)
    return [Problem("E7000", f"{type(error).__name__}: {error}", "", "report this with --debug", case)]


def failed(case: str, problems: list[Problem]) -> CaseOutcome:
    """The outcome of a case with these problems."""
    return CaseOutcome(id=case, status="failed", problems=tuple(str(p) for p in problems))


def _covers(before: str, key: str) -> bool:
    """Whether files made with the key ``before`` are all that ``key`` asks for; more maps than wanted do no harm."""
    return before == key or before.partition("+")[0] == key


def _intact(outcome: CaseOutcome, output: Path) -> bool:
    files = [(output / name, digest) for name, digest in outcome.outputs.items()]
    return bool(files) and all(path.is_file() and sha256_of(path) == digest for path, digest in files)
