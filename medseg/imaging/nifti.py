"""NIfTI files: volumes read to the last byte of the stream, label maps written on the grid they came from.

SimpleITK reads a damaged ``.nii.gz`` without an error, and nibabel does not look at the checksum (fault catalogue
F01–F03): the stream is inflated here with zlib, which verifies CRC and length, and must end where the header says.
"""

from __future__ import annotations

import logging
import zlib
from pathlib import Path
from typing import BinaryIO

import nibabel as nib
import numpy as np
from numpy.typing import NDArray

from medseg.artefacts import commit
from medseg.errors import InputError, IntegrityError, Problem, ResourceError
from medseg.imaging.geometry import nifti_affine
from medseg.imaging.nifti_header import MAX_VOXELS, Layout, header_size, parse_header
from medseg.records.grid import Grid, Source, Volume

logger = logging.getLogger(__name__)

GZIP_LEVEL = 4
DEFLATE_MAX_RATIO = 1032  # zlib's documented limit: one bit pair per 258 bytes
_GZIP = 31  # wbits: 32 KiB window with gzip header, CRC and length checked
_IN, _OUT = 256 * 2**10, 2**20
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
    volume, layout = _read(Path(path), channels, max_voxels)
    for note in layout.notes:
        logger.warning("%s", note)
    return volume


def header_notes(source: Source, channels: int = 1) -> tuple[Problem, ...]:
    """The warnings about a volume that was read from NIfTI: W0121, W0122, W0123; none for other formats."""
    return parse_header(source.header, Path(source.path).name, channels).notes if source.header else ()


def _read(path: Path, channels: int, max_voxels: int = MAX_VOXELS) -> tuple[Volume, Layout]:
    try:
        with path.open("rb") as file:
            magic = file.read(2)
            file.seek(0)
            compressed = path.name.lower().endswith(".gz")
            if len(magic) == 2 and compressed != (magic == b"\x1f\x8b"):
                found = "is not gzip data" if compressed else "is gzip data"
                raise _bad("E0102", path, f"{found}, against its name", "rename or rewrite the file")
            stream = _GzipStream(file, path) if compressed else _PlainStream(file)
            raw = _fill(stream, bytearray(4), path)
            raw += _fill(stream, bytearray(header_size(raw, path.name) - 4), path)
            layout = parse_header(bytes(raw), path.name, channels, max_voxels)
            capacity = path.stat().st_size * (DEFLATE_MAX_RATIO if compressed else 1)
            if layout.offset + layout.voxel_bytes > capacity:
                raise _truncated(path, path.stat().st_size, layout.offset + layout.voxel_bytes)
            _fill(stream, bytearray(layout.offset - len(raw)), path)
            array = _voxels(stream, layout, path)
            if stream.readinto(memoryview(bytearray(1))):
                raise _bad("E0102", path, "has data after its last voxel", "the header or the file is damaged")
    except OSError as error:
        raise _bad("E0106", path, f"cannot be read: {error.strerror or error}", "check the file") from error
    return Volume(array, layout.grid, Source(str(path), "nifti", bytes(raw))), layout


class _PlainStream:
    """An uncompressed file."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file

    def readinto(self, view: memoryview) -> int:
        """Fill ``view``; fewer bytes only at the end of the file."""
        filled = 0
        while filled < len(view):
            got = self._file.readinto(view[filled : filled + 2**30])  # type: ignore[attr-defined]
            if not got:
                break
            filled += got
        return filled


class _GzipStream:
    """A gzip file of one or more members (bgzip, pigz), inflated piece by piece, checksums verified."""

    def __init__(self, file: BinaryIO, path: Path) -> None:
        self._file, self._path = file, path
        self._inflate = zlib.decompressobj(_GZIP)
        self._pending = b""

    def readinto(self, view: memoryview) -> int:
        """Fill ``view``; fewer bytes only where the stream ends as it should."""
        filled = 0
        while filled < len(view):
            if self._inflate.eof and not self._next_member():
                break
            data = self._pending or self._file.read(_IN)
            try:
                piece = self._inflate.decompress(data, min(len(view) - filled, _OUT))
            except zlib.error as error:
                reason = str(error).rpartition(": ")[2]
                raise _bad("E0102", self._path, f"gzip stream is corrupt ({reason})", "copy the file again") from error
            self._pending = self._inflate.unconsumed_tail
            if not data and not piece and not self._inflate.eof:
                raise _bad("E0101", self._path, "gzip stream ends too early", "copy the file again")
            view[filled : filled + len(piece)] = piece
            filled += len(piece)
        return filled

    def _next_member(self) -> bool:
        rest = self._inflate.unused_data or self._file.read(_IN)
        if not rest:
            return False
        rest += self._file.read(1) if len(rest) == 1 else b""
        if rest[:2] != b"\x1f\x8b":
            raise _bad("E0102", self._path, "has data after the end of its gzip stream", "copy the file again")
        self._inflate, self._pending = zlib.decompressobj(_GZIP), rest
        return True


_Stream = _PlainStream | _GzipStream


def _fill(stream: _Stream, buffer: bytearray, path: Path) -> bytearray:
    got = stream.readinto(memoryview(buffer))
    if got < len(buffer):
        raise _bad("E0101", path, f"header ends after {got} of {len(buffer)} bytes", "copy the file again")
    return buffer


def _voxels(stream: _Stream, layout: Layout, path: Path) -> NDArray[np.generic]:
    try:
        flat = np.empty(layout.voxel_bytes, np.uint8)
        got = stream.readinto(flat.data)
        if got < len(flat):
            raise _truncated(path, layout.offset + got, layout.offset + len(flat))
        array = flat.view(layout.dtype).reshape(layout.shape)
        if not array.dtype.isnative:
            array = array.byteswap(inplace=True).view(array.dtype.newbyteorder("="))
        return _scaled(array, layout.slope, layout.inter)
    except MemoryError as error:
        needed = f"{path.name}: needs {layout.voxel_bytes / 2**30:.1f} GiB"
        raise ResourceError(Problem("E0600", needed, "", "use a machine with more memory")) from error


def _scaled(array: NDArray[np.generic], slope: float, inter: float) -> NDArray[np.generic]:
    if slope == 1 and inter == 0:
        return array
    result: NDArray[np.floating] = array.astype(np.float32 if np.can_cast(array.dtype, np.float32) else np.float64)
    with np.errstate(over="ignore", invalid="ignore"):  # what is not finite is found and named by the checks
        np.multiply(result, result.dtype.type(slope), out=result)
        np.add(result, result.dtype.type(inter), out=result)
    return result


def write_nifti(path: Path, labels: NDArray[np.integer], grid: Grid, source: Source) -> str:
    """Commit a label map (Z, Y, X) on the source file's grid and return the file's SHA-256.

    The orientation fields are the source's own, bit for bit; text fields, which may hold patient data, are not
    copied. The voxel type is the smallest unsigned one that fits; the gzip stream holds neither name nor time, so
    that equal labels give equal files. Without a NIfTI source the header is made from ``grid``.

    Raises:
        ValueError: labels are negative, or do not lie on ``grid``, or ``grid`` is not the source's.
        EnvironmentFailure: E0501, E0502.
        IntegrityError: E0701 the file does not read back as it was written.
    """
    if labels.shape != grid.shape:
        raise ValueError(f"labels {labels.shape} do not lie on a grid of {grid.shape}")
    if labels.min() < 0:
        raise ValueError(f"label {labels.min()} is negative")
    path = Path(path)
    labels = labels.astype(np.min_scalar_type(int(labels.max())), copy=False)
    header = _label_header(grid, source, labels.dtype)

    def write(temporary: Path) -> None:
        with temporary.open("xb") as file:
            deflate = zlib.compressobj(GZIP_LEVEL, zlib.DEFLATED, _GZIP) if path.name.lower().endswith(".gz") else None
            for piece in (header, *labels):
                data = piece if isinstance(piece, bytes) else np.ascontiguousarray(piece).tobytes()
                file.write(deflate.compress(data) if deflate else data)
            file.write(deflate.flush() if deflate else b"")

    def verify(temporary: Path) -> None:
        try:
            back, _ = _read(temporary, channels=1)
        except InputError as error:
            raise IntegrityError(Problem("E0701", f"{path.name} does not read back: {error}")) from error
        moved = grid.corner_displacement_voxels(back.grid) if back.grid.shape == grid.shape else np.inf
        if not np.array_equal(back.array[0], labels) or moved > (0 if source.header else 1e-2):
            raise IntegrityError(Problem("E0701", f"{path.name} read back differently", "", "check the disk"))

    return commit(path, write, verify)


def _label_header(grid: Grid, source: Source, dtype: np.dtype[np.generic]) -> bytes:
    """Header and empty extension block of a label file."""
    if source.header:
        header, dimensions = _copied_header(grid, source)
    else:
        header, dimensions = _made_header(grid), 3
    header["dim"] = [dimensions, *grid.shape[::-1], 1, 1, 1, 1]
    header.set_data_dtype(dtype.newbyteorder("<"))
    header["scl_slope"], header["scl_inter"] = 1, 0
    header["vox_offset"] = header.sizeof_hdr + 4
    return bytes(header.binaryblock) + bytes(4)


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
    header.set_xyzt_units("mm")
    header.set_qform(nifti_affine(grid), code=1, strip_shears=True)
    header.set_sform(nifti_affine(grid), code=1)
    return header


def _truncated(path: Path, got: int, declared: int) -> InputError:
    return _bad("E0101", path, f"file ends after {got} of {declared} bytes", "copy the file again")


def _bad(code: str, path: Path, measured: str, action: str) -> InputError:
    return InputError(Problem(code, f"{path.name}: {measured}", "", action))
