"""Select: the configuration, or two together, and the post-processing that the cross-validation of a run speaks for."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import combinations
from pathlib import Path

from medseg import __version__
from medseg.artefacts import owned
from medseg.errors import InputError, Problem, UsageError
from medseg.evaluation.crossfit import Judged, cross_fit, parts_of
from medseg.evaluation.gain import mean_dice, real_gain
from medseg.evaluation.pairs import Pair, read_pair
from medseg.evaluation.selection import Configurations, choose_candidate
from medseg.machine import usable_cores
from medseg.networks.device import Device, choose_device
from medseg.pipeline.cross_validated import WORK, Predicted, Validated, raise_if_stopped, validated_pair
from medseg.pipeline.recipe import SELECTION
from medseg.pipeline.run_folder import RunFolder, every_fold, stages_of
from medseg.pipeline.validate import SCORES
from medseg.progress import SILENT, Progress, never
from medseg.records.base import read_record, write_record
from medseg.records.case import Case
from medseg.records.model import CARD, ModelCard, Refinement
from medseg.records.plan import Plan
from medseg.records.scores import Scores
from medseg.records.selection import Member, Selection
from medseg.records.task import Task


@dataclass(frozen=True, slots=True)
class SelectOptions:
    """``configurations`` () are all that were trained; without ``ensembles`` and ``refinement`` nothing is predicted.

    With ``refinement`` the winner segments its validation cases again, refined; that is kept where the gain is real.
    """

    configurations: tuple[str, ...] = ()
    ensembles: bool = True
    device: Device | None = None
    refinement: Refinement | None = None


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
    with owned(run / WORK, "*"):
        chosen, device = [cases[case] for case in common], options.device or choose_device()
        pair_of: dict[Configurations, Callable[[Case], Pair]] = {
            (name,): partial(validated_pair, folder, one) for name, one in found.items()
        }
        if options.ensembles and len(found) > 1:
            together = Predicted(folder, found, device, list(combinations(found, 2)))
            together.score(chosen, progress, stop_signal)
            pair_of |= {names: partial(together.pair, names) for names in together.names}
        parts = parts_of([next(iter(found.values())).fold_of[case.id] for case in chosen])
        fit = partial(_judged, cases=chosen, parts=parts, task=plan.task, progress=progress, stop_signal=stop_signal)
        judged = fit(pair_of)
        networks = {one: sum(len(stages_of(plan, name)) for name in one) for one in pair_of}
        best, candidates, evidence = choose_candidate(judged, networks)
        processing = judged[best].postprocessing
        score = next(c.mean_dice for c in candidates if c.configurations == best)
        if options.refinement is not None:
            refined = Predicted(folder, found, device, [best], options.refinement)
            refined.score(chosen, progress, stop_signal)
            after = fit({best: partial(refined.pair, best)})[best]
            kept, told = real_gain("Refine by a mean field", judged[best], after)
            evidence = (*evidence, told)
            if kept:
                processing = after.postprocessing.model_copy(update={"refinement": options.refinement})
                score = mean_dice(after.processed)
        selection = Selection(
            medseg_version=__version__,
            members=tuple(_member(found[name], 1 / len(best)) for name in best),
            postprocessing=processing,
            mean_dice=score,
            cases=tuple(common),
            candidates=candidates,
            evidence=evidence,
            missing=_missing(folder, plan, found, common),
        )
        write_record(run / SELECTION, selection)
    return selection


def _judged(
    pair_of: Mapping[Configurations, Callable[[Case], Pair]],
    cases: Sequence[Case],
    parts: Sequence[int],
    task: Task,
    progress: Progress,
    stop_signal: Callable[[], int | None],
) -> dict[Configurations, Judged]:
    """Every candidate with its own post-processing, for each case chosen on the other folds."""
    judged = {}
    progress.begin("post-processing", len(pair_of), "candidates")
    try:
        for done, (names, pair) in enumerate(pair_of.items(), start=1):
            raise_if_stopped(stop_signal)
            opened = [partial(read_pair, pair(case), task) for case in cases]
            judged[names] = cross_fit(opened, parts, task, usable_cores())
            progress.update(done, " + ".join(names))
    finally:
        progress.end()
    return judged


def _validated(folder: RunFolder, plan: Plan, wanted: Sequence[str]) -> dict[str, Validated]:
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
            found[name] = Validated(name, fold_of, cards)
    absent = [name for name in wanted if name not in found]
    if absent or not found:
        what = f"no validated fold of {', '.join(absent) or 'any configuration'} in {folder.path}"
        raise InputError(Problem("E0100", what, "", "train one: medseg train --run RUN --configuration NAME --fold 0"))
    return found


def _missing(folder: RunFolder, plan: Plan, found: Mapping[str, Validated], common: Sequence[str]) -> tuple[str, ...]:
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


def _member(one: Validated, weight: float) -> Member:
    hashes = tuple(card.weights_sha256 for card in one.cards.values())
    return Member(configuration=one.name, folds=tuple(one.cards), weights_sha256=hashes, weight=weight)
