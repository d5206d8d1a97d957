"""Dealing: groups of cases onto folds, so that the folds hold equal numbers of cases, and of cases with each label."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial

import numpy as np


@dataclass(frozen=True, slots=True)
class Unit:
    """Cases that stay together, and how many of them have each label (only labels that are worth spreading)."""

    cases: tuple[str, ...]
    labels: Mapping[int, int] = field(default_factory=dict)


def shuffle(count: int, seed: int) -> list[int]:
    """0 … count - 1 in random order, as scikit-learn draws it; global state is untouched."""
    order = np.arange(count)
    np.random.RandomState(seed).shuffle(order)
    return [int(place) for place in order]


def deal_evenly(units: Sequence[Unit], folds: int, seed: int) -> list[list[Unit]]:
    """Shuffled units, cut into parts that differ by at most one, the larger first: scikit-learn's ``KFold``."""
    return [[units[place] for place in part] for part in np.array_split(shuffle(len(units), seed), folds)]


def deal_balanced(units: Sequence[Unit], folds: int, seed: int) -> list[list[Unit]]:
    """Units onto folds: first those with the rarest label, last those with none; deterministic for a seed.

    The iterative stratification of Sechidis, Tsoumakas and Vlahavas (ECML PKDD 2011), for units instead of samples:
    take the label that the fewest cases yet to be dealt have; deal its units, those with most of it first, each to
    the fold that lacks most of the label, then most cases. A fold that the unit would overfill is passed over while
    another would be overfilled less; so folds of single cases have exactly the sizes that ``KFold`` gives them. Units
    without labels go, the largest first, to the fold with most room. Every fold gets at least one unit.

    Args:
        units: at least as many as ``folds``.
        folds: at least 1.
        seed: of the order among units that are equal in this.
    """
    table = _Table(units, folds)
    waiting = [units[place] for place in shuffle(len(units), seed)]
    while waiting:
        label = _rarest(waiting)
        chosen = waiting if label is None else [unit for unit in waiting if unit.labels.get(label)]
        rest = [] if label is None else [unit for unit in waiting if not unit.labels.get(label)]
        for dealt, unit in enumerate(sorted(chosen, key=partial(_most_first, label=label))):
            table.deal(unit, label, len(waiting) - dealt)
        waiting = rest
    return table.dealt


def _most_first(unit: Unit, label: int | None) -> tuple[int, int]:
    """Sorts units with most of the label, then with most cases, to the front."""
    return (0 if label is None else -unit.labels[label]), -len(unit.cases)


def _rarest(waiting: Sequence[Unit]) -> int | None:
    """The label that the fewest cases have, the lowest of several; None if none has any."""
    total: dict[int, int] = {}
    for unit in waiting:
        for label, cases in unit.labels.items():
            if cases:
                total[label] = total.get(label, 0) + cases
    return min(total, key=lambda label: (total[label], label)) if total else None


class _Table:
    """The folds while they are dealt: what each holds, and what it still lacks."""

    def __init__(self, units: Sequence[Unit], folds: int) -> None:
        cases = sum(len(unit.cases) for unit in units)
        labels = {label for unit in units for label in unit.labels}
        total = {label: sum(unit.labels.get(label, 0) for unit in units) for label in labels}
        self.dealt: list[list[Unit]] = [[] for _ in range(folds)]
        self.room = [math.ceil((cases - fold) / folds) for fold in range(folds)]  # as np.array_split cuts
        self.lack = {label: [total[label] / folds] * folds for label in labels}

    def deal(self, unit: Unit, label: int | None, waiting: int) -> None:
        """Put a unit into the fold that needs it most; ``waiting`` units, with it, are yet to be dealt."""
        empty = [fold for fold, units in enumerate(self.dealt) if not units]
        folds = empty if len(empty) >= waiting else range(len(self.dealt))
        size = len(unit.cases)

        def need(fold: int) -> tuple[float, float, float, int]:
            overflow = max(0, size - self.room[fold])
            lack = self.lack[label][fold] if label is not None else 0.0
            return -overflow, lack, self.room[fold], -fold

        best = max(folds, key=need)
        self.dealt[best].append(unit)
        self.room[best] -= size
        for each, cases in unit.labels.items():
            self.lack[each][best] -= cases
