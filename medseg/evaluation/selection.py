"""Selection: which candidate's predictions are worth their cost, from scores on the same cases.

The rule. Candidates are gone through from the cheapest (one network per fold) to the most costly (two cascades); of
equal cost the one with the highest mean Dice counts. A more costly one takes the place of the best so far only if its
mean gain is more than ``MIN_GAIN`` and the 95 % bootstrap interval of that gain, of differences case by case, lies
above 0. An ensemble doubles the time of every future prediction, and the best of many candidates is best by chance as
well: a mean that is higher is no reason yet.

An ensemble is considered only if each of its members alone is at most ``MOST_BEHIND`` behind the best configuration.
A much weaker member helps in cross-validation by removing single wrong voxels, which post-processing, chosen
afterwards, and the mean over folds remove as well, and drags the rest down (seen with short trainings on the
hippocampus, the weaker member 0.104 behind: +0.033 in cross-validation, of which post-processing of both left +0.008;
-0.011 on held-out cases). The limit is a judgement from that one experiment.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from medseg.evaluation.bootstrap import mean_interval
from medseg.evaluation.comparison import paired_values
from medseg.records.scores import CaseScore
from medseg.records.selection import Candidate

MIN_GAIN = 0.001  # trainings of the same plan with another seed differ by more
MOST_BEHIND = 0.02

Configurations = tuple[str, ...]
Rows = Sequence[CaseScore]


def choose_candidate(
    rows: Mapping[Configurations, Rows], networks: Mapping[Configurations, int]
) -> tuple[Configurations, tuple[Candidate, ...], tuple[str, ...]]:
    """Choose by the rule above.

    Args:
        rows: scores of every candidate on the same cases and targets.
        networks: how many networks of a fold each candidate needs for a case.

    Returns:
        the choice; all candidates with their figures, the cheapest first; and one sentence for each decision.
    """
    tables = {name: dice_table(found) for name, found in rows.items()}
    order = sorted(rows, key=lambda name: (networks[name], -_mean(tables[name]), list(rows).index(name)))
    best = order[0]
    candidates, sentences = [_candidate(best, rows[best], networks[best])], []
    same = [name for name in order[1:] if networks[name] == networks[best]]
    against = f", before {', '.join(_titled(n, tables[n]) for n in same)}" if same else ""
    sentences.append(f"Of the cheapest candidates {_titled(best, tables[best])} has the highest mean Dice{against}.")
    level = networks[best]
    for name in order[1:]:
        candidate = _candidate(name, rows[name], networks[name])
        gain, interval = _gain(rows[best], rows[name])
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


def _behind(name: Configurations, tables: Mapping[Configurations, NDArray[np.float64]]) -> str | None:
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


def dice_table(rows: Rows) -> NDArray[np.float64]:
    """Dice (cases, targets) of labels, or of regions where there are any; nan where both masks are empty."""
    return _table(rows, {(row.case, row.label): row.dice for row in _main(rows)})


def _table(rows: Rows, values: Mapping[tuple[str, str], float | None]) -> NDArray[np.float64]:
    main = _main(rows)
    cases, labels = (list(dict.fromkeys(getattr(row, field) for row in main)) for field in ("case", "label"))
    table = np.full((len(cases), len(labels)), np.nan)
    for (case, label), value in values.items():
        if value is not None:
            table[cases.index(case), labels.index(label)] = value
    return table


def _main(rows: Rows) -> list[CaseScore]:
    kind = "region" if any(row.kind == "region" for row in rows) else "label"
    return [row for row in rows if row.kind == kind]


def _mean(table: NDArray[np.float64]) -> float:
    """Mean over labels of the mean over cases; -1 without any number."""
    means = [column[~np.isnan(column)].mean() for column in table.T if not np.isnan(column).all()]
    return float(np.mean(means)) if means else -1.0


def _gain(before: Rows, after: Rows) -> tuple[float | None, tuple[float, float] | None]:
    """Mean gain in Dice and its interval; a structure rightly left out counts as 1 where the other side invents it."""
    old = {(row.case, row.label): row for row in _main(before)}
    pairs = {(row.case, row.label): paired_values("dice", old[row.case, row.label], row) for row in _main(after)}
    differences = _table(after, {key: None if pair is None else pair[1] - pair[0] for key, pair in pairs.items()})
    if np.isnan(differences).all():
        return None, None
    means = [column[~np.isnan(column)].mean() for column in differences.T if not np.isnan(column).all()]
    return float(np.mean(means)), mean_interval(differences)


def _candidate(name: Configurations, rows: Rows, networks: int) -> Candidate:
    table = dice_table(rows)
    labels = list(dict.fromkeys(row.label for row in _main(rows)))
    means = [None if np.isnan(c).all() else float(np.nanmean(c)) for c in table.T]
    mean = _mean(table)
    return Candidate(
        configurations=name,
        networks=networks,
        mean_dice=mean if mean >= 0 else None,
        mean_dice_ci=None if np.isnan(table).all() else mean_interval(table),
        dice=dict(zip(labels, means, strict=True)),
    )


def _titled(name: Configurations, table: NDArray[np.float64]) -> str:
    return f"{' + '.join(name)} ({_mean(table):.4f})"


def _sentence(
    name: Configurations, best: Configurations, found: tuple[float | None, tuple[float, float] | None], real: bool
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
