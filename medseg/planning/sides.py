"""Sides: labels that tell left from right, and so what mirroring that axis does to them.

A network trained on images mirrored left to right cannot learn which of two kidneys is the left one: it has seen either
on both sides, under the same name. Where labels are each other's mirror image, they change places with the image;
where that is not certain, the axis is not mirrored at all.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np
from numpy.typing import NDArray

from medseg.planning.presets import Preset
from medseg.records.fingerprint import CasePrint, Fingerprint
from medseg.records.grid import Int3
from medseg.records.plan import Reason
from medseg.records.task import Label, Task
from medseg.records.training import Laterality

LEFT_RIGHT = 2  # the axis of canonical arrays (z, y, x) that runs from left to right
WORDS = {
    "left": "left", "l": "left", "lt": "left", "lh": "left", "sin": "left", "sinistra": "left", "sinister": "left",
    "right": "right", "r": "right", "rt": "right", "rh": "right", "dex": "right", "dextra": "right", "dexter": "right",
}  # fmt: skip
AGREED = 0.95  # share of the cases in which a label lies on its side: a mistake or two are forgiven
STRAIGHT = 0.5  # mirror images lie at most this much up or forward of each other, in shares of their distance
ALIKE = 1.25  # ratio of volumes up to which unnamed labels may be mirror images
ENOUGH_CASES = 3  # that must agree, where names do not tell

_Pairs = tuple[tuple[int, int], ...]


@dataclass(frozen=True, slots=True)
class Sides:
    """What mirroring means: ``pairs`` of class indices change places, or (``keep``) the axis is left alone.

    ``axis`` is that of the transposed array; None where mirroring changes nothing.
    """

    axis: int | None = None
    pairs: _Pairs = ()

    def mirroring(self, dimensions: int) -> tuple[tuple[int, ...], Laterality | None]:
        """``mirror_axes`` and ``laterality`` of a configuration; 2D does not see the first axis."""
        axis = None if self.axis is None else self.axis - (3 - dimensions)
        axes = tuple(range(dimensions))
        if axis is None or axis < 0:
            return axes, None
        if not self.pairs:
            return tuple(a for a in axes if a != axis), None
        return axes, Laterality(axis=axis, pairs=self.pairs)


def find_sides(task: Task, fingerprint: Fingerprint, order: Int3, preset: Preset) -> tuple[Sides, Reason]:
    """Which labels are left and right of each other, by their names and by where they lie.

    Named pairs (``kidney left``, ``kidney_r``) count if they lie on opposite sides; heart chambers, one of which is in
    front of the other, are no mirror images. Labels without such names count if in all cases one lies across from
    another of its size; then the axis is only dropped. So it is where a named label has no counterpart.

    Args:
        task: its labels.
        fingerprint: centres and volumes of the labels.
        order: of the axes in the prepared arrays.
        preset: ``laterality``.
    """
    axis = order.index(LEFT_RIGHT)
    if preset.laterality == "mirror":
        return Sides(), _reason("all axes are mirrored, whatever the labels")
    named, single = _named(task.foreground)
    across = {pair: _across(_steps(fingerprint.cases, *pair)) for pair in named}
    pairs = tuple(pair for pair, straight in across.items() if straight is not False)
    text = _listed(task, pairs)
    if single:
        names = ", ".join(sorted(label.name for label in single)[:5])
        return Sides(axis), _reason(f"left and right are not mirrored: {names} has no counterpart on the other side")
    if pairs and preset.laterality == "swap" and all(across[pair] for pair in pairs):
        sides = Sides(axis, _indices(task, pairs))
        if _regions_agree(task, sides):
            return sides, _reason(f"mirroring left and right exchanges {text}")
        return Sides(axis), _reason(f"left and right are not mirrored: {text}, and regions that are not symmetric")
    if pairs:
        return Sides(axis), _reason(f"left and right are not mirrored: labels tell them apart ({text})")
    found = _unnamed(task.foreground, fingerprint.cases)
    if found:
        return Sides(axis), _reason(
            f"left and right are not mirrored: in all cases {_listed(task, found)} face each other"
        )
    return Sides(), _reason("all axes are mirrored: no labels are each other's mirror image")


def _reason(text: str) -> Reason:
    return Reason(topic="mirroring", text=text)


def _named(labels: Sequence[Label]) -> tuple[list[tuple[int, int]], list[Label]]:
    """Values of labels whose names differ in the side only; and labels called left or right without a counterpart."""
    by_name: dict[tuple[str, ...], dict[str, Label]] = {}
    for label in labels:
        words = re.findall(r"[a-z0-9]+", re.sub(r"(?<=[a-z])(?=[A-Z])", " ", label.name).lower())  # L1 is a vertebra
        sides = {WORDS[word] for word in words if word in WORDS}
        if len(sides) == 1 and any(word not in WORDS for word in words):
            rest = tuple("" if word in WORDS else word for word in words)
            by_name.setdefault(rest, {})[sides.pop()] = label
    pairs = [(found["left"].value, found["right"].value) for found in by_name.values() if len(found) == 2]
    single = [
        label
        for found in by_name.values()
        if len(found) == 1
        for side, label in found.items()
        if side in label.name.lower()
    ]
    return pairs, single


def _steps(cases: Sequence[CasePrint], left: int, right: int) -> NDArray[np.float64]:
    """(cases, 3): from the centre of one label to that of the other, in the cases that have both."""
    both = [case.label_centres_mm for case in cases if {left, right} <= case.label_centres_mm.keys()]
    return np.array([np.subtract(centres[right], centres[left]) for centres in both]).reshape(-1, 3)


def _across(steps: NDArray[np.float64]) -> bool | None:
    """Whether two labels lie straight across from each other, always on the same sides; None if never measured."""
    if not len(steps):
        return None
    same_side = np.mean(np.sign(steps[:, 2]) == np.sign(np.median(steps[:, 2])))
    z, y, x = np.median(np.abs(steps), axis=0)
    return bool(same_side >= AGREED and x > 0 and max(z, y) <= STRAIGHT * x)


def _unnamed(labels: Sequence[Label], cases: Sequence[CasePrint]) -> list[tuple[int, int]]:
    """Pairs of values, whatever their names, that face each other and are of one size."""
    volumes = {
        label.value: float(np.median([case.voxels_per_label.get(label.value, 0) for case in cases])) for label in labels
    }
    alike = [
        (one, other)
        for one, other in combinations(volumes, 2)
        if volumes[one] > 0 and 1 / ALIKE <= volumes[other] / volumes[one] <= ALIKE
    ]
    steps = {pair: _steps(cases, *pair) for pair in alike}
    return [pair for pair, found in steps.items() if len(found) >= ENOUGH_CASES and _across(found)]


def _indices(task: Task, pairs: Sequence[tuple[int, int]]) -> _Pairs:
    return tuple((task.values.index(left), task.values.index(right)) for left, right in pairs)


def _regions_agree(task: Task, sides: Sides) -> bool:
    try:
        Laterality(axis=0, pairs=sides.pairs).swap(task)
    except ValueError:
        return False
    return True


def _listed(task: Task, pairs: Sequence[tuple[int, int]]) -> str:
    names = {label.value: label.name for label in task.labels}
    shown = [f"{names[left]} and {names[right]}" for left, right in pairs[:3]]
    return ", ".join(shown) + (f" and {len(pairs) - 3} more pairs" if len(pairs) > 3 else "")
