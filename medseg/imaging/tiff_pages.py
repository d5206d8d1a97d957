"""TIFF pages: the chain of directories and all that they point to, checked to lie within the file.

Decoders stop without a word where the chain breaks: a stack that was cut loses its last slices. Rules: TIFF 6.0,
section 2; BigTIFF (version 43) has the same structure with wider numbers.
"""

from __future__ import annotations

import struct
from pathlib import Path
from typing import BinaryIO

from medseg.errors import InputError, Problem

MAX_PAGES, MAX_ENTRIES = 65535, 4096
MAX_DATA_BYTES = 16 * 2**20  # of one entry's numbers
_SIZES = {1: 1, 2: 1, 3: 2, 4: 4, 5: 8, 6: 1, 7: 1, 8: 2, 9: 4, 10: 8, 11: 4, 12: 8, 13: 4, 16: 8, 17: 8, 18: 8}
_NUMBERS = {3: "H", 4: "I", 16: "Q"}
_OFFSETS, _COUNTS = (273, 324), (279, 325)  # of strips and tiles
_ORDERS = {b"II": "<", b"MM": ">"}


def count_pages(path: Path) -> int:
    """The number of pages of a TIFF file, after all of them were found to lie within it; 0 for other files.

    Raises:
        InputError: E0101 the file ends before something that it points to; E0102 damaged directories.
    """
    with path.open("rb") as file:
        size = path.stat().st_size
        start = file.read(16)
        order = _ORDERS.get(start[:2])
        if order is None or len(start) < 8:
            return 0
        (version,) = struct.unpack(order + "H", start[2:4])
        if version not in (42, 43):
            return 0
        wide = version == 43
        if wide and len(start) < 16:
            raise _ends(path, size, 16)
        (at,) = struct.unpack(order + ("Q" if wide else "I"), start[8:16] if wide else start[4:8])
        seen: set[int] = set()
        while at:
            if at in seen or len(seen) > MAX_PAGES:
                raise _damaged(path, "a page follows itself" if at in seen else f"more than {MAX_PAGES} pages")
            seen.add(at)
            at = _directory(_Reader(file, path, size, order, wide), at)
        if not seen:
            raise _damaged(path, "no page")
        return len(seen)


class _Reader:
    """Bytes at a position of a file whose size is known."""

    def __init__(self, file: BinaryIO, path: Path, size: int, order: str, wide: bool) -> None:
        self.file, self.path, self.size, self.order, self.wide = file, path, size, order, wide

    def take(self, at: int, count: int) -> bytes:
        """``count`` bytes from ``at``."""
        self.inside(at, count)
        self.file.seek(at)
        return self.file.read(count)

    def inside(self, at: int, count: int) -> None:
        """Refuse what ends behind the file."""
        if at + count > self.size:
            raise _ends(self.path, self.size, at + count)


def _directory(reader: _Reader, at: int) -> int:
    """Check one page's directory and its strips or tiles; returns where the next one is, 0 for none."""
    head, word, step = ("Q", "Q", 20) if reader.wide else ("H", "I", 12)
    count_size, word_size = struct.calcsize("=" + head), struct.calcsize("=" + word)
    (entries,) = struct.unpack(reader.order + head, reader.take(at, count_size))
    if entries > MAX_ENTRIES:
        raise _damaged(reader.path, f"{entries} entries")
    table = reader.take(at + count_size, entries * step + word_size)
    found: dict[int, tuple[int, ...]] = {}
    for n in range(entries):
        tag, kind, count = struct.unpack_from(reader.order + "HH" + word, table, n * step)
        length = _SIZES.get(kind, 1) * count
        value = table[n * step + step - word_size : (n + 1) * step]
        if length > word_size:
            (where,) = struct.unpack(reader.order + word, value)
            reader.inside(where, length)
            value = reader.take(where, length) if tag in (*_OFFSETS, *_COUNTS) and length <= MAX_DATA_BYTES else b""
        if tag in (*_OFFSETS, *_COUNTS):
            if kind not in _NUMBERS or len(value) < length or count == 0:
                raise _damaged(reader.path, f"tag {tag}")
            found[tag] = struct.unpack_from(f"{reader.order}{count}{_NUMBERS[kind]}", value)
    for offsets, counts in zip(_OFFSETS, _COUNTS, strict=True):
        for where, length in zip(found.get(offsets, ()), found.get(counts, ()), strict=False):
            reader.inside(where, length)
    return int(struct.unpack(reader.order + word, table[-word_size:])[0])


def _damaged(path: Path, what: str) -> InputError:
    return InputError(Problem("E0102", f"{path.name}: damaged directory ({what})", "", "export the file again"))


def _ends(path: Path, size: int, needed: int) -> InputError:
    measured = f"{path.name}: file ends after {size} of at least {needed} bytes"
    return InputError(Problem("E0101", measured, "", "copy the file again"))
