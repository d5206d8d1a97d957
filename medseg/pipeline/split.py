"""Split: how the folds of a run are chosen — what was asked for, what is there already, and what the data need."""

from __future__ import annotations

import logging
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from medseg.dataset.fingerprint import Measured
from medseg.dataset.groups import Groups, find_groups
from medseg.dataset.splits import NNUNET_SEED, leaks, left_to_chance, make_splits, read_splits
from medseg.errors import IncompatibleError, InputError, Problem, UsageError
from medseg.records.case import Dataset
from medseg.records.fingerprint import Fingerprint
from medseg.records.run import Splits
from medseg.records.task import Task

logger = logging.getLogger(__name__)

Stratify = Literal["auto", "always", "never"]
NNUNETS = frozenset({"nnunet", "resenc-m", "resenc-l", "resenc-xl"})  # presets that promise nnU-Net's own folds


@dataclass(frozen=True, slots=True)
class SplitOptions:
    """What may be asked of the folds; None and "auto" leave it to the data and the preset.

    ``file`` holds folds made elsewhere, ours or nnU-Net's ``splits_final.json``. ``group`` is one of
    ``medseg.dataset.groups.FORMS``. Stratified by itself is what a preset of our own does where chance would leave a
    fold without some label; nnU-Net's presets keep nnU-Net's folds.
    """

    file: Path | None = None
    folds: int | None = None
    seed: int | None = None
    group: str | None = None
    stratify: Stratify = "auto"


def choose_splits(
    dataset: Dataset, measured: Measured, options: SplitOptions, preset: str, there: Splits | None = None
) -> Splits:
    """The folds of a run: those that are ``there``, or those that the options ask for.

    Raises:
        UsageError: E0001 an option is wrong, or does not go with a file.
        InputError: E0161 no such folds can be made of these cases, or the file is wrong.
        IncompatibleError: E0802 others than those there are asked for; models may have been trained on these.
    """
    if there is not None and options == SplitOptions():
        return there
    asked = _asked(dataset, measured, options, preset)
    if there is not None and there.folds != asked.folds:
        what = f"this run has other splits: {there.reason or 'given in a file'}"
        action = "choose another --run, or plan again with --overwrite"
        raise IncompatibleError(Problem("E0802", what, asked.reason or "those of --splits", action))
    return there or asked


def _asked(dataset: Dataset, measured: Measured, options: SplitOptions, preset: str) -> Splits:
    groups = find_groups(dataset.cases, options.group, measured.identical)
    if options.file is not None:
        return _given(options.file, dataset, options, groups)
    if options.group is None and groups.source == "identical images":
        logger.warning("cases with identical images are kept in one fold; --group none splits them like others")
    cases = [case.id for case in dataset.cases]
    presence = labels_present(measured.fingerprint, dataset.task)
    missed: Mapping[int, float] = {}
    if options.stratify == "auto" and preset not in NNUNETS:
        missed = left_to_chance(cases, options.folds, groups, presence)
    stratify_by = presence if missed or options.stratify == "always" else None
    seed = NNUNET_SEED if options.seed is None else options.seed
    splits = make_splits(cases, options.folds, seed, groups, stratify_by)
    return splits.model_copy(update={"reason": splits.reason + _why(missed, dataset.task, len(splits.folds))})


def labels_present(fingerprint: Fingerprint, task: Task) -> dict[str, Collection[int]]:
    """The foreground labels that each case has."""
    values = {label.value for label in task.foreground}
    return {case.id: {v for v, n in case.voxels_per_label.items() if n and v in values} for case in fingerprint.cases}


def _given(path: Path, dataset: Dataset, options: SplitOptions, groups: Groups) -> Splits:
    if options.folds is not None or options.seed is not None or options.stratify != "auto":
        what = "--splits with options that draw splits"
        raise UsageError(Problem("E0001", what, "either", "leave out --split-folds, --split-seed and --stratify"))
    splits = read_splits(path, [case.id for case in dataset.cases])
    problems = leaks(splits, groups)
    if problems and options.group is not None:
        raise InputError(problems)
    if problems:
        logger.warning(
            "%s: %d fold(s) train and validate on the same group of %s", path.name, len(problems), groups.source
        )
    return splits


def _why(missed: Mapping[int, float], task: Task, folds: int) -> str:
    """Why it was stratified, if that was not asked for."""
    if not missed:
        return ""
    worst = max(missed, key=lambda value: missed[value])
    name = next(label.name for label in task.labels if label.value == worst)
    more = f" (and {len(missed) - 1} more labels)" if len(missed) > 1 else ""
    return f"; by chance {missed[worst]:.2g} of {folds} folds would be without {name}{more}"
