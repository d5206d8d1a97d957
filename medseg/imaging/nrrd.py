"""NRRD files (``.nrrd``, ``.nhdr``): volumes read to their last byte, label maps and Slicer segmentations written."""

from __future__ import annotations

import colorsys
import itertools
import logging
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from medseg.imaging.geometry import nifti_affine
from medseg.imaging.nifti_header import MAX_VOXELS
from medseg.imaging.nrrd_header import parse_nrrd_header
from medseg.imaging.raw_data import MAX_HEADER_BYTES, as_label_file, commit_labels, little_endian, read_raw, refused
from medseg.imaging.streams import deflated
from medseg.records.grid import Grid, Source, Volume
from medseg.records.task import Label

logger = logging.getLogger(__name__)

_NAMES = {"u1": "unsigned char", "u2": "unsigned short", "u4": "unsigned int", "u8": "unsigned long long int"}
MAX_SEGMENT_VALUE = 65535  # as of Label
_GOLDEN_ANGLE = 0.381966  # of a full turn: any number of hues in a row are far from their neighbours


def read_nrrd(path: Path, channels: int = 1, max_voxels: int = MAX_VOXELS) -> Volume:
    """Read ``.nrrd`` or ``.nhdr``: (C, Z, Y, X) in native byte order and the file's own type, on the file's grid.

    A list or vector axis, first or last, is read only as the number of ``channels`` asked for. Without a ``space``
    the axes are taken as left-posterior-superior, as ITK does, and W0123 says so.

    Raises:
        InputError: E0100 no data file; E0101 truncated; E0102 corrupt; E0104 too large; E0106 encodings other than
            raw and gzip, several data files; E0111 voxel type or axes; E0121, E0124, E0125 geometry; E0133 other
            channels; E0142 a data file elsewhere.
        ResourceError: E0600 not enough memory.
    """
    volume = _read(Path(path), channels, max_voxels)
    for note in volume.notes:
        logger.warning("%s", note)
    return volume


def write_nrrd(path: Path, labels: NDArray[np.integer], grid: Grid, source: Source) -> str:
    """Commit a label map (Z, Y, X) as gzipped ``.nrrd`` and return the file's SHA-256.

    The geometry lines are those of an NRRD source, word for word; else they hold ``grid`` to the last bit.

    Raises:
        ValueError: labels are negative, or do not lie on ``grid``.
        EnvironmentFailure: E0501, E0502.
        IntegrityError: E0701 the file does not read back as it was written.
    """
    return _write(Path(path), as_label_file(labels, grid), grid, source, [])


def write_segmentation(
    path: Path, labels: NDArray[np.integer], grid: Grid, source: Source, classes: Sequence[Label] = ()
) -> str:
    """Commit a label map as a segmentation of 3D Slicer (``.seg.nrrd``): like ``write_nrrd``, with a segment per class.

    Fields as Slicer's developer guide lists them ("Segmentation labelmap file format"): name, label value, colour,
    and extent, the segment's box of voxel indices i, j, k. Without ``classes`` there is a segment for each value that
    occurs, named after it.

    Raises:
        ValueError, EnvironmentFailure, IntegrityError: as ``write_nrrd``.
        InputError: E0106 more names than a header holds, or a label above 65535.
    """
    labels, path = as_label_file(labels, grid), Path(path)
    if labels.max() > MAX_SEGMENT_VALUE:
        raise refused("E0106", path.name, f"label {labels.max()}", f"at most {MAX_SEGMENT_VALUE}", "write .nrrd")
    if not classes:
        classes = [Label(name=f"Segment_{value}", value=int(value)) for value in np.unique(labels)]
    return _write(path, labels, grid, source, _segment_lines(labels, [c for c in classes if c.value > 0]))


def _read(path: Path, channels: int, max_voxels: int) -> Volume:
    try:
        with path.open("rb") as file:
            header = parse_nrrd_header(file, path, channels, max_voxels)
        array = read_raw(header.data, path.name)
    except OSError as error:
        raise refused("E0106", path.name, f"cannot be read: {error.strerror or error}", "", "check it") from error
    return Volume(array, header.grid, Source(str(path), "nrrd", geometry=header.geometry), notes=header.notes)


def _write(path: Path, labels: NDArray[np.unsignedinteger], grid: Grid, source: Source, extra: list[str]) -> str:
    copied = source.geometry if source.file_format == "nrrd" else ""
    lines = [
        "NRRD0004",
        f"type: {_NAMES[labels.dtype.str[1:]]}",
        "dimension: 3",
        f"sizes: {' '.join(map(str, grid.shape[::-1]))}",
        "kinds: domain domain domain",
        "endian: little",
        "encoding: gzip",
        copied or _geometry_lines(grid),
        *extra,
    ]
    header = ("\n".join(lines) + "\n\n").encode()
    if len(header) > MAX_HEADER_BYTES:
        raise refused("E0106", path.name, f"header of {len(header)} bytes", f"{MAX_HEADER_BYTES}", "write .nii.gz")
    pieces = itertools.chain([header], deflated(little_endian(labels)))
    return commit_labels(path, pieces, lambda p: _read(p, 1, MAX_VOXELS), labels, grid, 0)


def _geometry_lines(grid: Grid) -> str:
    affine = nifti_affine(grid)[:3] * np.array([-1.0, -1.0, 1.0])[:, None] + 0.0
    i, j, k, origin = ("(" + ",".join(repr(float(v)) for v in column) + ")" for column in affine.T)
    return f"space: left-posterior-superior\nspace directions: {i} {j} {k}\nspace origin: {origin}"


def _segment_lines(labels: NDArray[np.unsignedinteger], classes: Sequence[Label]) -> list[str]:
    """The key/value pairs that make an NRRD file a segmentation of Slicer."""
    lines = [
        "Segmentation_ContainedRepresentationNames:=Binary labelmap|",
        "Segmentation_ReferenceImageExtentOffset:=0 0 0",
        "Segmentation_MasterRepresentation:=Binary labelmap",  # read by Slicer up to 5.0, the next one since
        "Segmentation_SourceRepresentation:=Binary labelmap",
    ]
    boxes = ndimage.find_objects(labels) if classes else []
    for n, label in enumerate(classes):
        box = boxes[label.value - 1] if label.value <= len(boxes) else None
        extent = " ".join(f"{s.start} {s.stop - 1}" for s in box[::-1]) if box else "0 -1 0 -1 0 -1"
        lines += [
            f"Segment{n}_ID:=Segment_{n + 1}",
            f"Segment{n}_Name:={_one_line(label.name)}",
            f"Segment{n}_NameAutoGenerated:=0",
            f"Segment{n}_Color:={' '.join(f'{v:.6g}' for v in segment_colour(n))}",
            f"Segment{n}_ColorAutoGenerated:=1",
            f"Segment{n}_LabelValue:={label.value}",
            f"Segment{n}_Layer:=0",
            f"Segment{n}_Extent:={extent}",
            f"Segment{n}_Tags:=|",
        ]
    return lines


def segment_colour(n: int) -> tuple[float, float, float]:
    """Red, green, blue in [0, 1] of the n-th segment: hues by the golden angle, in three shades."""
    saturation, value = ((0.85, 0.95), (0.55, 0.9), (0.8, 0.7))[n // 21 % 3]
    return colorsys.hsv_to_rgb(n * _GOLDEN_ANGLE % 1.0, saturation, value)


def _one_line(name: str) -> str:
    """A value as the format wants it: backslashes escaped, control characters blank."""
    return "".join(c if c.isprintable() else " " for c in name.replace("\\", "\\\\"))
