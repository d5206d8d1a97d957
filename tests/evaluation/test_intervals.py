"""Bootstrap intervals and paired tests against SciPy, and their degenerate cases."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from scipy import stats

from medseg.evaluation.bootstrap import mean_interval, median, median_interval
from medseg.evaluation.paired import EXACT_RANKS, holm, permutation, signed_ranks, wilcoxon


@pytest.mark.parametrize("cases", [8, 30, 200])
def test_the_interval_of_a_skewed_mean_is_scipys_bca(cases):
    values = 1 - np.random.default_rng(cases).gamma(1.0, 0.08, cases)
    low, high = mean_interval(values)
    expected = stats.bootstrap(
        (values,), np.mean, n_resamples=20000, method="BCa", rng=np.random.default_rng(0)
    ).confidence_interval
    width = expected.high - expected.low
    assert low == pytest.approx(expected.low, abs=0.06 * width)
    assert high == pytest.approx(expected.high, abs=0.06 * width)


def test_the_interval_covers_the_true_mean_about_as_often_as_it_says():
    rng = np.random.default_rng(5)
    inside = 0
    for _ in range(200):
        low, high = mean_interval(rng.gamma(2.0, 1.0, 25))
        inside += low <= 2.0 <= high
    assert 0.87 <= inside / 200 <= 0.99


def test_cases_are_drawn_whole_for_a_mean_over_labels():
    rng = np.random.default_rng(0)
    case_effect = rng.normal(size=40)
    table = np.stack([0.5 + case_effect, 0.7 + case_effect], axis=1)  # labels of a case are good or bad together
    together = np.diff(mean_interval(table))
    alone = np.diff(mean_interval(table[:, 0]))
    assert together == pytest.approx(alone, rel=0.02)
    table[3:, 1] = np.nan
    low, high = mean_interval(table)
    assert low < (np.nanmean(table[:, 0]) + np.nanmean(table[:, 1])) / 2 < high


def test_same_values_give_the_same_interval_every_time_and_equal_ones_a_point():
    values = np.random.default_rng(1).normal(size=17)
    assert mean_interval(values) == mean_interval(values.copy())
    assert mean_interval(np.full(5, 0.25)) == (0.25, 0.25)
    assert mean_interval(np.array([0.5, 0.7, np.nan])) is None
    assert mean_interval(np.array([])) is None


def test_medians_may_be_infinite():
    assert median(np.array([1.0, np.inf, 2.0])) == 2.0
    assert median(np.array([1.0, np.inf])) == np.inf
    assert median(np.array([-np.inf, -np.inf])) == -np.inf
    assert np.isnan(median(np.array([-np.inf, np.inf])))
    assert median(np.array([3.0, 1.0, 2.0, 9.0])) == np.median([3.0, 1.0, 2.0, 9.0])
    assert median_interval(np.array([np.inf, np.inf, np.inf, 0.0])) is None
    low, high = median_interval(np.arange(21.0))
    assert low < 10 < high


@pytest.mark.parametrize("cases", [5, 12, 40])
def test_wilcoxon_without_ties_is_scipys_exact_test(cases):
    differences = np.random.default_rng(cases).normal(0.3, 1, cases)
    assert wilcoxon(differences) == pytest.approx(stats.wilcoxon(differences, method="exact").pvalue)


def test_wilcoxon_with_ties_and_zeros_counts_every_choice_of_signs():
    differences = np.array([0.0, 0.0, 1.0, 1.0, -1.0, 2.0, 3.0, 3.0, -0.5, 4.0])
    ranks = signed_ranks(differences)
    np.testing.assert_array_equal(np.abs(ranks[2:]), stats.rankdata(np.abs(differences))[2:])
    size = np.abs(ranks[ranks != 0])
    observed = abs(ranks.sum())
    extreme = [abs(np.dot(signs, size)) >= observed - 1e-9 for signs in itertools.product((-1, 1), repeat=size.size)]
    assert wilcoxon(differences) == pytest.approx(np.mean(extreme))


def test_many_differences_take_scipys_normal_distribution_with_pratts_zeros():
    differences = np.round(np.random.default_rng(2).normal(0.1, 1, EXACT_RANKS + 50), 1)
    assert (differences == 0).sum() > 3
    expected = stats.wilcoxon(differences, zero_method="pratt", correction=False, method="asymptotic").pvalue
    assert wilcoxon(differences) == pytest.approx(expected, rel=1e-9)
    assert wilcoxon(differences[:EXACT_RANKS]) == pytest.approx(
        stats.wilcoxon(differences[:EXACT_RANKS], zero_method="pratt", method="asymptotic").pvalue, abs=0.005
    )


@pytest.mark.parametrize("cases", [6, 13, 25])
def test_the_permutation_test_is_scipys(cases):
    differences = np.random.default_rng(cases).normal(0.4, 1, cases)
    expected = stats.permutation_test(
        (differences,), np.mean, permutation_type="samples", n_resamples=30000, rng=np.random.default_rng(0)
    ).pvalue
    assert permutation(differences) == pytest.approx(expected, abs=1e-9 if cases <= 13 else 0.015)


def test_infinite_differences_are_the_largest_ranks():
    differences = np.array([0.5, -0.2, 0.3, np.inf, np.inf, 0.1])
    finite = np.array([5.0, -2.0, 3.0, 100.0, 100.0, 1.0])
    assert wilcoxon(differences) == wilcoxon(finite)
    assert permutation(differences) == permutation(signed_ranks(finite))


def test_nothing_to_test_has_no_p_and_no_difference_is_no_evidence():
    for test in (wilcoxon, permutation):
        assert test(np.array([])) is None
        assert test(np.zeros(7)) == 1
        assert test(np.array([0.3])) == 1


def test_holms_correction_by_hand():
    # sorted 0.01 × 4, 0.02 × 3, 0.03 × 2, 0.5 × 1; the third may not fall below the second
    assert holm([0.03, 0.01, 0.5, 0.02]) == pytest.approx([0.06, 0.04, 0.5, 0.06])
    assert holm([None, 0.04, None]) == [None, 0.04, None]
    assert holm([0.9, 0.8]) == [1.0, 1.0]
