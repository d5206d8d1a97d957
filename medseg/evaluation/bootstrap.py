"""Bootstrap: how far a mean or a median could be off by chance of which cases were looked at.

Whole cases are drawn with replacement, always the same draws (seeded), so that equal scores give equal intervals.
"""

from __future__ import annotations

import math
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray
from scipy.special import ndtr, ndtri

Numbers = NDArray[np.float64]
Interval = tuple[float, float]

DRAWS = 2000
LEVEL = 0.95
FEWEST_CASES = 3
_SEED = 20_250_101


def mean_interval(values: Numbers) -> Interval | None:
    """95 % interval of the mean over cases, bias-corrected and accelerated (BCa; Efron, JASA 1987).

    Args:
        values: (cases,) or (cases, labels); nan where a case has no number. With labels: of the mean over labels of
            the mean over cases, labels without any number left out.

    Returns:
        (low, high), or None if fewer than ``FEWEST_CASES`` cases have a number.
    """
    table = values[:, None] if values.ndim == 1 else values
    table = table[~np.isnan(table).all(axis=1)]
    if len(table) < FEWEST_CASES:
        return None
    present = (~np.isnan(table)).astype(np.float64)
    numbers = np.where(present > 0, table, 0)
    counts = _counts(len(table))
    all_sums, all_totals = numbers.sum(axis=0), present.sum(axis=0)
    estimate = float(_mean_over_labels(all_sums, all_totals))
    drawn = _mean_over_labels(counts @ numbers, counts @ present)
    left_out = _mean_over_labels(all_sums - numbers, all_totals - present)  # for each case, all the others
    return _bca(estimate, np.sort(drawn[~np.isnan(drawn)]), left_out[~np.isnan(left_out)])


def median_interval(values: Numbers) -> Interval | None:
    """95 % percentile interval of the median of ``values`` (cases,), which may be infinite.

    Returns:
        (low, high), or None for fewer than ``FEWEST_CASES`` values or if an end is infinite.
    """
    if len(values) < FEWEST_CASES:
        return None
    medians = np.sort(median(values[_draws(len(values))]))
    low, high = (float(medians[round(q * (DRAWS - 1))]) for q in ((1 - LEVEL) / 2, (1 + LEVEL) / 2))
    return (low, high) if math.isfinite(low) and math.isfinite(high) else None


def median(values: Numbers) -> Numbers:
    """Median along the last axis of numbers that may be infinite: -inf and inf in the middle give nan, silently."""
    ordered = np.sort(values, axis=-1)
    size = values.shape[-1]
    low, high = ordered[..., (size - 1) // 2], ordered[..., size // 2]
    with np.errstate(invalid="ignore"):
        return np.where(low == high, low, (low + high) / 2)


def _bca(estimate: float, drawn: Numbers, left_out: Numbers) -> Interval:
    if drawn[0] == drawn[-1]:
        return float(drawn[0]), float(drawn[-1])
    below = (np.count_nonzero(drawn < estimate) + np.count_nonzero(drawn <= estimate)) / (2 * drawn.size)
    bias = float(ndtri(np.clip(below, 1 / drawn.size, 1 - 1 / drawn.size)))
    deviation = left_out.mean() - left_out
    spread = float((deviation**2).sum()) ** 1.5
    acceleration = float((deviation**3).sum()) / (6 * spread) if spread > 0 else 0.0
    ends = []
    for share in ((1 - LEVEL) / 2, (1 + LEVEL) / 2):
        z = bias + float(ndtri(share))
        ends.append(float(np.quantile(drawn, ndtr(bias + z / (1 - acceleration * z)))))
    return ends[0], ends[1]


def _mean_over_labels(sums: Numbers, totals: Numbers) -> Numbers:
    """Mean along the last axis of ``sums / totals``, labels of which there are none left out; nan if that is all."""
    there = totals > 0.5
    means = np.where(there, sums / np.where(there, totals, 1), 0).sum(axis=-1)
    labels = there.sum(axis=-1)
    return np.where(labels > 0, means / np.maximum(labels, 1), np.nan)


@lru_cache(maxsize=4)
def _draws(cases: int) -> NDArray[np.intp]:
    """(DRAWS, cases) indices of cases."""
    return np.random.default_rng(_SEED).integers(0, cases, (DRAWS, cases))


@lru_cache(maxsize=4)
def _counts(cases: int) -> Numbers:
    """(DRAWS, cases) how often each case is drawn."""
    rows = _draws(cases) + np.arange(DRAWS)[:, None] * cases
    return np.bincount(rows.ravel(), minlength=DRAWS * cases).reshape(DRAWS, cases).astype(np.float64)
