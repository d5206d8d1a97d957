"""MetaImage against SimpleITK, and against headers and damage that it lets pass."""

from __future__ import annotations

import zlib
from pathlib import Path

import numpy as np
import pytest
import SimpleITK
from phantoms import affine_ijk

from medseg.errors import InputError
from medseg.imaging.geometry import grid_from_nifti, nifti_affine
from medseg.imaging.metaimage import read_metaimage, write_metaimage
from medseg.records.grid import Source

SHAPE = (6, 9, 5)
LPS = np.diag([-1.0, -1.0, 1.0, 1.0])
HEADER = {
    "ObjectType": "Image",
    "NDims": "3",
    "BinaryData": "True",
    "BinaryDataByteOrderMSB": "False",
    "CompressedData": "False",
    "TransformMatrix": "0 1 0 -1 0 0 0 0 1",
    "Offset": "20 -14 31.25",
    "ElementSpacing": "0.9 1.1 2",
    "DimSize": "6 9 5",
    "ElementType": "MET_SHORT",
    "ElementDataFile": "LOCAL",
}


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(13)


def make(path: Path, edit: dict | None = None, body: bytes | None = None) -> Path:
    """A small volume by hand; a field set to None is left out, others go before ``ElementDataFile``."""
    fields = HEADER | (edit or {})
    fields["ElementDataFile"] = fields.pop("ElementDataFile")
    plain = np.arange(270, dtype="<i2").tobytes() if body is None else body
    lines = [f"{key} = {value}\n" for key, value in fields.items() if value is not None]
    path.write_bytes("".join(lines).encode() + plain)
    return path


def code_of(path: Path, channels: int = 1, max_voxels: int = 2**31) -> str:
    with pytest.raises(InputError) as error:
        read_metaimage(path, channels, max_voxels)
    return error.value.problems[0].code


def itk_image(array: np.ndarray, degrees: tuple = (31, -22, 140), vector: bool = False) -> SimpleITK.Image:
    """An oblique image of ``array`` (z, y, x)."""
    image = SimpleITK.GetImageFromArray(array, isVector=vector)
    affine = LPS @ affine_ijk(degrees=degrees)
    spacing = np.linalg.norm(affine[:3, :3], axis=0)
    image.SetSpacing(spacing.tolist())
    image.SetDirection((affine[:3, :3] / spacing).ravel().tolist())
    image.SetOrigin(affine[:3, 3].tolist())
    return image


def itk_affine(image: SimpleITK.Image) -> np.ndarray:
    affine = np.eye(4)
    affine[:3, :3] = np.array(image.GetDirection()).reshape(3, 3) * image.GetSpacing()
    affine[:3, 3] = image.GetOrigin()
    return LPS @ affine


# Reading what is well


@pytest.mark.parametrize("kind", ["u1", "i1", "u2", "i2", "u4", "i4", "u8", "i8", "f4", "f8"])
@pytest.mark.parametrize("name", ["a.mha", "a.mhd"])
@pytest.mark.parametrize("packed", [True, False])
def test_every_type_is_read_as_simpleitk_reads_it(
    tmp_path: Path, rng: np.random.Generator, kind: str, name: str, packed: bool
) -> None:
    array = rng.integers(0, 100, SHAPE[::-1]).astype(kind)
    SimpleITK.WriteImage(itk_image(array), str(tmp_path / name), packed)
    theirs, volume = SimpleITK.ReadImage(str(tmp_path / name)), read_metaimage(tmp_path / name)
    assert volume.array.dtype == np.dtype(kind)
    assert volume.array.flags.c_contiguous
    assert np.array_equal(volume.array[0], SimpleITK.GetArrayFromImage(theirs))
    assert np.allclose(nifti_affine(volume.grid), itk_affine(theirs), rtol=0, atol=1e-12)
    assert volume.notes == ()


@pytest.mark.parametrize(
    "kind", ["CHAR", "UCHAR", "SHORT", "USHORT", "INT", "UINT", "LONG", "ULONG", "FLOAT", "DOUBLE"]
)
def test_big_endian_data_and_old_type_names_are_read_as_simpleitk_reads_them(
    tmp_path: Path, rng: np.random.Generator, kind: str
) -> None:
    codes = {"CHAR": "i1", "UCHAR": "u1", "SHORT": "i2", "USHORT": "u2", "FLOAT": "f4", "DOUBLE": "f8"}
    dtype = np.dtype(codes.get(kind, "u4" if kind[0] == "U" else "i4"))
    body = rng.integers(0, 99, 270).astype(dtype.newbyteorder(">")).tobytes()
    path = make(tmp_path / "a.mha", {"ElementType": f"MET_{kind}", "BinaryDataByteOrderMSB": "True"}, body)
    assert np.array_equal(read_metaimage(path).array[0], SimpleITK.GetArrayFromImage(SimpleITK.ReadImage(str(path))))


def test_components_and_a_fourth_dimension_are_channels_only_when_asked(
    tmp_path: Path, rng: np.random.Generator
) -> None:
    array = rng.integers(0, 99, (5, 9, 6, 3)).astype(np.int16)
    path = tmp_path / "a.mha"
    SimpleITK.WriteImage(itk_image(array, vector=True), str(path), True)
    volume = read_metaimage(path, 3)
    assert np.array_equal(volume.array, np.moveaxis(array, -1, 0))
    assert volume.array.flags.c_contiguous
    assert (code_of(path), code_of(path, 2)) == ("E0111", "E0133")
    SimpleITK.WriteImage(SimpleITK.GetImageFromArray(array, isVector=False), str(tmp_path / "b.mha"))
    assert np.array_equal(read_metaimage(tmp_path / "b.mha", 5).array, array)
    assert code_of(tmp_path / "b.mha") == "E0111"


def test_the_matrix_lists_one_axis_after_the_other(tmp_path: Path) -> None:
    path = make(tmp_path / "a.mha")
    affine = nifti_affine(read_metaimage(path).grid)
    assert np.allclose(affine[:3, :3], [[0, 1.1, 0], [-0.9, 0, 0], [0, 0, 2]])
    assert np.allclose(affine, itk_affine(SimpleITK.ReadImage(str(path))))


def test_without_a_matrix_the_axes_are_taken_as_itk_takes_them_and_a_note_says_so(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = make(tmp_path / "a.mha", {"TransformMatrix": None})
    volume = read_metaimage(path)
    assert [note.code for note in volume.notes] == ["W0123"]
    assert "W0123" in caplog.text
    assert np.allclose(nifti_affine(volume.grid), itk_affine(SimpleITK.ReadImage(str(path))))


def test_synonyms_units_sizes_and_2d_are_understood(tmp_path: Path) -> None:
    edit = {"Offset": None, "Position": "20 -14 31.25", "TransformMatrix": None, "Rotation": "0 1 0 -1 0 0 0 0 1"}
    assert np.array_equal(
        read_metaimage(make(tmp_path / "a.mha", edit)).grid.affine, read_metaimage(make(tmp_path / "b.mha")).grid.affine
    )
    centimetres = read_metaimage(make(tmp_path / "c.mha", {"DistanceUnits": "cm"})).grid
    assert centimetres.spacing_mm == pytest.approx((20, 11, 9))
    flat = {"NDims": "2", "TransformMatrix": "1 0 0 1", "Offset": "1 2", "ElementSpacing": "0.9 1.1", "DimSize": "6 9"}
    volume = read_metaimage(make(tmp_path / "d.mha", flat, np.arange(54, dtype="<i2").tobytes()))
    assert volume.grid.spacing_mm == pytest.approx((1, 1.1, 0.9))
    write_metaimage(tmp_path / "e.mha", volume.array[0], volume.grid, volume.source)
    assert read_metaimage(tmp_path / "e.mha").grid.corner_displacement_voxels(volume.grid) < 1e-9


def test_data_beside_the_header_may_be_skipped_into(tmp_path: Path) -> None:
    voxels = np.arange(270, dtype="<i2")
    (tmp_path / "data.raw").write_bytes(b"x" * 17 + voxels.tobytes())
    for skip in ("17", "-1"):
        path = make(tmp_path / "a.mhd", {"ElementDataFile": "data.raw", "HeaderSize": skip}, b"")
        assert np.array_equal(read_metaimage(path).array.ravel(), voxels)


# Refusing what is bad


BAD_HEADERS = [
    ({"ObjectType": "Tube"}, "E0102"),
    ({"NDims": None}, "E0102"),
    ({"NDims": "1"}, "E0111"),
    ({"NDims": "5"}, "E0111"),
    ({"NDims": "3.0"}, "E0102"),
    ({"DimSize": None}, "E0102"),
    ({"DimSize": "6 9"}, "E0102"),
    ({"DimSize": "6 9 -5"}, "E0111"),
    ({"DimSize": "6 9 6"}, "E0101"),
    ({"DimSize": "6 9 4"}, "E0102"),
    ({"DimSize": "30000 30000 3000"}, "E0104"),
    ({"DimSize": "1000 1000 1000"}, "E0101"),
    ({"ElementNumberOfChannels": "0"}, "E0111"),
    ({"ElementNumberOfChannels": "3"}, "E0111"),
    ({"ElementType": None}, "E0111"),
    ({"ElementType": "MET_STRING"}, "E0111"),
    ({"ElementType": "MET_SHORT_ARRAY"}, "E0111"),
    ({"BinaryData": "False"}, "E0106"),
    ({"BinaryData": "Maybe"}, "E0102"),
    ({"BinaryDataByteOrderMSB": None}, "E0102"),
    ({"ElementByteOrderMSB": "True"}, "E0102"),
    ({"CompressedData": "True"}, "E0102"),
    ({"CompressedData": "True", "CompressedDataSize": "9999"}, "E0101"),
    ({"CompressedData": "True", "CompressedDataSize": "5"}, "E0102"),
    ({"CompressedData": "True", "HeaderSize": "4"}, "E0102"),
    ({"HeaderSize": "-1"}, "E0102"),
    ({"HeaderSize": "-7"}, "E0102"),
    ({"HeaderSize": "9"}, "E0101"),
    ({"TransformMatrix": "1 0 0 0 1 0 0 0"}, "E0102"),
    ({"TransformMatrix": "1 0 0 0 1 0 0 0 x"}, "E0102"),
    ({"TransformMatrix": "1 0 0 1 0 0 0 0 1"}, "E0121"),
    ({"TransformMatrix": "1 0 0 0.5 1 0 0 0 1"}, "E0121"),
    ({"TransformMatrix": "nan 0 0 0 1 0 0 0 1"}, "E0121"),
    ({"Offset": "0 0 inf"}, "E0121"),
    ({"Offset": "0 0 1_0"}, "E0102"),
    ({"ElementSpacing": None}, "E0124"),
    ({"ElementSpacing": "0.9 0 2"}, "E0124"),
    ({"ElementSpacing": "0.9 -1.1 2"}, "E0124"),
    ({"ElementSpacing": "0.9 1.1 nan"}, "E0124"),
    ({"ElementSpacing": "0.9 1.1 1e9"}, "E0125"),
    ({"DistanceUnits": "inch"}, "E0125"),
    ({"ElementToIntensityFunctionSlope": "2"}, "E0111"),
    ({"ElementToIntensityFunctionOffset": "-1024"}, "E0111"),
    ({"Größe": "1"}, "E0102"),
    ({"ElementDataFile": "LIST"}, "E0106"),
    ({"ElementDataFile": "s%03d.raw 1 5 1"}, "E0106"),
    ({"ElementDataFile": "gone.raw"}, "E0100"),
    ({"ElementDataFile": "a.mha"}, "E0102"),
    ({"ElementDataFile": "../a.raw"}, "E0142"),
    ({"ElementDataFile": "/etc/passwd"}, "E0142"),
    ({"ElementDataFile": "\\\\host\\share\\a.raw"}, "E0142"),
    ({"ElementDataFile": "https://example.org/a.raw"}, "E0142"),
    ({"ElementDataFile": ""}, "E0142"),
]


@pytest.mark.parametrize(("edit", "code"), BAD_HEADERS, ids=str)
def test_a_bad_header_has_its_code(tmp_path: Path, edit: dict, code: str) -> None:
    assert code_of(make(tmp_path / "a.mha", edit)) == code


def test_what_is_no_metaimage_is_said(tmp_path: Path) -> None:
    for content, code in (
        (b"", "E0101"),
        (b"<html>not found</html>\n", "E0102"),
        (b"\x00\x01\x02\n" * 99, "E0102"),
        (b"x" * 2**21, "E0102"),
        (b"A = 1\n" * 2, "E0102"),
    ):
        (tmp_path / "a.mha").write_bytes(content)
        assert code_of(tmp_path / "a.mha") == code
    assert code_of(make(tmp_path / "b.mha"), max_voxels=269) == "E0104"


@pytest.mark.parametrize("packed", [True, False])
def test_a_file_cut_anywhere_is_refused(tmp_path: Path, rng: np.random.Generator, packed: bool) -> None:
    SimpleITK.WriteImage(itk_image(rng.integers(0, 99, SHAPE[::-1]).astype(np.int16)), str(tmp_path / "a.mha"), packed)
    whole = (tmp_path / "a.mha").read_bytes()
    for end in range(0, len(whole), 5):
        (tmp_path / "cut.mha").write_bytes(whole[:end])
        assert code_of(tmp_path / "cut.mha") == "E0101", end


@pytest.mark.parametrize("packed", [True, False])
def test_a_data_file_cut_anywhere_is_refused(tmp_path: Path, rng: np.random.Generator, packed: bool) -> None:
    SimpleITK.WriteImage(itk_image(rng.integers(0, 99, SHAPE[::-1]).astype(np.int16)), str(tmp_path / "a.mhd"), packed)
    data = tmp_path / ("a.zraw" if packed else "a.raw")
    whole = data.read_bytes()
    for end in range(0, len(whole), 11):
        data.write_bytes(whole[:end])
        assert code_of(tmp_path / "a.mhd") == "E0101", end
    data.write_bytes(whole + b"\0")
    assert code_of(tmp_path / "a.mhd") == "E0102"


def test_compressed_data_without_a_declared_size_are_still_read_to_their_end(
    tmp_path: Path, rng: np.random.Generator
) -> None:
    packed = zlib.compress(rng.integers(0, 99, 270).astype("<i2").tobytes())
    assert read_metaimage(make(tmp_path / "a.mha", {"CompressedData": "True"}, packed)).array.size == 270
    for body, code in (
        (packed[:-1], "E0101"),
        (packed + b"\0", "E0102"),
        (packed[:-1] + b"\0", "E0102"),
        (b"", "E0101"),
    ):
        assert code_of(make(tmp_path / "a.mha", {"CompressedData": "True"}, body)) == code


def test_no_flipped_bit_of_compressed_voxels_passes(tmp_path: Path, rng: np.random.Generator) -> None:
    path = tmp_path / "a.mha"
    SimpleITK.WriteImage(itk_image(rng.integers(0, 99, SHAPE[::-1]).astype(np.int16)), str(path), True)
    whole, truth = path.read_bytes(), read_metaimage(path)
    start = whole.index(b"LOCAL\n") + 6
    refused = 0
    for bit in rng.integers(0, 8 * len(whole), 300).tolist():
        damaged = bytearray(whole)
        damaged[bit // 8] ^= 1 << (bit % 8)
        path.write_bytes(damaged)
        try:
            volume = read_metaimage(path)
        except InputError:
            refused += 1
            continue
        assert bit < 8 * (start + 2), "only the header's text and zlib's window size may differ"
        assert volume.array.size == truth.array.size
    assert refused > 100


# Writing


def test_labels_of_a_metaimage_carry_its_geometry_word_for_word(tmp_path: Path) -> None:
    edit = {"ElementSpacing": "0.90000000000000002 1.1 2.00", "TransformMatrix": "0 1 0 -1 0 0.005 0 0 1"}
    source = read_metaimage(make(tmp_path / "a.mha", edit))
    assert [note.code for note in source.notes] == ["W0121"]
    labels = np.zeros(SHAPE[::-1], np.int16)
    labels[1:3, 2:5, 3:] = 300
    digest = write_metaimage(tmp_path / "out.mha", labels, source.grid, source.source)
    assert digest == write_metaimage(tmp_path / "again.mha", labels, source.grid, source.source)
    text = (tmp_path / "out.mha").read_bytes()[:600].decode("latin-1")
    assert all(f"\n{key} = {value}\n" in text for key, value in edit.items())
    assert np.array_equal(read_metaimage(tmp_path / "out.mha").grid.affine, source.grid.affine)
    theirs = SimpleITK.ReadImage(str(tmp_path / "out.mha"))
    assert theirs.GetPixelID() == SimpleITK.sitkUInt16
    assert np.array_equal(SimpleITK.GetArrayFromImage(theirs), labels)


def test_labels_of_other_sources_lie_on_their_grid(tmp_path: Path, rng: np.random.Generator) -> None:
    for n in range(20):
        affine = affine_ijk(rng.uniform(0.3, 4, 3), rng.uniform(-180, 180, 3), rng.normal(0, 99, 3))
        grid, labels = grid_from_nifti(affine, SHAPE), rng.integers(0, 3, SHAPE[::-1])
        write_metaimage(tmp_path / f"{n}.mha", labels, grid, Source("", "nifti"))
        theirs = SimpleITK.ReadImage(str(tmp_path / f"{n}.mha"))
        assert np.allclose(itk_affine(theirs), affine, rtol=0, atol=1e-9)
        assert np.array_equal(SimpleITK.GetArrayFromImage(theirs), labels)
