"""Scaled maps: numbers from 0 to 1 as NIfTI files of small whole numbers with a slope, written slice by slice."""

from __future__ import annotations

import itertools
import math
from pathlib import Path

import nibabel as nib
import numpy as np
from numpy.typing import NDArray

from medseg.artefacts import commit
from medseg.imaging.geometry import nifti_affine
from medseg.imaging.streams import deflated
from medseg.records.grid import Grid

_PIECE = 2**20


def write_scaled(path: Path, values: NDArray[np.unsignedinteger], grid: Grid, slope: float) -> str:
    """Commit (Z, Y, X) uint8 or uint16 values, each standing for itself times ``slope``; returns the file's SHA-256.

    NIfTI knows no half-precision numbers. The array may be mapped from a file: it is read once, slice by slice.

    Raises:
        ValueError: values and grid do not belong together.
        EnvironmentFailure: E0501, E0502.
    """
    if values.shape != grid.shape:
        raise ValueError(f"values {values.shape} do not lie on a grid of {grid.shape}")
    header = (nib.Nifti1Header if max(grid.shape) < 2**15 else nib.Nifti2Header)(endianness="<")
    header.set_data_shape(grid.shape[::-1])
    header.set_data_dtype(values.dtype.newbyteorder("<"))
    header.set_xyzt_units("mm")
    header.set_qform(nifti_affine(grid), code=1, strip_shears=True)
    header.set_sform(nifti_affine(grid), code=1)
    header["scl_slope"], header["scl_inter"] = slope, 0
    header["vox_offset"] = header.sizeof_hdr + 4
    start = bytes(header.binaryblock) + bytes(4)
    slices = max(1, _PIECE // math.prod(grid.shape[1:]))

    def write(temporary: Path) -> None:
        little = values.dtype.newbyteorder("<")
        sections = (
            np.ascontiguousarray(values[z : z + slices], dtype=little).data.cast("B")
            for z in range(0, len(values), slices)
        )
        pieces: itertools.chain[bytes | memoryview] = itertools.chain([start], sections)
        with temporary.open("xb") as file:
            file.writelines(deflated(pieces) if path.name.endswith(".gz") else pieces)

    return commit(path, write)
