"""Fuzzed headers, truncations and flipped bits: refused with a code, or read as a parser of its own reads them.

Each test takes a share of its full number; the full numbers (100,000 headers, 1,000 cuts, 1,000 bits) are ``slow``.
"""

from __future__ import annotations

import gzip
import itertools
import math
import resource
import struct
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
from phantoms import affine_ijk

from medseg.errors import InputError
from medseg.imaging import codec
from medseg.imaging.geometry import grid_from_nifti, nifti_affine
from medseg.imaging.nifti import read_nifti
from medseg.records.grid import Grid, Volume

# A parser of the header by the tables of nifti1.h and nifti2.h, without numpy's or nibabel's help:
# name -> (offset, struct format)

NIFTI1 = {
    "sizeof_hdr": (0, "i"), "dim": (40, "8h"), "datatype": (70, "h"), "bitpix": (72, "h"), "pixdim": (76, "8f"),
    "vox_offset": (108, "f"), "scl_slope": (112, "f"), "scl_inter": (116, "f"), "xyzt_units": (123, "B"),
    "qform_code": (252, "h"), "sform_code": (254, "h"), "quatern": (256, "3f"), "qoffset": (268, "3f"),
    "srow_x": (280, "4f"), "srow_y": (296, "4f"), "srow_z": (312, "4f"), "magic": (344, "4s"),
}  # fmt: skip
NIFTI2 = {
    "sizeof_hdr": (0, "i"), "magic": (4, "8s"), "datatype": (12, "h"), "bitpix": (14, "h"), "dim": (16, "8q"),
    "pixdim": (104, "8d"), "vox_offset": (168, "q"), "scl_slope": (176, "d"), "scl_inter": (184, "d"),
    "qform_code": (344, "i"), "sform_code": (348, "i"), "quatern": (352, "3d"), "qoffset": (376, "3d"),
    "srow_x": (400, "4d"), "srow_y": (432, "4d"), "srow_z": (464, "4d"), "xyzt_units": (500, "i"),
}  # fmt: skip
TYPES = {2: "B", 4: "h", 8: "i", 16: "f", 64: "d", 256: "b", 512: "H", 768: "I", 1024: "q", 1280: "Q"}
FLOATS = [0.0, -0.0, 1.0, -1.0, math.nan, math.inf, -math.inf, 1e-9, 5e-4, 1e-45, 1e6, 3e38, -3e38, 352.0, 544.0, 0.5]
INTEGERS = [0, 1, 2, 3, 4, 5, 7, 8, 9, 10, 16, 64, 128, 256, 512, -1, -2, 127, 255, 2**15 - 1, -(2**15)]


def seed(kind: dict, order: str, **fields: object) -> bytes:
    """A sound header with its empty extension flag."""
    affine = affine_ijk()
    size = 348 if kind is NIFTI1 else 540
    raw = bytearray(size + 4)
    values = {
        "sizeof_hdr": size, "dim": (3, 6, 5, 4, 1, 1, 1, 1), "datatype": 4, "bitpix": 16,
        "pixdim": (1, 0.9, 1.1, 2, 1, 1, 1, 1), "vox_offset": size + 4, "scl_slope": 0, "scl_inter": 0,
        "xyzt_units": 10, "qform_code": 0, "sform_code": 1, "quatern": (0, 0, 0), "qoffset": (0, 0, 0),
        "srow_x": affine[0], "srow_y": affine[1], "srow_z": affine[2],
        "magic": b"n+1\0" if size == 348 else b"n+2\0\r\n\x1a\n",
    }  # fmt: skip
    for name, value in (values | fields).items():
        put(raw, kind, order, name, value)
    return bytes(raw)


def put(raw: bytearray, kind: dict, order: str, name: str, value: object) -> None:
    offset, form = kind[name]
    items = value if isinstance(value, (tuple, list, np.ndarray)) else (value,)
    struct.pack_into(order + form, raw, offset, *items)


def parse(raw: bytes, kind: dict, order: str) -> dict:
    found = {name: struct.unpack_from(order + form, raw, offset) for name, (offset, form) in kind.items()}
    return {name: value if len(value) > 1 else value[0] for name, value in found.items()}


TURN = {"sform_code": 0, "qform_code": 1, "quatern": (0.1, -0.3, 0.2), "qoffset": (4, -5, 6)}
SEEDS = [
    (NIFTI1, "<", seed(NIFTI1, "<")),
    (NIFTI1, ">", seed(NIFTI1, ">", datatype=16, bitpix=32)),
    (NIFTI2, "<", seed(NIFTI2, "<", datatype=2, bitpix=8)),
    (NIFTI1, "<", seed(NIFTI1, "<", **TURN)),
    (NIFTI2, ">", seed(NIFTI2, ">", **TURN, dim=(4, 3, 4, 5, 1, 1, 1, 1))),
    (NIFTI1, "<", seed(NIFTI1, "<", dim=(2, 7, 5, 1, 1, 1, 1, 1), sform_code=0, scl_slope=2, scl_inter=-1)),
    (NIFTI1, "<", seed(NIFTI1, "<", qform_code=2, qoffset=(-20, 14, 31), quatern=(0.0760, -0.0357, 0.1069))),
]


def mutate(raw: bytes, kind: dict, order: str, rng: np.random.Generator) -> bytearray:
    """One to three fields set to odd values or changed a little, or one to four bytes or bits at random."""
    raw = bytearray(raw)
    if rng.random() < 0.3:
        for position in rng.integers(0, len(raw), rng.integers(1, 5)):
            raw[position] = rng.integers(0, 256) if rng.random() < 0.5 else raw[position] ^ (1 << rng.integers(0, 8))
        return raw
    for name in rng.choice([name for name in kind if name != "magic" or rng.random() < 0.2], rng.integers(1, 4)):
        offset, form = kind[name]
        item = form[-1]
        if item == "s":
            raw[offset + rng.integers(0, 4)] = rng.integers(0, 256)
            continue
        size = struct.calcsize(order + item)
        place = offset + size * int(rng.integers(0, int(form[:-1] or 1)))
        if item in "fd":
            (old,) = struct.unpack_from(order + item, raw, place)
            near = old * (1 + rng.normal() * 10.0 ** rng.integers(-7, 1)) + rng.normal() * 10.0 ** rng.integers(-7, 1)
            value = near if rng.random() < 0.6 and math.isfinite(near) else FLOATS[rng.integers(len(FLOATS))]
            value = math.copysign(1e308, value) if item == "d" and rng.random() < 0.02 else value
            value = max(-3e38, min(3e38, value)) if item == "f" and math.isfinite(value) else value
        else:
            low, high = (0, 255) if item == "B" else (-(2 ** (8 * size - 1)), 2 ** (8 * size - 1) - 1)
            value = min(high, max(low, INTEGERS[rng.integers(len(INTEGERS))] if rng.random() < 0.9 else high))
        struct.pack_into(order + item, raw, place, value)
    return raw


def reference(raw: bytes, kind: dict, order: str) -> tuple[dict, list[int], Grid]:
    """Fields, sizes (i, j, k) and the grid by the formulas of nifti1.h: method 3, else 2, else 1."""
    fields = parse(raw, kind, order)
    sizes = [*fields["dim"][1 : fields["dim"][0] + 1], 1, 1][:3]
    pixdim = [fields["pixdim"][n + 1] if n < fields["dim"][0] else 1.0 for n in range(3)]
    matrix = np.eye(4)
    if fields["sform_code"] > 0:
        matrix[:3] = fields["srow_x"], fields["srow_y"], fields["srow_z"]
    elif fields["qform_code"] > 0:
        b, c, d = fields["quatern"]
        square = b * b + c * c + d * d
        if square > 1 - 1e-7:
            a, (b, c, d) = 0.0, (v / math.sqrt(square) for v in (b, c, d))
        else:
            a = math.sqrt(1 - square)
        rotation = [
            [a * a + b * b - c * c - d * d, 2 * (b * c - a * d), 2 * (b * d + a * c)],
            [2 * (b * c + a * d), a * a + c * c - b * b - d * d, 2 * (c * d - a * b)],
            [2 * (b * d - a * c), 2 * (c * d + a * b), a * a + d * d - b * b - c * c],
        ]
        sign = -1 if fields["pixdim"][0] < 0 else 1
        matrix[:3, :3] = np.array(rotation) * (pixdim[0], pixdim[1], sign * pixdim[2])
        matrix[:3, 3] = fields["qoffset"]
    else:
        matrix[:3, :3] = np.diag(pixdim)
    matrix[:3] *= {1: 1e3, 3: 1e-3}.get(fields["xyzt_units"] & 7, 1.0)
    return fields, sizes, grid_from_nifti(matrix, tuple(sizes))


def judge(volume: Volume, raw: bytes, kind: dict, order: str, voxels: bytes) -> None:
    """What was accepted must be what the header says, and sane."""
    fields, sizes, grid = reference(raw, kind, order)
    assert volume.array.shape == (1, *sizes[::-1])
    assert math.prod(sizes) == math.prod(fields["dim"][1 : fields["dim"][0] + 1])
    assert all(s > 0 and math.isfinite(s) for s in fields["pixdim"][1 : min(3, fields["dim"][0]) + 1])
    assert np.isfinite(volume.grid.affine).all()
    assert min(volume.grid.spacing_mm) > 1e-6 * 0.999
    assert max(volume.grid.spacing_mm) < 5001
    moved = grid.corner_displacement_voxels(volume.grid)
    straightened = any(note.code == "W0121" for note in volume.notes)
    rounding = 1e-6 * (1 + np.abs(grid.affine).max() / min(grid.spacing_mm))  # a quaternion may lie near 180 degrees
    assert moved <= (0.5 if straightened else max(rounding, 2e-3 if fields["sform_code"] <= 0 else 0)), moved
    if fields["sform_code"] > 0 and not straightened:
        assert np.array_equal(nifti_affine(volume.grid), nifti_affine(grid))
    stored = np.array(struct.unpack(f"{order}{math.prod(sizes)}{TYPES[fields['datatype']]}", voxels))
    slope, inter = fields["scl_slope"], fields["scl_inter"]
    with np.errstate(all="ignore"):
        if slope != 0 and math.isfinite(slope):
            stored = stored.astype(np.float64) * slope + inter
        stored = stored.astype(volume.array.dtype).reshape(volume.array.shape)
        assert np.allclose(volume.array, stored, rtol=1e-5, equal_nan=True) or abs(slope) > 1e30 or abs(inter) > 1e30


def fuzz(folder: Path, count: int, start: int) -> int:
    """Read ``count`` mutated files; the number that was accepted."""
    rng = np.random.default_rng(start)
    accepted = 0
    for index in range(count):
        kind, order, raw = SEEDS[index % len(SEEDS)]
        mutant = mutate(raw, kind, order, rng)
        fields = parse(mutant, kind, order)
        size = math.prod(fields["dim"][1 : max(1, min(7, fields["dim"][0])) + 1])
        size *= struct.calcsize(TYPES.get(fields["datatype"], "h"))
        voxels = rng.bytes(size if 0 < size < 4000 and rng.random() < 0.9 else 240)
        compressed = rng.random() < 0.3
        path = folder / ("a.nii.gz" if compressed else "a.nii")
        path.write_bytes(zlib.compress(mutant + voxels, 1, 31) if compressed else mutant + voxels)
        try:
            volume = read_nifti(path)
        except InputError:  # refused with a code; any other exception fails the test
            continue
        accepted += 1
        judge(volume, mutant, kind, order, voxels)
    return accepted


@pytest.mark.parametrize("start", range(4))
def test_a_fuzzed_header_is_refused_or_read_as_another_parser_reads_it(tmp_path: Path, start: int) -> None:
    assert 100 < fuzz(tmp_path, 500, start) < 400


@pytest.mark.slow
def test_a_hundred_thousand_fuzzed_headers_are_refused_or_read_right(tmp_path: Path) -> None:
    fuzz(tmp_path, 100, 99)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    accepted = sum(fuzz(tmp_path, 1000, 1000 + start) for start in range(100))
    assert accepted > 20_000
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 64 * 1024


# Damage of compressed files


def damaged_seeds(rng: np.random.Generator) -> list[bytes]:
    """Five files: made by zlib, by ISA-L, of several members, with a name and a comment in it, and with a checksum."""
    voxels = rng.integers(0, 90, (13, 11, 9)).astype("<i2").tobytes()
    raw = seed(NIFTI1, "<", dim=(3, 9, 11, 13, 1, 1, 1, 1)) + voxels
    plain = gzip.compress(raw, 6, mtime=0)
    deflate = codec.deflater("gzip")
    names = plain[:3] + bytes([8 | 16]) + plain[4:10] + b"a.nii\0" + b"made by hand\0" + plain[10:]
    start = plain[:3] + bytes([2 | 4]) + plain[4:10] + struct.pack("<H", 5) + b"extra"
    checked = start + struct.pack("<H", zlib.crc32(start) & 0xFFFF) + plain[10:]
    members = b"".join(gzip.compress(raw[a:b], mtime=0) for a, b in itertools.pairwise((0, 200, 500, len(raw))))
    return [plain, deflate.compress(raw) + deflate.flush(), members, names, checked]


def survives(path: Path, data: bytes, truth: Volume) -> bool:
    """Whether damaged data are read; then they must be read as the truth."""
    path.write_bytes(data)
    try:
        volume = read_nifti(path)
    except InputError:
        return False
    assert np.array_equal(volume.array, truth.array)
    assert volume.grid.affine.tobytes() == truth.grid.affine.tobytes()
    return True


def cut_and_flip(folder: Path, count: int, start: int) -> tuple[int, int]:
    """``count`` cuts and ``count`` flipped bits over five files: how many of each are accepted."""
    rng = np.random.default_rng(start)
    cuts = flips = 0
    path = folder / "damaged.nii.gz"
    for data in damaged_seeds(rng):
        path.write_bytes(data)
        truth = read_nifti(path)
        ends = {0, 1, 9, 10, 400, len(data) - 1, len(data) - 4, len(data) - 8, len(data) - 9}
        ends = [*ends, *rng.integers(0, len(data), count // 5 - len(ends))]
        cuts += sum(survives(path, data[:end], truth) for end in ends)
        for bit in rng.integers(0, 8 * len(data), count // 5):
            flipped = bytearray(data)
            flipped[bit // 8] ^= 1 << (bit % 8)
            flips += survives(path, bytes(flipped), truth)
    return cuts, flips


@pytest.fixture(params=["isal", "zlib"])
def each_codec(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param == "zlib":
        monkeypatch.setattr(codec, "_ISAL", None)
    else:
        pytest.importorskip("isal")


@pytest.mark.usefixtures("each_codec")
def test_every_cut_is_refused_and_no_flipped_bit_changes_a_voxel(tmp_path: Path) -> None:
    cuts, flips = cut_and_flip(tmp_path, 200, 1)
    assert cuts == 0
    assert flips < 5  # of names, times and comments in the gzip header


@pytest.mark.slow
@pytest.mark.usefixtures("each_codec")
def test_a_thousand_cuts_are_refused_and_a_thousand_flipped_bits_change_no_voxel(tmp_path: Path) -> None:
    cuts, flips = cut_and_flip(tmp_path, 1000, 2)
    assert cuts == 0
    assert flips < 25


def test_a_header_that_overflows_is_refused_without_a_warning(tmp_path: Path) -> None:
    path = tmp_path / "a.nii"
    for field in ("srow_x", "srow_y"):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            raw = seed(NIFTI2, "<", xyzt_units=1, **{field: (1e308, 0, 0, 1e308)})
            path.write_bytes(raw + bytes(240))
            with pytest.raises(InputError, match="E012"):
                read_nifti(path)
