"""NRRD header: text fields, judged before they are believed.

Rules: teem.sourceforge.net/nrrd/format.html. What can be said in several ways, or not at all (``space`` missing), is
named in a warning or refused; nothing is left to a library's default.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Literal

import numpy as np
from numpy.typing import NDArray

from medseg.errors import Problem
from medseg.imaging.geometry import judge_affine
from medseg.imaging.nifti_header import MAX_VOXELS
from medseg.imaging.raw_data import Encoding, RawData, beside, channel_shape, header_lines, integers, numbers, refused
from medseg.records.grid import Grid

_TYPES = {
    "i1": ("signed char", "int8", "int8_t"),
    "u1": ("uchar", "unsigned char", "uint8", "uint8_t"),
    "i2": ("short", "short int", "signed short", "signed short int", "int16", "int16_t"),
    "u2": ("ushort", "unsigned short", "unsigned short int", "uint16", "uint16_t"),
    "i4": ("int", "signed int", "int32", "int32_t"),
    "u4": ("uint", "unsigned int", "uint32", "uint32_t"),
    "i8": ("longlong", "long long", "long long int", "signed long long", "signed long long int", "int64", "int64_t"),
    "u8": ("ulonglong", "unsigned long long", "unsigned long long int", "uint64", "uint64_t"),
    "f4": ("float",),
    "f8": ("double",),
}
_DTYPES = {word: code for code, words in _TYPES.items() for word in words}
_SPACES = {
    "right-anterior-superior": (1, 1), "ras": (1, 1),
    "left-anterior-superior": (-1, 1), "las": (-1, 1),
    "left-posterior-superior": (-1, -1), "lps": (-1, -1),
}  # fmt: skip
_UNKNOWN_SPACES = ("scanner-xyz", "3d-right-handed", "3d-left-handed")
_ENCODINGS: dict[str, Encoding] = {"raw": "raw", "gzip": "gzip", "gz": "gzip"}
_ENDIANS: dict[str, Literal["<", ">"]] = {"little": "<", "big": ">"}
_UNIT_MM = {"mm": 1.0, "millimeter": 1.0, "millimeters": 1.0, "cm": 10.0, "m": 1e3, "um": 1e-3, "µm": 1e-3}
_SYNONYMS = {"datafile": "data file", "byteskip": "byte skip", "lineskip": "line skip"}
_DOMAINS = ("domain", "space")

Fields = dict[str, str]
Vector = NDArray[np.float64]


@dataclass(frozen=True, slots=True, eq=False)
class NrrdHeader:
    """What a header says: voxels, grid, the lines that describe the grid for a copy, and warnings."""

    data: RawData
    grid: Grid
    geometry: str
    notes: tuple[Problem, ...]


def parse_nrrd_header(file: BinaryIO, path: Path, channels: int = 1, max_voxels: int = MAX_VOXELS) -> NrrdHeader:
    """Judge the header at the start of ``file``, which is ``path``; see ``medseg.imaging.nrrd.read_nrrd``."""
    name = path.name
    fields = _fields(file, name)
    (dimension,) = integers(_needed(fields, "dimension", name), 1, "dimension", name)
    if not 2 <= dimension <= 4:
        raise refused("E0111", name, f"{dimension} dimensions", "2 or 3, and channels", "provide a volume")
    sizes = integers(_needed(fields, "sizes", name), dimension, "sizes", name)
    vectors = _vectors(fields, dimension, name)
    listed = _channel_axis(fields, vectors, dimension, name)
    spatial = [axis for axis in range(dimension) if axis != listed]
    i, j, k = [*(sizes[axis] for axis in spatial), 1][:3]
    found = 1 if listed is None else sizes[listed]
    shape = channel_shape((i, j, k), found, channels, name, max_voxels)
    data = _data(fields, file.tell(), path, shape, listed == 0 and found > 1)
    return NrrdHeader(data, *_grid(fields, vectors, spatial, (i, j, k), name))


def _fields(file: BinaryIO, name: str) -> Fields:
    """The fields, names in lower case; comments and key/value pairs are dropped."""
    lines = header_lines(file, name)
    magic = file.read(8)
    if not re.fullmatch(rb"NRRD000[1-5]", magic):
        code = "E0101" if len(magic) < 8 else "E0102"
        raise refused(code, name, f"begins with {magic!r}", "NRRD0001 to NRRD0005", "this is not an NRRD file")
    if next(lines, "no line"):
        raise refused("E0102", name, "more than the magic on the first line", "", "the header is damaged")
    fields: Fields = {}
    for line in lines:
        if not line:
            return fields
        if line.startswith("#") or ":=" in line:
            continue
        if fields.get("data file", "").upper().startswith("LIST"):
            continue  # names of files, which are refused together
        key, colon, value = line.partition(": ")
        key = _SYNONYMS.get(key.lower(), key.lower())
        if not colon or key in fields:
            problem = "twice the same field" if colon else "no field"
            raise refused("E0102", name, f"header line {line[:80]!r}: {problem}", "", "the header is damaged")
        fields[key] = value.strip()
    if "data file" not in fields:  # a detached header may end with the file
        raise refused("E0101", name, f"header ends after {file.tell()} bytes", "an empty line", "copy the file again")
    return fields


def _vectors(fields: Fields, dimension: int, name: str) -> list[Vector | None] | None:
    """The step along each axis in the header's space; None for an axis without, or for all where none are given."""
    text = fields.get("space directions")
    if text is None:
        return None
    words = re.findall(r"\([^()]*\)|[^\s()]+", text)
    if len(words) != dimension:
        raise refused("E0102", name, f"space directions {text[:80]!r}", f"{dimension} vectors", "the header is damaged")
    return [None if word.lower() == "none" else _vector(word, "space directions", name) for word in words]


def _vector(word: str, field: str, name: str) -> Vector:
    if not (word.startswith("(") and word.endswith(")")) or word.count(",") not in (1, 2):
        raise refused("E0102", name, f"{field} {word[:80]!r}", "(x,y,z)", "the header is damaged")
    parts = word[1:-1].split(",")
    return np.array(numbers(" ".join(parts), len(parts), field, name))


def _channel_axis(fields: Fields, vectors: list[Vector | None] | None, dimension: int, name: str) -> int | None:
    """The axis that is no direction in space: the first or the last one, or none.

    ``space directions`` tells, else ``kinds``, else ``spacings`` (nan). Four axes of which none is marked are refused.
    """
    marked: list[int] = []
    if vectors is not None:
        marked = [axis for axis, vector in enumerate(vectors) if vector is None]
    elif "kinds" in fields:
        kinds = fields["kinds"].lower().split()
        marked = [axis for axis, kind in enumerate(kinds) if kind not in (*_DOMAINS, "none", "???")]
    elif "spacings" in fields:
        spacings = numbers(fields["spacings"], dimension, "spacings", name)
        marked = [axis for axis, value in enumerate(spacings) if np.isnan(value)]
    if len(marked) > 1 or dimension - len(marked) not in (2, 3) or marked not in ([], [0], [dimension - 1]):
        measured = f"{dimension} axes, {len(marked)} of them without a direction in space"
        raise refused("E0111", name, measured, "2 or 3 in space, channels first or last", "split the file")
    return marked[0] if marked else None


def _data(fields: Fields, end: int, path: Path, shape: tuple[int, int, int, int], interleaved: bool) -> RawData:
    name = path.name
    code = _DTYPES.get(_needed(fields, "type", name).lower())
    if code is None:
        raise refused("E0111", name, f"type {fields['type'][:40]!r}", "one real number per voxel", "convert it")
    dtype = np.dtype(code)
    if dtype.itemsize > 1 or "endian" in fields:
        endian = _needed(fields, "endian", name).lower()
        if endian not in _ENDIANS:
            raise refused("E0102", name, f"endian {endian[:40]!r}", "little or big", "the header is damaged")
        dtype = dtype.newbyteorder(_ENDIANS[endian])
    encoding = _ENCODINGS.get(_needed(fields, "encoding", name).lower())
    if encoding is None:
        raise refused("E0106", name, f"encoding {fields['encoding'][:40]!r}", "raw or gzip", "convert it to gzip")
    (skip,) = integers(fields.get("byte skip", "0"), 1, "byte skip", name)
    if fields.get("line skip", "0") != "0":
        raise refused("E0106", name, f"line skip {fields['line skip'][:40]}", "0", "convert it to .nrrd")
    if skip < -1 or (skip == -1 and (encoding != "raw" or "data file" not in fields)):
        raise refused("E0102", name, f"byte skip {skip}", "0 or more; -1 for raw data files", "the header is damaged")
    target = fields.get("data file")
    if target is None:
        return RawData(path, shape, dtype, encoding, end, skip, interleaved)
    if target.upper().startswith("LIST") or "%" in target:
        raise refused("E0106", name, "voxels lie in several files", "one data file", "convert it to .nrrd")
    start = None if skip == -1 else 0
    return RawData(beside(path, target.removeprefix("./")), shape, dtype, encoding, start, max(skip, 0), interleaved)


def _grid(
    fields: Fields, vectors: list[Vector | None] | None, spatial: list[int], shape_ijk: tuple[int, int, int], name: str
) -> tuple[Grid, str, tuple[Problem, ...]]:
    """Grid, lines for a copy (three axes with directions in a named space), and warnings."""
    steps, origin, unit = _steps(fields, vectors, spatial, name)
    affine = np.eye(4)
    affine[: steps.shape[0], : steps.shape[1]] = steps
    if steps.shape == (3, 2):  # one slice in space: its third axis is perpendicular to it, 1 mm
        normal = np.cross(steps[:, 0], steps[:, 1])
        length = np.linalg.norm(normal)
        affine[:3, 2] = normal / length / unit if length > 0 else normal
    affine[: len(origin), 3] = origin
    affine[:3] *= unit
    if steps.shape[0] == 2:
        affine[2, 2] = 1
    space = fields.get("space", "").lower()
    if space not in (*_SPACES, *_UNKNOWN_SPACES, ""):
        raise refused("E0121", name, f"space {space[:40]!r}", " or ".join(tuple(_SPACES)[::2]), "correct the header")
    known = space in _SPACES and vectors is not None
    signs = _SPACES[space] if known else (-1, -1)
    affine[:3] *= np.array([*signs, 1.0])[:, None]
    grid, notes = judge_affine(affine, shape_ijk, f"{name}: space directions")
    if not known:
        found = "no space directions" if vectors is None else f"space {space}" if space else "no space"
        measured = f"{name}: {found}, left and right are unknown"
        notes += (Problem("W0123", measured, "", "axes are taken as left-posterior-superior; set the space"),)
        return grid, "", notes
    if len(spatial) < 3 or unit != 1:
        return grid, "", notes
    directions = " ".join(re.findall(r"\([^()]*\)", fields["space directions"]))
    lines = [f"space: {space}", f"space directions: {directions}"]
    return grid, "\n".join([*lines, f"space origin: {fields.get('space origin', '(0,0,0)')}"]), notes


def _steps(
    fields: Fields, vectors: list[Vector | None] | None, spatial: list[int], name: str
) -> tuple[Vector, Vector, float]:
    """Steps along the spatial axes as columns (space, axes), the origin (space,), and the unit in mm."""
    if vectors is None:
        if "spacings" not in fields:
            raise refused("E0124", name, "neither space directions nor spacings", "one of them", "add it to the header")
        spacings = numbers(fields["spacings"], int(fields["dimension"]), "spacings", name)
        chosen = [spacings[axis] for axis in spatial]
        if not all(np.isfinite(value) and value > 0 for value in chosen):
            raise refused("E0124", name, f"spacings {fields['spacings'][:80]}", "positive numbers", "correct it")
        return np.diag(chosen), np.zeros(len(chosen)), _unit(fields, "units", name)
    columns = [vector for vector in vectors if vector is not None]
    lengths = {len(column) for column in columns}
    origin = _vector(fields.get("space origin", f"({','.join('0' * len(columns[0]))})"), "space origin", name)
    lengths.add(len(origin))
    if len(lengths) != 1 or len(columns) > len(origin):
        raise refused("E0102", name, "space vectors of different lengths", "one length", "the header is damaged")
    return np.stack(columns, 1), origin, _unit(fields, "space units", name)


def _unit(fields: Fields, field: str, name: str) -> float:
    """Millimetres per unit of space, from quoted words that are equal where they are not empty."""
    words = {word.strip().lower() for word in re.findall(r'"([^"]*)"', fields.get(field, ""))} - {"", "???", "none"}
    if len(words) > 1 or not words <= set(_UNIT_MM):
        raise refused("E0125", name, f"{field} {fields[field][:80]}", " ".join(_UNIT_MM), "correct the header")
    return _UNIT_MM[words.pop()] if words else 1.0


def _needed(fields: Fields, key: str, name: str) -> str:
    if key not in fields:
        raise refused("E0102", name, f"no field {key!r}", "", "the header is damaged")
    return fields[key]
