"""Comparisons: what counts as a difference, who is left out, and what is refused."""

from __future__ import annotations

import csv

import numpy as np
import pytest
from scipy import stats

from medseg.errors import IncompatibleError, InputError
from medseg.evaluation.comparison import compare
from medseg.evaluation.comparison_tables import comparison_table, pairs_csv, write_comparison
from medseg.evaluation.scores import score_arrays, summarise
from medseg.records.base import read_record
from medseg.records.comparison import Comparison
from medseg.records.scores import Measures, Scores
from medseg.records.task import Channel, Label, Task

SPACING = (2.0, 1.1, 0.9)
TASK = Task(
    channels=(Channel(name="CT"),),
    labels=tuple(Label(name=n, value=v) for n, v in (("background", 0), ("liver", 1), ("spleen", 2))),
)


def body(seed: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    labels = np.zeros((6, 24, 30), np.int16)
    z, y, x = np.mgrid[:6, :24, :30]
    labels[((y - 9) ** 2 + (x - 9) ** 2 < rng.uniform(20, 40)) & (z > 0)] = 1
    labels[((y - 15) ** 2 + (x - 21) ** 2 < rng.uniform(12, 25)) & (z < 5)] = 2
    return labels


def scores_of(predictions: dict[str, np.ndarray], references: dict[str, np.ndarray], mm: float = 1.0) -> Scores:
    measures = Measures(tolerance_mm=mm)
    rows = [r for c, p in predictions.items() for r in score_arrays(p, references[c], SPACING, TASK, measures, c)]
    return summarise(rows, TASK, measures)


def methods(cases: int) -> tuple[Scores, Scores]:
    """B moves liver and spleen by one voxel, A the liver by one or two."""
    references = {f"case_{i:02d}": body(i) for i in range(cases)}
    a, b = {}, {}
    for i, (case, labels) in enumerate(references.items()):
        liver, spleen = labels * (labels == 1), labels * (labels == 2)
        a[case] = np.maximum(np.roll(liver, 1 + i % 2, axis=1), np.roll(spleen, 1, axis=2))
        b[case] = np.maximum(np.roll(liver, i % 2, axis=1), np.roll(spleen, 1 - 2 * (i % 2), axis=2))
    return scores_of(a, references), scores_of(b, references)


def test_the_better_method_is_found_for_the_label_that_it_is_better_for():
    a, b = methods(12)
    tests = {(t.label, t.measure): t for t in compare(a, b).tests}
    assert list(tests) == [(n, m) for m in ("dice", "nsd", "hd95_mm") for n in ("liver", "spleen")]
    for measure in ("dice", "hd95_mm"):
        test = tests["liver", measure]
        left, right = ([getattr(r, measure) for r in s.cases if r.label == "liver"] for s in (a, b))
        assert (test.pairs, test.better) == (12, "b")
        assert test.median_difference == pytest.approx(np.median(np.subtract(right, left)))
        assert test.mean_a == pytest.approx(np.mean(left))
        expected = stats.permutation_test(
            (np.subtract(right, left),), np.mean, permutation_type="samples", n_resamples=np.inf
        ).pvalue
        assert test.p_permutation == pytest.approx(expected)
        assert test.p_permutation_holm == pytest.approx(min(1, 2 * expected))
        assert test.ci[0] <= test.median_difference <= test.ci[1]
    assert tests["spleen", "dice"].better == "neither"


def test_swapping_the_sides_swaps_the_result():
    a, b = methods(9)
    for forth, back in zip(compare(a, b).tests, compare(b, a).tests, strict=True):
        assert back.p_wilcoxon == pytest.approx(forth.p_wilcoxon)
        assert back.p_permutation == pytest.approx(forth.p_permutation)
        assert back.median_difference == pytest.approx(-forth.median_difference)
        assert {forth.better, back.better} in ({"a", "b"}, {"neither"})


def absent_structures() -> tuple[Scores, Scores]:
    empty = np.zeros((3, 5, 6), np.int16)
    dot = empty.copy()
    dot[1, 2, 3] = 1
    references = {"both empty": empty, "a invents": empty, "b misses": dot, "both miss": dot, "same": dot}
    a = {"both empty": empty, "a invents": dot, "b misses": dot, "both miss": empty, "same": dot}
    b = {"both empty": empty, "a invents": empty, "b misses": empty, "both miss": empty, "same": dot}
    return scores_of(a, references), scores_of(b, references)


def test_absent_structures_are_differences_too():
    tests = {(t.label, t.measure): t for t in compare(*absent_structures()).tests}
    dice, distance = tests["liver", "dice"], tests["liver", "hd95_mm"]
    assert (dice.pairs, dice.equal) == (4, 2)  # only the case without the label anywhere says nothing
    assert (dice.mean_a, dice.mean_b) == (0.5, 0.5)  # 0, 1, 0, 1 and 1, 0, 0, 1: the rightly empty side has 1
    assert (distance.infinite_a, distance.infinite_b, distance.equal) == (2, 2, 2)
    assert (distance.median_difference, distance.p_wilcoxon, distance.p_permutation) == (0.0, 1.0, 1.0)
    nothing = tests["spleen", "dice"]
    assert (nothing.pairs, nothing.p_wilcoxon, nothing.better) == (0, None, "neither")


def test_the_csv_has_every_case_with_both_values(tmp_path):
    a, b = absent_structures()
    rows = {(r["case"], r["label"]): r for r in csv.DictReader(pairs_csv(a, b).splitlines())}
    row = rows["a invents", "liver"]
    assert (row["status_a"], row["status_b"]) == ("spurious", "both empty")
    assert (row["dice_difference"], row["hd95_mm_a"], row["hd95_mm_difference"]) == ("1.0", "inf", "-inf")
    assert rows["both miss", "liver"]["hd95_mm_difference"] == "0.0"
    assert rows["both empty", "liver"]["dice_a"] == ""
    comparison = compare(a, b, ("one", "other"))
    assert set(write_comparison(comparison, a, b, tmp_path / "c.json")) == {"c.json", "c.csv"}
    assert read_record(tmp_path / "c.json", Comparison) == comparison
    header, *lines = comparison_table(comparison)
    assert {len(line) for line in lines} == {len(header)}
    assert "0.00 (2 infinite)" in lines[4]


def test_cases_of_one_side_are_named_and_left_out():
    a, b = methods(4)
    less = b.model_copy(update={"cases": tuple(r for r in b.cases if r.case != "case_01")})
    comparison = compare(a, less)
    assert (comparison.only_a, comparison.only_b, len(comparison.cases)) == (("case_01",), (), 3)
    assert {t.pairs for t in comparison.tests} == {3}
    assert pairs_csv(a, less).count("not scored") == 2
    assert pairs_csv(less, a).count("not scored") == 2
    none = b.model_copy(update={"cases": ()})
    with pytest.raises(InputError, match="E0146"):
        compare(a, none)


def test_sides_that_were_not_scored_alike_are_refused():
    references = {"case": body(0)}
    a = scores_of(references, references)
    with pytest.raises(IncompatibleError, match=r"E0802.*tolerances"):
        compare(a, scores_of(references, references, mm=2.0))
    with pytest.raises(IncompatibleError, match=r"E0802.*labels"):
        compare(a, a.model_copy(update={"labels": a.labels[:1]}))
    other = {"case": np.roll(body(1), 1, axis=1)}
    with pytest.raises(IncompatibleError, match="case=case: the reference has other voxels"):
        compare(a, scores_of(references, other))
