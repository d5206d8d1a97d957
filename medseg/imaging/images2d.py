"""2D images: PNG, BMP, TIFF and JPEG read as one slice, TIFF pages as slices, label pictures written without loss.

A picture has no millimetres and no patient axes: its grid has spacing 1 and the array order is its canonical order.
"""

from __future__ import annotations

import logging
import re
import struct
import zlib
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from medseg.artefacts import commit
from medseg.errors import InputError, IntegrityError, MedsegError, Problem
from medseg.imaging.geometry import grid_from_nifti
from medseg.imaging.nifti_header import MAX_VOXELS
from medseg.imaging.streams import memory_for
from medseg.imaging.tiff_pages import count_pages
from medseg.records.grid import Grid, Source, Volume

logger = logging.getLogger(__name__)

_READABLE = ("PNG", "BMP", "TIFF", "JPEG")
_WRITABLE = {".png": "PNG", ".bmp": "BMP", ".tif": "TIFF", ".tiff": "TIFF"}
_GREY_MODES = ("1", "L", "I", "I;16", "I;16B", "I;16L", "F")
_PNG_MAGIC = b"\x89PNG\r\n\x1a\n"
_BITS_PER_SAMPLE, _DESCRIPTION, _IMAGE_DEPTH = 258, 270, 32997  # TIFF tags
_TIFF_DEFLATE = "tiff_adobe_deflate"  # zlib's checksum guards the pixels


def read_image2d(path: Path, channels: int = 1) -> Volume:
    """Read a picture as (C, 1, Y, X), TIFF pages as (C, Z, Y, X): uint8, uint16, int32 or float32, as stored.

    Grey pictures have one channel, colour pictures three (R, G, B). Alpha is dropped, with a warning unless it is
    the same everywhere. A palette picture gives its colours for three channels and its indices for one, which is
    how label maps are stored. Several pages have no spacing: it is taken as 1 mm, and W0123 says so.

    Raises:
        InputError: E0101 truncated; E0102 corrupt; E0104 too large; E0106 unreadable; E0111 layout not supported
            (pages that differ or hold channels or times, 16-bit colour, CMYK); E0133 another number of channels.
    """
    volume = _read(Path(path), channels)
    for note in volume.notes:
        logger.warning("%s", note)
    return volume


def _read(path: Path, channels: int) -> Volume:
    try:
        _check_png(path)
        pages = count_pages(path)
        with Image.open(path, formats=_READABLE) as image:
            if image.format == "JPEG":
                logger.warning("%s is JPEG: the compression has changed the pixels", path.name)
            if image.format == "TIFF":
                _check_series(image, pages, path)
            array = _pages(image, channels, path)
    except MedsegError:
        raise
    except UnidentifiedImageError as error:
        code = "E0106" if path.stat().st_size else "E0101"
        raise _bad(code, path, f"is none of {', '.join(_READABLE)}", "export it again") from error
    except Image.DecompressionBombError as error:
        raise _bad("E0104", path, "declares too many pixels", "cut the picture into tiles") from error
    except OSError as error:
        if error.errno is not None:
            raise _bad("E0106", path, f"cannot be read: {error.strerror}", "check the file") from error
        raise _undecodable(error, path) from error
    except Exception as error:  # decoders fed with damaged files raise whatever they like
        raise _undecodable(error, path) from error
    notes: tuple[Problem, ...] = ()
    if pages > 1:
        measured = f"{path.name}: {pages} pages without spacing and orientation"
        notes = (Problem("W0123", measured, "", "taken as slices, 1 mm along every axis, from bottom to top"),)
    grid = picture_grid(array.shape[2], array.shape[3], array.shape[1])
    return Volume(array, grid, Source(str(path), path.suffix.lower()[1:]), notes=notes)


def picture_grid(rows: int, columns: int, pages: int = 1) -> Grid:
    """The grid of a picture: a slice for each page, spacing 1 along every axis, array order canonical."""
    return grid_from_nifti(np.eye(4), (columns, rows, pages))


def write_image2d(path: Path, labels: NDArray[np.integer]) -> str:
    """Commit a label picture (1, Y, X), in TIFF also (Z, Y, X), 8 or 16 bit, without loss; returns its SHA-256.

    Raises:
        InputError: E0106 the format loses data or cannot hold the labels; E0111 more than one slice.
        EnvironmentFailure: E0501, E0502.
        IntegrityError: E0701 the file does not read back as it was written.
    """
    path = Path(path)
    file_format = _WRITABLE.get(path.suffix.lower())
    if file_format is None:
        raise _bad("E0106", path, "is a format that loses data", f"use one of {', '.join(_WRITABLE)}")
    if labels.ndim != 3 or (labels.shape[0] != 1 and file_format != "TIFF"):
        raise _bad("E0111", path, f"labels of shape {labels.shape} are not one slice", "write NIfTI")
    limit = 255 if file_format == "BMP" else 65535
    if labels.min() < 0 or labels.max() > limit:
        raise _bad("E0106", path, f"labels {labels.min()} to {labels.max()} do not fit 0 to {limit}", "write NIfTI")
    pixels = labels.astype(np.uint8 if labels.max() <= 255 else np.uint16, copy=False)

    def write(temporary: Path) -> None:
        first, *others = (Image.fromarray(np.ascontiguousarray(page)) for page in pixels)
        if file_format == "TIFF":
            first.save(temporary, format="TIFF", compression=_TIFF_DEFLATE, save_all=True, append_images=others)
        else:
            first.save(temporary, format=file_format)

    def verify(temporary: Path) -> None:
        if not np.array_equal(_read(temporary, 1).array[0], pixels):
            raise IntegrityError(Problem("E0701", f"{path.name} read back differently", "", "check the disk"))

    return commit(path, write, verify)


def _pages(image: Image.Image, channels: int, path: Path) -> NDArray[np.generic]:
    """(C, pages, Y, X) of an opened picture; only TIFF has pages."""
    pages = int(getattr(image, "n_frames", 1))
    if pages == 1:
        return _pixels(image, channels, path)
    if image.format != "TIFF":
        raise _bad("E0111", path, f"holds {pages} frames", "save one frame per file")
    first, mode, size = _pixels(image, channels, path), image.mode, image.size
    if pages * first.size > MAX_VOXELS:
        raise _bad("E0104", path, f"declares {pages} pages of {first.size} values", "cut the volume")
    with memory_for(path, pages * first.nbytes):
        array = np.empty((first.shape[0], pages, *first.shape[2:]), first.dtype)
    array[:, :1] = first
    for page in range(1, pages):
        image.seek(page)
        if (image.mode, image.size) != (mode, size):
            measured = f"page {page} is {image.size} {image.mode}, the first {size} {mode}"
            raise _bad("E0111", path, measured, "save pages of one size and type")
        array[:, page : page + 1] = _pixels(image, channels, path)
    return array


def _check_series(image: Image.Image, pages: int, path: Path) -> None:
    """Refuse TIFF files whose pages are not just slices: what writers note about channels, times and hidden pages."""
    if image.n_frames != pages:
        raise _bad("E0102", path, f"{image.n_frames} of {pages} pages can be decoded", "export the file again")
    tags = image.tag_v2
    text = str(tags.get(_DESCRIPTION, ""))
    counts = {word.lower(): int(n) for word, n in re.findall(r"\b(images|channels|frames|Size[CT])=\"?(\d{1,9})", text)}
    known = text.startswith("ImageJ=") or "<OME" in text
    several = [f"{n} {word}" for word, n in counts.items() if word != "images" and n > 1]
    hidden = known and counts.get("images", pages) != pages
    if (known and several) or hidden or '"truncated": true' in text or int(tags.get(_IMAGE_DEPTH, 1)) != 1:
        measured = f"declares {', '.join(several) or 'more slices than it has pages'}"
        raise _bad("E0111", path, measured, "save a plain stack of slices, or NIfTI")


def _pixels(image: Image.Image, channels: int, path: Path) -> NDArray[np.generic]:
    """(C, 1, Y, X) of an opened picture's current page."""
    mode, depth = image.mode, _bits_per_sample(image, path)
    if mode in _GREY_MODES:
        pixels = np.asarray(image)
        pixels = pixels.astype(np.uint8) if mode == "1" else pixels.astype(pixels.dtype.newbyteorder("="), copy=False)
        if depth in (2, 4):  # Pillow stretches these to 0–255, which would change labels
            pixels = pixels // np.uint8(255 // (2**depth - 1))
        return _expect(pixels[None, None], channels, path)
    if mode == "P" and channels == 1:
        return np.asarray(image)[None, None]
    if mode not in ("LA", "RGB", "RGBA", "P") or depth > 8:
        raise _bad("E0111", path, f"has pixels of type {mode}, {depth} bit", "save it as grey, or as 8-bit RGB")
    if mode == "P":
        image = image.convert("RGB")
    pixels = np.asarray(image)
    if mode in ("LA", "RGBA"):
        alpha = pixels[..., -1]
        if alpha.min() != alpha.max():
            logger.warning("%s: its alpha channel is not constant and is dropped", path.name)
        pixels = pixels[..., :-1]
    return _expect(np.ascontiguousarray(np.moveaxis(pixels, -1, 0))[:, None], channels, path)


def _expect(array: NDArray[np.generic], channels: int, path: Path) -> NDArray[np.generic]:
    if len(array) != channels:
        measured = f"{path.name}: holds {len(array)} channel(s)"
        action = "save it as grey" if channels == 1 else "provide all channels in order"
        raise InputError(Problem("E0133", measured, str(channels), action))
    return array


def _check_png(path: Path) -> None:
    """Refuse a damaged PNG: Pillow does not look at the checksums of pixel data."""
    with path.open("rb") as file:
        if file.read(8) != _PNG_MAGIC:
            return
        kind = b""
        while kind != b"IEND":
            start = file.read(8)
            length, kind = struct.unpack(">I4s", start) if len(start) == 8 else (0, b"")
            body = file.read(length)
            checksum = file.read(4)
            if len(checksum) < 4:
                raise _bad("E0101", path, f"file ends after {file.tell()} bytes, inside its data", "copy it again")
            if zlib.crc32(body, zlib.crc32(kind)) != int.from_bytes(checksum, "big"):
                raise _bad("E0102", path, "has a wrong checksum", "copy the file again")


def _bits_per_sample(image: Image.Image, path: Path) -> int:
    """As stored; Pillow's mode does not tell (16-bit colour becomes 8-bit RGB without a word)."""
    if image.format == "TIFF":
        return int(max(image.tag_v2.get(_BITS_PER_SAMPLE, (1,))))
    if image.format == "PNG":
        with path.open("rb") as file:
            return file.read(25)[24]
    return 8


def _undecodable(error: Exception, path: Path) -> InputError:
    code = "E0101" if "truncated" in str(error).lower() else "E0102"
    return _bad(code, path, f"cannot be decoded ({error})", "copy or export the file again")


def _bad(code: str, path: Path, measured: str, action: str) -> InputError:
    return InputError(Problem(code, f"{path.name}: {measured}", "", action))
