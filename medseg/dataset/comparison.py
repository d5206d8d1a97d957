"""Comparison: what only shows when the cases of a data set are held against each other.

All are warnings (but E0135): real data vary, and a case that stands out may be right. The limits are wide, so that
what is named is worth a look: rules F09, F11, F12, F13 and F17 of the fault catalogue.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence

import numpy as np

from medseg.dataset.case_check import CaseFindings
from medseg.dataset.declaration import FILE_NAME
from medseg.errors import Problem
from medseg.records.task import Task

SPACING_TIMES = 10.0
SCALE_TIMES = 30.0
SHIFT_SHARE = 0.25  # of the usual range of values: 1024 of the 2000 to 4000 HU of a CT
FEW = 5  # with fewer cases nothing is usual
MANY, RARE = 20, 0.05  # a single orientation stands out among so many
STRAY_VOXELS, STRAY_SHARE, USUAL_VOXELS = 3, 1e-3, 400
_AXES = "zyx"


def compare_cases(findings: Sequence[CaseFindings], task: Task | None) -> list[Problem]:
    """All problems that concern several cases."""
    problems = identical_images(findings) + identical_labels(findings)
    if task is None:  # images of any kind
        return problems
    problems += odd_geometry(findings) + odd_intensities(findings, task)
    return problems + label_coverage(findings, task) + stray_labels(findings, task)


def identical_images(findings: Iterable[CaseFindings]) -> list[Problem]:
    """A W0141 for each image that occurs more than once, in several cases or in one."""
    places: dict[str, list[tuple[str, str]]] = defaultdict(list)
    labels: dict[str, str] = {}
    for found in findings:
        labels[found.case] = found.label_hash
        for channel, digest in found.hashes.items():
            if digest:
                places[digest].append((found.case, channel))
    problems = []
    for where in places.values():
        if len(where) > 1:
            shown = ", ".join(f"{case} {channel}" for case, channel in where[:5])
            shown += f" and {len(where) - 5} more" if len(where) > 5 else ""
            differ = len({labels[case] for case, _ in where}) > 1
            action = "keep the right one" if differ else "remove copies; else keep them on the same side of every split"
            measured = f"identical voxels: {shown}{'; their labels differ' if differ else ''}"
            problems.append(Problem("W0141", measured, "different images", action, where[0][0]))
    return problems


def duplicates(findings: Iterable[CaseFindings]) -> tuple[tuple[str, ...], ...]:
    """Groups of cases that are equal in all images and in the label, each in order of ids."""
    groups: dict[tuple[object, ...], list[str]] = defaultdict(list)
    for found in findings:
        if found.hashes and all(found.hashes.values()):
            groups[tuple(sorted(found.hashes.items())), found.label_hash].append(found.case)
    return tuple(sorted(tuple(sorted(cases)) for cases in groups.values() if len(cases) > 1))


def identical_labels(findings: Iterable[CaseFindings]) -> list[Problem]:
    """W0149: equal labels with foreground under cases that share no image."""
    groups: dict[str, list[CaseFindings]] = defaultdict(list)
    for found in findings:
        if found.label_hash:
            groups[found.label_hash].append(found)
    problems = []
    for group in groups.values():
        images = Counter(digest for found in group for digest in set(found.hashes.values()) if digest)
        if len(group) > 1 and max(images.values(), default=0) < 2:
            shown = ", ".join(found.case for found in group[:5]) + (" …" if len(group) > 5 else "")
            action = "check which label file belongs to which image"
            problems.append(Problem("W0149", f"identical labels: {shown}", "a label of its own", action, group[0].case))
    return problems


def label_coverage(findings: Iterable[CaseFindings], task: Task) -> list[Problem]:
    """W0132 labels that no case has, W0135 that one of several has, E0135 if no case has any foreground."""
    cases: dict[int, list[str]] = defaultdict(list)
    labelled = 0
    for found in findings:
        labelled += bool(found.label_counts)
        for value, count in found.label_counts.items():
            if count:
                cases[value].append(found.case)
    if not labelled:  # no label could be read: said already
        return []
    if not any(cases[label.value] for label in task.foreground):
        values = ", ".join(str(value) for value in task.values[1:6]) + (" …" if len(task.values) > 6 else "")
        return [Problem("E0135", "no case has foreground", f"{FILE_NAME} declares {values}", "check the label files")]
    problems = []
    for label in task.foreground:
        name = f"label {label.value} ({label.name})"
        where = cases[label.value]
        if not where:
            problems.append(Problem("W0132", f"{name} is in no case", "", "remove it or add cases"))
        elif len(where) == 1 and labelled > 1:
            measured = f"{name} is in 1 of {labelled} cases"
            problems.append(Problem("W0135", measured, "", "add cases, or merge it with another label", where[0]))
    return problems


def stray_labels(findings: Sequence[CaseFindings], task: Task) -> list[Problem]:
    """W0138: at most 3 voxels, or a thousandth, of what the other cases usually have of a label."""
    problems = []
    for label in task.foreground:
        counts = {found.case: found.label_counts.get(label.value, 0) for found in findings}
        present = [count for count in counts.values() if count]
        usual = float(np.median(present)) if present else 0.0
        if len(present) < FEW or usual < USUAL_VOXELS:
            continue
        for case, count in counts.items():
            if 0 < count <= max(STRAY_VOXELS, STRAY_SHARE * usual):
                measured = f"label {label.value} ({label.name}) has {count} voxel{'s' if count > 1 else ''}"
                expected = f"a median of {usual:.0f} in other cases"
                problems.append(Problem("W0138", measured, expected, "look for stray voxels", case))
    return problems


def odd_geometry(findings: Sequence[CaseFindings]) -> list[Problem]:
    """W0126: spacing ten times another's, one slice among volumes, an orientation that no other case has."""
    shapes = {found.case: found.shape for found in findings if found.shape is not None and not found.shape.picture}
    if len(shapes) < FEW:
        return []
    usual = np.median([shape.spacing_mm for shape in shapes.values()], axis=0)
    slices = float(np.median([min(shape.shape) for shape in shapes.values()]))
    orientations = Counter(shape.orientation for shape in shapes.values())
    action = "compare the header with the original images"
    problems = []
    for case, shape in shapes.items():
        for axis, found, expected in zip(_AXES, shape.spacing_mm, usual, strict=True):
            if max(found / expected, expected / found) > SPACING_TIMES:
                measured = f"spacing {found:.4g} mm along {axis}"
                problems.append(Problem("W0126", measured, f"a median of {expected:.4g} mm", action, case))
        if min(shape.shape) == 1 and slices > 1:
            measured, expected = f"one slice, shape {shape.shape} (z, y, x)", "a volume, like the other cases"
            problems.append(Problem("W0126", measured, expected, "check that it is the whole image", case))
        common, count = orientations.most_common(1)[0]
        if len(shapes) >= MANY and orientations[shape.orientation] == 1 and count >= (1 - RARE) * len(shapes):
            measured = f"stored in orientation {shape.orientation}"
            problems.append(Problem("W0126", measured, f"{common}, as in {count} other cases", action, case))
    return problems


def odd_intensities(findings: Sequence[CaseFindings], task: Task) -> list[Problem]:
    """W0127: CT without negative values; values shifted as a whole, or on another scale, against the other cases."""
    problems = []
    for channel in sorted({channel for found in findings for channel in found.extremes}):
        ranges = {found.case: found.extremes[channel] for found in findings if channel in found.extremes}
        name = f"channel {channel} ({task.channels[channel].name})"
        is_ct = task.channels[channel].name.casefold() == "ct"
        for case, (low, high) in ranges.items():
            values = f"{name}: values {low:.4g} to {high:.4g}"
            if is_ct and low >= 0:
                action = "export it with its rescale intercept"
                problems.append(Problem("W0127", values, "Hounsfield units, air is -1000", action, case))
            elif (usual := _unusual(low, high, list(ranges.values()))) is not None:
                action = "check units and export; normalising each image evens out scale and shift, that of CT does not"
                problems.append(Problem("W0127", values, f"usually {usual[0]:.4g} to {usual[1]:.4g}", action, case))
    return problems


def _unusual(low: float, high: float, ranges: list[tuple[float, float]]) -> tuple[float, float] | None:
    """The usual range of values (percentiles 0.5 and 99.5), if this one is shifted or scaled away from it."""
    if len(ranges) < FEW:
        return None
    usual_low, usual_high = (float(v) for v in np.median(ranges, axis=0))
    usual, found = usual_high - usual_low, high - low
    if usual <= 0 or found <= 0:
        return None
    scaled = max(found / usual, usual / found) > SCALE_TIMES
    moved = (low - usual_low, high - usual_high)
    shifted = moved[0] * moved[1] > 0 and min(abs(moved[0]), abs(moved[1])) > SHIFT_SHARE * usual
    return (usual_low, usual_high) if scaled or shifted else None
