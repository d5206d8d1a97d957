"""Splits: which cases train and which validate, drawn the way nnU-Net draws them, better, or read from a file."""

from __future__ import annotations

import logging
import math
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from medseg.dataset.dealing import Unit, deal_balanced, deal_evenly
from medseg.dataset.groups import Groups
from medseg.errors import InputError, Problem, UsageError
from medseg.records.base import read_json
from medseg.records.run import Fold, SplitMethod, Splits
from medseg.records.task import Task

logger = logging.getLogger(__name__)

NNUNET_FOLDS, NNUNET_SEED = 5, 12345
LIKELY = 0.01
COLUMNS = 8
ALONE = Groups()

Presence = Mapping[str, Collection[int]]
"""Case id → the label values that occur in it."""


def make_splits(
    case_ids: Sequence[str],
    folds: int | None = None,
    seed: int = NNUNET_SEED,
    groups: Groups = ALONE,
    stratify_by: Presence | None = None,
) -> Splits:
    """Cross-validation: every case validates once; with the defaults the very folds of nnU-Net v2.

    nnU-Net sorts the ids and uses scikit-learn's shuffled ``KFold`` with seed 12345
    (nnunetv2/utilities/crossval_split.py): shuffle the positions, cut them into parts that differ by at most one,
    the larger first, and list each part in sorted order. Groups of equal size are dealt out likewise, groups of
    different sizes so that the folds hold about as many cases.

    Args:
        case_ids: all cases, in any order.
        folds: how many; by default 5, or as many as there are groups.
        seed: of the shuffle.
        groups: a group is never on both sides. Cases that have none are a group of their own.
        stratify_by: the labels to spread evenly over the folds; None to leave that to chance.

    Raises:
        UsageError: E0001 fewer than 2 folds asked for.
        InputError: E0161 fewer than 2 groups, more folds than groups, or an id twice.
    """
    if folds is not None and folds < 2:
        raise UsageError(Problem("E0001", f"{folds} folds", "at least 2", "choose the number of folds"))
    cases = sorted(case_ids)
    if len(set(cases)) < len(cases):
        raise InputError(Problem("E0161", "a case id is given twice", "unique ids", "remove one"))
    units = _units(cases, groups, stratify_by or {})
    if len(units) < 2:
        what = f"{len(cases)} case(s) in {len(units)} group(s)"
        raise InputError(Problem("E0161", what, "at least 2 to train on one and validate on another", "add cases"))
    if folds is not None and folds > len(units):
        what = f"{folds} folds of {_counted(len(cases), units)}"
        raise InputError(Problem("E0161", what, "at least one group for each fold", "choose fewer folds"))
    count = folds or min(NNUNET_FOLDS, len(units))
    method = _method(units, stratify_by is not None)
    dealt = (deal_evenly if method == "kfold" else deal_balanced)(units, count, seed)
    return Splits(
        method=method,
        reason=f"{count} folds of {_counted(len(cases), units)}: {_WORDS[method]}",
        seed=seed,
        grouped_by=groups.source,
        groups={case: groups.of[case] for case in cases if case in groups.of},
        folds=tuple(_fold(cases, {case for unit in part for case in unit.cases}) for part in dealt),
    )


_WORDS: dict[SplitMethod, str] = {
    "kfold": "shuffled and cut into equal parts, as nnU-Net does",
    "balanced": "dealt so that the folds hold about as many cases",
    "stratified": "dealt so that the folds hold about as many cases, and as many with each label",
}


def _units(cases: Sequence[str], groups: Groups, presence: Presence) -> list[Unit]:
    """Groups, and cases without one, sorted by name, with the labels that some cases have and some have not."""
    members: dict[tuple[str, str], list[str]] = {}
    for case in cases:
        name = ("group", groups.of[case]) if case in groups.of else ("case", case)
        members.setdefault(name, []).append(case)
    everywhere = set.intersection(*(set(presence.get(case, ())) for case in cases)) if cases else set()
    return [
        Unit(tuple(own), _count(label for case in own for label in presence.get(case, ()) if label not in everywhere))
        for _, own in sorted(members.items())
    ]


def _method(units: Sequence[Unit], stratify: bool) -> SplitMethod:
    if stratify:
        return "stratified"
    return "kfold" if len({len(unit.cases) for unit in units}) == 1 else "balanced"


def _fold(cases: Sequence[str], held_out: Collection[str]) -> Fold:
    return Fold(
        train=tuple(case for case in cases if case not in held_out),
        val=tuple(case for case in cases if case in held_out),
    )


def _counted(cases: int, units: Sequence[Unit]) -> str:
    return f"{cases} cases" if len(units) == cases else f"{cases} cases in {len(units)} groups"


def _count(labels: Iterable[int]) -> dict[int, int]:
    return dict(sorted(Counter(labels).items()))


def left_to_chance(case_ids: Sequence[str], folds: int | None, groups: Groups, presence: Presence) -> dict[int, float]:
    """Labels that shuffled folds may well miss: value → expected number of folds without it, where above 1 %.

    A fold of n of N groups misses a label of m groups with the probability C(N-m, n) / C(N, n), without replacement;
    the sum over the folds bounds the probability that any misses it. A validation fold without a label cannot score
    it, and stopping, post-processing and the choice of a configuration then rest on the other folds.
    """
    units = _units(sorted(case_ids), groups, presence)
    count = min(folds or NNUNET_FOLDS, len(units))
    sizes = [math.ceil((len(units) - fold) / count) for fold in range(count)]
    having = Counter(label for unit in units for label in unit.labels)
    missed = {
        label: sum(math.comb(len(units) - m, n) / math.comb(len(units), n) for n in sizes)
        for label, m in sorted(having.items())
    }
    return {label: expected for label, expected in missed.items() if expected > LIKELY}


def split_table(splits: Splits, presence: Presence, task: Task) -> list[tuple[str, ...]]:
    """Rows, header first: per fold the validation groups (if there are any), cases, and cases with each label.

    Of many labels the ``COLUMNS`` that the fewest cases have are shown.
    """
    total = Counter(label for labels in presence.values() for label in labels)
    rare = sorted(task.foreground, key=lambda label: (total[label.value], label.value))[:COLUMNS]
    labels = sorted(rare, key=lambda label: label.value)
    grouped = bool(splits.groups)
    rows = [("fold", *(["groups"] if grouped else []), "cases", *(label.name for label in labels))]
    for number, fold in enumerate(splits.folds):
        groups = {splits.groups.get(case, f"\0{case}") for case in fold.val}
        with_label = [sum(label.value in presence.get(case, ()) for case in fold.val) for label in labels]
        numbers = (*([len(groups)] if grouped else []), len(fold.val), *with_label)
        rows.append((str(number), *(str(n) for n in numbers)))
    return rows


def read_splits(path: Path, case_ids: Sequence[str]) -> Splits:
    """Read splits made by hand or by others: ours, nnU-Net's ``splits_final.json``, or one ``{train, val}``.

    Cases that no fold mentions are left out of training, and logged.

    Raises:
        InputError: E0100 not found; E0161 every fold that is malformed, names unknown cases, names one twice, or
            trains on a case, or by the file's own ``groups`` on a patient, it validates on.
        IntegrityError: E0711 not strict JSON.
    """
    path = Path(path)
    value = read_json(path)
    try:
        splits = Splits.model_validate(_as_record(value))
    except ValidationError as error:
        raise InputError(
            [
                Problem("E0161", f"{path.name}: {'.'.join(str(p) for p in e['loc'])}: {e['msg']}", "", "correct it")
                for e in error.errors(include_url=False)[:20]
            ]
        ) from error
    known = set(case_ids)
    problems = [p for k, fold in enumerate(splits.folds) for p in _fold_problems(fold, f"{path.name}: fold {k}", known)]
    problems += leaks(splits, Groups(splits.groups))
    if problems:
        raise InputError(problems)
    left_out = known - {case for fold in splits.folds for case in (*fold.train, *fold.val)}
    if left_out:
        logger.warning("%s: %d case(s) are in no fold: %s", path.name, len(left_out), _some(left_out))
    return splits


def leaks(splits: Splits, groups: Groups) -> list[Problem]:
    """E0161 for every fold that trains on a group it validates on."""
    problems = []
    for number, fold in enumerate(splits.folds):
        train, val = ({groups.of[case] for case in side if case in groups.of} for side in (fold.train, fold.val))
        if train & val:
            what = f"fold {number} trains and validates on group(s) {_some(train & val)}"
            problems.append(Problem("E0161", what, "each group on one side", "correct it"))
    return problems


def _as_record(value: Any) -> Any:
    if isinstance(value, list):
        return {"folds": value}
    if isinstance(value, dict) and "folds" not in value:
        return {"folds": [value]}
    return value


def _fold_problems(fold: Fold, where: str, known: set[str]) -> list[Problem]:
    problems = []
    both = set(fold.train) & set(fold.val)
    if both:
        problems.append(
            Problem("E0161", f"{where} trains on {_some(both)}", "cases it does not validate on", "correct it")
        )
    unknown = (set(fold.train) | set(fold.val)) - known
    if unknown:
        problems.append(Problem("E0161", f"{where} names {_some(unknown)}", "cases of the data set", "correct it"))
    for name, cases in (("train", fold.train), ("val", fold.val)):
        if len(set(cases)) < len(cases):
            twice = {case for case in cases if cases.count(case) > 1}
            problems.append(Problem("E0161", f"{where}: {name} names {_some(twice)} twice", "once", "correct it"))
    return problems


def _some(cases: set[str]) -> str:
    names = sorted(cases)
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
