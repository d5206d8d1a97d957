"""DICOM frames: where each slice of a file lies and how its values are scaled, from classic and enhanced headers."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from medseg.errors import InputError, Problem

# What tells the volumes of one series apart, in the order in which they are tried.
VOLUME_KEYS = (
    "EchoTime", "EchoNumbers", "DiffusionBValue", "DiffusionGradientOrientation", "TemporalPositionIdentifier",
    "TriggerTime", "InversionTime", "FlipAngle", "ImageType", "AcquisitionNumber", "AcquisitionTime",
)  # fmt: skip
_GROUPS = {
    "position": "PlanePositionSequence", "orientation": "PlaneOrientationSequence", "measures": "PixelMeasuresSequence",
    "rescale": "PixelValueTransformationSequence",
}  # fmt: skip
# Where enhanced objects keep them.
_KEY_GROUPS = {
    "EffectiveEchoTime": "MREchoSequence", "DiffusionBValue": "MRDiffusionSequence",
    "TemporalPositionIndex": "FrameContentSequence", "InversionTimes": "MRModifierSequence",
    "NominalCardiacTriggerDelayTime": "CardiacSynchronizationSequence", "FrameType": "MRImageFrameTypeSequence",
    "DiffusionGradientOrientation": "DiffusionGradientDirectionSequence",
}  # fmt: skip

Numbers = tuple[float, ...]


@dataclass(frozen=True, slots=True)
class Coding:
    """How the pixels of a file are coded.

    ``offset`` is where the value of the pixel element starts, unless the file is deflated; ``raw`` pixels are grey
    little-endian numbers without gaps, ``encapsulated`` ones are compressed frame by frame.
    """

    syntax: str
    offset: int | None
    raw: bool
    encapsulated: bool
    rows: int
    columns: int
    samples: int
    allocated: int
    stored: int
    signed: bool
    photometric: str


@dataclass(frozen=True, slots=True)
class Frame:
    """One slice: where it lies (LPS mm, as the file says; None where it does not) and how its values are scaled.

    ``orientation`` holds the directions in which the column and then the row index grow, ``spacing_mm`` the distance
    of rows and of columns, ``rescale`` slope and intercept, ``keys`` what could tell this volume from others.
    """

    path: Path
    index: int
    coding: Coding
    position: Numbers | None
    orientation: Numbers | None
    spacing_mm: Numbers | None
    thickness_mm: float | None
    rescale: tuple[float, float] | None
    keys: tuple[tuple[str, str], ...]


def refused(code: str, path: Path, measured: str, expected: str, action: str) -> InputError:
    """The error that names a file."""
    return InputError(Problem(code, f"{path.name}: {measured}", expected, action))


def read_frames(header: dict[str, Any], path: Path, coding: Coding, count: int) -> Iterator[Frame]:
    """The frames of a classic file, or those of an enhanced one from its functional groups."""
    shared: Any = next(iter(header.get("SharedFunctionalGroupsSequence") or ()), {})
    per_frame = header.get("PerFrameFunctionalGroupsSequence") or ()
    if count > 1 and len(per_frame) != count:
        found = f"describes {len(per_frame)} of {count} frames"
        raise refused("E0154", path, found, "a position for each", "multi-frame files without positions are no volumes")
    for index in range(count):
        own = per_frame[index] if per_frame else {}

        def group(name: str, own: Any = own) -> Any:
            found = own.get(_GROUPS[name]) or shared.get(_GROUPS[name])
            return found[0] if found else header

        measures = group("measures")
        spacing = numbers(measures, "PixelSpacing", 2, path) or numbers(header, "ImagerPixelSpacing", 2, path)
        thickness = numbers(measures, "SliceThickness", 1, path)
        yield Frame(
            path=path,
            index=index,
            coding=coding,
            position=numbers(group("position"), "ImagePositionPatient", 3, path),
            orientation=numbers(group("orientation"), "ImageOrientationPatient", 6, path),
            spacing_mm=spacing,
            thickness_mm=thickness[0] if thickness else None,
            rescale=_rescale(group("rescale"), path),
            keys=tuple(_keys(header, own)),
        )


def _rescale(group: Any, path: Path) -> tuple[float, float] | None:
    slope, intercept = (numbers(group, key, 1, path) for key in ("RescaleSlope", "RescaleIntercept"))
    if slope is None and intercept is None:
        return None
    if slope is None or intercept is None or slope[0] == 0:
        raise refused("E0102", path, "rescale slope or intercept is missing or 0", "both", "export the file again")
    return slope[0], intercept[0]


def _keys(header: dict[str, Any], own: Any) -> Iterator[tuple[str, str]]:
    for key in VOLUME_KEYS:
        if header.get(key) not in (None, ""):
            yield key, str(header.get(key))
    for key, sequence in _KEY_GROUPS.items():
        found = own.get(sequence) or next((g.get(sequence) for g in own.get("MRDiffusionSequence") or ()), None)
        if found and found[0].get(key) not in (None, ""):
            yield key, str(found[0].get(key))


def numbers(group: Any, key: str, count: int, path: Path) -> Numbers | None:
    """``count`` finite numbers of an element, or None if it is missing or empty.

    Raises:
        InputError: E0102 another count, not numbers, or not finite.
    """
    found = group.get(key)
    if found is None or found == "":
        return None
    values = list(found) if count > 1 else [found]
    if not values:
        return None
    parsed = tuple(float(value) for value in values)
    if len(parsed) != count or not all(map(math.isfinite, parsed)):
        raise refused("E0102", path, f"{key} is not {count} finite number(s)", "", "the header is damaged")
    return parsed
