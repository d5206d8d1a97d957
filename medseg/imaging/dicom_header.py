"""DICOM headers: what one file says about its frames, judged before any pixel is read or memory taken."""

from __future__ import annotations

import contextlib
import io
import logging
import threading
import warnings
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from medseg.errors import InputError, Problem
from medseg.imaging.dicom_frames import VOLUME_KEYS, Coding, Frame, read_frames, refused
from medseg.imaging.nifti_header import MAX_VOXELS

NEEDED = 'pip install "medseg[dicom]"'
MAX_INFLATED_BYTES = 2**30  # of one deflated file; real ones are single slices
LARGE_READ = 2**16
LONGEST_FIRST = 256  # bytes of the first element of a file without preamble: a length, a version or a name

_DEFLATED = b"1.2.840.10008.1.2.1.99"
_UNSUPPORTED = {"E0106", "E0111", "E0154"}
_NATIVE = ("1.2.840.10008.1.2", "1.2.840.10008.1.2.1")
_BARE_STARTS = (b"\x02\0\0\0", b"\x02\0\x01\0", b"\x02\0\x10\0", b"\x08\0\0\0", b"\x08\0\x05\0", b"\x08\0\x08\0",
                b"\x08\0\x16\0", b"\0\x08\0\0", b"\0\x08\0\x05", b"\0\x08\0\x08", b"\0\x08\0\x16")  # fmt: skip
_TAGS = [
    "SOPClassUID", "SOPInstanceUID", "Modality", "SeriesDescription", "SeriesInstanceUID", "SeriesNumber",
    "NumberOfFrames", "Rows", "Columns", "SamplesPerPixel", "PhotometricInterpretation", "BitsAllocated", "BitsStored",
    "HighBit", "PixelRepresentation", "PixelSpacing", "ImagerPixelSpacing", "SliceThickness",
    "ImagePositionPatient", "ImageOrientationPatient", "RescaleSlope", "RescaleIntercept", "ModalityLUTSequence",
    "SharedFunctionalGroupsSequence", "PerFrameFunctionalGroupsSequence", *VOLUME_KEYS,
]  # fmt: skip


@dataclass(frozen=True, slots=True)
class Instance:
    """One file of a series; without frames and with ``problems`` where it is sound, but of a kind that is not read."""

    path: Path
    uid: str
    series_uid: str
    series_number: int
    description: str
    modality: str
    frames: tuple[Frame, ...]
    problems: tuple[Problem, ...] = ()


def require_pydicom() -> None:
    """Refuse DICOM where pydicom is not installed.

    Raises:
        InputError: E0106.
    """
    try:
        import pydicom  # noqa: F401
    except ImportError as error:
        raise InputError(Problem("E0106", "DICOM files need pydicom", "", NEEDED)) from error


def looks_like_dicom(path: Path) -> bool:
    """Whether a file starts as DICOM does: with the 128-byte preamble and ``DICM``, or at once with an element."""
    if path.name.upper() == "DICOMDIR" or not path.is_file():
        return False
    try:
        with path.open("rb") as file:
            start = file.read(132)
    except OSError:
        return False
    length = min(int.from_bytes(start[4:8], order) for order in ("little", "big"))  # without a VR, of a short element
    bare = len(start) == 132 and start[:4] in _BARE_STARTS and (start[4:6].isalpha() or length < LONGEST_FIRST)
    return start[128:] == b"DICM" or bare


def read_instance(path: Path, max_voxels: int = MAX_VOXELS) -> Instance | None:
    """The header of one file that ``looks_like_dicom``; None if it is not an image (structure set, report, SEG …).

    Raises:
        InputError: E0101 truncated; E0102 damaged; E0104 too large; E0106 pydicom is missing, or no permission.
    """
    require_pydicom()
    from pydicom.uid import UID

    try:
        with path.open("rb") as raw, _BoundedReader(raw, path.stat().st_size) as file, quiet():
            if _DEFLATED in file.peek(1024)[:1024]:
                _bound_inflation(path)
            header, meta, at = _read_header(file)
            kind = UID(str(header.get("SOPClassUID") or meta.get("MediaStorageSOPClassUID") or "")).name
            if "Image Storage" not in kind and not (kind == "" and "Rows" in header):
                return None
            frames, problems = _judged(file, at, header, str(meta.get("TransferSyntaxUID") or ""), path, max_voxels)
            return Instance(
                path=path,
                uid=str(header.get("SOPInstanceUID") or ""),
                series_uid=str(header.get("SeriesInstanceUID") or ""),
                series_number=int(header.get("SeriesNumber") or 0),
                description=str(header.get("SeriesDescription") or ""),
                modality=str(header.get("Modality") or ""),
                frames=frames,
                problems=problems,
            )
    except InputError:
        raise
    except OSError as error:
        raise refused("E0106", path, f"cannot be read: {error.strerror or error}", "", "check the file") from error
    except Exception as error:  # a parser fed with damaged files raises whatever it likes
        damaged = f"header cannot be read ({type(error).__name__})"
        raise refused("E0102", path, damaged, "", "copy or export the file again") from error


class _BoundedReader(io.BufferedReader):
    """A file in which a declared length, however large, never makes a buffer larger than the file."""

    def __init__(self, raw: Any, size: int) -> None:
        super().__init__(raw)
        self._size = size

    def read(self, size: int | None = -1, /) -> bytes:
        """At most what is left."""
        if size is None or size < 0 or size > LARGE_READ:
            left = max(0, self._size - self.tell())
            size = left if size is None or size < 0 else min(size, left)
        return super().read(size)


_QUIET = threading.RLock()


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keep pydicom's warnings, which quote values of patients, out of logs; one thread at a time."""
    logger = logging.getLogger("pydicom")
    with _QUIET, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        level = logger.level
        logger.setLevel(logging.CRITICAL + 1)
        try:
            yield
        finally:
            logger.setLevel(level)


def _read_header(file: Any) -> tuple[dict[str, Any], Any, int | None]:
    """Needed elements by keyword, file meta, and where the pixel element starts if the file is not deflated."""
    from pydicom import dcmread

    header = dcmread(file, stop_before_pixels=True, force=True, specific_tags=_TAGS)
    deflated = str(header.file_meta.get("TransferSyntaxUID") or "") == _DEFLATED.decode()
    elements = {element.keyword: element.value for element in header}
    return elements, header.file_meta, None if deflated else file.tell()


def _bound_inflation(path: Path) -> None:
    """Inflate a deflated file piece by piece, keeping nothing, so that pydicom is not given a bomb."""
    from pydicom.filereader import read_file_meta_info

    start = 132 + 12 + int(read_file_meta_info(path).FileMetaInformationGroupLength)
    inflate, total = zlib.decompressobj(-zlib.MAX_WBITS), 0
    with path.open("rb") as file:
        file.seek(start)
        data = file.read(LARGE_READ)
        while data and not inflate.eof:
            total += len(inflate.decompress(data, 2**20))
            if total > MAX_INFLATED_BYTES:
                limit = f"at most {MAX_INFLATED_BYTES}"
                raise refused("E0104", path, "deflated data grow too large", limit, "the file is damaged or hostile")
            data = inflate.unconsumed_tail or file.read(LARGE_READ)
    if not inflate.eof:
        raise refused("E0101", path, "deflated data end too early", "", "copy the file again")


def _judged(
    file: _BoundedReader, at: int | None, header: dict[str, Any], syntax: str, path: Path, max_voxels: int
) -> tuple[tuple[Frame, ...], tuple[Problem, ...]]:
    """The frames, or what is not supported about the file; damage is raised."""
    try:
        coding = _coding(header, syntax, path)
        count = _count(header, path)
        if coding.rows * coding.columns * coding.samples * count > max_voxels:
            declared = f"declares {count} × {coding.rows} × {coding.columns} voxels"
            raise refused("E0104", path, declared, f"at most {max_voxels}", "the header is damaged")
        coding = _place_pixels(file, at, coding, count, path)
        return tuple(read_frames(header, path, coding, count)), ()
    except InputError as error:
        if {problem.code for problem in error.problems} <= _UNSUPPORTED:
            return (), error.problems
        raise


def _coding(header: dict[str, Any], syntax: str, path: Path) -> Coding:
    missing = [k for k in ("Rows", "Columns", "BitsAllocated") if header.get(k) is None]
    if missing:
        raise refused("E0101", path, f"header ends without {missing[0]}", "", "copy the file again")
    allocated = int(header["BitsAllocated"])
    stored = int(header.get("BitsStored") or allocated)
    coding = Coding(
        syntax=syntax,
        offset=None,
        raw=False,
        encapsulated=False,
        rows=int(header["Rows"]),
        columns=int(header["Columns"]),
        samples=int(header.get("SamplesPerPixel") or 1),
        allocated=allocated,
        stored=stored,
        signed=int(header.get("PixelRepresentation") or 0) == 1,
        photometric=str(header.get("PhotometricInterpretation") or ""),
    )
    if coding.rows < 1 or coding.columns < 1:
        raise refused("E0111", path, f"{coding.rows} rows, {coding.columns} columns", "", "there are no pixels in it")
    high = int(header.get("HighBit", stored - 1))
    if allocated not in (8, 16, 32) or not 1 <= stored <= allocated or high != stored - 1:
        found = f"{stored} of {allocated} bits, highest {high}"
        raise refused("E0106", path, found, "whole numbers of 8, 16 or 32 bits", "convert the series")
    if (coding.samples, coding.photometric) not in ((1, "MONOCHROME1"), (1, "MONOCHROME2"), (1, "")) and not (
        coding.samples == 3 and coding.photometric.startswith(("RGB", "YBR"))
    ):
        found = f"{coding.samples} samples of {coding.photometric}"
        raise refused("E0106", path, found, "grey values or RGB", "convert the series")
    if header.get("ModalityLUTSequence"):
        raise refused("E0106", path, "values go through a table (Modality LUT)", "slope and intercept", "convert it")
    return coding


def _count(header: dict[str, Any], path: Path) -> int:
    count = int(header.get("NumberOfFrames") or 1)
    if count < 1:
        raise refused("E0102", path, f"declares {count} frames", "1 or more", "the header is damaged")
    return count


def _place_pixels(file: _BoundedReader, at: int | None, coding: Coding, count: int, path: Path) -> Coding:
    """``coding`` with the offset of raw pixels; what is declared must be there."""
    if at is None:
        return coding
    file.seek(at)
    head = file.read(12)
    little = head[:4] in (b"\xe0\x7f\x10\0", b"\xe0\x7f\x08\0", b"\xe0\x7f\x09\0")
    if not little and head[:4] not in (b"\x7f\xe0\0\x10", b"\x7f\xe0\0\x08", b"\x7f\xe0\0\x09"):
        raise refused("E0101", path, "has no pixel data", "", "copy the file again")
    if head[2:4] not in (b"\x10\0", b"\0\x10"):
        raise refused("E0106", path, "has floating point pixels", "integers with slope and intercept", "convert it")
    order = "little" if little else "big"
    explicit = head[4:6] in (b"OW", b"OB", b"UN")
    length = int.from_bytes(head[8:12] if explicit else head[4:8], order)  # type: ignore[arg-type]
    start = at + (12 if explicit else 8)
    left = path.stat().st_size - start
    if length == 0xFFFFFFFF:  # encapsulated: every frame has an item of its own, with a head of 8 bytes
        if 8 * count > left:
            raise refused("E0101", path, f"{left} bytes for {count} frames", "", "copy the file again")
        return replace(coding, offset=start, encapsulated=True)
    samples = 2 if coding.photometric == "YBR_FULL_422" else coding.samples
    needed = coding.rows * coding.columns * samples * count * coding.allocated // 8
    if min(length, left) < needed:
        raise refused("E0101", path, f"{min(length, left)} bytes of pixels", str(needed), "copy the file again")
    raw = little and coding.samples == 1 and coding.syntax in (*_NATIVE, "")
    return replace(coding, offset=start, raw=raw)
