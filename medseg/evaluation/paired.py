"""Paired tests: whether differences between two methods on the same cases could be chance.

Both are two-sided and ask whether the differences (cases,) are symmetric about 0; neither supposes a normal
distribution. Differences may be infinite, not nan.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray
from scipy.special import ndtr

Numbers = NDArray[np.float64]

EXACT_RANKS = 200  # the exact distribution has n(n + 1) + 1 values: 40 000 here, some milliseconds
EXACT_FLIPS = 13  # 2^13 choices of signs are fewer than RANDOM_FLIPS
RANDOM_FLIPS = 9999
_SEED = 20_250_102
_ROUNDING = 1e-9


def signed_ranks(differences: Numbers) -> Numbers:
    """Ranks of the differences' sizes with their signs; equal sizes share the mean rank, zeros are ranked and then 0.

    Pratt (JASA 1959): leaving zeros out before ranking can turn a result round.
    """
    _, place, counts = np.unique(np.abs(differences), return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    ranks = (last - (counts - 1) / 2)[place.reshape(differences.shape)]
    return np.sign(differences) * ranks


def wilcoxon(differences: Numbers) -> float | None:
    """The p value of the Wilcoxon signed-rank test with Pratt's zeros; None without differences, 1 if all are 0.

    Exact, with ties too, up to ``EXACT_RANKS`` differences; else by the normal distribution, without continuity
    correction.
    """
    if differences.size == 0:
        return None
    ranks = signed_ranks(differences)
    size = np.abs(ranks[ranks != 0])
    if size.size == 0:
        return 1.0
    off = abs(float(ranks.sum())) / 2  # of the sum of positive ranks from its mean
    if differences.size > EXACT_RANKS:
        return float(2 * ndtr(-off / math.sqrt((size**2).sum() / 4)))
    doubled = np.rint(2 * size).astype(np.int64)  # mean ranks are multiples of a half
    chances = np.zeros(int(doubled.sum()) + 1)
    chances[0] = 1.0
    for step in doubled:
        chances[step:] = (chances[step:] + chances[:-step]) / 2
        chances[:step] /= 2
    sums = np.arange(chances.size) / 2
    return float(min(1.0, chances[np.abs(sums - size.sum() / 2) >= off - _ROUNDING].sum()))


def permutation(differences: Numbers) -> float | None:
    """The p value of flipping the signs of the differences and taking their mean; None without differences.

    Every choice of signs up to ``EXACT_FLIPS`` differences, else ``RANDOM_FLIPS`` seeded ones with the observed one
    among them (Phipson and Smyth 2010: p is never 0). Where a difference is infinite, signed ranks take their place.
    """
    if differences.size == 0:
        return None
    values = differences if np.isfinite(differences).all() else signed_ranks(differences)
    observed = abs(float(values.sum()))
    signs = _all_signs(values.size) if values.size <= EXACT_FLIPS else _random_signs(values.size)
    extreme = int(np.count_nonzero(np.abs(signs @ values) >= observed - _ROUNDING * max(1.0, observed)))
    if values.size <= EXACT_FLIPS:
        return extreme / len(signs)
    return (extreme + 1) / (len(signs) + 1)


def holm(p_values: Sequence[float | None]) -> list[float | None]:
    """Correct p values for their number (Holm, Scandinavian Journal of Statistics 1979); None stays, uncounted."""
    order = sorted((p, index) for index, p in enumerate(p_values) if p is not None)
    corrected: list[float | None] = [None] * len(p_values)
    largest = 0.0
    for rank, (p, index) in enumerate(order):
        largest = max(largest, min(1.0, p * (len(order) - rank)))
        corrected[index] = largest
    return corrected


@lru_cache(maxsize=16)
def _all_signs(size: int) -> Numbers:
    bits = np.arange(2**size)[:, None] >> np.arange(size) & 1
    return (1 - 2 * bits).astype(np.float64)


@lru_cache(maxsize=4)
def _random_signs(size: int) -> Numbers:
    return (2 * np.random.default_rng(_SEED).integers(0, 2, (RANDOM_FLIPS, size)) - 1).astype(np.float64)
