"""Splits: which cases train and which validate, drawn the way nnU-Net draws them or read from a file."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import ValidationError

from medseg.errors import InputError, Problem, UsageError
from medseg.records.base import read_json
from medseg.records.run import Fold, Splits

logger = logging.getLogger(__name__)

NNUNET_FOLDS, NNUNET_SEED = 5, 12345


def make_splits(
    case_ids: Sequence[str],
    folds: int = NNUNET_FOLDS,
    seed: int = NNUNET_SEED,
    groups: Mapping[str, str] | None = None,
) -> Splits:
    """Cross-validation: every case validates once; with the defaults the very folds of nnU-Net v2.

    nnU-Net sorts the ids and uses scikit-learn's shuffled ``KFold`` with seed 12345
    (nnunetv2/utilities/crossval_split.py): shuffle the positions, cut them into parts that differ by at most one,
    the larger first, and list each part in sorted order.

    Args:
        case_ids: all cases, in any order.
        folds: how many; fewer if there are fewer cases (then each fold validates on one).
        seed: of the shuffle.
        groups: case id → group, for instance the patient. A group is never on both sides; the groups are dealt out
            like cases. Cases that are not named are a group of their own.

    Raises:
        UsageError: E0001 fewer than 2 folds asked for.
        InputError: E0161 fewer than 2 cases or groups, or an id twice.
    """
    if folds < 2:
        raise UsageError(Problem("E0001", f"{folds} folds", "at least 2", "choose the number of folds"))
    cases = sorted(case_ids)
    if len(set(cases)) < len(cases):
        raise InputError(Problem("E0161", "a case id is given twice", "unique ids", "remove one"))
    group_of = {case: ("group", groups[case]) if groups and case in groups else ("case", case) for case in cases}
    units = sorted(set(group_of.values()))
    if len(units) < 2:
        what = f"{len(cases)} case(s) in {len(units)} group(s)"
        raise InputError(Problem("E0161", what, "at least 2 to train on one and validate on another", "add cases"))
    order = np.arange(len(units))
    np.random.RandomState(seed).shuffle(order)  # as scikit-learn draws; global state is untouched
    result = []
    for part in np.array_split(order, min(folds, len(units))):
        held_out = {units[n] for n in part}
        result.append(
            Fold(
                train=tuple(case for case in cases if group_of[case] not in held_out),
                val=tuple(case for case in cases if group_of[case] in held_out),
            )
        )
    return Splits(seed=seed, folds=tuple(result))


def read_splits(path: Path, case_ids: Sequence[str]) -> Splits:
    """Read splits made by hand or by others: ours, nnU-Net's ``splits_final.json``, or one ``{train, val}``.

    Cases that no fold mentions are left out of training, and logged.

    Raises:
        InputError: E0100 not found; E0161 every fold that is malformed, names unknown cases, names one twice, or
            trains on a case it validates on.
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
    if problems:
        raise InputError(problems)
    left_out = known - {case for fold in splits.folds for case in (*fold.train, *fold.val)}
    if left_out:
        logger.warning("%s: %d case(s) are in no fold: %s", path.name, len(left_out), _some(left_out))
    return splits


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
