"""DICOM pixels: the values of a judged stack, read frame by frame; compressed frames are measured before decoding."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from medseg.errors import InputError, Problem, ResourceError
from medseg.imaging.dicom_frames import Coding, Frame, refused
from medseg.imaging.dicom_header import NEEDED, quiet
from medseg.imaging.dicom_stack import Stack

_JPEG_START, _JPEG_2000_START = b"\xff\xd8", b"\xff\x4f\xff\x51"
_JPEG_FRAMES = {0xC0, 0xC1, 0xC2, 0xC3, 0xC5, 0xC6, 0xC7, 0xC9, 0xCA, 0xCB, 0xCD, 0xCE, 0xCF, 0xF7}  # SOFn, JPEG-LS
_RUN_LENGTHS, _RUN_RATIO = "1.2.840.10008.1.2.5", 64  # two bytes stand for 128 at most (PS3.5, annex G.3)


def read_pixels(stack: Stack, name: str) -> tuple[NDArray[np.generic], bool]:
    """The values (C, Z, Y, X) of a stack, and whether pixels had bits set beyond those declared (they are cleared).

    Raises:
        InputError: E0101, E0102 damaged pixels; E0104 a frame that would decode to another size; E0106 no decoder.
        ResourceError: E0600 not enough memory.
    """
    shape = (stack.channels, *stack.grid.shape)
    places: dict[Path, dict[int, tuple[Frame, int, int]]] = {}
    for c, volume in enumerate(stack.volumes):
        for z, frame in enumerate(volume):
            places.setdefault(frame.path, {})[frame.index] = frame, c, z
    try:
        array, unused = np.empty(shape, stack.dtype), False
        for path, wanted in places.items():
            for index, pixels in enumerate(_decoded(path, wanted[0][0].coding, len(wanted))):
                frame, c, z = wanted[index]
                values, excess = _without_unused_bits(pixels, frame.coding)
                unused |= excess
                values = _rescaled(values, frame.rescale or (1.0, 0.0), array.dtype)
                array = array.astype(np.result_type(array, values), copy=False)
                target = array[c, z] if frame.coding.samples == 1 else np.moveaxis(array[:, z], 0, -1)
                target[...] = values
    except MemoryError as error:
        needed = f"{name}: needs {math.prod(shape) * stack.dtype.itemsize / 2**30:.1f} GiB"
        raise ResourceError(Problem("E0600", needed, "", "use a machine with more memory")) from error
    return array, unused


def _without_unused_bits(pixels: NDArray[Any], coding: Coding) -> tuple[NDArray[Any], bool]:
    """Sign or zero in the bits above BitsStored (PS3.5, 8.1.1), and whether there was something else."""
    spare = 8 * pixels.dtype.itemsize - coding.stored
    if spare == 0:
        return pixels, False
    cleaned = (pixels << spare) >> spare
    return cleaned, not np.array_equal(cleaned, pixels)


def _rescaled(stored: NDArray[Any], rescale: tuple[float, float], kind: np.dtype[np.generic]) -> NDArray[Any]:
    """Slope × stored + intercept: float32 for a float ``kind``, else the smallest integer type from int16 that fits."""
    slope, intercept = rescale
    if rescale == (1.0, 0.0):
        return stored
    if kind.kind == "f":
        return (stored * slope + intercept).astype(np.float32)
    values = stored.astype(np.int64) * int(slope) + int(intercept)
    lowest, highest = int(values.min()), int(values.max())
    fits = (t for t in (np.int16, np.int32) if np.iinfo(t).min <= lowest and highest <= np.iinfo(t).max)
    return values.astype(next(fits, np.int64))


def _decoded(path: Path, coding: Coding, count: int) -> Iterator[NDArray[Any]]:
    """Frames of a file one after the other as (Y, X) or (Y, X, 3)."""
    shape = (coding.rows, coding.columns, *([coding.samples] if coding.samples > 1 else []))
    frames = _raw(path, coding, count) if coding.raw else _by_library(path, coding, count)
    try:
        for _ in range(count):
            pixels = next(frames, None)
            if pixels is None:
                raise refused("E0101", path, f"fewer than {count} frames", "", "copy the file again")
            if pixels.shape != shape:
                raise refused("E0102", path, f"frame of shape {pixels.shape}", str(shape), "export the file again")
            yield pixels
    except (InputError, MemoryError):
        raise
    except OSError as error:
        raise refused("E0106", path, f"cannot be read: {error.strerror or error}", "", "check the file") from error
    except Exception as error:  # decoders fed with damaged data raise whatever they like
        damaged = f"pixels cannot be decoded ({type(error).__name__})"
        raise refused("E0102", path, damaged, "", "copy or export the file again") from error


def _raw(path: Path, coding: Coding, count: int) -> Iterator[NDArray[Any]]:
    kind = np.dtype(f"<{'i' if coding.signed else 'u'}{coding.allocated // 8}")
    with path.open("rb") as file:
        file.seek(coding.offset or 0)
        for _ in range(count):
            frame = np.empty((coding.rows, coding.columns), kind)
            if file.readinto(frame.data.cast("B")) < frame.nbytes:
                raise refused("E0101", path, "file ends inside its pixels", "", "copy the file again")
            yield frame


def _by_library(path: Path, coding: Coding, count: int) -> Iterator[NDArray[Any]]:
    """Frames from pydicom and its decoders: compressed, big-endian, deflated or with colours."""
    from pydicom import dcmread
    from pydicom.pixels import get_decoder, iter_pixels

    with quiet():
        try:
            decoder = get_decoder(coding.syntax)
        except NotImplementedError as error:
            raise refused("E0106", path, f"transfer syntax {coding.syntax or 'missing'}", "", "convert it") from error
        if not decoder.is_available:
            raise refused("E0106", path, f"no decoder for {decoder.UID.name}", "", NEEDED)
    if coding.encapsulated:
        _check_frames(path, coding, count)
    with quiet():
        frames = iter_pixels(dcmread(path, force=True) if coding.offset is None else path)
    while True:
        with quiet():
            pixels = next(frames, None)
        if pixels is None:
            return
        yield pixels


def _check_frames(path: Path, coding: Coding, count: int) -> None:
    """Refuse compressed frames that would decode to another size than the header says: decoders take their word."""
    from pydicom.encaps import generate_frames

    with path.open("rb") as file:
        file.seek(coding.offset or 0)
        for number, frame in enumerate(generate_frames(file, number_of_frames=count)):
            needed = coding.rows * coding.columns * coding.samples * coding.allocated // 8
            if coding.syntax == _RUN_LENGTHS and needed > _RUN_RATIO * len(frame):
                found = f"frame {number} has {len(frame)} bytes for {needed}"
                raise refused("E0104", path, found, f"{_RUN_RATIO} times as many at most", "the file is damaged")
            size = coded_size(frame)
            if size is not None and size != (coding.rows, coding.columns):
                expected = f"{coding.rows} × {coding.columns}"
                found = f"frame {number} is coded as {size[0]} × {size[1]}"
                raise refused("E0104", path, found, expected, "the file is damaged or hostile")


def coded_size(frame: bytes) -> tuple[int, int] | None:
    """Rows and columns that a JPEG, JPEG-LS or JPEG 2000 code stream declares; None for another (run lengths)."""
    if frame.startswith(_JPEG_2000_START):  # SIZ: Xsiz, Ysiz, XOsiz, YOsiz
        right, lower, left, upper = (int.from_bytes(frame[k : k + 4], "big") for k in (8, 12, 16, 20))
        return lower - upper, right - left
    at = 2
    while frame.startswith(_JPEG_START) and at + 9 <= len(frame) and frame[at] == 0xFF:
        marker = frame[at + 1]
        if marker in _JPEG_FRAMES:
            return int.from_bytes(frame[at + 5 : at + 7], "big"), int.from_bytes(frame[at + 7 : at + 9], "big")
        at += 1 if marker == 0xFF else 2 + int.from_bytes(frame[at + 2 : at + 4], "big")
    return None
