"""Tables of a comparison: the tests as JSON and for the console, the compared values as CSV."""

from __future__ import annotations

import math
from pathlib import Path

from medseg.artefacts import commit
from medseg.evaluation.comparison import MEASURES, paired_values
from medseg.evaluation.tables import Row, csv_of
from medseg.records.base import write_record
from medseg.records.comparison import Comparison, PairedTest
from medseg.records.scores import Scores

_TITLES = {"dice": ("Dice", 4), "nsd": ("NSD", 4), "hd95_mm": ("HD95 mm", 2)}


def write_comparison(comparison: Comparison, a: Scores, b: Scores, json_path: Path) -> dict[str, str]:
    """Commit the tests as JSON and the values that they compare as CSV beside it; return SHA-256 by file name."""
    csv_path = Path(json_path).with_suffix(".csv")
    return {
        csv_path.name: commit(csv_path, pairs_csv(a, b).encode()),
        Path(json_path).name: write_record(json_path, comparison),
    }


def pairs_csv(a: Scores, b: Scores) -> str:
    """One row per case and label with both sides' values and their difference; a case of one side has one status."""
    rows_b = {(row.case, row.label, row.kind): row for row in b.cases}
    header = ["case", "label", "kind", "status_a", "status_b"]
    header += [f"{measure}_{what}" for measure in MEASURES for what in ("a", "b", "difference")]
    found: list[list[object]] = []
    for row in a.cases:
        other = rows_b.pop((row.case, row.label, row.kind), None)
        cells: list[object] = [row.case, row.label, row.kind, row.status, other.status if other else "not scored"]
        for measure in MEASURES:
            pair = paired_values(measure, row, other) if other else None
            cells += [None] * 3 if pair is None else [*pair, 0.0 if pair[0] == pair[1] else pair[1] - pair[0]]
        found.append(cells)
    empty = [None] * (3 * len(MEASURES))
    found += [[row.case, row.label, row.kind, "not scored", row.status, *empty] for row in rows_b.values()]
    return csv_of([header, *found])


def comparison_table(comparison: Comparison) -> list[Row]:
    """Header and one row per label and measure for people to read."""
    header = ("label", "measure", "pairs", "mean A", "mean B", "median B - A (95 % CI)")
    tests = ("Wilcoxon p", "permutation p", "after Holm", "better")
    return [(*header, *tests), *(_row(test) for test in comparison.tests)]


def _row(test: PairedTest) -> Row:
    title, digits = _TITLES[test.measure]
    middle = "n/a" if test.median_difference is None else f"{test.median_difference:+.{digits}f}"
    if test.ci is not None:
        middle += f" ({test.ci[0]:+.{digits}f} to {test.ci[1]:+.{digits}f})"
    holm = f"{_p(test.p_wilcoxon_holm)}, {_p(test.p_permutation_holm)}"
    return (
        *(test.label, title, str(test.pairs)),
        *(_mean(test.mean_a, test.infinite_a, digits), _mean(test.mean_b, test.infinite_b, digits), middle),
        *(_p(test.p_wilcoxon), _p(test.p_permutation), holm),
        {"a": "A", "b": "B", "neither": "-"}[test.better],
    )


def _mean(value: float | None, infinite: int, digits: int) -> str:
    text = "n/a" if value is None else f"{value:.{digits}f}"
    return f"{text} ({infinite} infinite)" if infinite else text


def _p(value: float | None) -> str:
    if value is None or math.isnan(value):
        return "n/a"
    return "< 0.0001" if value < 1e-4 else f"{value:.4f}"
