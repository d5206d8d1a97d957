"""Flags: cases that a person should look at first, and why."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from medseg.records.fingerprint import Fingerprint
from medseg.records.run import CaseOutcome
from medseg.records.scores import CaseScore
from medseg.records.task import Task

FAR = 3.5
"""Modified z-score of an outlier: Iglewicz and Hoaglin, How to detect and handle outliers (1993)."""
ENOUGH_CASES = 8  # with a structure, before its volumes are called a distribution
USUAL = 0.95  # share of the training cases in which a structure is usual
LEAST_QUALITY = 0.7  # expected Dice below which a prediction is flagged
LEAST_SPREAD = 0.05  # of the logarithm of a volume: differences of 5 % are never remarkable

RULES = (
    f"Volumes are compared with those of the training cases: a volume is unexpected if the modified z-score of its "
    f"logarithm exceeds {FAR} (Iglewicz and Hoaglin, 1993), given at least {ENOUGH_CASES} training cases with the "
    f"structure. A structure is missing if it was not found though {USUAL:.0%} of the training cases have it. With "
    f"references, missed and spurious structures are named as such. Where predictions were made with --uncertainty, "
    f"those with an expected Dice below {LEAST_QUALITY:g} are uncertain: their networks doubt or disagree. A flag is a "
    "reason to look, not a verdict."
)


@dataclass(frozen=True, slots=True)
class Flag:
    """One reason to look at a case; ``weight`` orders flags, the largest first."""

    case: str
    label: str
    reason: str
    text: str
    weight: float


@dataclass(frozen=True, slots=True)
class Usual:
    """Volumes in ml of one structure over the training cases that have it, and the share of the cases that do."""

    volumes_ml: tuple[float, ...]
    share: float

    def distance(self, volume_ml: float) -> float:
        """Modified z-score of the logarithm of a positive volume; 0 if there are too few training cases."""
        if len(self.volumes_ml) < ENOUGH_CASES:
            return 0.0
        logs = np.log(self.volumes_ml)
        middle = float(np.median(logs))
        spread = max(1.4826 * float(np.median(np.abs(logs - middle))), LEAST_SPREAD)
        return abs(math.log(volume_ml) - middle) / spread


def usual_volumes(fingerprint: Fingerprint, task: Task) -> dict[str, Usual]:
    """The training distribution of each foreground label and each region, by name."""
    groups: dict[str, tuple[int, ...]] = {label.name: (label.value,) for label in task.foreground}
    groups |= {region.name: region.values for region in task.regions}
    usual = {}
    for name, values in groups.items():
        volumes = [
            sum(case.voxels_per_label.get(v, 0) for v in values) * math.prod(case.spacing_mm) / 1000
            for case in fingerprint.cases
        ]
        there = tuple(v for v in volumes if v > 0)
        usual[name] = Usual(there, len(there) / len(volumes))
    return usual


def flags_of_scores(rows: Sequence[CaseScore], usual: Mapping[str, Usual]) -> list[Flag]:
    """Flags of cases with references, the gravest first."""
    found = []
    for row in rows:
        if row.status == "missed":
            text = f"not found, the reference has {_ml(row.reference_ml)}"
            found.append(Flag(row.case, row.label, "missed", text, 1000 + row.reference_ml))
        elif row.status == "spurious":
            text = f"{_ml(row.prediction_ml)} found, the reference has none"
            found.append(Flag(row.case, row.label, "spurious", text, 900 + row.prediction_ml))
        elif row.status == "ok" and (flag := _volume(row.case, row.label, row.prediction_ml, usual)):
            text = f"{flag.text}, the reference {_ml(row.reference_ml)}"
            found.append(Flag(row.case, row.label, flag.reason, text, flag.weight))
    return ordered(found)


def flags_of_volumes(volumes_ml: Mapping[str, Mapping[str, float]], usual: Mapping[str, Usual]) -> list[Flag]:
    """Flags of cases without references, the gravest first; ``volumes_ml`` by case and structure."""
    found = []
    for case, structures in volumes_ml.items():
        for label, volume in structures.items():
            flag = _volume(case, label, volume, usual) if volume > 0 else _missing(case, label, usual)
            if flag is not None:
                found.append(flag)
    return ordered(found)


def flags_of_quality(cases: Iterable[CaseOutcome]) -> list[Flag]:
    """Flags of predictions whose own probabilities promise little, where ``predict`` was asked for their quality."""
    return [
        Flag(
            case.id,
            "",
            "uncertain",
            f"expected Dice {case.quality:.2f}, from the networks' probabilities",
            800 - case.quality,
        )
        for case in cases
        if case.quality is not None and case.quality < LEAST_QUALITY
    ]


def ordered(flags: Sequence[Flag]) -> list[Flag]:
    """The gravest first, else by name."""
    return sorted(flags, key=lambda f: (-f.weight, f.case, f.label))


def _volume(case: str, label: str, volume_ml: float, usual: Mapping[str, Usual]) -> Flag | None:
    known = usual.get(label)
    if known is None or (distance := known.distance(volume_ml)) <= FAR:
        return None
    middle = float(np.median(known.volumes_ml))
    size = "large" if volume_ml > middle else "small"
    spread = f"{min(known.volumes_ml):.3g}–{_ml(max(known.volumes_ml))}"
    text = f"{_ml(volume_ml)} found, training cases have {spread}"
    return Flag(case, label, f"unexpectedly {size}", text, distance)


def _missing(case: str, label: str, usual: Mapping[str, Usual]) -> Flag | None:
    known = usual.get(label)
    if known is None or known.share < USUAL or len(known.volumes_ml) < ENOUGH_CASES:
        return None
    text = f"not found, {known.share:.0%} of the training cases have it"
    return Flag(case, label, "missing", text, 1000 * known.share)


def _ml(volume: float) -> str:
    return f"{volume:.3g} ml"
