"""FreeSurfer's MGH files (``.mgh``, ``.mgz``): volumes read to the last byte of the stream.

Rules: FreeSurfer wiki, "FsTutorial/MghFormat" and "CoordinateSystems" (vox2ras). Values are big endian.
"""

from __future__ import annotations

import logging
import struct
from pathlib import Path

import numpy as np

from medseg.errors import Problem
from medseg.imaging.geometry import judge_affine, listed
from medseg.imaging.nifti_header import MAX_VOXELS
from medseg.imaging.raw_data import channel_shape, refused
from medseg.imaging.streams import DEFLATE_MAX_RATIO, DeflateStream, PlainStream, Stream, read_voxels, truncated
from medseg.records.grid import Grid, Source, Volume

logger = logging.getLogger(__name__)

HEADER_BYTES = 284
MAX_FOOTER_BYTES = 64 * 2**20
_FIELDS = struct.Struct(">7ih15f")  # version, width, height, depth, frames, type, dof, good, delta, Mdc, c_ras
_TYPES = {0: "u1", 1: ">i4", 3: ">f4", 4: ">i2", 10: ">u2"}


def read_mgh(path: Path, channels: int = 1, max_voxels: int = MAX_VOXELS) -> Volume:
    """Read ``.mgh`` or ``.mgz`` as (C, Z, Y, X) in native byte order and the file's own type, on the file's grid.

    Frames are read only as the number of ``channels`` asked for. What follows the voxels (scan parameters, tags) is
    not looked at, but a compressed stream is read to its end, so that its checksum is verified.

    Raises:
        InputError: E0101 truncated; E0102 corrupt; E0104 too large; E0106 unreadable; E0111 voxel type or frames;
            E0121, E0124, E0125 geometry; E0133 other channels.
        ResourceError: E0600 not enough memory.
    """
    path = Path(path)
    try:
        with path.open("rb") as file:
            compressed = path.name.lower().endswith("z")
            if (magic := file.read(2)) != b"\x1f\x8b" and compressed and len(magic) == 2:
                raise refused("E0102", path.name, "is not gzip data, against its name", "", "rename the file")
            file.seek(0)
            stream: Stream = DeflateStream(file, path) if compressed else PlainStream(file)
            raw = bytearray(HEADER_BYTES)
            if (got := stream.readinto(memoryview(raw))) < HEADER_BYTES:
                raise truncated(path, got, HEADER_BYTES)
            shape, dtype, grid, notes = _header(bytes(raw), path.name, channels, max_voxels)
            size, capacity = int(np.prod(shape)) * dtype.itemsize, path.stat().st_size
            if HEADER_BYTES + size > capacity * (DEFLATE_MAX_RATIO if compressed else 1):
                raise truncated(path, capacity, HEADER_BYTES + size)
            array = read_voxels(stream, shape, dtype, path, HEADER_BYTES)
            _drain(stream, path)
    except OSError as error:
        raise refused("E0106", path.name, f"cannot be read: {error.strerror or error}", "", "check it") from error
    for note in notes:
        logger.warning("%s", note)
    return Volume(array, grid, Source(str(path), "mgh"), notes=notes)


def _header(
    raw: bytes, name: str, channels: int, max_voxels: int
) -> tuple[tuple[int, int, int, int], np.dtype[np.generic], Grid, tuple[Problem, ...]]:
    version, i, j, k, frames, code, _, good, *geometry = _FIELDS.unpack_from(raw)
    if version != 1:
        raise refused("E0102", name, f"version {version}", "1", "this is not an MGH file")
    if code not in _TYPES:
        raise refused("E0111", name, f"voxel type {code}", "one of 0 1 3 4 10", "convert it to a scalar image")
    shape = channel_shape((i, j, k), frames, channels, name, max_voxels)
    if good <= 0:  # FreeSurfer takes such a file as coronal, nibabel as coronal turned by half a circle
        raise refused("E0121", name, f"goodRASFlag {good}: no direction is declared", "1", "set it with mri_convert")
    delta, directions, centre = np.split(np.array(geometry), [3, 12])
    if not (np.isfinite(delta).all() and (delta > 0).all()):
        raise refused("E0124", name, f"spacing {listed(delta)}", "positive numbers", "correct the header")
    affine = np.eye(4)
    affine[:3, :3] = directions.reshape(3, 3).T * delta
    with np.errstate(invalid="ignore", over="ignore"):
        affine[:3, 3] = centre - affine[:3, :3] @ (np.array([i, j, k]) / 2)
    grid, notes = judge_affine(affine, (i, j, k), f"{name}: vox2ras")
    return shape, np.dtype(_TYPES[code]), grid, notes


def _drain(stream: Stream, path: Path) -> None:
    """Read to the end of the stream, where its checksum is."""
    buffer = memoryview(bytearray(2**20))
    for _ in range(MAX_FOOTER_BYTES // len(buffer) + 1):
        if stream.readinto(buffer) < len(buffer):
            return
    raise refused("E0102", path.name, "goes on after its last voxel", f"{MAX_FOOTER_BYTES} bytes", "it is damaged")
