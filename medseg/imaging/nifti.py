"""NIfTI files: volumes read to the last byte of the stream, label maps written on the grid they came from.

SimpleITK reads a damaged ``.nii.gz`` without an error, and nibabel does not look at the checksum (fault catalogue
F01–F03): the stream is inflated here, CRC and length verified, and must end where the header says.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import logging
import math
import struct
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import nibabel as nib
import numpy as np
from numpy.typing import NDArray

from medseg.errors import InputError, Problem
from medseg.imaging.geometry import nifti_affine
from medseg.imaging.nifti_header import MAX_VOXELS, Layout, header_size, parse_header
from medseg.imaging.pieces import commit_pieces, sections
from medseg.imaging.streams import (
    DEFLATE_MAX_RATIO,
    DeflateStream,
    PlainStream,
    Stream,
    memory_for,
    must_end,
    read_voxels,
    truncated,
)
from medseg.records.grid import Grid, Source, Volume
from medseg.records.task import Label

logger = logging.getLogger(__name__)

_PIECE = 2**20  # voxels that are in memory twice
_COMMENT = 6  # NIFTI_ECODE_COMMENT: plain text
_COPIED = (
    "xyzt_units", "qform_code", "sform_code", "quatern_b", "quatern_c", "quatern_d",
    "qoffset_x", "qoffset_y", "qoffset_z", "srow_x", "srow_y", "srow_z",
)  # fmt: skip


def read_nifti(path: Path, channels: int = 1, max_voxels: int = MAX_VOXELS) -> Volume:
    """Read ``.nii`` or ``.nii.gz``: (C, Z, Y, X) in native byte order and the file's own type, on the file's grid.

    Where the header asks for scaling the array is float32, or float64 for types that float32 cannot hold. A 4D file
    is read only as the number of ``channels`` asked for. Peak memory is the array and little else.

    Raises:
        InputError: E0101 truncated; E0102 corrupt, or data after the end; E0104 too large; E0106 unreadable; and
            what ``parse_header`` raises.
        ResourceError: E0600 not enough memory for the array.
    """
    volume = _read(Path(path), channels, max_voxels)
    for note in volume.notes:
        logger.warning("%s", note)
    return volume


def nifti_slabs(path: Path, slices: int) -> Iterator[tuple[Grid, NDArray[np.floating]]]:
    """Read a single-channel file some ``slices`` at a time: its grid and (z, Y, X) scaled values, from the first on.

    Raises:
        What ``read_nifti`` raises, where the reading gets to it.
    """
    with _opened(path, 1, MAX_VOXELS) as (stream, layout, _):
        _, depth, *plane = layout.shape
        for start in range(0, depth, slices):
            piece = replace(layout, shape=(1, min(slices, depth - start), plane[0], plane[1]))
            yield layout.grid, _scaled(stream, piece, path)[0]
        must_end(stream, path)


def header_notes(source: Source, channels: int = 1) -> tuple[Problem, ...]:
    """The warnings about a volume that was read from NIfTI: W0121, W0122, W0123, W0125; none for other formats."""
    return parse_header(source.header, Path(source.path).name, channels).notes if source.header else ()


def _read(path: Path, channels: int, max_voxels: int) -> Volume:
    with _opened(path, channels, max_voxels) as (stream, layout, header):
        scaled = layout.slope != 1 or layout.inter != 0
        array = _scaled(stream, layout, path) if scaled else _stored(stream, layout, path)
        must_end(stream, path)
    return Volume(array, layout.grid, Source(str(path), "nifti", header), layout.notes)


@contextlib.contextmanager
def _opened(path: Path, channels: int, max_voxels: int) -> Iterator[tuple[Stream, Layout, bytes]]:
    """The stream of a file at its first voxel, what its header says, and the header; nothing large is allocated."""
    try:
        with path.open("rb") as file:
            magic = file.read(2)
            file.seek(0)
            compressed = path.name.lower().endswith(".gz")
            if len(magic) == 2 and compressed != (magic == b"\x1f\x8b"):
                found = "is not gzip data" if compressed else "is gzip data"
                raise _bad("E0102", path, f"{found}, against its name", "rename or rewrite the file")
            stream: Stream = DeflateStream(file, path) if compressed else PlainStream(file)
            raw = _fill(stream, bytearray(4), path)
            raw += _fill(stream, bytearray(header_size(raw, path.name) - 4), path)
            layout = parse_header(bytes(raw), path.name, channels, max_voxels)
            capacity = path.stat().st_size * (DEFLATE_MAX_RATIO if compressed else 1)
            if layout.offset + layout.voxel_bytes > capacity:
                raise truncated(path, path.stat().st_size, layout.offset + layout.voxel_bytes)
            _fill(stream, bytearray(layout.offset - len(raw)), path)
            yield stream, layout, bytes(raw)
    except OSError as error:
        raise _bad("E0106", path, f"cannot be read: {error.strerror or error}", "check the file") from error


def _stored(stream: Stream, layout: Layout, path: Path) -> NDArray[np.generic]:
    return read_voxels(stream, layout.shape, layout.dtype, path, layout.offset)


def _scaled(stream: Stream, layout: Layout, path: Path) -> NDArray[np.generic]:
    """The voxels times slope plus inter, piece by piece: the stored array is never in memory beside the scaled one."""
    dtype = np.dtype(np.float32 if np.can_cast(layout.dtype, np.float32) else np.float64)
    count = math.prod(layout.shape)
    with memory_for(path, count * dtype.itemsize):
        result = np.empty(count, dtype)
    piece = np.empty(min(count, _PIECE), layout.dtype)
    with np.errstate(over="ignore", invalid="ignore"):  # what is not finite is found and named by the checks
        slope, inter = np.array([[layout.slope], [layout.inter]]).astype(dtype)
        for start in range(0, count, _PIECE):
            target = result[start : start + _PIECE]
            stored = piece[: len(target)]
            got = start * stored.itemsize + stream.readinto(stored.view(np.uint8).data)
            if got < (start + len(stored)) * stored.itemsize:
                raise truncated(path, layout.offset + got, layout.offset + layout.voxel_bytes)
            np.multiply(stored, slope, out=target)
            np.add(target, inter, out=target)
    return result.reshape(layout.shape)


def _fill(stream: Stream, buffer: bytearray, path: Path) -> bytearray:
    got = stream.readinto(memoryview(buffer))
    if got < len(buffer):
        raise _bad("E0101", path, f"header ends after {got} of {len(buffer)} bytes", "copy the file again")
    return buffer


def write_nifti(
    path: Path, labels: NDArray[np.integer], grid: Grid, source: Source, classes: Sequence[Label] = ()
) -> str:
    """Commit a label map (Z, Y, X) on the source file's grid and return the file's SHA-256.

    The orientation fields are the source's own, bit for bit; text fields, which may hold patient data, are not
    copied. The voxel type is the smallest unsigned one that fits; the gzip stream holds neither name nor time, so
    that equal labels give equal files. Without a NIfTI source the header is made from ``grid``. The names of
    ``classes`` go into a header extension, a comment that holds JSON: ``{"labels": {"1": "liver", …}}``.

    Raises:
        ValueError: labels are negative, or do not lie on ``grid``, or ``grid`` is not the source's.
        EnvironmentFailure: E0501, E0502.
        IntegrityError: E0701 the file does not read back as it was written (see ``pieces``).
    """
    if labels.shape != grid.shape:
        raise ValueError(f"labels {labels.shape} do not lie on a grid of {grid.shape}")
    path, kind = Path(path), _smallest(labels)
    header = _label_header(grid, source, kind, _extension(classes))
    found = parse_header(header[: header_size(header, path.name)], path.name).grid
    if found.shape != grid.shape or grid.corner_displacement_voxels(found) > (0 if source.header else 1e-2):
        raise ValueError("a header cannot hold this grid")
    return commit_pieces(path, itertools.chain([header], sections(labels, kind.newbyteorder("<"))))


def write_nifti_image(path: Path, voxels: NDArray[np.generic], grid: Grid) -> str:
    """Commit voxels (Z, Y, X) of their own type on ``grid``, with a new header; returns the file's SHA-256.

    Raises:
        EnvironmentFailure: E0501, E0502.
        IntegrityError: E0701 the file does not read back as it was written.
    """
    header = _made_header(grid)
    header.set_data_dtype(voxels.dtype.newbyteorder("<"))
    header["vox_offset"] = header.sizeof_hdr + 4
    start = bytes(header.binaryblock) + bytes(4)
    return commit_pieces(path, itertools.chain([start], sections(voxels, voxels.dtype.newbyteorder("<"))))


def _smallest(labels: NDArray[np.integer]) -> np.dtype[np.generic]:
    """The smallest unsigned type for the labels; bytes are not looked at."""
    if labels.dtype == np.uint8:
        return labels.dtype
    if labels.dtype.kind != "u" and labels.min() < 0:
        raise ValueError(f"label {labels.min()} is negative")
    return np.dtype(np.min_scalar_type(int(labels.max())))


def _extension(classes: Sequence[Label]) -> bytes:
    """The bytes between header and voxels: the extension flag, then a comment with the names (nifti1.h, ecode 6)."""
    if not classes:
        return bytes(4)
    text = json.dumps({"labels": {str(label.value): label.name for label in classes}}, ensure_ascii=False).encode()
    size = 16 * math.ceil((8 + len(text)) / 16)
    return struct.pack("<4B2i", 1, 0, 0, 0, size, _COMMENT) + text.ljust(size - 8, b"\0")


def _label_header(grid: Grid, source: Source, dtype: np.dtype[np.generic], extension: bytes) -> bytes:
    """Header and extension block of a label file."""
    if source.header:
        header, dimensions = _copied_header(grid, source)
    else:
        header, dimensions = _made_header(grid), 3
    header["dim"] = [dimensions, *grid.shape[::-1], 1, 1, 1, 1]
    header.set_data_dtype(dtype.newbyteorder("<"))
    header["scl_slope"], header["scl_inter"] = 1, 0
    header["vox_offset"] = header.sizeof_hdr + len(extension)
    return bytes(header.binaryblock) + extension


def _copied_header(grid: Grid, source: Source) -> tuple[nib.Nifti1Header, int]:
    kind = nib.Nifti1Header if len(source.header) == 348 else nib.Nifti2Header
    order = "<" if int.from_bytes(source.header[:4], "little") == len(source.header) else ">"
    old = kind(binaryblock=source.header, endianness=order, check=False)
    dimensions = min(int(old["dim"][0]), 3)
    channels = int(old["dim"][4]) if int(old["dim"][0]) > 3 else 1
    own = parse_header(source.header, "source", channels).grid
    if own.shape != grid.shape or not np.array_equal(own.affine, grid.affine):
        raise ValueError("the grid of the labels is not the grid of the source file")
    header = kind(endianness="<")
    for field in _COPIED:
        header[field] = old[field]
    header["xyzt_units"] = int(old["xyzt_units"]) & 7
    header["pixdim"] = [*old["pixdim"][:4], 1, 1, 1, 1]
    return header, dimensions


def _made_header(grid: Grid) -> nib.Nifti1Header:
    header = (nib.Nifti1Header if max(grid.shape) < 2**15 else nib.Nifti2Header)(endianness="<")
    header.set_data_shape(grid.shape[::-1])
    header["scl_slope"], header["scl_inter"] = 1, 0
    header.set_xyzt_units("mm")
    header.set_qform(nifti_affine(grid), code=1, strip_shears=True)
    header.set_sform(nifti_affine(grid), code=1)
    return header


def _bad(code: str, path: Path, measured: str, action: str) -> InputError:
    return InputError(Problem(code, f"{path.name}: {measured}", "", action))
