"""Joint prediction: every image by several models, and labels from the mean of their probabilities."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from medseg import __version__
from medseg.artefacts import owned, sha256_of, sha256_of_json
from medseg.dataset.layouts import scan_inputs
from medseg.errors import EnvironmentFailure, InputError, MedsegError, Problem, Stopped, UsageError
from medseg.evaluation.postprocessing import apply
from medseg.imaging.scaled import write_scaled
from medseg.imaging.volumes import volume_sha256, write_labels
from medseg.inference.ensemble import Map, labels_of_maps
from medseg.inference.maps import Maps
from medseg.inference.model import Model
from medseg.pipeline.ensemble import map_names
from medseg.pipeline.members import STEPS, disagreement, mean_maps, member_job, opened_maps, quality
from medseg.pipeline.outputs import MAP_FOLDERS, label_values, output_name
from medseg.pipeline.pictures import PREVIEWS, preview
from medseg.pipeline.predict_case import ReadCase, failed, problems_of
from medseg.pipeline.predict_settings import PredictOptions, accelerated, engine_words
from medseg.pipeline.processing import processing
from medseg.progress import Progress
from medseg.records.base import read_record, write_record
from medseg.records.case import Case
from medseg.records.run import CaseOutcome, RunManifest
from medseg.records.selection import Selection

MANIFEST = "predict.json"


def predict_jointly(
    models: Mapping[str, Model],
    recipe: Selection,
    inputs: Path | Sequence[Path],
    output: Path,
    options: PredictOptions,
    progress: Progress,
    stop_signal: Callable[[], int | None],
) -> RunManifest:
    """``predict_files`` for the models of a recipe: a label file per case, and a manifest about all.

    Raises:
        UsageError: E0001 an output would replace an input; attention maps are those of one model.
        InputError: nothing to predict.
        Stopped: by ``stop_signal``; finished cases stay.
    """
    if options.attention_maps:
        action = "name one with --configuration"
        raise UsageError(Problem("E0001", "--attention-maps with an ensemble", "one configuration", action))
    scan = scan_inputs(inputs, next(iter(models.values())).plan.task)
    if not scan.cases:
        raise InputError(scan.problems)
    models = {name: accelerated(model, options, len(scan.cases)) for name, model in models.items()}
    for model in models.values():
        progress.say(engine_words(model))
    together = _Together(models, recipe, output, options)
    together.protect(scan.cases)
    with owned(output, *MAP_FOLDERS, PREVIEWS):
        before = _previous(output / MANIFEST)
        outcomes = [failed(p.case or "", [p]) for p in scan.errors]
        progress.begin("predict", len(scan.cases), "cases")
        try:
            for done, case in enumerate(scan.cases, start=1):
                if (stop := stop_signal()) is not None:
                    action = "the same command goes on here"
                    raise Stopped(Problem("E1300", f"stopped after {done - 1} cases", "", action), stop)
                outcomes.append(together.outcome(case, before.get(case.id)))
                progress.update(done, f"{case.id} {outcomes[-1].status}")
        finally:
            progress.end()
            now = {outcome.id for outcome in outcomes}
            kept = [outcome for outcome in before.values() if outcome.id not in now]
            manifest = together.manifest(outcomes)
            write_record(output / MANIFEST, manifest.model_copy(update={"cases": (*outcomes, *kept)}))
        if options.preview:
            preview(scan.cases, manifest, output, together.task, progress, stop_signal)
    return manifest


def _previous(path: Path) -> dict[str, CaseOutcome]:
    try:
        return {case.id: case for case in read_record(path, RunManifest).cases}
    except MedsegError:
        return {}


class _Together:
    """What every case of one command shares."""

    def __init__(
        self,
        models: Mapping[str, Model],
        recipe: Selection,
        output: Path,
        options: PredictOptions,
    ) -> None:
        self.task = next(iter(models.values())).plan.task
        self.postprocessing = processing(recipe.postprocessing, options, self.task)
        refinement = self.postprocessing.refinement
        self.jobs = {name: member_job(model, options, output, refinement) for name, model in models.items()}
        self.weights = [member.weight for member in recipe.members]
        self.output, self.options = output, options

    def protect(self, cases: Sequence[Case]) -> None:
        """Refuse to write over an input."""
        images = {image.resolve() for case in cases for image in case.files}
        for case in cases:
            name = output_name(case, self.options.ending)
            if (self.output / name).resolve() in images:
                raise UsageError(Problem("E0001", f"{name} would replace an input", "", "choose another -o"))

    def outcome(self, case: Case, before: CaseOutcome | None) -> CaseOutcome:
        """Segment one case, unless that was done."""
        begun = time.monotonic()
        try:
            key = self._key(case)
            if before is not None and before.key == key and before.status != "failed" and self._intact(before):
                return before.model_copy(update={"status": "skipped", "seconds": 0.0})
            with opened_maps(case, self.jobs) as (found, read):
                maps, outputs = list(found.values()), dict[str, str]()
                means = self._kept(mean_maps(maps, self.weights, self.task), read, outputs)
                labels = labels_of_maps(means, self.task)
                sure = None
                if self.options.wanted.any:
                    sure = quality(mean_maps(maps, self.weights, self.task), labels, self.task)
                if self.options.uncertainty:
                    outputs |= self._write_disagreement(maps, read)
            outputs |= self._write(labels, read)
        except EnvironmentFailure:
            raise
        except Exception as error:
            return failed(case.id, problems_of(error, case.id))
        seconds = round(time.monotonic() - begun, 2)
        return CaseOutcome(id=case.id, status="done", key=key, outputs=outputs, seconds=seconds, quality=sure)

    def _key(self, case: Case) -> str:
        images = tuple("" if path is None else volume_sha256(path) for path in dict.fromkeys(case.images))
        keys = [job.key(images) for job in self.jobs.values()]
        steps = self.postprocessing.model_copy(update={"evidence": ()}).to_json()
        return sha256_of_json([keys, self.weights, steps, self.options.probabilities, self.options.uncertainty])

    def _intact(self, outcome: CaseOutcome) -> bool:
        files = [(self.output / name, digest) for name, digest in outcome.outputs.items()]
        return bool(files) and all(path.is_file() and sha256_of(path) == digest for path, digest in files)

    def _kept(self, means: Iterator[Map], read: ReadCase, outputs: dict[str, str]) -> Iterator[Map]:
        """The maps as they come, written where they are wanted."""
        steps = self.options.probabilities
        for name, probability in zip(map_names(read.case.id, self.task), means, strict=True):
            if steps is not None:
                largest = int(np.iinfo(steps).max)
                values: NDArray[np.unsignedinteger] = np.rint(probability * largest).astype(steps)
                outputs[name] = write_scaled(self.output / name, values, read.grid, 1 / largest)
            yield probability

    def _write_disagreement(self, maps: Sequence[Maps], read: ReadCase) -> dict[str, str]:
        networks = [len(job.model.networks) for job in self.jobs.values()]
        values = disagreement(maps, self.weights, networks, self.task)
        name = f"uncertainty/{read.case.id}.nii.gz"
        return {name: write_scaled(self.output / name, values, read.grid, 1 / STEPS)}

    def _write(self, labels: NDArray[np.int16], read: ReadCase) -> dict[str, str]:
        processed = apply(labels, self.postprocessing, read.grid.spacing_mm)
        name, values = output_name(read.case, self.options.ending), label_values(processed, self.task)
        return {name: write_labels(self.output / name, values, read.grid, read.source, self.task.labels)}

    def manifest(self, outcomes: Sequence[CaseOutcome]) -> RunManifest:
        """The account of the command."""
        return RunManifest(
            command="predict",
            medseg_version=__version__,
            inputs={
                f"{card.configuration} fold_{card.fold}": card.weights_sha256
                for job in self.jobs.values()
                for stage in job.model.stages
                for card in stage.cards
            },
            settings={
                "configuration": " + ".join(self.jobs),
                "weights": " ".join(f"{weight:g}" for weight in self.weights),
                "tta": "mirror" if self.options.mirror else "none",
                "step": f"{self.options.tile_step:g}",
                "refinement": "none" if self.postprocessing.refinement is None else "mean-field",
            },
            cases=tuple(outcomes),
        )
