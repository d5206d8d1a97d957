"""Files made of pieces: written plain or as one gzip member, and verified by what the disk gives back.

The blocks of a member are independent (each ends with a full flush, as ``pigz --independent`` writes them), so that
several cores deflate them, and inflate them again; to any other reader they are one stream. Equal pieces give equal
bytes whatever the number of cores. Verified is that the file's bytes inflate to data of the length and the CRC-32
that the pieces had before they were compressed.
"""

from __future__ import annotations

import struct
from collections import deque
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, TypeVar

import numpy as np
from numpy.typing import NDArray

from medseg.artefacts import commit
from medseg.errors import IntegrityError, Problem
from medseg.imaging.codec import codec_errors, crc32, deflate_block, inflate_block
from medseg.machine import usable_cores

Piece = bytes | NDArray[np.generic]
Item = TypeVar("Item")
Result = TypeVar("Result")

_PIECE_BYTES = 2**20
_HEADER = b"\x1f\x8b\x08\0\0\0\0\0\0\xff"  # RFC 1952: deflate, no name, no time, unknown system
_LAST_BLOCK = b"\x03\0"  # RFC 1951: final, fixed codes, empty
_MOST_CORES = 8


@dataclass(frozen=True, slots=True)
class _Block:
    """``packed`` bytes at ``offset`` stand for ``size`` bytes, which take the CRC from ``before`` to ``after``."""

    offset: int
    packed: int
    size: int
    before: int
    after: int


def commit_pieces(path: Path, pieces: Iterable[Piece]) -> str:
    """Commit ``pieces`` one after the other, as one gzip member if ``path`` ends with ``.gz``; returns the SHA-256.

    Arrays are C-contiguous and taken as the bytes they hold.

    Raises:
        EnvironmentFailure: E0501, E0502.
        IntegrityError: E0701 the file does not read back as it was written.
    """
    written: list[_Block] = []
    write, holds = (_write_gzip, _gzip_holds) if path.name.lower().endswith(".gz") else (_write_plain, _plain_holds)

    def create(temporary: Path) -> None:
        with temporary.open("xb") as file:
            written.extend(write(file, pieces))

    def verify(temporary: Path) -> None:
        if not holds(temporary, written):
            raise IntegrityError(Problem("E0701", f"{path.name} read back differently", "", "check the disk"))

    return commit(path, create, verify)


def sections(voxels: NDArray[np.generic], dtype: np.dtype[np.generic]) -> Iterable[NDArray[np.generic]]:
    """Stacks of whole slices (Z, …) of about a megabyte, in order, contiguous and of the type ``dtype``."""
    slices = max(1, _PIECE_BYTES // (voxels[0].size * dtype.itemsize))
    return (np.ascontiguousarray(voxels[z : z + slices], dtype) for z in range(0, len(voxels), slices))


def _write_plain(file: BinaryIO, pieces: Iterable[Piece]) -> list[_Block]:
    offset, crc, blocks = 0, 0, list[_Block]()
    for view in map(_bytes, pieces):
        before, crc = crc, crc32(view, crc)
        file.write(view)
        blocks.append(_Block(offset, len(view), len(view), before, crc))
        offset += len(view)
    return blocks


def _plain_holds(path: Path, blocks: list[_Block]) -> bool:
    with path.open("rb") as file:
        same = all(crc32(file.read(block.size), block.before) == block.after for block in blocks)
        return same and not file.read(1)


def _write_gzip(file: BinaryIO, pieces: Iterable[Piece]) -> list[_Block]:
    offset, crc, size, blocks = len(_HEADER), 0, 0, list[_Block]()
    file.write(_HEADER)
    for view, packed in _ahead(deflate_block, map(_bytes, pieces)):
        before, crc = crc, crc32(view, crc)
        file.write(packed)
        blocks.append(_Block(offset, len(packed), len(view), before, crc))
        offset, size = offset + len(packed), size + len(view)
    file.write(_trailer(crc, size))
    return blocks


def _gzip_holds(path: Path, blocks: list[_Block]) -> bool:
    def same(block: _Block) -> bool:
        with path.open("rb") as file:
            file.seek(block.offset)
            return crc32(inflate_block(file.read(block.packed), block.size), block.before) == block.after

    trailer = _trailer(blocks[-1].after, sum(block.size for block in blocks))
    with path.open("rb") as file:
        start = file.read(len(_HEADER))
        file.seek(blocks[-1].offset + blocks[-1].packed)
        if start != _HEADER or file.read() != trailer:
            return False
    try:
        return all(found for _, found in _ahead(same, blocks))
    except codec_errors():
        return False


def _trailer(crc: int, size: int) -> bytes:
    return _LAST_BLOCK + struct.pack("<2I", crc, size % 2**32)


def _bytes(piece: Piece) -> memoryview:
    return memoryview(piece if isinstance(piece, bytes) else piece.data).cast("B")


def _ahead(work: Callable[[Item], Result], items: Iterable[Item]) -> Iterable[tuple[Item, Result]]:
    """Each item with its result, in order, worked on by several threads that run a few items ahead."""
    cores = min(usable_cores(), _MOST_CORES)
    waiting: deque[tuple[Item, Future[Result]]] = deque()
    with ThreadPoolExecutor(cores, "medseg-pieces") as pool:
        for item in items:
            waiting.append((item, pool.submit(work, item)))
            if len(waiting) > 2 * cores:
                first, future = waiting.popleft()
                yield first, future.result()
        for first, future in waiting:
            yield first, future.result()
