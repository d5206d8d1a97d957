"""Label values: what a label file really holds, counted without sorting and without copying the volume."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from medseg.errors import Problem
from medseg.imaging.volumes import nonfinite
from medseg.records.task import Task

LABEL = "label"  # what problems call the label file of a case
INTEGER_TOLERANCE = 1e-3
_CHUNK = 2**20
_LARGEST = 65535
_EXAMPLES = 3


@dataclass(frozen=True, slots=True)
class LabelValues:
    """Voxels per integer value, and how many voxels are no integers, with examples; ``rounded``: nearly integers."""

    counts: dict[int, int]
    fractional: int = 0
    examples: tuple[float, ...] = ()
    rounded: int = 0


def label_values(array: NDArray[Any]) -> LabelValues:
    """Count the values of a label array of any shape and real type, all finite; |v - round(v)| ≤ 1e-3 is an integer.

    Voxels that are not integers are counted apart and under no value.
    """
    counts: Counter[int] = Counter()
    table = np.zeros(_LARGEST + 1, np.int64)
    fractional, rounded_off, examples = 0, 0, list[float]()
    flat = array.reshape(-1)
    for start in range(0, flat.size, _CHUNK):
        chunk = flat[start : start + _CHUNK]
        if chunk.dtype.kind == "f":
            rounded = np.rint(chunk)
            rounded_off += int((chunk != rounded).sum())
            off = np.abs(chunk - rounded) > INTEGER_TOLERANCE
            if off.any():
                fractional += int(off.sum())
                examples = sorted({*examples, *(float(v) for v in chunk[off][:_EXAMPLES])})[:_EXAMPLES]
                rounded = rounded[~off]
            chunk = rounded
        if chunk.size and (chunk.min() < 0 or chunk.max() > _LARGEST):
            outside = (chunk < 0) | (chunk > _LARGEST)
            values, voxels = np.unique(chunk[outside], return_counts=True)
            counts.update({int(v): int(n) for v, n in zip(values, voxels, strict=True)})
            chunk = chunk[~outside]
        found = np.bincount(chunk.astype(np.intp))
        table[: len(found)] += found
    counts.update({int(v): int(table[v]) for v in np.flatnonzero(table)})
    return LabelValues(dict(sorted(counts.items())), fractional, tuple(examples), rounded_off - fractional)


def label_problems(array: NDArray[np.generic], task: Task, case: str) -> tuple[list[Problem], dict[int, int]]:
    """What is wrong with the labels of one case, and the voxels per value.

    E0110 not finite; E0130 no integers; W0130 nearly integers; E0131 values not declared; W0134 no foreground.
    """
    bad = nonfinite(array)
    if bad is not None:
        return [nonfinite_problem(bad, LABEL, case)], {}
    values = label_values(array)
    problems = []
    if values.fractional:
        examples = ", ".join(f"{v:.6g}" for v in values.examples)
        measured = f"label: {values.fractional} voxels are no integers: {examples}"
        problems.append(Problem("E0130", measured, "integers", "export labels without interpolation", case))
    if values.rounded and not values.fractional:
        measured = f"label: {values.rounded} voxels are off a whole number by up to {INTEGER_TOLERANCE}"
        problems.append(Problem("W0130", measured, "integers", "they are rounded; save labels as integers", case))
    declared = {*task.values, task.ignore_value}
    undeclared = {value: count for value, count in values.counts.items() if value not in declared}
    if undeclared:
        shown = ", ".join(f"{value} ({count} voxels)" for value, count in list(undeclared.items())[:5])
        shown += f" and {len(undeclared) - 5} more" if len(undeclared) > 5 else ""
        known = "values of dataset.json"
        problems.append(
            Problem("E0131", f"label: value {shown}", known, "declare the value or correct the labels", case)
        )
    if not any(values.counts.get(label.value) for label in task.foreground):
        problems.append(
            Problem("W0134", "label: no foreground", "", "check that the label file is the right one", case)
        )
    return problems, values.counts


def nonfinite_problem(found: tuple[int, tuple[int, ...]], what: str, case: str) -> Problem:
    """E0110 with count and first index, as ``nonfinite`` found them."""
    count, index = found
    voxels = "1 voxel is" if count == 1 else f"{count} voxels are"
    measured = f"{what}: {voxels} not finite, the first at {index} (z, y, x)"
    return Problem("E0110", measured, "", "replace them by the value of background", case)
