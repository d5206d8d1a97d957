"""NIfTI header: 348 or 540 raw bytes, judged before they are believed.

Libraries repair bad headers without a word, and each in its own way (fault catalogue F05–F09): the fields are taken
as they are on disk and anything that has no single meaning is refused with a code.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import nibabel as nib
import numpy as np
from nibabel.quaternions import quat2mat
from numpy.typing import NDArray

from medseg.errors import InputError, Problem
from medseg.imaging.geometry import (
    CLOSE_GRID_VOXELS,
    NAMED_UNIT_SMALLEST_MM,
    SPACING_MM,
    judge_affine,
    judge_spacing,
    listed,
    nifti_affine,
)
from medseg.records.grid import Float3, Grid

Affine = NDArray[np.float64]

MAX_VOXELS = 2**31
MAX_EXTENSION_BYTES = 64 * 2**20

_VERSIONS = {348: (nib.Nifti1Header, b"n+1\0"), 540: (nib.Nifti2Header, b"n+2\0")}
_VOXEL_TYPES = {
    2: "u1", 4: "i2", 8: "i4", 16: "f4", 64: "f8", 256: "i1", 512: "u2", 768: "u4", 1024: "i8", 1280: "u8",
}  # fmt: skip
_OTHER_TYPES = {
    0: "unknown", 1: "1-bit", 32: "complex64", 128: "RGB", 1536: "float128", 1792: "complex128", 2048: "complex256",
    2304: "RGBA",
}  # fmt: skip
_QUATERNION_NOISE = 3 * float(np.finfo(np.float32).eps)  # nibabel's limit: below it a² is rounding, turns by 180°
_UNIT_MM = {1: ("metre", 1e3), 2: ("mm", 1.0), 3: ("micron", 1e-3)}  # nifti1.h, NIFTI_UNITS_*


@dataclass(frozen=True, slots=True, eq=False)
class Layout:
    """What a header says: where the voxels lie in the file, what they are, and their grid.

    ``shape`` is (C, Z, Y, X), ``dtype`` in the file's byte order, ``offset`` and ``voxel_bytes`` in bytes of the
    inflated file. ``slope`` and ``inter`` are 1 and 0 where the file asks for no scaling. ``notes`` are warnings.
    """

    shape: tuple[int, int, int, int]
    dtype: np.dtype[np.generic]
    offset: int
    slope: float
    inter: float
    grid: Grid
    notes: tuple[Problem, ...]

    @property
    def voxel_bytes(self) -> int:
        """Size of the voxel data."""
        return math.prod(self.shape) * self.dtype.itemsize


def header_size(start: bytes | bytearray, name: str) -> int:
    """348 or 540 by the first four bytes.

    Raises:
        InputError: E0102 neither NIfTI-1 nor NIfTI-2.
    """
    sizes = (int.from_bytes(start[:4], "little"), int.from_bytes(start[:4], "big"))
    for size in sizes:
        if size in _VERSIONS:
            return size
    raise _refused("E0102", name, f"header size field is {sizes[0]}", "348 or 540", "this is not a NIfTI file")


def parse_header(raw: bytes, name: str, channels: int = 1, max_voxels: int = MAX_VOXELS) -> Layout:
    """Judge the raw header of a single-file NIfTI-1 or -2 volume with ``channels`` channels; ``name`` is for messages.

    Orientation: the sform if its code is positive, else the qform if its code is positive; with both codes 0 the
    axes are taken as they are stored, as RAS with the origin at the first voxel, and note W0123 says so (NIfTI
    "method 1"; nibabel and ITK each make up something else). Metre and micron become mm where the unit code says so.

    Raises:
        InputError: E0102, E0104, E0106, E0111, E0121, E0122, E0124, E0125, E0133.
    """
    header = _fields(raw, name)
    sizes = _sizes(header, name)
    shape = _shape(sizes, channels, name)
    if math.prod(shape) > max_voxels:
        measured = f"declares {' × '.join(map(str, sizes))} voxels"
        raise _refused("E0104", name, measured, f"at most {max_voxels}", "check the header, or raise the limit")
    code = int(header["datatype"])
    if code not in _VOXEL_TYPES:
        measured = f"shape {tuple(sizes)} of voxel type {_OTHER_TYPES.get(code, code)}"
        raise _refused("E0111", name, measured, "one real number per voxel", "convert it to a scalar image")
    with np.errstate(invalid="ignore", over="ignore"):  # signalling NaN, and what overflows: both are refused
        grid, notes = _grid(header, sizes, name)
    return Layout(
        shape=shape,
        dtype=np.dtype(_VOXEL_TYPES[code]).newbyteorder(header.endianness),
        offset=_offset(header, len(raw), name),
        grid=grid,
        notes=tuple(notes),
        **_scaling(header, name),
    )


def _fields(raw: bytes, name: str) -> nib.Nifti1Header:
    size = header_size(raw, name)
    kind, magic = _VERSIONS[size]
    found = raw[344:348] if size == 348 else raw[4:8]
    if found != magic:
        if found[:2] == b"ni":
            raise _refused("E0106", name, "header of a .hdr/.img pair", "one .nii file", "convert the pair to .nii.gz")
        raise _refused("E0102", name, f"magic bytes {found!r}", repr(magic), "this is not a NIfTI file")
    endianness = "<" if int.from_bytes(raw[:4], "little") == size else ">"
    return kind(binaryblock=raw[:size], endianness=endianness, check=False)


def _sizes(header: nib.Nifti1Header, name: str) -> list[int]:
    """The used entries of ``dim``, trailing ones beyond the third dropped."""
    dim = [int(n) for n in header["dim"]]
    if not 1 <= dim[0] <= 7:
        raise _refused("E0102", name, f"{dim[0]} dimensions declared", "1 to 7", "the header is damaged")
    sizes = dim[1 : dim[0] + 1]
    if min(sizes) < 1:
        raise _refused("E0111", name, f"shape {tuple(sizes)}", "positive sizes", "there are no voxels in it")
    while len(sizes) > 3 and sizes[-1] == 1:
        sizes.pop()
    if len(sizes) < 2:
        raise _refused("E0111", name, f"shape {tuple(sizes)}", "2 or 3 dimensions", "provide an image")
    return sizes


def _shape(sizes: list[int], channels: int, name: str) -> tuple[int, int, int, int]:
    found = sizes[3] if len(sizes) > 3 else 1
    if len(sizes) > 4 or (found != channels and channels == 1):
        raise _refused("E0111", name, f"shape {tuple(sizes)}", "a 3D volume", "split it into one file per volume")
    if found != channels:
        raise _refused("E0133", name, f"holds {found} channels", f"{channels}", "provide all channels in order")
    i, j, k = [*sizes, 1][:3]
    return found, k, j, i


def _offset(header: nib.Nifti1Header, header_bytes: int, name: str) -> int:
    offset = float(header["vox_offset"])
    lowest = header_bytes + 4
    if not (lowest <= offset <= lowest + MAX_EXTENSION_BYTES and offset == int(offset)):
        raise _refused(
            "E0102", name, f"vox_offset {offset:g}", f"{lowest} to {lowest + MAX_EXTENSION_BYTES}", "damaged header"
        )
    return int(offset)


def _scaling(header: nib.Nifti1Header, name: str) -> dict[str, float]:
    """``slope`` and ``inter``; a slope of 0 or not finite means none (nifti1.h, "data scaling")."""
    slope, inter = float(header["scl_slope"]), float(header["scl_inter"])
    if slope == 0 or not math.isfinite(slope):
        return {"slope": 1.0, "inter": 0.0}
    if not math.isfinite(inter):
        raise _refused("E0102", name, f"scl_slope {slope:g} with scl_inter {inter}", "finite", "the header is damaged")
    return {"slope": slope, "inter": inter}


def _grid(header: nib.Nifti1Header, sizes: list[int], name: str) -> tuple[Grid, list[Problem]]:
    shape = (sizes[0], sizes[1], sizes[2] if len(sizes) > 2 else 1)
    pixdim = _pixdim(header, name)
    millimetres, smallest_mm, notes = _unit(int(header["xyzt_units"]) & 7, name)
    judge_spacing(pixdim * millimetres, shape, f"{name}: pixdim", smallest_mm)
    forms: dict[str, Affine] = {}
    if int(header["sform_code"]) > 0:
        forms["sform"] = np.array([header["srow_x"], header["srow_y"], header["srow_z"], [0, 0, 0, 1]], np.float64)
    if int(header["qform_code"]) > 0:
        forms["qform"] = _qform(header, pixdim, name)
    if not forms:
        forms["pixdim"] = np.diag([*pixdim, 1.0])
        measured = f"{name}: neither sform nor qform has a code, left and right are unknown"
        notes.append(Problem("W0123", measured, "", "axes are taken as RAS as stored; set the orientation"))
    grids = {}
    for form, affine in forms.items():
        affine[:3] *= millimetres
        grids[form], problems = judge_affine(affine, shape, f"{name}: {form}", smallest_mm)
        notes += problems
    chosen = next(iter(grids.values()))
    if len(grids) == 2:
        _agree(chosen, grids["qform"], name)
    x, y, z = pixdim * millimetres
    if "sform" in grids and not np.allclose((z, y, x), chosen.spacing_mm, rtol=1e-2, atol=0):
        found = f"{name}: pixdim {listed((x, y, z))} mm, sform {listed(chosen.spacing_mm[::-1])} mm"
        notes.append(Problem("W0122", found, "", "the sform is used; readers that use pixdim see another spacing"))
    return chosen, notes


def stored_spacing_mm(header_bytes: bytes) -> Float3:
    """Spacing along z, y, x as the header's ``pixdim`` has it: rounded otherwise than what the sform gives.

    It is what SimpleITK and nibabel report, so that shapes made from it are theirs where sizes come out at a half.
    """
    header = _VERSIONS[len(header_bytes)][0](header_bytes, check=False)
    x, y, z = _pixdim(header, "header") * _unit(int(header["xyzt_units"]) & 7, "header")[0]
    return float(z), float(y), float(x)


def _unit(code: int, name: str) -> tuple[float, float, list[Problem]]:
    """Millimetres in the file's unit, the smallest spacing (mm) that is believed, and what is to be said about it.

    Code 0, unknown, is written by many tools and means millimetres to all of them, but not less than 0.001 of one.
    """
    if code == 0:
        return 1.0, SPACING_MM[0], []
    if code not in _UNIT_MM:
        measured = f"{name}: unit code {code} has no meaning"
        return 1.0, SPACING_MM[0], [Problem("W0125", measured, "1 to 3", "taken as mm; correct xyzt_units")]
    unit, millimetres = _UNIT_MM[code]
    converted = Problem("W0125", f"{name}: spacing is in {unit}", "mm", "converted; check that the unit is true")
    return millimetres, NAMED_UNIT_SMALLEST_MM, [converted] if millimetres != 1 else []


def _pixdim(header: nib.Nifti1Header, name: str) -> NDArray[np.float64]:
    """Raw spacing along i, j, k in the file's unit; axes beyond the declared dimensions count as 1."""
    pixdim = np.ones(3)
    used = min(int(header["dim"][0]), 3)
    pixdim[:used] = header["pixdim"][1 : used + 1]
    if not (np.isfinite(pixdim).all() and (pixdim > 0).all()):
        raise _refused("E0124", name, f"pixdim {listed(pixdim)}", "positive numbers", "correct the header")
    return pixdim


def _qform(header: nib.Nifti1Header, pixdim: NDArray[np.float64], name: str) -> Affine:
    """Affine (i, j, k) of the quaternion (nifti1.h, "method 2"); any qfac that is not negative counts as 1."""
    b, c, d = (float(header[f"quatern_{letter}"]) for letter in "bcd")
    square = b * b + c * c + d * d
    if not square <= 1 + 1e-3:
        raise _refused("E0121", name, f"qform quaternion {listed((b, c, d))}", "norm ≤ 1", "correct the header")
    rest = 1 - square
    quaternion = np.array([math.sqrt(rest) if rest > _QUATERNION_NOISE else 0.0, b, c, d])
    affine = np.eye(4)
    affine[:3, :3] = quat2mat(quaternion / np.linalg.norm(quaternion)) * pixdim
    if float(header["pixdim"][0]) < 0:
        affine[:3, 2] *= -1
    affine[:3, 3] = [float(header[f"qoffset_{letter}"]) for letter in "xyz"]
    return affine


def _agree(sform: Grid, qform: Grid, name: str) -> None:
    moved = sform.corner_displacement_voxels(qform)
    if moved > CLOSE_GRID_VOXELS:
        first, second = (
            " ".join(f"{v:.3g}" for v in nifti_affine(g)[:3].round(3).ravel() + 0.0) for g in (sform, qform)
        )
        measured = f"sform [{first}] and qform [{second}] lie {moved:.3g} voxels apart"
        raise _refused("E0122", name, measured, f"at most {CLOSE_GRID_VOXELS}", "correct one, or set its code to 0")


def _refused(code: str, name: str, measured: str, expected: str, action: str) -> InputError:
    return InputError(Problem(code, f"{name}: {measured}", expected, action))
