"""Pictures of every kind that Pillow and tifffile can write, whole and damaged."""

from __future__ import annotations

import logging
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import tifffile
from PIL import Image

from medseg.errors import InputError
from medseg.imaging.geometry import canonical_axes
from medseg.imaging.images2d import picture_grid, read_image2d, write_image2d

ROWS, COLUMNS = 7, 11


@pytest.fixture
def grey() -> np.ndarray:
    return np.random.default_rng(3).integers(0, 4, (ROWS, COLUMNS)).astype(np.uint8)


@pytest.fixture
def colour() -> np.ndarray:
    return np.random.default_rng(4).integers(0, 256, (ROWS, COLUMNS, 4)).astype(np.uint8)


def code_of(path: Path, channels: int = 1) -> str:
    with pytest.raises(InputError) as error:
        read_image2d(path, channels)
    assert path.name in str(error.value)
    return error.value.problems[0].code


def png(depth: int, colour_type: int, rows: bytes, width: int = 4, height: int = 2) -> bytes:
    """A PNG by hand, for depths that Pillow does not write."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", width, height, depth, colour_type, 0, 0, 0)
    data = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + data


@pytest.mark.parametrize(
    ("ending", "kind"),
    [(ending, kind) for ending in ("png", "bmp", "tif", "tiff") for kind in ("uint8", "bool")]
    + [("png", "uint16"), ("tif", "uint16"), ("tif", "float32")],
)
def test_grey_pictures_are_read_as_stored(tmp_path: Path, grey: np.ndarray, ending: str, kind: str) -> None:
    pixels = {"uint16": grey.astype(np.uint16) * 9000, "float32": grey / np.float32(3), "bool": grey > 1}.get(
        kind, grey
    )
    path = tmp_path / f"a.{ending}"
    Image.fromarray(pixels).save(path)
    volume = read_image2d(path)
    assert volume.array.shape == (1, 1, ROWS, COLUMNS)
    assert volume.array.dtype == (np.uint8 if kind == "bool" else kind)
    assert np.array_equal(volume.array[0, 0], pixels)


@pytest.mark.parametrize("ending", ["png", "tif", "bmp"])
def test_colour_is_three_channels_and_alpha_is_dropped(
    tmp_path: Path, colour: np.ndarray, ending: str, caplog: pytest.LogCaptureFixture
) -> None:
    Image.fromarray(colour[..., :3]).save(tmp_path / f"a.{ending}")
    assert np.array_equal(read_image2d(tmp_path / f"a.{ending}", 3).array[:, 0], colour[..., :3].transpose(2, 0, 1))
    assert caplog.text == ""
    if ending != "bmp":
        Image.fromarray(colour).save(tmp_path / f"b.{ending}")
        with caplog.at_level(logging.WARNING):
            volume = read_image2d(tmp_path / f"b.{ending}", 3)
        assert np.array_equal(volume.array[:, 0], colour[..., :3].transpose(2, 0, 1))
        assert "alpha" in caplog.text


def test_constant_alpha_is_dropped_without_a_word(
    tmp_path: Path, colour: np.ndarray, caplog: pytest.LogCaptureFixture
) -> None:
    colour[..., 3] = 255
    Image.fromarray(colour).save(tmp_path / "a.png")
    Image.fromarray(colour[..., (0, 3)], mode=None).save(tmp_path / "b.png")
    assert read_image2d(tmp_path / "a.png", 3).array.shape[0] == 3
    assert np.array_equal(read_image2d(tmp_path / "b.png").array[0, 0], colour[..., 0])
    assert caplog.text == ""


def test_a_palette_gives_indices_as_labels_and_colours_as_an_image(tmp_path: Path, grey: np.ndarray) -> None:
    image = Image.frombytes("P", (COLUMNS, ROWS), grey.tobytes())
    palette = np.array([[0, 0, 0], [255, 0, 0], [0, 255, 0], [9, 9, 9]], np.uint8)
    image.putpalette(palette.ravel().tolist())
    image.save(tmp_path / "a.png", bits=4)
    assert np.array_equal(read_image2d(tmp_path / "a.png").array[0, 0], grey)
    assert np.array_equal(read_image2d(tmp_path / "a.png", 3).array[:, 0], palette[grey].transpose(2, 0, 1))


@pytest.mark.parametrize(("depth", "rows"), [(4, b"\0\x01\x23\0\x45\x6f"), (2, b"\0\x1b\0\xe4")])
def test_shallow_grey_keeps_its_values(tmp_path: Path, depth: int, rows: bytes) -> None:
    (tmp_path / "a.png").write_bytes(png(depth, 0, rows))
    expected = {4: [[0, 1, 2, 3], [4, 5, 6, 15]], 2: [[0, 1, 2, 3], [3, 2, 1, 0]]}[depth]
    assert np.array_equal(read_image2d(tmp_path / "a.png").array[0, 0], expected)


def test_16_bit_colour_is_refused_because_pillow_would_drop_half_of_it(tmp_path: Path) -> None:
    (tmp_path / "rgb.png").write_bytes(png(16, 2, (b"\0" + bytes(24)) * 2))
    (tmp_path / "la.png").write_bytes(png(16, 4, (b"\0" + bytes(16)) * 2))
    assert code_of(tmp_path / "rgb.png", 3) == "E0111"
    assert code_of(tmp_path / "la.png") == "E0111"


def test_other_numbers_of_channels_pages_and_colour_spaces_are_refused(tmp_path: Path, colour: np.ndarray) -> None:
    rgb = Image.fromarray(colour[..., :3])
    rgb.save(tmp_path / "rgb.png")
    rgb.convert("CMYK").save(tmp_path / "cmyk.tif")
    rgb.convert("L").save(tmp_path / "pages.tif", save_all=True, append_images=[rgb.convert("L").resize((5, 5))])
    assert code_of(tmp_path / "rgb.png") == "E0133"
    assert code_of(tmp_path / "rgb.png", 4) == "E0133"
    assert code_of(tmp_path / "cmyk.tif", 3) == "E0111"
    assert code_of(tmp_path / "pages.tif") == "E0111"


def test_jpeg_is_read_with_a_warning(tmp_path: Path, colour: np.ndarray, caplog: pytest.LogCaptureFixture) -> None:
    Image.fromarray(colour[..., :3]).save(tmp_path / "a.jpg")
    assert read_image2d(tmp_path / "a.jpg", 3).array.shape == (3, 1, ROWS, COLUMNS)
    assert "JPEG" in caplog.text


def test_a_png_cut_anywhere_is_refused(tmp_path: Path, grey: np.ndarray) -> None:
    path = tmp_path / "a.png"
    Image.fromarray(grey).save(path)
    whole = path.read_bytes()
    for end in range(len(whole)):
        path.write_bytes(whole[:end])
        assert code_of(path) in (("E0101", "E0106") if end < 8 else ("E0101",)), end


def test_no_flipped_bit_of_a_png_passes(tmp_path: Path, grey: np.ndarray) -> None:
    path = tmp_path / "a.png"
    Image.fromarray(grey).save(path)
    whole = path.read_bytes()
    for bit in range(0, 8 * len(whole), 3):
        damaged = bytearray(whole)
        damaged[bit // 8] ^= 1 << bit % 8
        path.write_bytes(damaged)
        assert code_of(path) in ("E0101", "E0102", "E0106"), bit


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("ending", ["tif", "bmp", "jpg"])
def test_other_formats_cut_short_are_refused(tmp_path: Path, colour: np.ndarray, ending: str) -> None:
    path = tmp_path / f"a.{ending}"
    Image.fromarray(colour[..., :3]).save(path)
    whole = path.read_bytes()
    for end in (0, 1, 2, 7, 20, 40, len(whole) // 2, len(whole) - 40):
        path.write_bytes(whole[:end])
        assert code_of(path, 3) in ("E0101", "E0102", "E0106"), end


def test_what_is_no_picture_is_called_that(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_text("<html>")
    (tmp_path / "b.tif").write_bytes(b"")
    assert code_of(tmp_path / "a.png") == "E0106"
    assert code_of(tmp_path / "b.tif") == "E0101"


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_a_picture_that_declares_too_many_pixels_is_refused_before_it_is_inflated(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(png(8, 0, b"", 100_000, 100_000))
    assert code_of(tmp_path / "a.png") == "E0104"


def test_the_grid_of_a_picture_is_already_canonical() -> None:
    grid = picture_grid(ROWS, COLUMNS)
    assert grid.shape == (1, ROWS, COLUMNS)
    assert grid.spacing_mm == (1.0, 1.0, 1.0)
    assert canonical_axes(grid) == ((0, 1, 2), (False, False, False))


@pytest.mark.parametrize(("name", "largest"), [("a.png", 3), ("a.png", 40000), ("a.tif", 300), ("a.bmp", 200)])
def test_labels_are_written_without_loss_and_always_the_same(tmp_path: Path, name: str, largest: int) -> None:
    labels = np.random.default_rng(0).integers(0, largest + 1, (1, ROWS, COLUMNS)).astype(np.int32)
    first, second = (write_image2d(tmp_path / folder / name, labels) for folder in ("x", "y"))
    assert first == second
    assert np.array_equal(np.asarray(Image.open(tmp_path / "x" / name)), labels[0])


@pytest.mark.parametrize(
    ("name", "labels", "code"),
    [
        ("a.jpg", np.zeros((1, 3, 4), np.uint8), "E0106"),
        ("a.bmp", np.full((1, 3, 4), 256), "E0106"),
        ("a.png", np.full((1, 3, 4), 65536), "E0106"),
        ("a.png", np.full((1, 3, 4), -1), "E0106"),
        ("a.png", np.zeros((2, 3, 4), np.uint8), "E0111"),
    ],
)
def test_labels_that_a_picture_cannot_hold_are_refused(
    tmp_path: Path, name: str, labels: np.ndarray, code: str
) -> None:
    with pytest.raises(InputError) as error:
        write_image2d(tmp_path / name, labels)
    assert error.value.problems[0].code == code
    assert not list(tmp_path.iterdir())


def test_real_pictures_are_read_as_stored(shared: Path) -> None:
    nuclei = sorted((shared / "data" / "nuclei" / "imagesTr").iterdir())[:10]
    for path in nuclei:
        assert np.array_equal(read_image2d(path, 3).array[:, 0], np.asarray(Image.open(path)).transpose(2, 0, 1))
    for path in sorted((shared / "data" / "membranes" / "labelsTr").iterdir())[:3]:
        assert set(np.unique(read_image2d(path).array)) == {0, 1}


# Pages


@pytest.mark.parametrize("kind", ["u1", "u2", "f4"])
@pytest.mark.parametrize("compression", [None, "zlib"])
def test_tiff_pages_are_slices_as_tifffile_reads_them(
    tmp_path: Path, kind: str, compression: str | None, caplog: pytest.LogCaptureFixture
) -> None:
    array = np.random.default_rng(5).integers(0, 99, (5, ROWS, COLUMNS)).astype(kind)
    tifffile.imwrite(tmp_path / "a.tif", array, photometric="minisblack", compression=compression)
    volume = read_image2d(tmp_path / "a.tif")
    assert volume.array.dtype == np.dtype(kind)
    assert np.array_equal(volume.array[0], tifffile.imread(tmp_path / "a.tif"))
    assert volume.grid.shape == array.shape
    assert [note.code for note in volume.notes] == ["W0123"]
    assert "W0123" in caplog.text


def test_coloured_pages_are_channels_of_slices(tmp_path: Path, colour: np.ndarray) -> None:
    pages = [Image.fromarray(np.roll(colour[..., :3], n, 0)) for n in range(3)]
    pages[0].save(tmp_path / "a.tif", save_all=True, append_images=pages[1:])
    array = read_image2d(tmp_path / "a.tif", 3).array
    assert array.shape == (3, 3, ROWS, COLUMNS)
    assert all(np.array_equal(array[:, n], np.asarray(page).transpose(2, 0, 1)) for n, page in enumerate(pages))
    assert code_of(tmp_path / "a.tif") == "E0133"


@pytest.mark.parametrize(
    "arguments",
    [
        {"imagej": True, "metadata": {"axes": "CYX"}},
        {"imagej": True, "metadata": {"axes": "TYX"}},
        {"ome": True, "metadata": {"axes": "CYX"}},
        {"ome": True, "metadata": {"axes": "TYX"}},
    ],
    ids=str,
)
def test_pages_that_are_channels_or_times_are_refused(tmp_path: Path, arguments: dict) -> None:
    array = np.ones((4, ROWS, COLUMNS), np.uint8)
    tifffile.imwrite(tmp_path / "a.tif", array, photometric="minisblack", **arguments)
    assert code_of(tmp_path / "a.tif") == "E0111"


def test_stacks_that_hide_their_pages_are_refused(tmp_path: Path) -> None:
    array = np.ones((4, 32, 48), np.uint8)
    tifffile.imwrite(tmp_path / "one.tif", array, photometric="minisblack", truncate=True)
    tifffile.imwrite(tmp_path / "deep.tif", array, photometric="minisblack", volumetric=True, tile=(4, 16, 16))
    one = tmp_path / "imagej.tif"
    tifffile.imwrite(
        one, array[0], photometric="minisblack", description="ImageJ=1.53\nimages=4\nslices=4\n", metadata=None
    )
    for path in (tmp_path / "one.tif", tmp_path / "deep.tif", one):
        assert code_of(path) == "E0111"


def test_stacks_of_imagej_and_ome_are_slices(tmp_path: Path) -> None:
    array = np.random.default_rng(5).integers(0, 99, (5, ROWS, COLUMNS)).astype(np.uint8)
    tifffile.imwrite(tmp_path / "a.tif", array, imagej=True, metadata={"axes": "ZYX"})
    tifffile.imwrite(tmp_path / "b.tif", array, ome=True, photometric="minisblack", metadata={"axes": "ZYX"})
    for name in ("a.tif", "b.tif"):
        assert np.array_equal(read_image2d(tmp_path / name).array[0], array)


@pytest.mark.parametrize("compression", [None, "zlib"])
@pytest.mark.parametrize("big", [False, True])
def test_a_stack_cut_anywhere_is_refused_or_whole(tmp_path: Path, compression: str | None, big: bool) -> None:
    array = np.random.default_rng(5).integers(0, 99, (3, ROWS, COLUMNS)).astype(np.uint8)
    path = tmp_path / "a.tif"
    tifffile.imwrite(
        path, array, photometric="minisblack", compression=compression, bigtiff=big, metadata=None, software=""
    )
    assert np.array_equal(read_image2d(path).array[0], array)
    whole, codes = path.read_bytes(), set()
    for end in range(0, len(whole), 7):
        path.write_bytes(whole[:end])
        try:
            volume = read_image2d(path)
        except InputError as error:
            codes.add(error.problems[0].code)
        else:  # only what nothing points to is missing
            assert end > 0.9 * len(whole), end
            assert np.array_equal(volume.array[0], array), end
    assert codes <= {"E0101", "E0106"}


def test_pages_that_follow_each_other_in_a_circle_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.tif"
    tifffile.imwrite(path, np.ones((2, ROWS, COLUMNS), np.uint8), photometric="minisblack", metadata=None)
    raw = bytearray(path.read_bytes())
    (first,) = struct.unpack_from("<I", raw, 4)
    (entries,) = struct.unpack_from("<H", raw, first)
    struct.pack_into("<I", raw, first + 2 + 12 * entries, first)
    path.write_bytes(raw)
    assert code_of(path) == "E0102"


def test_label_stacks_are_written_as_tifffile_reads_them(tmp_path: Path) -> None:
    for largest in (3, 300):
        labels = np.random.default_rng(5).integers(0, largest + 1, (5, ROWS, COLUMNS))
        labels[0, 0, 0] = largest
        digest = write_image2d(tmp_path / "a.tif", labels)
        assert digest == write_image2d(tmp_path / "b.tif", labels)
        theirs = tifffile.imread(tmp_path / "a.tif")
        assert theirs.dtype == (np.uint8 if largest < 256 else np.uint16)
        assert np.array_equal(theirs, labels)
