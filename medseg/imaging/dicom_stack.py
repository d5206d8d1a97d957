"""Stacks: the frames of one DICOM series put in order and judged (fault F20): nothing is filled in or left out."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import islice

import numpy as np
from numpy.typing import NDArray

from medseg.errors import InputError, Problem
from medseg.imaging.dicom_frames import Frame
from medseg.imaging.dicom_header import Instance
from medseg.imaging.geometry import SAME_GRID_VOXELS, SKEW_REFUSED_DEGREES, judge_affine
from medseg.records.grid import Grid

GAP = 0.01  # of the slice distance, the limit of fault F20
ROUNDING_MM = 0.02  # what two positions rounded to two decimals differ by at most
SAME_POSITION = 1e-3  # of the pixel spacing
_LPS_TO_RAS = np.diag([-1.0, -1.0, 1.0, 1.0])
_SHOWN = 3


@dataclass(frozen=True, slots=True, eq=False)
class Stack:
    """Frames (volume, slice) on a grid, the type their values have, and what differs between several volumes."""

    volumes: tuple[tuple[Frame, ...], ...]
    grid: Grid
    dtype: np.dtype[np.generic]
    notes: tuple[Problem, ...] = ()
    told_apart_by: str = ""

    @property
    def channels(self) -> int:
        """Volumes times samples of a pixel."""
        return len(self.volumes) * self.volumes[0][0].coding.samples


def stack(instances: Sequence[Instance], name: str) -> Stack:
    """The frames of one series, sorted by their position along the normal, and their grid in RAS mm.

    File names and instance numbers are not looked at. ``name`` is for the messages.

    Raises:
        InputError: E0106, E0111 pixels of a kind that is not read; E0121 tilted gantry; E0150 gaps; E0151 mixed
            slices; E0152 duplicates; E0153 several volumes that nothing tells apart; E0154 no positions; E0124, E0125.
    """
    frames = [frame for instance in instances for frame in instance.frames]
    problems = [problem for instance in instances for problem in instance.problems]
    problems += [*_repeated(instances, name), *(_mixed(frames, name) if frames else [])]
    if problems:
        raise InputError(problems)
    dtype, notes = value_type(frames), _grey_scale(frames, name)
    if len(frames) == 1:
        grid, more = _single(frames[0], name)
        return Stack(((frames[0],),), grid, dtype, (*notes, *more))
    absent = sum(f.position is None or f.orientation is None or f.spacing_mm is None for f in frames)
    if absent:
        found = f"{absent} of {len(frames)} slices have no position, orientation or spacing"
        raise _refused("E0154", name, found, "all of them", "export the original series")
    volumes, told_apart_by = _volumes(frames, name)
    grid, more = _grid(volumes, name)
    return Stack(volumes, grid, dtype, (*notes, *more), told_apart_by)


def value_type(frames: Iterable[Frame]) -> np.dtype[np.generic]:
    """The type to begin with: as stored without rescaling, int16 if all is whole (widened if need be), else float32."""
    frames = list(frames)
    stored = np.result_type(*{f"{'i' if f.coding.signed else 'u'}{f.coding.allocated // 8}" for f in frames})
    rescales = {f.rescale or (1.0, 0.0) for f in frames}
    if rescales == {(1.0, 0.0)}:
        return stored
    slope, intercept = next(iter(rescales))
    whole = slope == int(slope) and intercept == int(intercept)
    fits = abs(slope) * 2.0**32 + abs(intercept) < 2.0**62
    return np.dtype(np.int16 if len(rescales) == 1 and whole and fits else np.float32)


def _repeated(instances: Sequence[Instance], name: str) -> list[Problem]:
    paths: dict[str, list[str]] = {}
    for instance in instances:
        paths.setdefault(instance.uid, []).append(instance.path.name)
    twice = [names for uid, names in paths.items() if uid and len(names) > 1]
    if not twice:
        return []
    shown = "; ".join(" = ".join(names) for names in twice[:_SHOWN])
    return [Problem("E0152", f"{name}: {len(twice)} instances occur several times ({shown})", "", "remove the copies")]


def _mixed(frames: Sequence[Frame], name: str) -> list[Problem]:
    """E0151 for every property in which slices differ from the first."""
    first = frames[0]
    larger = max(first.coding.rows, first.coding.columns)
    turn = SAME_GRID_VOXELS / larger  # moves the last pixel of a row by the tolerance
    kind = (first.coding.rows, first.coding.columns, first.coding.samples, first.coding.photometric)
    different = {
        "size or kind of pixels": [
            (f.coding.rows, f.coding.columns, f.coding.samples, f.coding.photometric) != kind for f in frames
        ],
        "orientation": [not _near(f.orientation, first.orientation, turn) for f in frames],
        "pixel spacing": [
            not _near(f.spacing_mm, first.spacing_mm, turn * min(first.spacing_mm or (1,))) for f in frames
        ],
        "presence of a rescale slope": [(f.rescale is None) != (first.rescale is None) for f in frames],
    }
    action = "take out what does not belong (a localizer, for instance)"
    return [
        Problem("E0151", f"{name}: {sum(flags)} of {len(frames)} slices differ in {what}", "one for all", action)
        for what, flags in different.items()
        if any(flags)
    ]


def _near(one: Sequence[float] | None, other: Sequence[float] | None, tolerance: float) -> bool:
    if one is None or other is None:
        return one is other
    return bool(np.abs(np.subtract(one, other)).max() <= tolerance)


def _grey_scale(frames: Sequence[Frame], name: str) -> list[Problem]:
    if frames[0].coding.photometric != "MONOCHROME1":
        return []
    measured = f"{name} is MONOCHROME1: its smallest values are displayed white"
    return [Problem("W0156", measured, "", "values are left as stored")]


def _single(frame: Frame, name: str) -> tuple[Grid, list[Problem]]:
    """The grid of one slice: its thickness is its extent; without a position it is a picture, as a radiograph is."""
    rows, columns = frame.coding.rows, frame.coding.columns
    spacing = frame.spacing_mm or (1.0, 1.0)
    depth = frame.thickness_mm or min(spacing)
    if frame.position is None or frame.orientation is None or frame.spacing_mm is None:
        measured = f"{name}: one image without position, orientation or spacing in the patient"
        note = Problem("W0123", measured, "", "its axes are taken as they are stored")
        affine = np.diag([spacing[1], spacing[0], depth, 1.0])
    else:
        note = Problem("W0155", f"{name} is a single slice", "", f"its thickness is taken as {depth:.4g} mm")
        step = _normal(frame, name) * depth
        affine = _affine(frame, step)
    grid, notes = judge_affine(affine, (columns, rows, 1), name)
    return grid, [note, *(_as_used(n) for n in notes)]


def _normal(frame: Frame, name: str) -> NDArray[np.float64]:
    assert frame.orientation is not None
    normal = np.cross(frame.orientation[:3], frame.orientation[3:])
    length = float(np.linalg.norm(normal))
    if length < 0.5:
        raise _refused("E0154", name, "ImageOrientationPatient is no pair of directions", "", "export it again")
    return normal / length


def _affine(first: Frame, step: NDArray[np.float64]) -> NDArray[np.float64]:
    """(4, 4) voxel (i, j, k) → RAS mm of a stack that starts with ``first`` and goes on by ``step`` (LPS mm)."""
    assert first.orientation is not None
    assert first.spacing_mm is not None
    affine = np.eye(4)
    affine[:3, 0] = np.array(first.orientation[:3]) * first.spacing_mm[1]  # PixelSpacing: of rows, then of columns
    affine[:3, 1] = np.array(first.orientation[3:]) * first.spacing_mm[0]
    affine[:3, 2] = step
    affine[:3, 3] = first.position
    result: NDArray[np.float64] = _LPS_TO_RAS @ affine
    return result


def _volumes(frames: Sequence[Frame], name: str) -> tuple[tuple[tuple[Frame, ...], ...], str]:
    """Frames by volume and position; a volume is what one value of a distinguishing element has."""
    positions = np.array([f.position for f in frames])
    along = positions @ _normal(frames[0], name)
    order = np.argsort(along, kind="stable")
    same = SAME_POSITION * min(frames[0].spacing_mm or (1.0,))
    index = np.concatenate([[0], np.cumsum(np.diff(along[order]) > same)])
    slots: dict[int, list[Frame]] = {}
    for slot, which in zip(index, order, strict=True):
        slots.setdefault(int(slot), []).append(frames[which])
    counts = Counter(len(found) for found in slots.values())
    deepest = max(counts)
    if deepest == 1:
        return (tuple(found[0] for found in slots.values()),), ""
    if len(counts) > 1:
        _uneven(slots, along[order], counts, name)
    for key in dict.fromkeys(key for frame in frames for key, _ in frame.keys):
        table: dict[str, list[Frame]] = {}
        for found in slots.values():
            for frame in found:
                table.setdefault(dict(frame.keys).get(key, ""), []).append(frame)
        if len(table) == deepest and all(_one_each(volume, slots) for volume in table.values()):
            return tuple(tuple(table[value]) for value in sorted(table, key=_by_number)), key
    found_at = f"{deepest} slices at each of {len(slots)} positions, and nothing tells the volumes apart"
    code = "E0152" if len(slots) == 1 or deepest == 2 else "E0153"
    raise _refused(code, name, found_at, "one, or a value that tells them apart", "export one volume per series")


def _uneven(slots: dict[int, list[Frame]], along: NDArray[np.float64], counts: Counter[int], name: str) -> None:
    usual = counts.most_common(1)[0][0]
    starts = np.cumsum([0, *(len(found) for found in slots.values())])[:-1]
    odd = [
        (float(along[s]), len(found)) for s, found in zip(starts, slots.values(), strict=True) if len(found) != usual
    ]
    shown = ", ".join(f"{count} at {place:.4g} mm" for place, count in odd[:_SHOWN])
    found_at = f"{len(odd)} of {len(slots)} positions do not have {usual} slice(s): {shown}"
    if usual == 1 or max(counts) > usual:
        raise _refused("E0152", name, found_at, f"{usual} at each position", "remove what is there twice")
    raise _refused("E0150", name, found_at, f"{usual} at each position", "export the series again, completely")


def _one_each(volume: Sequence[Frame], slots: dict[int, list[Frame]]) -> bool:
    mine = {id(frame) for frame in volume}
    return all(sum(id(frame) in mine for frame in found) == 1 for found in slots.values())


def _by_number(value: str) -> tuple[float, str]:
    try:
        return float(value), value
    except ValueError:
        return float("inf"), value


def _grid(volumes: tuple[tuple[Frame, ...], ...], name: str) -> tuple[Grid, list[Problem]]:
    """The grid of the first volume, slice distances judged; the others must lie on it."""
    first = volumes[0]
    if len(first) == 1:
        grid, notes = _single(first[0], name)
        _same_places(volumes, np.array([first[0].position]), name)
        return grid, notes
    normal = _normal(first[0], name)
    positions = np.array([frame.position for frame in first])
    along = positions @ normal
    _even(along, name)
    step = (positions[-1] - positions[0]) / (len(first) - 1)
    tilt = float(np.degrees(np.arccos(min(1.0, float(step @ normal) / float(np.linalg.norm(step))))))
    if tilt > SKEW_REFUSED_DEGREES:
        found = f"slices are shifted against each other by {tilt:.3g} degrees (a tilted gantry)"
        limit = f"at most {SKEW_REFUSED_DEGREES:g}"
        raise _refused("E0121", name, found, limit, "resample the series onto perpendicular axes")
    straight = positions[0] + np.arange(len(first))[:, None] * step
    _same_places(volumes, straight, name)
    grid, turned = judge_affine(_affine(first[0], step), _shape(first), name)
    return grid, [_as_used(note) for note in turned]


def _shape(volume: Sequence[Frame]) -> tuple[int, int, int]:
    return volume[0].coding.columns, volume[0].coding.rows, len(volume)


def _even(along: NDArray[np.float64], name: str) -> None:
    """E0150 unless the slices lie at equal distances; names the missing positions where whole slices are missing."""
    steps = np.diff(along)
    usual = float(np.median(steps))
    regular = along[0] + np.arange(len(along)) * (along[-1] - along[0]) / (len(along) - 1)
    off = np.abs(steps - usual) > max(GAP * usual, ROUNDING_MM)
    if not off.any() and np.abs(along - regular).max() <= GAP * usual:
        return
    where = int(off.argmax()) if off.any() else int(np.abs(along - regular).argmax()) - 1
    lost = {int(k): round(float(steps[k]) / usual) - 1 for k in np.flatnonzero(off)}
    whole = {k: n for k, n in lost.items() if n > 0 and abs(float(steps[k]) / usual - n - 1) < 0.1}
    if whole:
        holes = (f"{along[k] + (m + 1) * usual:.4g}" for k, n in whole.items() for m in range(n))
        count = sum(whole.values())  # may be in the millions: a damaged position
        shown = ", ".join(islice(holes, _SHOWN)) + (" …" if count > _SHOWN else "")
        found = f"{count} slice(s) missing, at {shown} mm along the stack"
    else:
        found = f"distance of slices is {steps[where]:.4g} mm after {along[where]:.4g} mm"
    raise _refused("E0150", name, found, f"{usual:.4g} mm throughout", "export the series again, completely")


def _same_places(volumes: tuple[tuple[Frame, ...], ...], straight: NDArray[np.float64], name: str) -> None:
    """E0150 for slices that lie sideways of the line (LPS mm, one point per slice) that the stack follows."""
    distance = float(np.linalg.norm(straight[-1] - straight[0])) / max(1, len(straight) - 1)
    limit = max(SAME_GRID_VOXELS * min(volumes[0][0].spacing_mm or (1.0,)), GAP * distance, ROUNDING_MM)
    for volume in volumes:
        beside = np.linalg.norm(np.array([frame.position for frame in volume]) - straight, axis=1)
        if beside.max() > limit:
            worst = int(beside.argmax())
            found = f"{volume[worst].path.name} lies {beside[worst]:.3g} mm beside the stack"
            raise _refused("E0150", name, found, f"at most {limit:.3g}", "check the series, or resample it")


def _as_used(note: Problem) -> Problem:
    return replace(note, action="the nearest perpendicular axes are used")


def _refused(code: str, name: str, measured: str, expected: str, action: str) -> InputError:
    return InputError(Problem(code, f"{name}: {measured}", expected, action))
