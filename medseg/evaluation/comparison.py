"""Comparison of two sets of predictions: case by case on the same references, tested label by label."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import replace
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from medseg.errors import IncompatibleError, InputError, Problem
from medseg.evaluation.bootstrap import median, median_interval
from medseg.evaluation.paired import holm, permutation, wilcoxon
from medseg.records.comparison import Comparison, PairedTest
from medseg.records.scores import CaseScore, Scores

Numbers = NDArray[np.float64]
Key = tuple[str, str, str]

# measure: (its value where a structure is rightly absent, which is the best one; the sign of "more is better")
MEASURES: dict[str, tuple[float, int]] = {"dice": (1.0, 1), "nsd": (1.0, 1), "hd95_mm": (0.0, -1)}
SIGNIFICANT = 0.05


def compare(a: Scores, b: Scores, names: tuple[str, str] = ("A", "B")) -> Comparison:
    """Test B against A on the cases that both have; cases of one side only are named and left out.

    Args:
        a: scores of the first set.
        b: scores of the second, against the same references with the same tolerances.
        names: what the sets are called.

    Raises:
        InputError: E0146 no case in common.
        IncompatibleError: E0802 tolerances, labels or references differ.
    """
    _check_same_measures(a, b)
    rows_a, rows_b = _by_key(a), _by_key(b)
    cases_a, cases_b = {key[0] for key in rows_a}, {key[0] for key in rows_b}
    common = sorted(cases_a & cases_b)
    if not common:
        raise InputError(
            Problem("E0146", "no case has scores on both sides", "", "compare predictions of one data set")
        )
    tests = []
    for kind in dict.fromkeys(summary.kind for summary in a.labels):
        labels = [summary.label for summary in a.labels if summary.kind == kind]
        for measure in MEASURES:
            found = []
            for label in labels:
                keys = [(case, label, kind) for case in common]
                found.append(_test(measure, [(rows_a[key], rows_b[key]) for key in keys]))
            tests += _corrected(found)
    return Comparison(
        a=names[0],
        b=names[1],
        tolerance_mm=a.tolerance_mm,
        label_tolerances_mm=a.label_tolerances_mm,
        cases=tuple(common),
        only_a=tuple(sorted(cases_a - cases_b)),
        only_b=tuple(sorted(cases_b - cases_a)),
        tests=tuple(tests),
        problems=(*_named(a, names[0]), *_named(b, names[1])),
    )


def paired_values(measure: str, a: CaseScore, b: CaseScore) -> tuple[float, float] | None:
    """The two values of a measure for one case and label; None where both masks of both sides are empty."""
    if a.status == b.status == "both empty":
        return None
    return _value(measure, a), _value(measure, b)


def _value(measure: str, row: CaseScore) -> float:
    if row.status == "both empty":  # the other side is spurious: this one is right
        return MEASURES[measure][0]
    value: float | None = getattr(row, measure)
    return math.inf if value is None else value


def _test(measure: str, rows: list[tuple[CaseScore, CaseScore]]) -> PairedTest:
    pairs = [pair for a, b in rows if (pair := paired_values(measure, a, b)) is not None]
    left, right = np.array(pairs, dtype=np.float64).reshape(-1, 2).T
    with np.errstate(invalid="ignore"):
        differences = np.where(left == right, 0.0, right - left)
    middle = float(median(differences)) if pairs else math.nan
    return PairedTest(
        label=rows[0][0].label,
        kind=rows[0][0].kind,
        measure=measure,
        pairs=len(pairs),
        equal=int(np.count_nonzero(differences == 0)),
        mean_a=_finite_mean(left),
        mean_b=_finite_mean(right),
        infinite_a=int(np.isinf(left).sum()),
        infinite_b=int(np.isinf(right).sum()),
        median_difference=middle if math.isfinite(middle) else None,
        ci=median_interval(differences),
        p_wilcoxon=wilcoxon(differences),
        p_permutation=permutation(differences),
        better=_favoured(measure, middle),
    )


def _favoured(measure: str, middle: float) -> Literal["a", "b", "neither"]:
    direction = MEASURES[measure][1] * middle
    return "b" if direction > 0 else "a" if direction < 0 else "neither"


def _corrected(tests: list[PairedTest]) -> list[PairedTest]:
    """Holm over the labels of one measure; a side is better only where both tests then say so."""
    ranks, flips = holm([t.p_wilcoxon for t in tests]), holm([t.p_permutation for t in tests])
    result = []
    for test, by_ranks, by_flips in zip(tests, ranks, flips, strict=True):
        sure = by_ranks is not None and by_flips is not None and max(by_ranks, by_flips) < SIGNIFICANT
        holms = {"p_wilcoxon_holm": by_ranks, "p_permutation_holm": by_flips}
        result.append(test.model_copy(update=holms | {"better": test.better if sure else "neither"}))
    return result


def _check_same_measures(a: Scores, b: Scores) -> None:
    for what, one, other in (
        ("tolerances", (a.tolerance_mm, a.label_tolerances_mm), (b.tolerance_mm, b.label_tolerances_mm)),
        ("labels", [(s.label, s.kind, s.values) for s in a.labels], [(s.label, s.kind, s.values) for s in b.labels]),
    ):
        if one != other:
            raise IncompatibleError(Problem("E0802", f"{what} {one}", f"{other}", "score both sides in the same way"))
    expected = {key: row.true_positives + row.false_negatives for key, row in _by_key(b).items()}
    differ = {
        key[0]
        for key, row in _by_key(a).items()
        if key in expected and expected[key] != row.true_positives + row.false_negatives
    }
    if differ:
        action = "score both sides against the same files"
        raise IncompatibleError(
            Problem("E0802", "the reference has other voxels in A than in B", "", action, case)
            for case in sorted(differ)
        )


def _by_key(scores: Scores) -> dict[Key, CaseScore]:
    return {(row.case, row.label, row.kind): row for row in scores.cases}


def _finite_mean(values: Numbers) -> float | None:
    finite = values[np.isfinite(values)]
    return float(finite.mean()) if finite.size else None


def _named(scores: Scores, name: str) -> Iterable[Problem]:
    return (replace(problem, measured=f"{name}: {problem.measured}") for problem in scores.problems)
