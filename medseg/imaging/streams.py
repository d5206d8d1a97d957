"""Streams of voxel bytes: plain, gzip and zlib data read to their end, checksums verified, nothing left over.

Whoever reads a volume knows how many bytes it needs; a stream that ends before or after them is refused.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import BinaryIO, Protocol

import numpy as np
from numpy.typing import NDArray

from medseg.errors import InputError, Problem, ResourceError
from medseg.imaging.codec import Wrapper, codec_errors, deflater, inflater

DEFLATE_MAX_RATIO = 1032  # zlib's documented limit: one bit pair per 258 bytes
_IN, _OUT = 256 * 2**10, 2**20


class Stream(Protocol):
    """Bytes in order; what is wrong with them is raised as ``InputError``."""

    def readinto(self, view: memoryview) -> int:
        """Fill ``view``; fewer bytes only where the stream ends as it should."""


class PlainStream:
    """An uncompressed file from its current position."""

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


class DeflateStream:
    """Deflated data to the end of a file, inflated piece by piece, checksums verified.

    gzip data may have several members (bgzip, pigz); zlib data are one stream.
    """

    def __init__(self, file: BinaryIO, path: Path, wrapper: Wrapper = "gzip") -> None:
        self._file, self._path, self._wrapper = file, path, wrapper
        self._inflate = inflater(wrapper)
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
            except codec_errors() as error:
                reason = str(error).rpartition(": ")[2]
                raise self._bad("E0102", f"stream is corrupt ({reason})") from error
            self._pending = self._inflate.unconsumed_tail
            if not data and not piece and not self._inflate.eof:
                raise self._bad("E0101", "stream ends too early")
            view[filled : filled + len(piece)] = piece
            filled += len(piece)
        return filled

    def _next_member(self) -> bool:
        rest = self._inflate.unused_data or self._file.read(_IN)
        if not rest:
            return False
        rest += self._file.read(1) if len(rest) == 1 else b""
        if self._wrapper != "gzip" or rest[:2] != b"\x1f\x8b":
            problem = f"has data after the end of its {self._wrapper} stream"
            raise InputError(Problem("E0102", f"{self._path.name}: {problem}", "", "copy the file again"))
        self._inflate, self._pending = inflater("gzip"), rest
        return True

    def _bad(self, code: str, measured: str) -> InputError:
        return InputError(Problem(code, f"{self._path.name}: {self._wrapper} {measured}", "", "copy the file again"))


def read_voxels(
    stream: Stream, shape: tuple[int, ...], dtype: np.dtype[np.generic], path: Path, offset: int = 0
) -> NDArray[np.generic]:
    """The next voxels of ``stream`` as an array of ``shape`` in native byte order; ``dtype`` is the file's.

    The array is the only memory that is taken. ``offset`` is the number of bytes before it, for messages.

    Raises:
        InputError: E0101 the stream ends too early.
        ResourceError: E0600 not enough memory.
    """
    size = math.prod(shape) * dtype.itemsize
    with memory_for(path, size):
        flat = np.empty(size, np.uint8)
    got = stream.readinto(flat.data)
    if got < size:
        raise truncated(path, offset + got, offset + size)
    array = flat.view(dtype).reshape(shape)
    return array if array.dtype.isnative else array.byteswap(inplace=True).view(array.dtype.newbyteorder("="))


@contextlib.contextmanager
def memory_for(path: Path, size: int) -> Iterator[None]:
    """Turn a ``MemoryError`` of the block, which takes ``size`` bytes, into E0600."""
    try:
        yield
    except MemoryError as error:
        needed = f"{path.name}: needs {size / 2**30:.1f} GiB"
        raise ResourceError(Problem("E0600", needed, "", "use a machine with more memory")) from error


def must_end(stream: Stream, path: Path) -> None:
    """Refuse a stream that goes on: E0102; reading on to its end is also what verifies its last checksum."""
    if stream.readinto(memoryview(bytearray(1))):
        measured = f"{path.name}: has data after its last voxel"
        raise InputError(Problem("E0102", measured, "", "the header or the file is damaged"))


def deflated(pieces: Iterable[bytes | memoryview], wrapper: Wrapper = "gzip") -> Iterator[bytes]:
    """``pieces`` as one compressed stream that holds neither name nor time: equal pieces give equal bytes."""
    deflate = deflater(wrapper)
    for piece in pieces:
        yield deflate.compress(piece)
    yield deflate.flush()


def truncated(path: Path, got: int, declared: int) -> InputError:
    """E0101 with the numbers of bytes."""
    return InputError(
        Problem("E0101", f"{path.name}: file ends after {got} of {declared} bytes", "", "copy the file again")
    )
