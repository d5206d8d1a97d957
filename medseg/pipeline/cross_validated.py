"""Cross-validated: the label files by which candidates are compared, each case by a fold that did not learn from it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from medseg import __version__
from medseg.artefacts import sha256_of, sha256_of_json
from medseg.errors import InputError, MedsegError, Problem, Stopped
from medseg.evaluation.pairs import Pair
from medseg.evaluation.scores import evaluate, write_scores
from medseg.evaluation.selection import Configurations
from medseg.imaging.volumes import volume_sha256, write_labels
from medseg.inference.ensemble import labels_of_maps
from medseg.inference.model import load_model
from medseg.machine import usable_cores
from medseg.networks.device import Device
from medseg.pipeline.members import mean_maps, member_job, opened_maps
from medseg.pipeline.outputs import label_values, output_name
from medseg.pipeline.predict_case import Job
from medseg.pipeline.predict_settings import PredictOptions
from medseg.pipeline.run_folder import RunFolder, stages_of
from medseg.pipeline.validate import FOLDER, TOLERANCE_MM
from medseg.progress import Progress
from medseg.records.base import read_record, write_record
from medseg.records.case import Case
from medseg.records.model import CARD, ModelCard, Refinement
from medseg.records.run import CaseOutcome, RunManifest
from medseg.records.scores import Measures

WORK, DONE = "selection", "select.json"


@dataclass(frozen=True, slots=True)
class Validated:
    """One configuration: the fold that validated each case, and the cards of its folds."""

    name: str
    fold_of: dict[str, str]
    cards: dict[str, ModelCard]


def validated_pair(folder: RunFolder, one: Validated, case: Case) -> Pair:
    """A case with the label file that its training validated by, and its reference."""
    assert case.label is not None  # a data set for training has labels
    return case.id, folder.fold(one.name, one.fold_of[case.id]) / FOLDER / output_name(case), case.label


def raise_if_stopped(stop_signal: Callable[[], int | None]) -> None:
    """Raise Stopped if there is a signal."""
    if (stop := stop_signal()) is not None:
        raise Stopped(Problem("E1300", "stopped while selecting", "", "the same command goes on here"), stop)


class Predicted:
    """Label files that are made for the choice: of configurations together, or refined; kept by hashes of their making.

    Each case is segmented by the models of the fold that validated it.
    """

    def __init__(
        self,
        folder: RunFolder,
        found: Mapping[str, Validated],
        device: Device,
        names: Sequence[Configurations],
        refinement: Refinement | None = None,
    ) -> None:
        self.folder, self.plan, self.found, self.device = folder, folder.read_plan(), found, device
        self.names, self.refinement = tuple(names), refinement
        self.jobs: dict[tuple[str, str], Job] = {}
        self.done = {one: _outcomes(self._folder(one) / DONE) for one in self.names}

    def pair(self, names: Configurations, case: Case) -> Pair:
        """A case with its label file and its reference."""
        assert case.label is not None  # a data set for training has labels
        return case.id, self._folder(names) / output_name(case), case.label

    def _folder(self, names: Configurations) -> Path:
        return self.folder.path / WORK / ("+".join(names) + ("" if self.refinement is None else "_refined"))

    def score(self, cases: Sequence[Case], progress: Progress, stop_signal: Callable[[], int | None]) -> None:
        """Label files and scores of all names on the cases; what is not there yet is predicted, fold after fold."""
        first = next(iter(self.found.values()))
        progress.begin("ensembles" if self.refinement is None else "refinement", len(cases), "cases")
        try:
            for done, case in enumerate(sorted(cases, key=lambda case: int(first.fold_of[case.id])), start=1):
                raise_if_stopped(stop_signal)
                self._predict(case)
                progress.update(done, case.id)
        finally:
            progress.end()
        self.jobs.clear()
        for names in self.names:
            pairs = [self.pair(names, case) for case in cases]
            measures = Measures(tolerance_mm=TOLERANCE_MM)
            scores = evaluate(pairs, self.plan.task, measures, usable_cores(), progress)
            if scores.problems:
                raise InputError(scores.problems)
            write_scores(scores, self._folder(names) / "scores.json")

    def _predict(self, case: Case) -> None:
        """The label files of a case, of all names that lack them."""
        keys = {names: self._key(case, names) for names in self.names}
        lacking = [names for names in self.names if not self._intact(case, names, keys[names])]
        if not lacking:
            return
        wanted = dict.fromkeys(name for names in lacking for name in names)
        with opened_maps(case, {name: self._job(name, case.id) for name in wanted}) as (maps, read):
            for names in lacking:
                means = mean_maps([maps[name] for name in names], [1 / len(names)] * len(names), self.plan.task)
                values = label_values(labels_of_maps(means, self.plan.task), self.plan.task)
                target, name = self._folder(names), output_name(case)
                digest = write_labels(target / name, values, read.grid, read.source, self.plan.task.labels)
                outcome = CaseOutcome(id=case.id, status="done", key=keys[names], outputs={name: digest})
                self.done[names][case.id] = outcome
                outcomes = tuple(self.done[names].values())
                write_record(target / DONE, RunManifest(command="select", medseg_version=__version__, cases=outcomes))

    def _job(self, name: str, case_id: str) -> Job:
        """The model of the fold that did not train on a case; only the last fold of each configuration stays loaded."""
        fold = self.found[name].fold_of[case_id]
        if (name, fold) not in self.jobs:
            self.jobs = {key: job for key, job in self.jobs.items() if key[0] != name}
            model = load_model(self.folder.models(name), self.device, name, (fold,), (fold,))
            self.jobs[name, fold] = member_job(model, PredictOptions(), self.folder.path / WORK, self.refinement)
        return self.jobs[name, fold]

    def _key(self, case: Case, names: Configurations) -> str:
        images = ["" if path is None else volume_sha256(path) for path in dict.fromkeys(case.images)]
        weights = [self._weights(name, self.found[name].fold_of[case.id]) for name in names]
        refined = [] if self.refinement is None else [self.refinement.to_json()]
        return sha256_of_json([images, weights, str(self.device.dtype), self.device.torch_device.type, *refined])

    def _weights(self, name: str, fold: str) -> list[str]:
        """Hashes of the networks of a fold, of a cascade's first stage too."""
        cards = [self.folder.fold(stage, fold) / CARD for stage in stages_of(self.plan, name)]
        return [read_record(path, ModelCard).weights_sha256 for path in cards]

    def _intact(self, case: Case, names: Configurations, key: str) -> bool:
        outcome = self.done[names].get(case.id)
        if outcome is None or outcome.key != key:
            return False
        folder = self._folder(names)
        return all((folder / name).is_file() and sha256_of(folder / name) == d for name, d in outcome.outputs.items())


def _outcomes(path: Path) -> dict[str, CaseOutcome]:
    try:
        return {case.id: case for case in read_record(path, RunManifest).cases}
    except MedsegError:
        return {}
