"""MetaImage files (``.mha``, ``.mhd`` with its data file): volumes read to their last byte, label maps written.

Rules: itk.org, "MetaIO/Documentation"; ``TransformMatrix`` lists the direction of one axis after the other, in LPS.
"""

from __future__ import annotations

import itertools
import logging
import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray

from medseg.errors import Problem
from medseg.imaging.geometry import judge_affine, nifti_affine
from medseg.imaging.nifti_header import MAX_VOXELS
from medseg.imaging.raw_data import (
    Encoding,
    RawData,
    as_label_file,
    beside,
    channel_shape,
    commit_labels,
    header_lines,
    integers,
    little_endian,
    numbers,
    read_raw,
    refused,
)
from medseg.imaging.streams import deflated
from medseg.records.grid import Grid, Source, Volume

logger = logging.getLogger(__name__)

_TYPES = {
    "CHAR": "i1", "UCHAR": "u1", "SHORT": "i2", "USHORT": "u2", "INT": "i4", "UINT": "u4", "LONG": "i4", "ULONG": "u4",
    "LONG_LONG": "i8", "ULONG_LONG": "u8", "FLOAT": "f4", "DOUBLE": "f8",
}  # fmt: skip
_NAMES = {"u1": "UCHAR", "u2": "USHORT", "u4": "UINT", "u8": "ULONG_LONG"}
_SYNONYMS = {
    "ElementByteOrderMSB": "BinaryDataByteOrderMSB",
    "Rotation": "TransformMatrix",
    "Orientation": "TransformMatrix",
    "Origin": "Offset",
    "Position": "Offset",
}
_GEOMETRY = ("TransformMatrix", "Offset", "ElementSpacing", "DistanceUnits")
_UNIT_MM = {"mm": 1.0, "cm": 10.0, "um": 1e-3, "?": 1.0}
_LPS = np.array([-1.0, -1.0, 1.0])

Fields = dict[str, str]


@dataclass(frozen=True, slots=True, eq=False)
class _Header:
    data: RawData
    grid: Grid
    geometry: str
    notes: tuple[Problem, ...]


def read_metaimage(path: Path, channels: int = 1, max_voxels: int = MAX_VOXELS) -> Volume:
    """Read ``.mha`` or ``.mhd`` as (C, Z, Y, X) in native byte order and the file's own type, on the file's grid.

    Several components per voxel, or a fourth dimension, are read only as the number of ``channels`` asked for.

    Raises:
        InputError: E0100 no data file; E0101 truncated; E0102 corrupt; E0104 too large; E0106 text data, lists of
            files; E0111 not scalar; E0121, E0124, E0125 geometry; E0133 other channels; E0142 a data file elsewhere.
        ResourceError: E0600 not enough memory.
    """
    volume = _read(Path(path), channels, max_voxels)
    for note in volume.notes:
        logger.warning("%s", note)
    return volume


def write_metaimage(path: Path, labels: NDArray[np.integer], grid: Grid, source: Source) -> str:
    """Commit a label map (Z, Y, X) as compressed ``.mha`` and return the file's SHA-256.

    The geometry lines are those of a MetaImage source, word for word; else they are made from ``grid``, which
    then reads back within rounding of the last digit.

    Raises:
        ValueError: labels are negative, or do not lie on ``grid``.
        EnvironmentFailure: E0501, E0502.
        IntegrityError: E0701 the file does not read back as it was written.
    """
    path = Path(path)
    labels = as_label_file(labels, grid)
    copied = source.geometry if source.file_format == "metaimage" else ""
    packed = list(deflated(little_endian(labels), "zlib"))  # labels pack well; their packed size leads the file
    header = [
        "ObjectType = Image",
        "NDims = 3",
        "BinaryData = True",
        "BinaryDataByteOrderMSB = False",
        "CompressedData = True",
        f"CompressedDataSize = {sum(map(len, packed))}",
        copied or _geometry_lines(grid),
        f"DimSize = {' '.join(map(str, grid.shape[::-1]))}",
        f"ElementType = MET_{_NAMES[labels.dtype.str[1:]]}",
        "ElementDataFile = LOCAL",
    ]
    pieces = itertools.chain([("\n".join(header) + "\n").encode()], packed)
    return commit_labels(path, pieces, lambda p: _read(p, 1, MAX_VOXELS), labels, grid, 0 if copied else 1e-6)


def _read(path: Path, channels: int, max_voxels: int) -> Volume:
    try:
        with path.open("rb") as file:
            header = _header(file, path, channels, max_voxels)
        array = read_raw(header.data, path.name)
    except OSError as error:
        raise refused("E0106", path.name, f"cannot be read: {error.strerror or error}", "", "check it") from error
    return Volume(array, header.grid, Source(str(path), "metaimage", geometry=header.geometry), notes=header.notes)


def _header(file: BinaryIO, path: Path, channels: int, max_voxels: int) -> _Header:
    name = path.name
    fields = _fields(file, name)
    if fields.get("ObjectType", "Image") != "Image" or "NDims" not in fields:
        raise refused("E0102", name, "is no MetaImage of type Image", "", "check the file")
    (dimensions,) = integers(fields["NDims"], 1, "NDims", name)
    if dimensions not in (2, 3, 4):
        raise refused("E0111", name, f"{dimensions} dimensions", "2 or 3", "provide a volume")
    sizes = [*integers(_needed(fields, "DimSize", name), dimensions, "DimSize", name), 1, 1][:4]
    (components,) = integers(fields.get("ElementNumberOfChannels", "1"), 1, "ElementNumberOfChannels", name)
    if sizes[3] != 1 and components != 1:
        raise refused("E0111", name, f"{components} components in 4 dimensions", "one of both", "split the file")
    shape = channel_shape((sizes[0], sizes[1], sizes[2]), sizes[3] * components, channels, name, max_voxels)
    data = _data(fields, file.tell(), path, shape, components > 1)
    return _Header(data, *_grid(fields, dimensions, shape, name))


def _fields(file: BinaryIO, name: str) -> Fields:
    """The header's fields, up to and with ``ElementDataFile``, behind which the voxels may follow."""
    fields: Fields = {}
    for line in header_lines(file, name):
        key, equals, value = line.partition("=")
        key, value = key.strip(), value.strip()
        if not line.strip():
            continue
        if not equals or not re.fullmatch(r"[!-~]+( [!-~]+)*", key):
            raise refused("E0102", name, f"header line {line[:80]!r}", "Key = Value", "this is not a MetaImage")
        key = _SYNONYMS.get(key, key)
        if key in fields:
            raise refused("E0102", name, f"{key} is there twice", "once", "the header is damaged")
        fields[key] = value
        if key == "ElementDataFile":
            return fields
    raise refused("E0101", name, f"header ends after {file.tell()} bytes", "ElementDataFile", "copy the file again")


def _data(fields: Fields, end: int, path: Path, shape: tuple[int, int, int, int], interleaved: bool) -> RawData:
    name = path.name
    slope, inter = (fields.get(f"ElementToIntensityFunction{part}", "") for part in ("Slope", "Offset"))
    if not _true(fields, "BinaryData", name, default=True):
        raise refused("E0106", name, "voxels are stored as text", "binary data", "convert it to .mha")
    if numbers(slope or "1", 1, "slope", name) != [1] or numbers(inter or "0", 1, "offset", name) != [0]:
        raise refused("E0111", name, "declares an intensity function", "plain values", "convert it to .mha")
    kind = fields.get("ElementType", "").removeprefix("MET_")
    if kind not in _TYPES:
        raise refused("E0111", name, f"voxel type {kind[:40]!r}", "one real number per voxel", "convert it")
    dtype = np.dtype(_TYPES[kind])
    if _true(fields, "BinaryDataByteOrderMSB", name, default=None if dtype.itemsize > 1 else False):
        dtype = dtype.newbyteorder(">")
    else:
        dtype = dtype.newbyteorder("<")
    target = fields["ElementDataFile"]
    if target.upper().startswith("LIST") or "%" in target:
        raise refused("E0106", name, "voxels lie in several files", "one data file", "convert it to .mha")
    data_path, start = (path, end) if target.upper() == "LOCAL" else (beside(path, target), 0)
    encoding: Encoding = "raw"
    (header_size,) = integers(fields.get("HeaderSize", "0"), 1, "HeaderSize", name)
    if _true(fields, "CompressedData", name, default=False):
        encoding = _compression(fields, data_path, start, name)
        if header_size:
            raise refused("E0102", name, f"HeaderSize {header_size} of compressed data", "0", "the header is damaged")
    if header_size < -1:
        raise refused("E0102", name, f"HeaderSize {header_size}", "-1 or more", "the header is damaged")
    if header_size == -1 and data_path == path:
        raise refused("E0102", name, "HeaderSize -1 of local data", "0", "the header is damaged")
    offset = None if header_size == -1 else start + header_size
    return RawData(data_path, shape, dtype, encoding, offset, interleaved=interleaved)


def _compression(fields: Fields, data_path: Path, start: int, name: str) -> Encoding:
    """zlib, or gzip by its first bytes; the declared size must be that of the rest of the file."""
    size = data_path.stat().st_size - start
    (declared,) = integers(fields.get("CompressedDataSize", "0"), 1, "CompressedDataSize", name)
    if declared > size or size == 0:
        raise refused("E0101", name, f"{size} bytes of {declared} compressed ones are there", "", "copy the file again")
    if declared and declared != size:
        raise refused("E0102", name, f"CompressedDataSize {declared}", str(size), "the header or the file is damaged")
    with data_path.open("rb") as file:
        file.seek(start)
        return "gzip" if file.read(2) == b"\x1f\x8b" else "zlib"


def _grid(
    fields: Fields, dimensions: int, shape: tuple[int, int, int, int], name: str
) -> tuple[Grid, str, tuple[Problem, ...]]:
    """The grid, the lines that describe it for a copy, and warnings; a fourth axis must be apart from the others."""
    n = dimensions
    matrix = np.eye(n)
    if "TransformMatrix" in fields:
        matrix = np.array(numbers(fields["TransformMatrix"], n * n, "TransformMatrix", name)).reshape(n, n).T
    stated = fields.get("ElementSpacing", fields.get("ElementSize", ""))
    if not stated:
        raise refused("E0124", name, "no ElementSpacing", "positive numbers", "add it to the header")
    spacing = numbers(stated, n, "ElementSpacing", name)
    origin = numbers(fields.get("Offset", "0 " * n), n, "Offset", name)
    unit = fields.get("DistanceUnits", "mm") or "mm"
    if unit not in _UNIT_MM:
        raise refused("E0125", name, f"DistanceUnits {unit[:40]!r}", " ".join(_UNIT_MM), "correct the header")
    s = min(n, 3)
    if n == 4 and (matrix[3, :3].any() or matrix[:3, 3].any()):
        raise refused("E0121", name, "the fourth axis is not apart from the others", "", "split the file")
    if not all(math.isfinite(value) and value > 0 for value in spacing[:s]):
        raise refused("E0124", name, f"ElementSpacing {stated[:80]}", "positive numbers", "correct the header")
    affine = np.eye(4)
    affine[:s, :s] = matrix[:s, :s] * np.array(spacing[:s])
    affine[:s, 3] = origin[:s]
    affine[:3] *= _UNIT_MM[unit]
    if s == 2:
        affine[2, 2] = 1
    affine[:3] *= _LPS[:, None]
    _, k, j, i = shape
    grid, notes = judge_affine(affine, (i, j, k), f"{name}: TransformMatrix")
    if "TransformMatrix" not in fields and s == 3:
        measured = f"{name}: no TransformMatrix, left and right are unknown"
        notes += (Problem("W0123", measured, "", "axes are taken as LPS as stored; set the orientation"),)
    whole = n == 3 and "TransformMatrix" in fields and "ElementSpacing" in fields
    lines = [f"{key} = {fields[key]}" for key in _GEOMETRY if key in fields] if whole else []
    return grid, "\n".join(lines), notes


def _geometry_lines(grid: Grid) -> str:
    affine = nifti_affine(grid)[:3] * _LPS[:, None] + 0.0
    spacing = np.linalg.norm(affine[:, :3], axis=0)
    directions = (affine[:, :3] / spacing).T.ravel()
    values = {"TransformMatrix": directions, "Offset": affine[:, 3], "ElementSpacing": spacing}
    return "\n".join(f"{key} = {' '.join(repr(float(v)) for v in row)}" for key, row in values.items())


def _needed(fields: Fields, key: str, name: str) -> str:
    if key not in fields:
        raise refused("E0102", name, f"no {key}", "", "the header is damaged")
    return fields[key]


def _true(fields: Fields, key: str, name: str, default: bool | None) -> bool:
    """A field that is True or False; one without a default must be there."""
    if key not in fields and default is not None:
        return default
    value = _needed(fields, key, name)
    if value.lower() not in ("true", "false", "1", "0", "t", "f"):
        raise refused("E0102", name, f"{key} is {value[:40]!r}", "True or False", "the header is damaged")
    return value.lower() in ("true", "1", "t")
