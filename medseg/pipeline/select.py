"""Select: the configuration, or two together, and the post-processing that the cross-validation of a run speaks for."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import combinations
from pathlib import Path

from medseg import __version__
from medseg.artefacts import owned, sha256_of, sha256_of_json
from medseg.errors import InputError, MedsegError, Problem, Stopped, UsageError
from medseg.evaluation.crossfit import Judged, cross_fit, parts_of
from medseg.evaluation.pairs import Pair, read_pair
from medseg.evaluation.scores import evaluate, write_scores
from medseg.evaluation.selection import Configurations, choose_candidate
from medseg.imaging.volumes import volume_sha256, write_labels
from medseg.inference.ensemble import labels_of_maps
from medseg.inference.model import load_model
from medseg.machine import usable_cores
from medseg.networks.device import Device, choose_device
from medseg.pipeline.members import mean_maps, member_job, opened_maps
from medseg.pipeline.outputs import label_values, output_name
from medseg.pipeline.predict_case import Job
from medseg.pipeline.predict_settings import PredictOptions
from medseg.pipeline.recipe import SELECTION
from medseg.pipeline.run_folder import RunFolder, every_fold, stages_of
from medseg.pipeline.validate import FOLDER, SCORES, TOLERANCE_MM
from medseg.progress import SILENT, Progress, never
from medseg.records.base import read_record, write_record
from medseg.records.case import Case
from medseg.records.model import CARD, ModelCard
from medseg.records.plan import Plan
from medseg.records.run import CaseOutcome, RunManifest
from medseg.records.scores import Measures, Scores
from medseg.records.selection import Member, Selection

WORK, DONE = "selection", "select.json"


@dataclass(frozen=True, slots=True)
class SelectOptions:
    """``configurations`` () are all that were trained; without ``ensembles`` nothing is predicted."""

    configurations: tuple[str, ...] = ()
    ensembles: bool = True
    device: Device | None = None


@dataclass(frozen=True, slots=True)
class _Validated:
    """One configuration: the fold that validated each case, and the cards of its folds."""

    name: str
    fold_of: dict[str, str]
    cards: dict[str, ModelCard]


def select_run(
    run: Path,
    options: SelectOptions | None = None,
    progress: Progress = SILENT,
    stop_signal: Callable[[], int | None] = never,
) -> Selection:
    """Choose by cross-validation and write ``selection.json``, which ``medseg predict --model RUN`` follows.

    Configurations are compared on the cases that all of them validated, each with post-processing of its own that the
    other folds chose. Ensembles of two are predicted with the models of the folds; their label files and scores are
    kept in ``RUN/selection`` and made once.

    Args:
        run: a run folder with at least one trained and validated fold.
        options: which configurations, with ensembles or without, the device.
        progress: told of every case.
        stop_signal: asked before every case.

    Raises:
        InputError: E0100 no fold was validated; E0146 the configurations validated no case in common.
        UsageError: E0001 a configuration is not there.
        Stopped: by ``stop_signal``; finished cases stay.
    """
    options = options or SelectOptions()
    folder = RunFolder(run)
    plan = folder.read_plan()
    found = _validated(folder, plan, options.configurations)
    common = sorted(set.intersection(*(set(one.fold_of) for one in found.values())))
    if not common:
        folds = "; ".join(f"{one.name}: fold {', '.join(one.cards)}" for one in found.values())
        action = "train the same fold of each, or name --configuration"
        raise InputError(Problem("E0146", f"no case was validated by all of {folds}", "one or more", action))
    cases = {case.id: case for case in folder.read_dataset().cases}
    with owned(run / WORK):
        names: list[Configurations] = [(name,) for name in found]
        chosen = [cases[case] for case in common]
        if options.ensembles and len(found) > 1:
            pairs = _Pairs(folder, plan, found, options.device or choose_device())
            pairs.score(chosen, progress, stop_signal)
            names += pairs.names
        judged = _judged(folder, plan, found, names, chosen, progress, stop_signal)
        networks = {one: sum(len(stages_of(plan, name)) for name in one) for one in names}
        best, candidates, evidence = choose_candidate(judged, networks)
        selection = Selection(
            medseg_version=__version__,
            members=tuple(_member(found[name], 1 / len(best)) for name in best),
            postprocessing=judged[best].postprocessing,
            mean_dice=next(c.mean_dice for c in candidates if c.configurations == best),
            cases=tuple(common),
            candidates=candidates,
            evidence=evidence,
            missing=_missing(folder, plan, found, common),
        )
        write_record(run / SELECTION, selection)
    return selection


def _judged(
    folder: RunFolder,
    plan: Plan,
    found: Mapping[str, _Validated],
    candidates: Sequence[Configurations],
    cases: Sequence[Case],
    progress: Progress,
    stop_signal: Callable[[], int | None],
) -> dict[Configurations, Judged]:
    """Every candidate with its own post-processing, for each case chosen on the other folds."""
    fold_of = next(iter(found.values())).fold_of
    parts = parts_of([fold_of[case.id] for case in cases])
    judged = {}
    progress.begin("post-processing", len(candidates), "candidates")
    try:
        for done, names in enumerate(candidates, start=1):
            _raise_if_stopped(stop_signal)
            opened = [partial(read_pair, _pair(folder, found, names, case), plan.task) for case in cases]
            judged[names] = cross_fit(opened, parts, plan.task, usable_cores())
            progress.update(done, " + ".join(names))
    finally:
        progress.end()
    return judged


def _raise_if_stopped(stop_signal: Callable[[], int | None]) -> None:
    if (stop := stop_signal()) is not None:
        raise Stopped(Problem("E1300", "stopped while selecting", "", "the same command goes on here"), stop)


def _validated(folder: RunFolder, plan: Plan, wanted: Sequence[str]) -> dict[str, _Validated]:
    """The configurations that have validated folds, in the plan's order."""
    unknown = sorted(set(wanted) - set(plan.configurations))
    if unknown:
        there = ", ".join(plan.configurations)
        raise UsageError(Problem("E0001", f"no configuration {', '.join(unknown)} in the plan", there, ""))
    found = {}
    for name in plan.configurations:
        if wanted and name not in wanted:
            continue
        fold_of: dict[str, str] = {}
        cards = {}
        for fold in every_fold(folder.read_splits()):
            path = folder.fold(name, fold)
            if not ((path / CARD).is_file() and (path / SCORES).is_file()):
                continue
            cards[fold] = read_record(path / CARD, ModelCard)
            for row in read_record(path / SCORES, Scores).cases:
                fold_of.setdefault(row.case, fold)
        if cards:
            found[name] = _Validated(name, fold_of, cards)
    absent = [name for name in wanted if name not in found]
    if absent or not found:
        what = f"no validated fold of {', '.join(absent) or 'any configuration'} in {folder.path}"
        raise InputError(Problem("E0100", what, "", "train one: medseg train --run RUN --configuration NAME --fold 0"))
    return found


def _missing(folder: RunFolder, plan: Plan, found: Mapping[str, _Validated], common: Sequence[str]) -> tuple[str, ...]:
    """What would have told more."""
    splits = folder.read_splits()
    told = []
    for name in plan.configurations:
        if name not in found:
            told.append(f"{name} has no validated fold, or was left out")
            continue
        absent = [fold for fold in every_fold(splits) if fold not in found[name].cards]
        if absent:
            told.append(f"{name} lacks fold {', '.join(absent)}")
    everything = {case for fold in splits.folds for case in fold.val}
    if len(common) < len(everything):
        told.append(f"{len(common)} of {len(everything)} cases were validated by all and compared")
    return tuple(told)


def _member(one: _Validated, weight: float) -> Member:
    hashes = tuple(card.weights_sha256 for card in one.cards.values())
    return Member(configuration=one.name, folds=tuple(one.cards), weights_sha256=hashes, weight=weight)


def _pair(folder: RunFolder, found: Mapping[str, _Validated], names: Configurations, case: Case) -> Pair:
    """A case with its label file by one candidate, cross-validated, and its reference."""
    assert case.label is not None  # a data set for training has labels
    if len(names) > 1:
        return case.id, _pair_folder(folder, names) / output_name(case), case.label
    return case.id, folder.fold(names[0], found[names[0]].fold_of[case.id]) / FOLDER / output_name(case), case.label


def _pair_folder(folder: RunFolder, names: Configurations) -> Path:
    return folder.path / WORK / "+".join(names)


class _Pairs:
    """Cross-validated predictions of all pairs of configurations, kept by hashes of what they depend on."""

    def __init__(self, folder: RunFolder, plan: Plan, found: Mapping[str, _Validated], device: Device) -> None:
        self.folder, self.plan, self.found, self.device = folder, plan, found, device
        self.names: list[Configurations] = list(combinations(found, 2))
        self.jobs: dict[tuple[str, str], Job] = {}
        self.done = {names: _outcomes(_pair_folder(folder, names) / DONE) for names in self.names}

    def score(self, cases: Sequence[Case], progress: Progress, stop_signal: Callable[[], int | None]) -> None:
        """Label files and scores of every pair on the cases; what is not there yet is predicted, fold after fold."""
        first = next(iter(self.found.values()))
        progress.begin("ensembles", len(cases), "cases")
        try:
            for done, case in enumerate(sorted(cases, key=lambda case: int(first.fold_of[case.id])), start=1):
                _raise_if_stopped(stop_signal)
                self._predict(case)
                progress.update(done, case.id)
        finally:
            progress.end()
        self.jobs.clear()
        for names in self.names:
            pairs = [_pair(self.folder, self.found, names, case) for case in cases]
            measures = Measures(tolerance_mm=TOLERANCE_MM)
            scores = evaluate(pairs, self.plan.task, measures, usable_cores(), progress)
            if scores.problems:
                raise InputError(scores.problems)
            write_scores(scores, _pair_folder(self.folder, names) / "scores.json")

    def _predict(self, case: Case) -> None:
        """The label files of a case by all pairs that lack it."""
        keys = {names: self._key(case, names) for names in self.names}
        lacking = [names for names in self.names if not self._intact(case, names, keys[names])]
        if not lacking:
            return
        wanted = dict.fromkeys(name for names in lacking for name in names)
        with opened_maps(case, {name: self._job(name, case.id) for name in wanted}) as (maps, read):
            for names in lacking:
                means = mean_maps([maps[name] for name in names], [1 / len(names)] * len(names), self.plan.task)
                values = label_values(labels_of_maps(means, self.plan.task), self.plan.task)
                target, name = _pair_folder(self.folder, names), output_name(case)
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
            self.jobs[name, fold] = member_job(model, PredictOptions(), self.folder.path / WORK)
        return self.jobs[name, fold]

    def _key(self, case: Case, names: Configurations) -> str:
        images = ["" if path is None else volume_sha256(path) for path in dict.fromkeys(case.images)]
        weights = [self._weights(name, self.found[name].fold_of[case.id]) for name in names]
        return sha256_of_json([images, weights, str(self.device.dtype), self.device.torch_device.type])

    def _weights(self, name: str, fold: str) -> list[str]:
        """Hashes of the networks of a fold, of a cascade's first stage too."""
        cards = [self.folder.fold(stage, fold) / CARD for stage in stages_of(self.plan, name)]
        return [read_record(path, ModelCard).weights_sha256 for path in cards]

    def _intact(self, case: Case, names: Configurations, key: str) -> bool:
        outcome = self.done[names].get(case.id)
        if outcome is None or outcome.key != key:
            return False
        folder = _pair_folder(self.folder, names)
        return all((folder / name).is_file() and sha256_of(folder / name) == d for name, d in outcome.outputs.items())


def _outcomes(path: Path) -> dict[str, CaseOutcome]:
    try:
        return {case.id: case for case in read_record(path, RunManifest).cases}
    except MedsegError:
        return {}
