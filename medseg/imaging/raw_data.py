"""Raw data: where a text header says that voxels lie, judged against the file's size, and reading and writing them."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Literal

import numpy as np
from numpy.typing import NDArray

from medseg.artefacts import commit
from medseg.errors import InputError, IntegrityError, Problem
from medseg.imaging.nifti_header import MAX_VOXELS
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
from medseg.records.grid import Grid, Volume

DETACHED = (".mhd", ".nhdr")
MAX_HEADER_BYTES = 16 * 2**20
MAX_LINE_BYTES = 2**20
_PIECE_BYTES = 4 * 2**20

Encoding = Literal["raw", "gzip", "zlib"]
_NUMBER = re.compile(r"[+-]?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?|[+-]?(?:nan|inf)", re.ASCII | re.IGNORECASE)


@dataclass(frozen=True, slots=True, eq=False)
class RawData:
    """Voxels in a file: ``shape`` (C, Z, Y, X), ``dtype`` in the file's byte order.

    ``path`` is the header's own file or one beside it. ``offset`` is where the stream begins, None for raw data that
    end with the file; ``skip`` are bytes to leave out after inflating. ``interleaved``: channels of a voxel together.
    """

    path: Path
    shape: tuple[int, int, int, int]
    dtype: np.dtype[np.generic]
    encoding: Encoding
    offset: int | None
    skip: int = 0
    interleaved: bool = False


def header_lines(file: BinaryIO, name: str) -> Iterator[str]:
    """Lines of a text header without their ends, for the caller to stop; what is longer than any header is refused.

    Raises:
        InputError: E0101 the file ends within a line; E0102 not text, or too long.
    """
    total = 0
    while True:
        line = file.readline(MAX_LINE_BYTES + 1)
        total += len(line)
        if len(line) > MAX_LINE_BYTES or total > MAX_HEADER_BYTES:
            raise refused("E0102", name, f"header of more than {total} bytes", "", "the header is damaged")
        if not line:
            return
        if not line.endswith(b"\n"):
            raise refused("E0101", name, f"header ends after {total} bytes", "", "copy the file again")
        if b"\0" in line:
            raise refused("E0102", name, "header holds bytes that are no text", "", "the header is damaged")
        yield line.decode("utf-8", "replace").rstrip("\r\n")


def numbers(text: str, count: int, field: str, name: str) -> list[float]:
    """Exactly ``count`` numbers, separated by white space.

    Raises:
        InputError: E0102.
    """
    words = text.split(maxsplit=count)
    if len(words) != count or not all(_NUMBER.fullmatch(word) for word in words):
        raise refused("E0102", name, f"{field} is {text[:80]!r}", f"{count} number(s)", "the header is damaged")
    return [float(word) for word in words]


def integers(text: str, count: int, field: str, name: str) -> list[int]:
    """Exactly ``count`` integers of at most 18 digits, separated by white space.

    Raises:
        InputError: E0102.
    """
    words = text.split(maxsplit=count)
    if len(words) != count or not all(re.fullmatch(r"[+-]?\d{1,18}", word, re.ASCII) for word in words):
        raise refused("E0102", name, f"{field} is {text[:80]!r}", f"{count} integer(s)", "the header is damaged")
    return [int(word) for word in words]


def channel_shape(
    sizes: tuple[int, int, int], found: int, channels: int, name: str, max_voxels: int = MAX_VOXELS
) -> tuple[int, int, int, int]:
    """(C, Z, Y, X) of a file that declares ``sizes`` (i, j, k) and ``found`` channels where ``channels`` are wanted.

    Raises:
        InputError: E0104 too large; E0111 no voxels, or channels that were not asked for; E0133 another number.
    """
    i, j, k = sizes
    if min(*sizes, found) < 1:
        raise refused("E0111", name, f"shape {(*sizes, found)}", "positive sizes", "there are no voxels in it")
    if found != channels:
        if channels == 1:
            raise refused("E0111", name, f"holds {found} channels", "one", "split it into one file per volume")
        raise refused("E0133", name, f"holds {found} channels", f"{channels}", "provide all channels in order")
    if math.prod(sizes) * found > max_voxels:
        measured = f"declares {' × '.join(map(str, (*sizes, found)))} voxels"
        raise refused("E0104", name, measured, f"at most {max_voxels}", "check the header, or raise the limit")
    return found, k, j, i


def beside(header: Path, name: str) -> Path:
    """The data file ``name`` of a detached header: in the header's own folder, and a file.

    Raises:
        InputError: E0142 the name leads out of the folder; E0100 the file is missing.
    """
    if name in ("", ".", "..") or re.search(r"[/\\:\0]", name):
        expected = "the name of a file beside the header"
        raise refused("E0142", header.name, f"names the data file {name[:200]!r}", expected, "put the data file there")
    path = header.parent / name
    if path.resolve() == header.resolve():
        raise refused("E0102", header.name, "names itself as its data file", "another file", "the header is damaged")
    if not path.is_file():
        raise refused("E0100", header.name, f"data file {name!r} is missing", "", "copy it beside the header")
    return path


def named_data_file(header: Path) -> Path | None:
    """The data file beside a MetaImage or NRRD header, where it names one that is there."""
    try:
        with header.open("rb") as file:
            for line in header_lines(file, header.name):
                found = re.match(r"(?:ElementDataFile\s*=|data ?file:)\s*(.*?)\s*$", line, re.IGNORECASE)
                if found:
                    target = found[1].removeprefix("./")
                    return None if target.upper() == "LOCAL" else beside(header, target)
                if not line:
                    return None
    except InputError:  # whoever reads the volume is told
        return None
    return None


def read_raw(data: RawData, name: str) -> NDArray[np.generic]:
    """(C, Z, Y, X) in native byte order; no memory is taken before the file's size allows the declared voxels.

    Raises:
        InputError: E0101 truncated; E0102 corrupt, or data left over; E0106 unreadable.
        ResourceError: E0600 not enough memory.
    """
    needed = math.prod(data.shape) * data.dtype.itemsize
    size = data.path.stat().st_size
    offset = size - needed if data.offset is None else data.offset
    ratio = 1 if data.encoding == "raw" else DEFLATE_MAX_RATIO
    if offset < 0 or needed + data.skip > (size - offset) * ratio:
        raise truncated(data.path, size, max(offset, 0) + needed + data.skip)
    try:
        with data.path.open("rb") as file:
            file.seek(offset)
            stream: Stream = (
                PlainStream(file) if data.encoding == "raw" else DeflateStream(file, data.path, data.encoding)
            )
            _skip(stream, data)
            read = _read_interleaved if data.interleaved else read_voxels
            array = read(stream, data.shape, data.dtype, data.path, offset + data.skip)
            must_end(stream, data.path)
    except OSError as error:
        raise refused("E0106", name, f"cannot be read: {error.strerror or error}", "", "check the file") from error
    return array


def _read_interleaved(
    stream: Stream, shape: tuple[int, ...], dtype: np.dtype[np.generic], path: Path, offset: int = 0
) -> NDArray[np.generic]:
    """Like ``read_voxels``, from a stream that holds the channels of each voxel together; ``shape`` is (C, …)."""
    channels, count = shape[0], math.prod(shape[1:])
    with memory_for(path, count * channels * dtype.itemsize):
        array = np.empty((channels, count), dtype.newbyteorder("="))
    step = max(1, _PIECE_BYTES // (channels * dtype.itemsize))
    for start in range(0, count, step):
        piece = (min(step, count - start), channels)
        array[:, start : start + step] = read_voxels(stream, piece, dtype, path, offset).T
        offset += math.prod(piece) * dtype.itemsize
    return array.reshape(shape)


def _skip(stream: Stream, data: RawData) -> None:
    left = data.skip
    while left:
        got = stream.readinto(memoryview(bytearray(min(left, 2**20))))
        if not got:
            raise truncated(data.path, data.skip - left, data.skip)
        left -= got


def as_label_file(labels: NDArray[np.integer], grid: Grid) -> NDArray[np.unsignedinteger]:
    """Labels (Z, Y, X) in the smallest unsigned type that holds them.

    Raises:
        ValueError: labels are negative, or do not lie on ``grid``.
    """
    if labels.shape != grid.shape:
        raise ValueError(f"labels {labels.shape} do not lie on a grid of {grid.shape}")
    if labels.min() < 0:
        raise ValueError(f"label {labels.min()} is negative")
    return labels.astype(np.min_scalar_type(int(labels.max())), copy=False)


def little_endian(labels: NDArray[np.integer]) -> Iterator[bytes]:
    """The bytes of each slice, little endian."""
    for section in labels:
        yield np.ascontiguousarray(section, section.dtype.newbyteorder("<")).tobytes()


def commit_labels(
    path: Path,
    pieces: Iterable[bytes],
    read: Callable[[Path], Volume],
    labels: NDArray[np.integer],
    grid: Grid,
    tolerance_voxels: float,
) -> str:
    """Commit a file made of ``pieces`` that ``read`` reads back as ``labels`` on ``grid``; returns its SHA-256.

    Raises:
        EnvironmentFailure: E0501, E0502.
        IntegrityError: E0701 the file does not read back as it was written.
    """

    def write(temporary: Path) -> None:
        with temporary.open("xb") as file:
            file.writelines(pieces)

    def verify(temporary: Path) -> None:
        try:
            back = read(temporary)
        except InputError as error:
            raise IntegrityError(Problem("E0701", f"{path.name} does not read back: {error}")) from error
        moved = grid.corner_displacement_voxels(back.grid) if back.grid.shape == grid.shape else np.inf
        if not np.array_equal(back.array[0], labels) or moved > tolerance_voxels:
            raise IntegrityError(Problem("E0701", f"{path.name} read back differently", "", "check the disk"))

    return commit(path, write, verify)


def refused(code: str, name: str, measured: str, expected: str, action: str) -> InputError:
    """One problem with the file ``name``."""
    return InputError(Problem(code, f"{name}: {measured}", expected, action))
