"""NIfTI against nibabel and SimpleITK, and against damage that they do not see."""

from __future__ import annotations

import gzip
import logging
import zlib
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import SimpleITK
from phantoms import affine_ijk, anatomy, save_nifti

from medseg import artefacts
from medseg.errors import InputError, IntegrityError
from medseg.imaging import codec, pieces
from medseg.imaging.geometry import grid_from_nifti, nifti_affine, shear
from medseg.imaging.nifti import header_notes, read_nifti, write_nifti
from medseg.records.grid import Source, Volume

SHAPE = (6, 9, 5)


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(7)


def codes(error: pytest.ExceptionInfo[InputError]) -> list[str]:
    return [problem.code for problem in error.value.problems]


def make(
    path: Path,
    edit: dict | None = None,
    array: np.ndarray | None = None,
    kind: type = nib.Nifti1Image,
    affine: np.ndarray | None = None,
) -> Path:
    """A small oblique volume, with raw header fields changed after nibabel is done."""
    array = np.arange(np.prod(SHAPE), dtype=np.int16).reshape(SHAPE) if array is None else array
    affine = affine_ijk() if affine is None else affine
    image = kind(array, affine)
    image.header.set_xyzt_units("mm")
    image.set_sform(affine, 1)
    image.set_qform(affine, 1)
    plain = path.with_name("plain.nii")
    nib.save(image, plain)
    raw = bytearray(plain.read_bytes())
    plain.unlink()
    header = image.header_class(binaryblock=bytes(raw[: image.header.sizeof_hdr]), check=False)
    for field, value in (edit or {}).items():
        if isinstance(value, tuple):
            header[field][value[0]] = value[1]
        else:
            header[field] = value
    raw[: header.sizeof_hdr] = header.binaryblock
    path.write_bytes(gzip.compress(bytes(raw)) if path.name.endswith(".gz") else bytes(raw))
    return path


# Reading what is well


@pytest.mark.parametrize("dtype", ["u1", "i1", "i2", "u2", "i4", "u4", "i8", "u8", "f4", "f8"])
@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("kind", [nib.Nifti1Image, nib.Nifti2Image])
@pytest.mark.parametrize("ending", [".nii", ".nii.gz"])
def test_every_real_type_is_read_as_nibabel_reads_it(
    tmp_path: Path, rng: np.random.Generator, dtype: str, order: str, kind: type, ending: str
) -> None:
    array = rng.integers(0, 100, SHAPE).astype(dtype)
    header = kind.header_class(endianness=order)
    header.set_data_dtype(dtype)
    nib.save(kind(array, affine_ijk(), header), tmp_path / f"a{ending}")
    volume = read_nifti(tmp_path / f"a{ending}")
    assert volume.array.dtype == np.dtype(dtype)
    assert volume.array.dtype.isnative
    assert volume.array.flags.c_contiguous
    assert volume.array.shape == (1, *SHAPE[::-1])
    assert np.array_equal(volume.array[0].T, array)
    assert np.allclose(nifti_affine(volume.grid), affine_ijk(), atol=1e-6)
    assert len(volume.source.header) == kind.header_class.sizeof_hdr


@pytest.mark.parametrize(("slope", "inter"), [(0.25, -1024), (1, -1024), (2, 0), (-1, 0)])
@pytest.mark.parametrize("dtype", ["u1", "i2", "i4", "f4"])
def test_scaling_is_applied(tmp_path: Path, slope: float, inter: float, dtype: str) -> None:
    array = np.arange(np.prod(SHAPE)).reshape(SHAPE).astype(dtype)
    path = make(tmp_path / "a.nii.gz", {"scl_slope": slope, "scl_inter": inter}, array)
    volume = read_nifti(path)
    assert volume.array.dtype == (np.float64 if dtype == "i4" else np.float32)
    assert np.allclose(volume.array[0].T, nib.load(path).get_fdata())


def test_scaled_voxels_are_scaled_piece_by_piece_to_the_last(tmp_path: Path, rng: np.random.Generator) -> None:
    array = rng.integers(-1000, 3000, (130, 110, 90)).astype(">i2")
    path = make(tmp_path / "a.nii", {"scl_slope": 0.5, "scl_inter": -3}, array)
    assert np.array_equal(read_nifti(path).array[0].T, nib.load(path).get_fdata(dtype=np.float32))


@pytest.mark.parametrize(("slope", "inter"), [(0, 5), (np.nan, 0), (np.nan, np.nan), (np.inf, 3), (1, 0)])
def test_no_scaling_keeps_the_type_of_the_file(tmp_path: Path, slope: float, inter: float) -> None:
    assert read_nifti(make(tmp_path / "a.nii", {"scl_slope": slope, "scl_inter": inter})).array.dtype == np.int16


def test_a_4d_file_is_channels_only_when_asked(tmp_path: Path, rng: np.random.Generator) -> None:
    array = rng.integers(0, 9, (*SHAPE, 3)).astype(np.int16)
    path = make(tmp_path / "a.nii.gz", array=array)
    volume = read_nifti(path, channels=3)
    assert np.array_equal(volume.array.T, array)
    with pytest.raises(InputError) as error:
        read_nifti(path)
    assert codes(error) == ["E0111"]
    with pytest.raises(InputError) as error:
        read_nifti(path, channels=2)
    assert codes(error) == ["E0133"]


def test_trailing_sizes_of_one_are_no_dimensions(tmp_path: Path) -> None:
    path = make(tmp_path / "a.nii.gz", {"dim": [5, *SHAPE, 1, 1, 1, 1]})
    assert read_nifti(path).array.shape == (1, *SHAPE[::-1])


def test_a_2d_file_is_one_slice(tmp_path: Path) -> None:
    array = np.arange(35, dtype=np.uint8).reshape(5, 7)
    path = make(tmp_path / "a.nii.gz", {"pixdim": (3, 0)}, array)
    volume = read_nifti(path)
    assert np.array_equal(volume.array, array.T[None, None])
    write_nifti(tmp_path / "b.nii.gz", volume.array[0], volume.grid, volume.source)
    assert nib.load(tmp_path / "b.nii.gz").shape == (5, 7)


def test_several_gzip_members_are_one_stream(tmp_path: Path) -> None:
    raw = make(tmp_path / "a.nii").read_bytes()
    (tmp_path / "b.nii.gz").write_bytes(
        gzip.compress(raw[:200]) + gzip.compress(raw[200:500]) + gzip.compress(raw[500:])
    )
    assert np.array_equal(read_nifti(tmp_path / "b.nii.gz").array, read_nifti(tmp_path / "a.nii").array)


def test_header_extensions_are_skipped(tmp_path: Path) -> None:
    image = nib.Nifti1Image(np.ones(SHAPE, np.uint8), affine_ijk())
    image.header.extensions.append(nib.nifti1.Nifti1Extension("comment", b"x" * 5000))
    nib.save(image, tmp_path / "a.nii.gz")
    assert read_nifti(tmp_path / "a.nii.gz").array.sum() == np.prod(SHAPE)


# Geometry from the header


@pytest.mark.parametrize(
    ("unit", "factor", "code"), [(0, 1, None), (1, 1000, "W0125"), (2, 1, None), (3, 1e-3, "W0125"), (5, 1, "W0125")]
)
def test_units_are_converted_when_the_header_names_them_and_said(
    tmp_path: Path, unit: int, factor: float, code: str | None
) -> None:
    affine = affine_ijk((0.015, 0.025, 0.02))
    volume = read_nifti(make(tmp_path / "a.nii", {"xyzt_units": unit + 8}, affine=affine))
    assert np.allclose(nifti_affine(volume.grid)[:3], affine[:3] * factor)
    assert [note.code for note in volume.notes] == ([code] if code else [])


@pytest.mark.parametrize(
    ("unit", "spacing", "code"),
    [
        (0, 5e-4, "E0125"),
        (2, 5e-4, None),
        (3, 0.25, None),
        (3, 4e-3, None),
        (3, 4e-4, "E0125"),
        (2, 90, None),
        (2, 120, "E0125"),
        (1, 1.2, "E0125"),
    ],
)
def test_a_tiny_spacing_is_believed_only_where_the_unit_is_named(
    tmp_path: Path, unit: int, spacing: float, code: str | None
) -> None:
    path = make(tmp_path / "a.nii", {"xyzt_units": unit}, affine=affine_ijk((spacing, spacing, spacing * 1.1)))
    if code is None:
        assert min(read_nifti(path).grid.spacing_mm) == pytest.approx(spacing * {2: 1, 3: 1e-3}[unit])
    else:
        with pytest.raises(InputError) as error:
            read_nifti(path)
        assert codes(error) == [code]


def test_a_slice_may_claim_any_thickness(tmp_path: Path) -> None:
    affine = np.diag([0.7, 0.8, 999.0, 1.0])
    path = make(tmp_path / "a.nii", array=np.ones((7, 9, 1), np.uint8), affine=affine)
    assert read_nifti(path).grid.spacing_mm[0] == 999


def test_the_qform_is_used_where_the_sform_has_no_code(tmp_path: Path) -> None:
    path = make(tmp_path / "a.nii", {"sform_code": 0, "srow_x": np.nan})
    assert np.allclose(nifti_affine(read_nifti(path).grid), affine_ijk(), atol=1e-5)


@pytest.mark.parametrize("degrees", [(180, 0, 0), (0, 180, 0), (0, 0, 180), (90, 0, 90), (170, 20, -60)])
@pytest.mark.parametrize("flip", [1, -1])
def test_quaternions_are_read_as_nibabel_and_itk_read_them(tmp_path: Path, degrees: tuple, flip: int) -> None:
    affine = affine_ijk(degrees=degrees) @ np.diag([1, 1, flip, 1])
    image = nib.Nifti1Image(np.zeros((200, 3, 100), np.uint8), affine)
    image.set_qform(affine, 1)
    image.set_sform(None, 0)
    nib.save(image, tmp_path / "a.nii.gz")
    ours = nifti_affine(read_nifti(tmp_path / "a.nii.gz").grid)
    assert np.allclose(ours, affine, atol=1e-4)
    theirs = SimpleITK.ReadImage(str(tmp_path / "a.nii.gz"))
    direction = np.array(theirs.GetDirection()).reshape(3, 3) * np.array(theirs.GetSpacing())
    assert np.allclose(ours[:3, :3], np.diag([-1, -1, 1]) @ direction, atol=1e-3)


def test_without_an_orientation_axes_are_taken_as_stored_and_the_log_says_so(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        volume = read_nifti(make(tmp_path / "a.nii", {"sform_code": 0, "qform_code": 0}))
    assert np.allclose(nifti_affine(volume.grid), np.diag([0.9, 1.1, 2.0, 1]), atol=1e-6)
    assert "W0123" in caplog.text
    assert [note.code for note in header_notes(volume.source)] == ["W0123"]


@pytest.mark.parametrize(
    ("amount", "code"), [(5e-4, None), (0.01, "W0121"), (0.03, "E0121"), (0.1, "E0121"), (0.4, "E0121")]
)
def test_shear_is_straightened_or_refused_and_outputs_keep_the_affine_of_the_file(
    tmp_path: Path, amount: float, code: str | None
) -> None:
    affine = affine_ijk()
    affine[:3, 0] += amount * affine[:3, 1] * 0.9 / 1.1
    path = make(tmp_path / "a.nii", {"qform_code": 0, **{f"srow_{a}": affine[n] for n, a in enumerate("xyz")}})
    if code and code.startswith("E"):
        with pytest.raises(InputError) as error:
            read_nifti(path)
        assert codes(error) == [code]
        return
    volume = read_nifti(path)
    assert [note.code for note in volume.notes] == ([code] if code else [])
    assert shear(volume.grid.affine) < (1e-12 if code else 1e-3)
    moved = volume.grid.corner_displacement_voxels(grid_from_nifti(nib.load(path).affine, SHAPE))
    assert moved < 0.05 if code else moved == 0
    write_nifti(tmp_path / "b.nii.gz", np.ones(volume.grid.shape, np.uint8), volume.grid, volume.source)
    assert nib.load(tmp_path / "b.nii.gz").affine.tobytes() == nib.load(path).affine.tobytes()


@pytest.mark.parametrize(("millimetres", "refused"), [(0.3, False), (0.6, True), (40, True)])
def test_sform_and_qform_must_agree_within_half_a_voxel(tmp_path: Path, millimetres: float, refused: bool) -> None:
    path = make(tmp_path / "a.nii", {"qoffset_y": 14.0 + millimetres})
    if refused:
        with pytest.raises(InputError) as error:
            read_nifti(path)
        assert codes(error) == ["E0122"]
    else:
        read_nifti(path)


def test_pixdim_that_contradicts_the_sform_is_noted(tmp_path: Path) -> None:
    volume = read_nifti(make(tmp_path / "a.nii", {"qform_code": 0, "pixdim": (3, 3.0)}))
    assert volume.grid.spacing_mm[0] == pytest.approx(2.0)
    assert [note.code for note in header_notes(volume.source)] == ["W0122"]


# Refusing what is bad


BAD_HEADERS = [
    ({"dim": (0, 0)}, "E0102"),
    ({"dim": (0, 9)}, "E0102"),
    ({"dim": (2, 0)}, "E0111"),
    ({"dim": (2, -9)}, "E0111"),
    ({"dim": [1, 270, 1, 1, 1, 1, 1, 1]}, "E0111"),
    ({"dim": [5, 6, 9, 1, 1, 5, 1, 1]}, "E0111"),
    ({"dim": [3, 30000, 30000, 3000, 1, 1, 1, 1]}, "E0104"),
    ({"dim": [4, 30000, 30000, 3000, 300, 1, 1, 1]}, "E0111"),
    ({"dim": [3, 1000, 1000, 1000, 1, 1, 1, 1]}, "E0101"),
    ({"dim": (1, 7)}, "E0101"),
    ({"dim": (1, 5)}, "E0102"),
    ({"datatype": 0}, "E0111"),
    ({"datatype": 1}, "E0111"),
    ({"datatype": 32}, "E0111"),
    ({"datatype": 128}, "E0111"),
    ({"datatype": 1536}, "E0111"),
    ({"datatype": 2304}, "E0111"),
    ({"datatype": 31000}, "E0111"),
    ({"magic": b"ni1"}, "E0106"),
    ({"magic": b"n+2"}, "E0102"),
    ({"magic": b""}, "E0102"),
    ({"vox_offset": 0}, "E0102"),
    ({"vox_offset": 100}, "E0102"),
    ({"vox_offset": -352}, "E0102"),
    ({"vox_offset": 352.5}, "E0102"),
    ({"vox_offset": np.nan}, "E0102"),
    ({"vox_offset": 1e9}, "E0102"),
    ({"vox_offset": 368}, "E0101"),
    ({"pixdim": (1, 0)}, "E0124"),
    ({"pixdim": (2, -1)}, "E0124"),
    ({"pixdim": (3, np.nan)}, "E0124"),
    ({"pixdim": (3, np.inf)}, "E0124"),
    ({"pixdim": (1, 1e-9)}, "E0125"),
    ({"pixdim": (1, 1e6)}, "E0125"),
    ({"xyzt_units": 1, "pixdim": (1, 6.0)}, "E0125"),
    ({"srow_x": np.nan}, "E0121"),
    ({"srow_y": np.inf}, "E0121"),
    ({"srow_z": 0}, "E0121"),
    ({"quatern_b": 2}, "E0121"),
    ({"quatern_c": np.nan}, "E0121"),
    ({"qoffset_x": np.nan}, "E0121"),
    ({"quatern_b": 0.9}, "E0122"),
    ({"scl_slope": 1, "scl_inter": np.inf}, "E0102"),
]


@pytest.mark.parametrize(("edit", "code"), BAD_HEADERS, ids=lambda value: str(value))
@pytest.mark.parametrize("ending", [".nii", ".nii.gz"])
def test_a_bad_header_field_has_its_code(tmp_path: Path, edit: dict, code: str, ending: str) -> None:
    with pytest.raises(InputError) as error:
        read_nifti(make(tmp_path / f"a{ending}", edit))
    assert codes(error) == [code]
    assert all(f"a{ending}" in problem.measured for problem in error.value.problems)


def test_a_nifti2_header_is_judged_like_a_nifti1_header(tmp_path: Path) -> None:
    for edit, code in [({"dim": (1, 2**40)}, "E0104"), ({"pixdim": (1, 0)}, "E0124"), ({"vox_offset": 352}, "E0102")]:
        with pytest.raises(InputError) as error:
            read_nifti(make(tmp_path / "a.nii.gz", edit, kind=nib.Nifti2Image))
        assert codes(error) == [code]


@pytest.mark.parametrize("ending", [".nii", ".nii.gz"])
def test_a_file_cut_anywhere_is_called_truncated(tmp_path: Path, rng: np.random.Generator, ending: str) -> None:
    whole = make(tmp_path / f"a{ending}", array=rng.integers(0, 99, (11, 13, 9)).astype(np.int16)).read_bytes()
    cut = tmp_path / f"cut{ending}"
    ends = {0, 1, 2, 3, 4, 9, 10, 347, 348, 351, 352, *(len(whole) - n for n in (1, 2, 4, 7, 8, 9, 20))}
    for end in sorted(ends | set(rng.integers(0, len(whole), 60).tolist())):
        cut.write_bytes(whole[:end])
        with pytest.raises(InputError) as error:
            read_nifti(cut)
        assert codes(error) == ["E0101"], end


def test_no_flipped_bit_of_a_compressed_file_changes_a_voxel_unseen(tmp_path: Path, rng: np.random.Generator) -> None:
    path = make(tmp_path / "a.nii.gz", array=rng.integers(0, 99, (11, 13, 9)).astype(np.int16))
    whole, truth = path.read_bytes(), read_nifti(path)
    refused = 0
    for bit in [*range(80), *rng.integers(80, 8 * len(whole), 400).tolist()]:
        damaged = bytearray(whole)
        damaged[bit // 8] ^= 1 << (bit % 8)
        path.write_bytes(damaged)
        try:
            volume = read_nifti(path)
        except InputError:
            refused += 1
        else:
            assert bit < 80, "only fields of the gzip header that hold no content may differ"
            assert np.array_equal(volume.array, truth.array)
            assert np.array_equal(volume.grid.affine, truth.grid.affine)
    assert refused >= 400


@pytest.mark.parametrize("tail", [b"\0", b"garbage", b"\x1f", b"\x1f\x8b", b"\x1f\x8b\x08\x00broken"])
def test_data_after_the_end_are_refused(tmp_path: Path, tail: bytes) -> None:
    whole = make(tmp_path / "a.nii.gz").read_bytes()
    (tmp_path / "b.nii.gz").write_bytes(whole + tail)
    (tmp_path / "c.nii").write_bytes(gzip.decompress(whole) + tail)
    (tmp_path / "d.nii.gz").write_bytes(whole + gzip.compress(tail))
    for name in ("b.nii.gz", "c.nii", "d.nii.gz"):
        with pytest.raises(InputError) as error:
            read_nifti(tmp_path / name)
        assert set(codes(error)) <= {"E0101", "E0102"}, name


def test_a_stream_that_inflates_without_end_is_stopped_at_the_declared_size(tmp_path: Path) -> None:
    raw = make(tmp_path / "a.nii").read_bytes()
    (tmp_path / "bomb.nii.gz").write_bytes(gzip.compress(raw + bytes(200 * 2**20), compresslevel=1))
    with pytest.raises(InputError) as error:
        read_nifti(tmp_path / "bomb.nii.gz")
    assert codes(error) == ["E0102"]


def test_names_and_contents_must_agree(tmp_path: Path) -> None:
    raw = make(tmp_path / "a.nii").read_bytes()
    (tmp_path / "b.nii.gz").write_bytes(raw)
    (tmp_path / "c.nii").write_bytes(gzip.compress(raw))
    (tmp_path / "d.nii").write_bytes(b"<html>not found</html>" * 30)
    for name in ("b.nii.gz", "c.nii", "d.nii"):
        with pytest.raises(InputError) as error:
            read_nifti(tmp_path / name)
        assert codes(error) == ["E0102"]


def test_the_size_limit_is_a_parameter(tmp_path: Path) -> None:
    with pytest.raises(InputError) as error:
        read_nifti(make(tmp_path / "a.nii.gz"), max_voxels=269)
    assert codes(error) == ["E0104"]
    assert "6 × 9 × 5" in str(error.value)


# Writing


def source_volume(path: Path, **edit: object) -> Volume:
    return read_nifti(make(path, edit))


ORIENTATION = (
    "qform_code", "sform_code", "quatern_b", "quatern_c", "quatern_d", "qoffset_x", "qoffset_y", "qoffset_z",
    "srow_x", "srow_y", "srow_z", "xyzt_units",
)  # fmt: skip


@pytest.mark.parametrize("kind", [nib.Nifti1Image, nib.Nifti2Image])
@pytest.mark.parametrize("ending", [".nii", ".nii.gz"])
def test_labels_are_written_on_the_fields_of_the_source(tmp_path: Path, kind: type, ending: str) -> None:
    source_path = make(tmp_path / "a.nii.gz", {"descrip": b"DOE^JANE"}, kind=kind)
    volume = read_nifti(source_path)
    labels = np.zeros(volume.grid.shape, np.int16)
    labels[1:3, 2:7, 1:5] = 3
    digest = write_nifti(tmp_path / f"out{ending}", labels, volume.grid, volume.source)
    written, source = nib.load(tmp_path / f"out{ending}"), nib.load(source_path)
    assert np.array_equal(np.asanyarray(written.dataobj).T, labels)
    assert written.get_data_dtype() == np.uint8
    for field in ORIENTATION:
        assert written.header[field].tobytes() == source.header[field].tobytes(), field
    assert written.header["pixdim"][:4].tobytes() == source.header["pixdim"][:4].tobytes()
    assert written.header["cal_max"] == 0
    if kind is nib.Nifti1Image:  # ITK does not read NIfTI-2
        itk = SimpleITK.ReadImage(str(tmp_path / f"out{ending}"))
        assert np.array_equal(SimpleITK.GetArrayFromImage(itk), labels)
    again = write_nifti(tmp_path / f"again{ending}", labels, volume.grid, volume.source)
    assert again == digest


@pytest.mark.parametrize("isal", [True, False])
def test_a_written_stream_is_one_gzip_member_without_name_or_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rng: np.random.Generator, isal: bool
) -> None:
    if not isal:
        monkeypatch.setattr(codec, "_ISAL", None)
    volume = source_volume(tmp_path / "a.nii")
    labels = rng.integers(0, 300, volume.grid.shape)
    write_nifti(tmp_path / "b.nii.gz", labels, volume.grid, volume.source)
    data = (tmp_path / "b.nii.gz").read_bytes()
    inflate = zlib.decompressobj(31)
    raw = inflate.decompress(data)
    assert inflate.eof
    assert inflate.unused_data == b""
    assert data[3:8] == bytes(5)
    assert raw[352:] == labels.astype("<u2").tobytes()
    assert np.array_equal(SimpleITK.GetArrayFromImage(SimpleITK.ReadImage(str(tmp_path / "b.nii.gz"))), labels)


def test_no_text_of_the_source_reaches_the_output(tmp_path: Path) -> None:
    text = {"descrip": b"CANARY1", "aux_file": b"CANARY2", "db_name": b"CANARY3", "intent_name": b"CANARY4"}
    volume = source_volume(tmp_path / "a.nii", **text)
    write_nifti(tmp_path / "out.nii", np.ones(volume.grid.shape, np.uint8), volume.grid, volume.source)
    assert b"CANARY" not in (tmp_path / "out.nii").read_bytes()
    write_nifti(tmp_path / "CANARY.nii.gz", np.ones(volume.grid.shape, np.uint8), volume.grid, volume.source)
    assert b"CANARY" not in (tmp_path / "CANARY.nii.gz").read_bytes()


@pytest.mark.parametrize(
    "edit",
    [
        {"sform_code": 0},
        {"qform_code": 0},
        {"sform_code": 0, "qform_code": 0},
        {"sform_code": 4, "qform_code": 2},
        {"xyzt_units": 3 + 8},
        {"pixdim": (0, -1), "qform_code": 0},
        {"dim": [4, *SHAPE, 1, 1, 1, 1]},
        {"scl_slope": 2, "scl_inter": -5, "cal_max": 900, "intent_code": 1005, "toffset": 4},
    ],
    ids=str,
)
def test_odd_sources_give_outputs_on_the_same_grid(tmp_path: Path, edit: dict) -> None:
    volume = source_volume(tmp_path / "a.nii.gz", **edit)
    labels = np.arange(270).reshape(volume.grid.shape)
    write_nifti(tmp_path / "out.nii.gz", labels, volume.grid, volume.source)
    back = read_nifti(tmp_path / "out.nii.gz")
    assert np.array_equal(back.array[0], labels)
    assert back.array.dtype == np.uint16
    assert np.array_equal(back.grid.affine, volume.grid.affine)
    assert np.array_equal(nib.load(tmp_path / "out.nii.gz").affine, nib.load(tmp_path / "a.nii.gz").affine)


def test_a_big_endian_source_keeps_its_geometry(tmp_path: Path) -> None:
    nib.save(
        nib.Nifti1Image(np.zeros(SHAPE, ">i2"), affine_ijk(), nib.Nifti1Header(endianness=">")), tmp_path / "a.nii"
    )
    volume = read_nifti(tmp_path / "a.nii")
    write_nifti(tmp_path / "b.nii", np.ones(volume.grid.shape, np.uint8), volume.grid, volume.source)
    assert np.array_equal(nib.load(tmp_path / "b.nii").affine, nib.load(tmp_path / "a.nii").affine)


def test_without_a_nifti_source_the_header_is_made_from_the_grid(tmp_path: Path) -> None:
    grid = grid_from_nifti(affine_ijk(degrees=(33, -50, 71)), SHAPE)
    labels = np.arange(270).reshape(grid.shape) % 5
    write_nifti(tmp_path / "a.nii.gz", labels, grid, Source("x.dcm", "dicom"))
    image = nib.load(tmp_path / "a.nii.gz")
    assert np.allclose(image.affine, nifti_affine(grid), atol=1e-5)
    assert image.header.get_xyzt_units()[0] == "mm"
    itk = SimpleITK.ReadImage(str(tmp_path / "a.nii.gz"))
    assert np.allclose(itk.GetSpacing()[::-1], grid.spacing_mm, atol=1e-5)


def test_labels_that_do_not_belong_to_the_grid_are_a_programming_error(tmp_path: Path) -> None:
    volume = source_volume(tmp_path / "a.nii")
    with pytest.raises(ValueError, match="do not lie"):
        write_nifti(tmp_path / "b.nii", np.zeros(SHAPE, np.uint8), volume.grid, volume.source)
    with pytest.raises(ValueError, match="negative"):
        write_nifti(tmp_path / "b.nii", np.full(volume.grid.shape, -1), volume.grid, volume.source)
    other = grid_from_nifti(affine_ijk(origin=(0, 0, 0)), SHAPE)
    with pytest.raises(ValueError, match="not the grid of the source"):
        write_nifti(tmp_path / "b.nii", np.zeros(other.shape, np.uint8), other, volume.source)
    assert [path.name for path in tmp_path.iterdir()] == ["a.nii"]


@pytest.mark.parametrize("ending", [".nii", ".nii.gz"])
@pytest.mark.parametrize("place", [3, 100, -30, -12, -6, -1])
def test_a_file_that_reads_back_differently_never_appears(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rng: np.random.Generator, ending: str, place: int
) -> None:
    volume = source_volume(tmp_path / "a.nii")
    real = artefacts.sha256_of

    def rotten(path: Path) -> str:  # between writing and reading back
        data = bytearray(path.read_bytes())
        data[place] ^= 1
        path.write_bytes(data)
        return real(path)

    monkeypatch.setattr(artefacts, "sha256_of", rotten)
    with pytest.raises(IntegrityError, match="E0701"):
        write_nifti(tmp_path / f"b{ending}", rng.integers(0, 9, volume.grid.shape), volume.grid, volume.source)
    assert [path.name for path in tmp_path.iterdir()] == ["a.nii"]


def test_equal_labels_give_equal_bytes_on_any_number_of_cores(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rng: np.random.Generator
) -> None:
    grid = grid_from_nifti(affine_ijk(), (190, 210, 70))
    labels = np.zeros(grid.shape, np.uint8)
    labels[5:60, 20:190, 30:150] = rng.integers(0, 25, (55, 170, 120))
    digests = set()
    for cores in (1, 2, 7):
        monkeypatch.setattr(pieces, "usable_cores", lambda cores=cores: cores)
        for view in (labels, labels.astype(np.int32), np.asfortranarray(labels), labels[::-1].copy()[::-1]):
            digests.add(write_nifti(tmp_path / "a.nii.gz", view, grid, Source("x", "dicom")))
    assert len(digests) == 1
    assert np.array_equal(np.asanyarray(nib.load(tmp_path / "a.nii.gz").dataobj).T, labels)
    assert gzip.decompress((tmp_path / "a.nii.gz").read_bytes())[352:] == labels.tobytes()


# Real files


def test_real_files_are_read_as_nibabel_reads_them_or_refused_with_a_code(shared: Path) -> None:
    data = shared / "data"
    files = [path for path in sorted((data / "formats").rglob("*.nii.gz")) if path.stat().st_size < 150_000]
    files += sorted((data / "ms_lesions").rglob("*.nii.gz"))[:2]
    files += (
        sorted((data / "cardiac" / "imagesTr").iterdir())[:3] + sorted((data / "glioma" / "labelsTr").iterdir())[:1]
    )
    refused = {}
    for path in files:
        try:
            volume = read_nifti(path)
        except InputError as error:
            refused[path.name] = error.problems[0].code
            continue
        image = nib.load(path)
        voxels = np.asanyarray(image.dataobj)
        assert np.allclose(nifti_affine(volume.grid), image.affine, atol=1e-5), path
        if volume.array.dtype == image.get_data_dtype():
            assert np.array_equal(volume.array[0].T, voxels, equal_nan=voxels.dtype.kind == "f"), path
        else:
            assert np.allclose(volume.array[0].T, voxels, atol=1e-4), path
    assert refused == {"rgb_test_file.nii.gz": "E0111"}
    assert len(files) > 50


def test_phantom_labels_go_to_disk_and_back(tmp_path: Path, rng: np.random.Generator) -> None:
    image, labels = anatomy(rng)
    save_nifti(tmp_path / "image.nii.gz", image, affine_ijk())
    volume = read_nifti(tmp_path / "image.nii.gz")
    assert np.array_equal(volume.array[0].T, image)
    write_nifti(tmp_path / "labels.nii.gz", labels.T.astype(np.int16), volume.grid, volume.source)
    written = nib.load(tmp_path / "labels.nii.gz")
    assert np.array_equal(np.asanyarray(written.dataobj), labels)
    assert np.array_equal(written.affine, nib.load(tmp_path / "image.nii.gz").affine)
