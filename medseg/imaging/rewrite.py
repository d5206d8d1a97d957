"""Rewrite: an image written again with mended voxels or on a mended grid; pictures stay pictures."""

from __future__ import annotations

import gzip
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO, Literal, cast

import nibabel as nib
import numpy as np
from numpy.typing import NDArray
from PIL import Image

from medseg.artefacts import commit
from medseg.errors import InputError, IntegrityError, Problem
from medseg.imaging.nifti import write_nifti_image
from medseg.imaging.nifti_header import header_size
from medseg.imaging.volumes import file_ending, read_volume
from medseg.records.grid import Grid, Volume

Form = Literal["sform", "qform"]
REWRITABLE = (".nii.gz", ".nii", ".png", ".bmp", ".tif", ".tiff")
SAME_PLACE_VOXELS = 1e-2  # the rounding of a float32 header
_PICTURES = {".png": "PNG", ".bmp": "BMP", ".tif": "TIFF", ".tiff": "TIFF"}
_PICTURE_TYPES = {".png": ("u1", "u2"), ".bmp": ("u1",), ".tif": ("u1", "u2", "i4", "f4"), ".tiff": ("u1", "f4")}
_CODES = {348: (252, 254, 2), 540: (344, 348, 4)}  # offsets of qform_code and sform_code, and their bytes
_PART = 2**20


def write_image(path: Path, array: NDArray[np.generic], grid: Grid) -> str:
    """Commit an image (C, Z, Y, X) of its own voxel type on ``grid``, without loss; returns the file's SHA-256.

    NIfTI takes one channel; its header is new, with sform and qform of ``grid`` and nothing else of the source.
    Pictures take one slice, of one channel or RGB.

    Raises:
        InputError: E0106 the format of ``path`` cannot hold the array.
        EnvironmentFailure: E0501, E0502.
        IntegrityError: E0701 the file does not read back as it was written.
    """
    ending = file_ending(path.name)
    if ending in (".nii", ".nii.gz") and len(array) == 1:
        return write_nifti_image(path, array[0], grid)
    if ending in _PICTURES and array.shape[1] == 1 and array.dtype.str[1:] in _PICTURE_TYPES[ending]:
        content = _picture(array[:, 0], _PICTURES[ending])
    else:
        measured = f"{path.name}: an image of shape {array.shape} and type {array.dtype} cannot be written so"
        raise InputError(Problem("E0106", measured, "", "convert the data set to .nii.gz first"))

    def verify(temporary: Path) -> None:
        back = read_volume(temporary, len(array))
        moved = grid.corner_displacement_voxels(back.grid)
        if back.array.dtype != array.dtype or not np.array_equal(back.array, array) or moved > SAME_PLACE_VOXELS:
            raise IntegrityError(Problem("E0701", f"{path.name} read back differently", "", "check the disk"))

    return commit(path, content, verify)


def _picture(voxels: NDArray[np.generic], file_format: str) -> Callable[[Path], None]:
    pixels = voxels[0] if len(voxels) == 1 else np.ascontiguousarray(np.moveaxis(voxels, 0, -1))

    def write(temporary: Path) -> None:
        Image.fromarray(pixels).save(temporary, format=file_format)

    return write


def read_by_form(path: Path, channels: int, form: Form, temporary: Path) -> Volume:
    """Read a NIfTI file by one of its two forms, as if the other were not there.

    Args:
        path: ``.nii`` or ``.nii.gz``; ``parse_header`` has judged its size before it got to its forms.
        channels: as for ``read_volume``.
        form: the one to use.
        temporary: a name for the copy with the changed header, ending with ``.nii``; removed afterwards.

    Raises:
        InputError: what ``read_volume`` raises of the copy; E0102 the stream is damaged.
        EnvironmentFailure: E0501, E0502.
    """

    def write(target: Path) -> None:
        opened = gzip.open if path.name.lower().endswith(".gz") else open
        with opened(path, "rb") as source, target.open("xb") as file:
            _copy_by_form(cast("BinaryIO", source), file, form, path.name)

    try:
        commit(temporary, write)
        return read_volume(temporary, channels)
    except (EOFError, gzip.BadGzipFile) as error:
        raise InputError(Problem("E0102", f"{path.name}: {error}", "", "copy the file again")) from error
    finally:
        temporary.unlink(missing_ok=True)


def _copy_by_form(source: BinaryIO, target: BinaryIO, form: Form, name: str) -> None:
    raw = bytearray(source.read(4))
    size = header_size(raw, name)
    raw += source.read(size - 4)
    order: Literal["little", "big"] = "little" if int.from_bytes(raw[:4], "little") == size else "big"
    header = (nib.Nifti1Header if size == 348 else nib.Nifti2Header)(
        binaryblock=bytes(raw), endianness="<" if order == "little" else ">", check=False
    )
    qform, sform, width = _CODES[size]
    at = qform if form == "sform" else sform
    raw[at : at + width] = bytes(width)
    target.write(raw)
    voxels = int(np.prod(header.get_data_shape(), dtype=np.int64)) * header.get_data_dtype().itemsize
    left = int(header["vox_offset"]) + voxels + 1 - size  # one byte more, for a reader to refuse what follows
    while left > 0 and (part := source.read(min(_PART, left))):
        target.write(part)
        left -= len(part)
