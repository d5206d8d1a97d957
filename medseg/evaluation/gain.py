"""Gain: whether predictions made in another way are better beyond chance, by the rule that post-processing keeps."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from medseg.evaluation.crossfit import Dice, Judged
from medseg.evaluation.paired import permutation
from medseg.evaluation.postprocessing import MIN_GAIN
from medseg.evaluation.steps import SIGNIFICANT

_ROUNDING = 1e-9


def real_gain(what: str, before: Judged, after: Judged) -> tuple[bool, str]:
    """Whether ``after`` is to be kept, and a sentence about it: both of the same cases, post-processed by other folds.

    The mean Dice must rise by more than ``MIN_GAIN``, that of no label (region) may fall, and a permutation test of the
    cases' differences stays below ``SIGNIFICANT``. Where both masks are empty a case counts as 1.
    """
    old, new = mean_dice(before.processed), mean_dice(after.processed)
    differences = np.where(np.isnan(after.processed), 1.0, after.processed)
    differences = differences - np.where(np.isnan(before.processed), 1.0, before.processed)
    p = permutation(differences.mean(axis=1))
    assert p is not None  # there are cases
    falling = [name for name, d in zip(before.labels, differences.mean(axis=0), strict=True) if d < -_ROUNDING]
    kept = bool(differences.mean() > MIN_GAIN and p < SIGNIFICANT and not falling)
    told = f"mean Dice {old:.4f} → {new:.4f}, p = {p:.2g}"
    told += f", but {', '.join(falling[:5])} would fall" if falling else ""
    better, worse = int((differences.mean(axis=1) > 0).sum()), int((differences.mean(axis=1) < 0).sum())
    return kept, f"{what}: {told}, {better} cases better, {worse} worse: {'yes' if kept else 'no'}."


def mean_dice(dice: Dice) -> float:
    """Mean over labels of the mean over cases; nan where nothing was there."""
    means: NDArray[np.float64] = np.array([row[~np.isnan(row)].mean() for row in dice.T if not np.isnan(row).all()])
    return float(means.mean()) if len(means) else float("nan")
