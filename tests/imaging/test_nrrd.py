"""NRRD against SimpleITK, pynrrd and slicerio, and against headers and damage that they let pass."""

from __future__ import annotations

import bz2
import gzip
from pathlib import Path

import nrrd
import numpy as np
import pytest
import SimpleITK
import slicerio
from phantoms import affine_ijk

from medseg.errors import InputError
from medseg.imaging import raw_data
from medseg.imaging.geometry import grid_from_nifti, nifti_affine
from medseg.imaging.nrrd import read_nrrd, segment_colour, write_nrrd, write_segmentation
from medseg.records.grid import Source
from medseg.records.task import Label

SHAPE = (6, 9, 5)
LPS = np.diag([-1.0, -1.0, 1.0, 1.0])
TYPES = ["u1", "i1", "u2", "i2", "u4", "i4", "u8", "i8", "f4", "f8"]
HEADER = {
    "type": "int16",
    "dimension": "3",
    "space": "left-posterior-superior",
    "sizes": "6 9 5",
    "space directions": "(-0.9,0,0) (0,1.1,0) (0,0,2)",
    "kinds": "domain domain domain",
    "endian": "little",
    "encoding": "raw",
    "space origin": "(20,-14,31.25)",
}


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(11)


def make(path: Path, edit: dict | None = None, body: bytes | None = None, magic: str = "NRRD0004") -> Path:
    """A small volume by hand; a field set to None is left out."""
    first = {k: v for k, v in (edit or {}).items() if k == "space dimension"}
    fields = first | HEADER | (edit or {})
    lines = [magic, "# a comment", *(f"{k}: {v}" for k, v in fields.items() if v is not None), "key:=value"]
    plain = np.arange(270, dtype="<i2").tobytes() if body is None else body
    packed = gzip.compress(plain, mtime=0) if fields["encoding"] in ("gzip", "gz") and plain else plain
    path.write_bytes(("\n".join(lines) + "\n\n").encode() + packed)
    return path


def code_of(path: Path, channels: int = 1, max_voxels: int = 2**31) -> str:
    with pytest.raises(InputError) as error:
        read_nrrd(path, channels, max_voxels)
    assert path.name in str(error.value) or "data.raw" in str(error.value)
    return error.value.problems[0].code


def itk_affine(image: SimpleITK.Image) -> np.ndarray:
    affine = np.eye(4)
    affine[:3, :3] = np.array(image.GetDirection()).reshape(3, 3) * image.GetSpacing()
    affine[:3, 3] = image.GetOrigin()
    return LPS @ affine


# Reading what is well


@pytest.mark.parametrize("kind", TYPES)
@pytest.mark.parametrize("endian", ["little", "big"])
@pytest.mark.parametrize("encoding", ["raw", "gzip"])
def test_every_real_type_is_read_as_pynrrd_reads_it(
    tmp_path: Path, rng: np.random.Generator, kind: str, endian: str, encoding: str
) -> None:
    array = rng.integers(0, 100, SHAPE).astype(kind)
    affine = LPS @ affine_ijk()
    header = {"space": "LPS", "space directions": affine[:3, :3].T, "space origin": affine[:3, 3], "endian": endian}
    stored = np.asfortranarray(array.astype(np.dtype(kind).newbyteorder("<" if endian == "little" else ">")))
    nrrd.write(str(tmp_path / "a.nrrd"), stored, header | {"encoding": encoding})
    theirs, _ = nrrd.read(str(tmp_path / "a.nrrd"))
    volume = read_nrrd(tmp_path / "a.nrrd")
    assert volume.array.dtype == np.dtype(kind)
    assert volume.array.flags.c_contiguous
    assert np.array_equal(volume.array[0].T, array)
    assert np.array_equal(theirs, array)
    assert np.allclose(nifti_affine(volume.grid), affine_ijk(), atol=1e-12)


@pytest.mark.parametrize("name", ["a.nrrd", "a.nhdr"])
@pytest.mark.parametrize("packed", [True, False])
def test_oblique_volumes_of_simpleitk_are_read_bit_for_bit(
    tmp_path: Path, rng: np.random.Generator, name: str, packed: bool
) -> None:
    image = SimpleITK.GetImageFromArray(rng.normal(size=SHAPE[::-1]).astype(np.float32))
    affine = LPS @ affine_ijk(degrees=(31, -22, 140))
    spacing = np.linalg.norm(affine[:3, :3], axis=0)
    image.SetSpacing(spacing.tolist())
    image.SetDirection((affine[:3, :3] / spacing).ravel().tolist())
    image.SetOrigin(affine[:3, 3].tolist())
    SimpleITK.WriteImage(image, str(tmp_path / name), packed)
    theirs, volume = SimpleITK.ReadImage(str(tmp_path / name)), read_nrrd(tmp_path / name)
    assert np.array_equal(volume.array[0], SimpleITK.GetArrayFromImage(theirs))
    assert np.allclose(nifti_affine(volume.grid), itk_affine(theirs), rtol=0, atol=1e-12)


@pytest.mark.parametrize("first", [True, False])
def test_a_list_axis_is_channels_only_when_asked(tmp_path: Path, rng: np.random.Generator, first: bool) -> None:
    array = rng.integers(0, 99, (3, *SHAPE) if first else (*SHAPE, 3)).astype("<i2")
    steps = "(-0.9,0,0) (0,1.1,0) (0,0,2)"
    edit = {
        "dimension": "4",
        "sizes": " ".join(map(str, array.shape)),
        "space directions": f"none {steps}" if first else f"{steps} none",
        "kinds": None,
        "encoding": "gzip",
    }
    path = make(tmp_path / "a.nrrd", edit, array.tobytes(order="F"))
    expected = np.moveaxis(array, 0 if first else -1, -1).T
    volume = read_nrrd(path, 3)
    assert np.array_equal(volume.array, expected)
    assert volume.array.flags.c_contiguous
    assert np.array_equal(nrrd.read(str(path))[0], array)
    assert (code_of(path), code_of(path, 2)) == ("E0111", "E0133")
    labels = expected[0].astype(np.uint8)
    write_nrrd(tmp_path / "out.nrrd", labels, volume.grid, volume.source)
    assert np.array_equal(read_nrrd(tmp_path / "out.nrrd").grid.affine, volume.grid.affine)


def test_long_interleaved_data_are_taken_apart_in_pieces(
    tmp_path: Path, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(raw_data, "_PIECE_BYTES", 64)
    image = SimpleITK.GetImageFromArray(rng.normal(size=(5, 9, 6, 3)).astype(np.float32), isVector=True)
    SimpleITK.WriteImage(image, str(tmp_path / "a.nrrd"))
    expected = np.moveaxis(SimpleITK.GetArrayFromImage(image), -1, 0)
    assert np.array_equal(read_nrrd(tmp_path / "a.nrrd", 3).array, expected)


@pytest.mark.parametrize(
    ("space", "signs"),
    [
        ("left-posterior-superior", (-1, -1)),
        ("LPS", (-1, -1)),
        ("right-anterior-superior", (1, 1)),
        ("RAS", (1, 1)),
        ("left-anterior-superior", (-1, 1)),
        ("LAS", (-1, 1)),
    ],
)
def test_named_spaces_lead_to_ras(tmp_path: Path, space: str, signs: tuple[int, int]) -> None:
    path = make(tmp_path / "a.nrrd", {"space": space})
    volume = read_nrrd(path)
    expected = np.diag([*signs, 1, 1]) @ np.array([[-0.9, 0, 0, 20], [0, 1.1, 0, -14], [0, 0, 2, 31.25], [0, 0, 0, 1]])
    assert np.array_equal(nifti_affine(volume.grid), expected)
    assert np.allclose(nifti_affine(volume.grid), itk_affine(SimpleITK.ReadImage(str(path))))
    assert volume.notes == ()
    write_nrrd(tmp_path / "b.nrrd", np.ones(SHAPE[::-1], int), volume.grid, volume.source)
    assert np.array_equal(read_nrrd(tmp_path / "b.nrrd").grid.affine, volume.grid.affine)


@pytest.mark.parametrize(
    "edit",
    [
        {"space": None, "space dimension": "3"},
        {"space": "scanner-xyz"},
        {"space": None, "space directions": None, "space origin": None, "spacings": "0.9 1.1 2"},
    ],
)
def test_without_a_patient_space_the_axes_are_taken_as_itk_takes_them_and_a_note_says_so(
    tmp_path: Path, edit: dict, caplog: pytest.LogCaptureFixture
) -> None:
    path = make(tmp_path / "a.nrrd", edit)
    volume = read_nrrd(path)
    assert [note.code for note in volume.notes] == ["W0123"]
    assert "W0123" in caplog.text
    assert np.allclose(nifti_affine(volume.grid), itk_affine(SimpleITK.ReadImage(str(path))))


def test_units_are_converted_when_the_header_names_them(tmp_path: Path) -> None:
    path = make(tmp_path / "a.nrrd", {"space units": '"cm" "cm" "cm"'})
    volume = read_nrrd(path)
    assert volume.grid.spacing_mm == pytest.approx((20, 11, 9))
    write_nrrd(tmp_path / "b.nrrd", np.ones(SHAPE[::-1], int), volume.grid, volume.source)
    assert np.array_equal(read_nrrd(tmp_path / "b.nrrd").grid.affine, volume.grid.affine)


def test_a_2d_file_is_one_slice(tmp_path: Path) -> None:
    flat = {"dimension": "2", "sizes": "6 9", "kinds": None, "space": None, "space dimension": "2"}
    flat |= {"space directions": "(0.9,0) (0,1.1)", "space origin": "(3,4)"}
    body = np.arange(54, dtype="<i2").tobytes()
    grid = read_nrrd(make(tmp_path / "a.nrrd", flat, body)).grid
    assert (grid.shape, grid.spacing_mm) == ((1, 9, 6), pytest.approx((1, 1.1, 0.9)))
    tilted = {"dimension": "2", "sizes": "6 9", "kinds": None, "space directions": "(0,0.9,0) (0,0,-1.1)"}
    grid = read_nrrd(make(tmp_path / "b.nrrd", tilted, body)).grid
    assert np.allclose(nifti_affine(grid)[:3, 2], (1, 0, 0))


def test_data_beside_the_header_may_be_skipped_into(tmp_path: Path) -> None:
    voxels = np.arange(270, dtype="<i2")
    (tmp_path / "data.raw").write_bytes(b"x" * 17 + voxels.tobytes())
    for skip in ("17", "-1"):
        path = make(tmp_path / "a.nhdr", {"data file": "./data.raw", "byte skip": skip}, b"")
        assert np.array_equal(read_nrrd(path).array.ravel(), voxels)
    (tmp_path / "data.raw").write_bytes(gzip.compress(b"x" * 17 + voxels.tobytes()))
    path = make(tmp_path / "a.nhdr", {"data file": "data.raw", "byte skip": "17", "encoding": "gz"}, b"")
    assert np.array_equal(read_nrrd(path).array.ravel(), voxels)
    path.write_bytes(path.read_bytes().removesuffix(b"\n"))  # a detached header may end with the file
    assert np.array_equal(read_nrrd(path).array.ravel(), voxels)


# Refusing what is bad


BAD_HEADERS = [
    ({"type": None}, "E0102"),
    ({"type": "block"}, "E0111"),
    ({"type": "complex"}, "E0111"),
    ({"dimension": "1", "sizes": "270"}, "E0111"),
    ({"dimension": "5"}, "E0111"),
    ({"dimension": "1_0"}, "E0102"),
    ({"sizes": "6 9"}, "E0102"),
    ({"sizes": "6 9 5 1"}, "E0102"),
    ({"sizes": "6 9 -5"}, "E0111"),
    ({"sizes": "6 0 5"}, "E0111"),
    ({"sizes": "6 9 7"}, "E0101"),
    ({"sizes": "6 9 4"}, "E0102"),
    ({"sizes": "30000 30000 3000"}, "E0104"),
    ({"sizes": "1000 1000 1000"}, "E0101"),
    ({"sizes": "6 9 99999999999999999999"}, "E0102"),
    ({"endian": None}, "E0102"),
    ({"endian": "middle"}, "E0102"),
    ({"encoding": None}, "E0102"),
    ({"encoding": "ascii"}, "E0106"),
    ({"encoding": "hex"}, "E0106"),
    ({"encoding": "bzip2"}, "E0106"),
    ({"space": "right-anterior-superior-time"}, "E0121"),
    ({"space": "upside-down"}, "E0121"),
    ({"space directions": "(-0.9,0,0) (0,1.1,0)"}, "E0102"),
    ({"space directions": "(-0.9,0,0) (0,1.1,0) (0,0)"}, "E0102"),
    ({"space directions": "(-0.9,0,0) (0,1.1,0) (0,0,two)"}, "E0102"),
    ({"space directions": "(-0.9,0,0) (0,1.1,0) 0,0,2"}, "E0102"),
    ({"space directions": "(-0.9,0,0) (0,1.1,0) (0,0,0)"}, "E0124"),
    ({"space directions": "(-0.9,0,0) (0,1.1,0) (0.9,0,0)"}, "E0121"),
    ({"space directions": "(-0.9,0,0) (0.5,1.1,0) (0,0,2)"}, "E0121"),
    ({"space directions": "(-0.9,0,0) (0,1.1,0) (0,0,nan)"}, "E0121"),
    ({"space directions": "(-0.9,0,0) (0,1.1,0) (0,0,1e9)"}, "E0125"),
    ({"space directions": "(-0.9,0,0) none none"}, "E0111"),
    ({"space directions": "(-0.9,0,0) none (0,0,2)"}, "E0111"),
    ({"space origin": "(20,-14)"}, "E0102"),
    ({"space origin": "(20,-14,inf)"}, "E0121"),
    ({"space units": '"furlong" "furlong" "furlong"'}, "E0125"),
    ({"space units": '"mm" "mm" "cm"'}, "E0125"),
    ({"space": None, "space directions": None, "space origin": None}, "E0124"),
    ({"space": None, "space directions": None, "space origin": None, "spacings": "1 0 2"}, "E0124"),
    ({"byte skip": "-1"}, "E0102"),
    ({"byte skip": "-2"}, "E0102"),
    ({"byte skip": "999999999999"}, "E0101"),
    ({"line skip": "2"}, "E0106"),
    ({"data file": "slice%03d.raw 1 5 1"}, "E0106"),
    ({"data file": "LIST\na.raw\nb.raw"}, "E0106"),
    ({"data file": "gone.raw"}, "E0100"),
    ({"data file": "a.nrrd"}, "E0102"),
    ({"data file": "../a.raw"}, "E0142"),
    ({"data file": "/etc/passwd"}, "E0142"),
    ({"data file": "sub/a.raw"}, "E0142"),
    ({"data file": "C:\\a.raw"}, "E0142"),
    ({"data file": "http://example.org/a.raw"}, "E0142"),
    ({"data file": ".."}, "E0142"),
    ({"no field": None, "Type": "int16"}, "E0102"),
    ({"spacings": "1 2\nnonsense"}, "E0102"),
]


@pytest.mark.parametrize(("edit", "code"), BAD_HEADERS, ids=str)
def test_a_bad_header_has_its_code(tmp_path: Path, edit: dict, code: str) -> None:
    assert code_of(make(tmp_path / "a.nrrd", edit)) == code


def test_what_is_no_nrrd_is_said(tmp_path: Path) -> None:
    (tmp_path / "a.nrrd").write_bytes(b"")
    assert code_of(tmp_path / "a.nrrd") == "E0101"
    (tmp_path / "a.nrrd").write_bytes(b"<html>not found</html>\n" * 9)
    assert code_of(tmp_path / "a.nrrd") == "E0102"
    (tmp_path / "a.nrrd").write_bytes(b"NRRD0004" + b"x" * 2**21)
    assert code_of(tmp_path / "a.nrrd") == "E0102"
    (tmp_path / "a.nrrd").write_bytes(b"NRRD0004\n" + (b"k:=" + b"v" * 1000 + b"\n") * 17000)
    assert code_of(tmp_path / "a.nrrd") == "E0102"
    assert code_of(make(tmp_path / "b.nrrd"), max_voxels=269) == "E0104"
    assert code_of(make(tmp_path / "c.nrrd", {"encoding": "bz2"}, bz2.compress(b""))) == "E0106"


def test_a_volume_of_four_axes_without_a_marked_one_is_refused(tmp_path: Path) -> None:
    edit = {"dimension": "4", "sizes": "6 9 5 1", "space directions": None, "kinds": None, "space origin": None}
    assert code_of(make(tmp_path / "a.nrrd", edit)) == "E0111"


@pytest.mark.parametrize("encoding", ["raw", "gzip"])
def test_a_file_cut_anywhere_is_refused(tmp_path: Path, rng: np.random.Generator, encoding: str) -> None:
    body = rng.integers(0, 99, 270).astype("<i2").tobytes()
    whole = make(tmp_path / "a.nrrd", {"encoding": encoding}, body).read_bytes()
    for end in range(0, len(whole), 5):
        (tmp_path / "cut.nrrd").write_bytes(whole[:end])
        assert code_of(tmp_path / "cut.nrrd") == "E0101", end


@pytest.mark.parametrize("encoding", ["raw", "gzip"])
def test_flipped_bits_are_refused_or_change_no_voxel_of_compressed_data(
    tmp_path: Path, rng: np.random.Generator, encoding: str
) -> None:
    body = rng.integers(0, 99, 270).astype("<i2").tobytes()
    path = make(tmp_path / "a.nrrd", {"encoding": encoding}, body)
    whole, truth = path.read_bytes(), read_nrrd(path)
    start = whole.index(b"\n\n") + 2
    refused = 0
    for bit in rng.integers(0, 8 * len(whole), 300).tolist():
        damaged = bytearray(whole)
        damaged[bit // 8] ^= 1 << (bit % 8)
        path.write_bytes(damaged)
        try:
            volume = read_nrrd(path)
        except InputError:
            refused += 1
            continue
        assert volume.array.size == truth.array.size
        if encoding == "gzip" and bit >= 8 * start:
            assert bit < 8 * (start + 10), "only the gzip header holds bits without a meaning"
            assert np.array_equal(volume.array, truth.array)
    assert refused > (150 if encoding == "gzip" else 30)


# Writing


def test_labels_of_an_nrrd_source_carry_its_geometry_word_for_word(tmp_path: Path) -> None:
    directions = "(-0.90000000000000000001,1e-19,0) (0,1.1,0.004) (0,0,2)"  # skewed within tolerance
    source = read_nrrd(make(tmp_path / "a.nrrd", {"space directions": directions}))
    assert [note.code for note in source.notes] == ["W0121"]
    labels = np.zeros(SHAPE[::-1], np.int16)
    labels[1:3, 2:5, 3:] = 300
    write_nrrd(tmp_path / "out.nrrd", labels, source.grid, source.source)
    assert f"space directions: {directions}\nspace origin: (20,-14,31.25)\n" in (tmp_path / "out.nrrd").read_bytes()[
        :600
    ].decode("latin-1")
    theirs, header = nrrd.read(str(tmp_path / "out.nrrd"))
    assert header["type"] == "unsigned short"
    assert np.array_equal(theirs.T, labels)
    assert np.array_equal(read_nrrd(tmp_path / "out.nrrd").grid.affine, source.grid.affine)


def test_labels_of_other_sources_lie_on_their_grid_to_the_last_bit(tmp_path: Path, rng: np.random.Generator) -> None:
    for n in range(20):
        grid = grid_from_nifti(
            affine_ijk(rng.uniform(0.3, 4, 3), rng.uniform(-180, 180, 3), rng.normal(0, 99, 3)), SHAPE
        )
        labels = rng.integers(0, 3, grid.shape)
        write_nrrd(tmp_path / f"{n}.nrrd", labels, grid, Source("", "nifti"))
        assert np.array_equal(read_nrrd(tmp_path / f"{n}.nrrd").grid.affine, grid.affine)
        assert np.allclose(itk_affine(SimpleITK.ReadImage(str(tmp_path / f"{n}.nrrd"))), nifti_affine(grid), atol=1e-9)


def test_a_segmentation_is_read_by_slicers_own_library(tmp_path: Path) -> None:
    labels = np.zeros(SHAPE[::-1], np.uint8)
    labels[1:3, 2:7, 4:6], labels[4, 8, 0] = 1, 7
    classes = [
        Label(name="background", value=0),
        Label(name="left kidney", value=1),
        Label(name="lesion", value=7),
    ]
    classes.append(Label(name="never", value=9))
    grid = grid_from_nifti(affine_ijk(), SHAPE)
    digest = write_segmentation(tmp_path / "a.seg.nrrd", labels, grid, Source("", ""), classes)
    assert digest == write_segmentation(tmp_path / "b.seg.nrrd", labels, grid, Source("", ""), classes)
    found = slicerio.read_segmentation(str(tmp_path / "a.seg.nrrd"))
    assert np.array_equal(found["voxels"].T, labels)
    assert [(s["name"], s["labelValue"]) for s in found["segments"]] == [
        ("left kidney", 1),
        ("lesion", 7),
        ("never", 9),
    ]
    assert [s["extent"] for s in found["segments"]] == [[4, 5, 2, 6, 1, 2], [0, 0, 8, 8, 4, 4], [0, -1, 0, -1, 0, -1]]
    assert len({tuple(s["color"]) for s in found["segments"]}) == 3
    assert np.array_equal(read_nrrd(tmp_path / "a.seg.nrrd").array[0], labels)
    assert np.array_equal(SimpleITK.GetArrayFromImage(SimpleITK.ReadImage(str(tmp_path / "a.seg.nrrd"))), labels)


def test_names_with_odd_characters_come_back_through_itk(tmp_path: Path) -> None:
    labels, grid = np.ones(SHAPE[::-1], np.uint8), grid_from_nifti(affine_ijk(), SHAPE)
    classes = [Label(name="a\\b: c:=d\n\x07ä", value=1)]
    write_segmentation(tmp_path / "a.seg.nrrd", labels, grid, Source("", ""), classes)
    assert SimpleITK.ReadImage(str(tmp_path / "a.seg.nrrd")).GetMetaData("Segment0_Name") == "a\\b: c:=d  ä"


def test_a_segmentation_without_declared_classes_names_the_values_that_occur(tmp_path: Path) -> None:
    labels = np.zeros(SHAPE[::-1], np.int64)
    labels[2, 2, 2], labels[3, 3, 3] = 4, 60000
    grid = grid_from_nifti(affine_ijk(), SHAPE)
    write_segmentation(tmp_path / "a.seg.nrrd", labels, grid, Source("", ""))
    found = slicerio.read_segmentation(str(tmp_path / "a.seg.nrrd"))
    assert [(s["name"], s["labelValue"]) for s in found["segments"]] == [("Segment_4", 4), ("Segment_60000", 60000)]
    with pytest.raises(InputError):
        write_segmentation(tmp_path / "a.seg.nrrd", labels + 10000, grid, Source("", ""))


def test_sixty_segments_have_sixty_colours_far_from_each_other() -> None:
    colours = np.array([segment_colour(n) for n in range(60)])
    apart = np.abs(colours[:, None] - colours[None]).max(-1) + np.eye(60)
    assert apart.min() > 0.05
    assert colours.min() >= 0
    assert colours.max() <= 1
