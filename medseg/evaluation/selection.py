"""Selection: which candidate's predictions are worth their cost, from their Dice on the same cases.

The rule. Every candidate is taken as it would predict: with post-processing of its own, which for each case was chosen
on the cases of other folds (``medseg.evaluation.crossfit``), since one that predicts more stray voxels gains more by
it. Candidates are gone through from the cheapest (one network per fold) to the most costly (two cascades); of equal
cost the one with the highest mean Dice counts. A more costly one takes the place of the best so far only if its mean
gain is more than ``MIN_GAIN`` and the 95 % bootstrap interval of that gain, of differences case by case, lies above 0.
An ensemble doubles the time of every future prediction, and the best of many candidates is best by chance as well: a
mean that is higher is no reason yet.

An ensemble is considered only if each of its members alone is at most ``MOST_BEHIND`` behind the best configuration.
A much weaker member helps in cross-validation by removing single wrong voxels, which the mean over folds, that later
predictions have and cross-validation has not, removes as well, and drags the rest down (seen with short trainings on
the hippocampus: two together +0.008 in cross-validation after post-processing, -0.011 on held-out cases). The limit
is a judgement from that one experiment.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from medseg.evaluation.bootstrap import Interval, mean_interval
from medseg.evaluation.crossfit import Dice, Judged
from medseg.records.selection import Candidate

MIN_GAIN = 0.001  # trainings of the same plan with another seed differ by more
MOST_BEHIND = 0.02

Configurations = tuple[str, ...]


def choose_candidate(
    judged: Mapping[Configurations, Judged], networks: Mapping[Configurations, int]
) -> tuple[Configurations, tuple[Candidate, ...], tuple[str, ...]]:
    """Choose by the rule above.

    Args:
        judged: every candidate on the same cases and labels.
        networks: how many networks of a fold each candidate needs for a case.

    Returns:
        the choice; all candidates with their figures, the cheapest first; and one sentence for each decision.
    """
    tables = {name: found.processed for name, found in judged.items()}
    order = sorted(judged, key=lambda name: (networks[name], -_mean(tables[name]), list(judged).index(name)))
    best = order[0]
    candidates, sentences = [_candidate(best, judged[best], networks[best])], []
    same = [name for name in order[1:] if networks[name] == networks[best]]
    against = f", before {', '.join(_titled(n, tables[n]) for n in same)}" if same else ""
    sentences.append(f"Of the cheapest candidates {_titled(best, tables[best])} has the highest mean Dice{against}.")
    level = networks[best]
    for name in order[1:]:
        candidate = _candidate(name, judged[name], networks[name])
        gain, interval = _gain(tables[best], tables[name])
        candidates.append(candidate.model_copy(update={"gain": gain, "gain_ci": interval}))
        if networks[name] == level:
            continue
        if (behind := _behind(name, tables)) is not None:
            sentences.append(behind)
            continue
        level = networks[name]  # the best of its cost comes first: the others of that cost are not asked
        real = gain is not None and interval is not None and gain > MIN_GAIN and interval[0] > 0
        sentences.append(_sentence(name, best, (gain, interval), real))
        best = name if real else best
    return best, tuple(candidates), tuple(sentences)


def _behind(name: Configurations, tables: Mapping[Configurations, Dice]) -> str | None:
    """Why an ensemble is not considered, or None."""
    alone = {member: _mean(tables[member,]) for member in name if len(name) > 1 and (member,) in tables}
    if not alone:
        return None
    best = max(_mean(table) for single, table in tables.items() if len(single) == 1)
    weakest = min(alone, key=lambda member: alone[member])
    lag = best - alone[weakest]
    if lag <= MOST_BEHIND:
        return None
    return f"{' + '.join(name)} is not considered: {weakest} alone is {lag:.4f} behind, more than {MOST_BEHIND:g}."


def _means(table: Dice) -> list[float | None]:
    """The mean over cases of every label; None for one that no case has."""
    return [None if np.isnan(column).all() else float(np.nanmean(column)) for column in table.T]


def _mean(table: Dice) -> float:
    """Mean over labels of the mean over cases; -1 without any number."""
    means = [mean for mean in _means(table) if mean is not None]
    return float(np.mean(means)) if means else -1.0


def _gain(before: Dice, after: Dice) -> tuple[float | None, Interval | None]:
    """Mean gain in Dice and its interval; a structure rightly left out counts as 1 where the other side invents it."""
    neither = np.isnan(before) & np.isnan(after)
    old, new = (np.where(np.isnan(table), 1.0, table) for table in (before, after))
    differences = np.where(neither, np.nan, new - old)
    means = [mean for mean in _means(differences) if mean is not None]
    return (float(np.mean(means)), mean_interval(differences)) if means else (None, None)


def _candidate(name: Configurations, judged: Judged, networks: int) -> Candidate:
    table = judged.processed
    mean, plain = _mean(table), _mean(judged.plain)
    return Candidate(
        configurations=name,
        networks=networks,
        mean_dice=mean if mean >= 0 else None,
        mean_dice_ci=None if np.isnan(table).all() else mean_interval(table),
        mean_dice_unprocessed=plain if plain >= 0 else None,
        dice=dict(zip(judged.labels, _means(table), strict=True)),
    )


def _titled(name: Configurations, table: Dice) -> str:
    return f"{' + '.join(name)} ({_mean(table):.4f})"


def _sentence(
    name: Configurations, best: Configurations, found: tuple[float | None, Interval | None], real: bool
) -> str:
    gain, interval = found
    measured = "nothing to compare" if gain is None else f"mean gain {gain:+.4f}"
    span = (
        "no interval from so few cases"
        if interval is None
        else f"95 % interval {interval[0]:+.4f} to {interval[1]:+.4f}"
    )
    verdict = "taken" if real else "not taken"
    return f"{' + '.join(name)} instead of {' + '.join(best)}: {measured}, {span}: {verdict}."
