"""DICOM series: values and geometry against pydicom and GDCM (SimpleITK), every fault with its code."""

from __future__ import annotations

import logging
import sys
import tracemalloc
import warnings
import zlib
from pathlib import Path

import numpy as np
import pydicom
import pytest
import SimpleITK as sitk  # noqa: N813
from dicom_phantoms import (
    COLUMNS,
    DIRECTIONS,
    ROWS,
    SLICES,
    SPACING,
    affine_ras,
    position,
    save,
    slice_of,
    voxels,
    write_enhanced,
    write_series,
)

from medseg.errors import InputError
from medseg.imaging.dicom import is_dicom, list_series, read_series, sha256_of_image
from medseg.imaging.dicom_header import read_instance
from medseg.imaging.dicom_pixels import coded_size
from medseg.imaging.geometry import nifti_affine
from medseg.imaging.volumes import read_volume, strip_ending, volume_sha256, write_labels

SAMPLES = Path(pydicom.__file__).parent / "data" / "test_files"  # those that come with the wheel


def refusal(folder: Path, series: str | None = None, channels: int = 1) -> str:
    """The text of the refusal, which names its code and never a patient."""
    with pytest.raises(InputError) as error:
        read_series(folder, series, channels)
    assert "Canary" not in str(error.value)
    return str(error.value)


def gdcm(files: list[str]) -> tuple[np.ndarray, np.ndarray]:
    """Array (Z, Y, X) and affine (z, y, x) → RAS mm of GDCM, in the order of positions that it finds itself."""
    sitk.ProcessObject.SetGlobalWarningDisplay(False)
    if len(files) == 1:
        image = sitk.ReadImage(files[0])
    else:
        reader = sitk.ImageSeriesReader()
        reader.SetFileNames(files)
        image = reader.Execute()
    affine = np.eye(4)
    affine[:3, :3] = np.array(image.GetDirection()).reshape(3, 3) * image.GetSpacing()
    affine[:3, 3] = image.GetOrigin()
    return sitk.GetArrayFromImage(image), (np.diag([-1.0, -1, 1, 1]) @ affine)[:, [2, 1, 0, 3]]


def test_slices_are_sorted_by_position_whatever_files_and_numbers_say(tmp_path):
    array = write_series(tmp_path)
    volume = read_series(tmp_path)
    assert volume.array.dtype == np.uint16
    np.testing.assert_array_equal(volume.array[0], array)
    np.testing.assert_allclose(volume.grid.affine, affine_ras(), atol=1e-6)
    np.testing.assert_allclose(volume.grid.spacing_mm, SPACING)
    assert volume.notes == ()


def test_values_and_geometry_are_those_of_gdcm(tmp_path):
    write_series(tmp_path, RescaleSlope=2, RescaleIntercept=-1024)
    names = sitk.ImageSeriesReader.GetGDCMSeriesFileNames(str(tmp_path))
    array, affine = gdcm(list(names))
    volume = read_series(tmp_path)
    np.testing.assert_array_equal(volume.array[0], array)
    np.testing.assert_allclose(volume.grid.affine, affine, atol=1e-4)
    assert volume.array.dtype == np.int16


@pytest.mark.parametrize("kind", ["u1", "i1", "u2", "i2", "u4", "i4"])
def test_every_integer_type_is_read_as_stored(tmp_path, kind):
    info = np.iinfo(kind)
    array = np.random.default_rng(0).integers(info.min, int(info.max) + 1, (3, ROWS, COLUMNS), dtype=kind)
    bits = {"BitsStored": 8 * array.itemsize, "HighBit": 8 * array.itemsize - 1}
    write_series(tmp_path, array, **bits)
    volume = read_series(tmp_path)
    assert volume.array.dtype == np.dtype(kind)
    np.testing.assert_array_equal(volume.array[0], array)


def test_integers_stay_integers_and_are_widened_only_where_they_must(tmp_path):
    array = np.full((3, ROWS, COLUMNS), -32768, np.int16)
    array[0] = 5
    write_series(tmp_path / "wide", array, RescaleSlope=1, RescaleIntercept=-1024)
    wide = read_series(tmp_path / "wide").array[0]
    assert wide.dtype == np.int32
    np.testing.assert_array_equal(wide, array.astype(int) - 1024)


def test_slopes_that_differ_or_are_fractions_give_float32(tmp_path):
    def change(ds, z):
        ds.RescaleSlope, ds.RescaleIntercept = 0.5 + z, -z

    array = write_series(tmp_path, change=change)
    volume = read_series(tmp_path)
    z = np.arange(SLICES)[:, None, None]
    assert volume.array.dtype == np.float32
    np.testing.assert_allclose(volume.array[0], array * (0.5 + z) - z, rtol=1e-6)


def test_bits_above_those_declared_are_cleared_with_a_note(tmp_path):
    array = voxels()
    write_series(tmp_path, array | np.uint16(0x4000))
    volume = read_series(tmp_path)
    np.testing.assert_array_equal(volume.array[0], array)
    assert [note.code for note in volume.notes] == ["W0157"]


def test_monochrome1_and_padding_are_left_as_stored_with_a_note(tmp_path):
    array = write_series(tmp_path, PhotometricInterpretation="MONOCHROME1", PixelPaddingValue=0)
    volume = read_series(tmp_path)
    np.testing.assert_array_equal(volume.array[0], array)
    assert [note.code for note in volume.notes] == ["W0156"]


@pytest.mark.parametrize("gone", [2, 4])
def test_a_missing_slice_is_refused_with_its_place_in_mm(tmp_path, gone):
    write_series(tmp_path, change=lambda ds, z: z != gone)
    place = position(gone) @ DIRECTIONS[:, 2]
    text = refusal(tmp_path)
    assert "E0150" in text
    assert f"{place:.4g} mm" in text


def test_a_gap_of_more_than_a_hundredth_is_refused_and_rounded_positions_are_not(tmp_path):
    def shift(ds, z):
        place = position(z + (0.03 if z > 3 else 0))
        ds.ImagePositionPatient = [float(f"{v:.6f}") for v in place]

    def rounded(ds, z):
        ds.ImagePositionPatient = [float(f"{v:.2f}") for v in position(z)]

    write_series(tmp_path / "gap", change=shift)
    assert "E0150" in refusal(tmp_path / "gap")
    write_series(tmp_path / "rounded", change=rounded)
    np.testing.assert_allclose(read_series(tmp_path / "rounded").grid.affine, affine_ras(), atol=6e-3)


def test_a_slice_beside_the_stack_is_refused(tmp_path):
    def aside(ds, z):
        if z == 3:
            ds.ImagePositionPatient = list(position(z) + 0.4 * DIRECTIONS[:, 0])

    write_series(tmp_path, change=aside)
    assert "E0150" in refusal(tmp_path)


def test_copies_and_slices_at_one_position_are_refused(tmp_path):
    write_series(tmp_path / "copy")
    first = sorted((tmp_path / "copy").iterdir())[0]
    (tmp_path / "copy" / "nested").mkdir()
    (tmp_path / "copy" / "nested" / "again.dcm").write_bytes(first.read_bytes())
    assert "E0152" in refusal(tmp_path / "copy")
    write_series(tmp_path / "twice")
    save(slice_of(voxels()[2], 2), tmp_path / "twice" / "other.dcm")
    assert "E0152" in refusal(tmp_path / "twice")
    for z in range(SLICES):
        save(slice_of(voxels()[z], z), tmp_path / "twice" / f"second{z}.dcm")
    assert "E0152" in refusal(tmp_path / "twice")


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("orientation", {"ImageOrientationPatient": [1, 0, 0, 0, 1, 0]}),
        ("pixel spacing", {"PixelSpacing": [0.8, 0.9]}),
        ("rescale", {"RescaleSlope": None, "RescaleIntercept": None}),
    ],
)
def test_slices_that_differ_are_refused(tmp_path, name, change):
    def one(ds, z):
        ds.RescaleSlope, ds.RescaleIntercept = 1, -1024
        if z == 4:
            for key, value in change.items():
                delattr(ds, key) if value is None else setattr(ds, key, value)

    write_series(tmp_path, change=one)
    text = refusal(tmp_path)
    assert "E0151" in text
    assert f"1 of {SLICES} slices differ" in text
    assert name in text


def test_slices_of_other_size_are_refused(tmp_path):
    write_series(tmp_path)
    save(slice_of(np.zeros((ROWS + 1, COLUMNS), np.uint16), SLICES), tmp_path / "larger.dcm")
    assert "E0151" in refusal(tmp_path)


def test_a_tilted_gantry_is_refused_with_its_angle(tmp_path):
    def tilt(degrees):
        def change(ds, z):
            shift = z * SPACING[0] * np.tan(np.deg2rad(degrees)) * DIRECTIONS[:, 1]
            ds.ImagePositionPatient = [float(f"{v:.8f}") for v in position(z) + shift]

        return change

    write_series(tmp_path / "ten", change=tilt(10))
    text = refusal(tmp_path / "ten")
    assert "E0121" in text
    assert "10 degrees" in text
    write_series(tmp_path / "slight", change=tilt(0.5))
    volume = read_series(tmp_path / "slight")
    assert [note.code for note in volume.notes] == ["W0121"]
    directions = volume.grid.affine[:3, :3] / volume.grid.spacing_mm
    np.testing.assert_allclose(directions.T @ directions, np.eye(3), atol=1e-12)


def test_time_points_are_channels_only_where_declared(tmp_path):
    volumes = [voxels(seed=seed) for seed in range(3)]
    for t, array in enumerate(volumes):
        write_series(tmp_path / f"t{t}", array, TemporalPositionIdentifier=10 - t)
    text = refusal(tmp_path)
    assert "E0153" in text
    assert "TemporalPositionIdentifier" in text
    volume = read_series(tmp_path, channels=3)
    np.testing.assert_array_equal(volume.array, np.stack(volumes[::-1]))
    assert list_series(tmp_path)[0].shape == (3, SLICES, ROWS, COLUMNS)
    next((tmp_path / "t1").glob("*.dcm")).unlink()
    assert "E0150" in refusal(tmp_path, channels=3)


def test_volumes_that_nothing_tells_apart_are_refused(tmp_path):
    for t in range(3):
        write_series(tmp_path / f"t{t}", voxels(seed=t))
    assert "E0153" in refusal(tmp_path, channels=3)


def test_colour_is_read_only_as_three_channels(tmp_path):
    array = np.random.default_rng(0).integers(0, 256, (3, ROWS, COLUMNS, 3), dtype=np.uint8)
    write_series(tmp_path, array)
    assert "E0133" in refusal(tmp_path)
    np.testing.assert_array_equal(read_series(tmp_path, channels=3).array, np.moveaxis(array, -1, 0))
    write_series(tmp_path / "grey")
    assert "E0133" in refusal(tmp_path / "grey", channels=2)


def test_slices_without_position_are_refused_and_one_alone_is_a_picture(tmp_path):
    write_series(tmp_path / "many", ImagePositionPatient=None)
    assert "E0154" in refusal(tmp_path / "many")
    save(slice_of(voxels()[0], 0, ImagePositionPatient=None, ImageOrientationPatient=None), tmp_path / "one.dcm")
    volume = read_series(tmp_path / "one.dcm")
    assert [note.code for note in volume.notes] == ["W0123"]
    assert volume.grid.spacing_mm == (2.5, *SPACING[1:])


def test_a_single_slice_is_as_thick_as_it_says(tmp_path):
    save(slice_of(voxels()[0], 2), tmp_path / "one.dcm")
    volume = read_volume(tmp_path / "one.dcm")
    assert [note.code for note in volume.notes] == ["W0155"]
    np.testing.assert_allclose(volume.grid.spacing_mm, (2.5, *SPACING[1:]))


def test_an_enhanced_object_is_read_by_the_positions_and_slopes_of_its_frames(tmp_path):
    array, order = voxels(), np.random.default_rng(5).permutation(SLICES)
    plain = read_series(write_enhanced(tmp_path / "a.dcm", array, order))
    np.testing.assert_array_equal(plain.array[0], array)
    np.testing.assert_allclose(plain.grid.affine, affine_ras(), atol=1e-6)
    slopes = 1 + 0.25 * np.arange(SLICES)
    scaled = read_series(write_enhanced(tmp_path / "b.dcm", array, order, slopes))
    np.testing.assert_allclose(scaled.array[0], array * slopes[:, None, None] - 5, rtol=1e-6)
    np.testing.assert_allclose(scaled.grid.affine, affine_ras(), atol=1e-6)


def test_several_series_are_listed_and_chosen_by_number_uid_or_words(tmp_path):
    first = write_series(tmp_path / "a", voxels(seed=1), series="1.2.3")
    second = write_series(tmp_path / "b", voxels(seed=2), series="1.2.44", SeriesDescription="scout", SeriesNumber=9)
    text = refusal(tmp_path)
    assert "E0151" in text
    assert f"1 (CT, {SLICES} files), 2 (CT, {SLICES} files)" in text
    assert "thorax" not in text
    for chosen, expected in (("1", first), ("2", second), ("1.2.44", second), ("T1 POST", first), ("scout", second)):
        np.testing.assert_array_equal(read_series(tmp_path, chosen).array[0], expected)
        np.testing.assert_array_equal(read_volume(Path(f"{tmp_path}#{chosen}")).array[0], expected)
    for wrong in ("0", "3", "1.2", "nothing", ""):
        assert "E0151" in refusal(tmp_path, wrong)
    found = list_series(tmp_path)
    assert [(s.number, s.uid, s.files, s.problems) for s in found] == [(1, "1.2.3", 7, ()), (2, "1.2.44", 7, ())]


def test_hashes_change_with_the_files_and_the_choice(tmp_path):
    write_series(tmp_path / "p")
    before = volume_sha256(tmp_path / "p")
    assert before == sha256_of_image(tmp_path / "p") != volume_sha256(Path(f"{tmp_path}/p#1"))
    save(slice_of(voxels()[0], SLICES), tmp_path / "p" / "more.dcm")
    assert volume_sha256(tmp_path / "p") != before
    with pytest.raises(FileNotFoundError):
        volume_sha256(tmp_path / "absent")
    assert strip_ending("p#1.2.44") == strip_ending("p.dcm") == "p"


def test_other_files_are_ignored_with_a_note_and_nothing_outside_is_opened(tmp_path):
    array = write_series(tmp_path / "p")
    (tmp_path / "secret").write_bytes(b"x" * 500)
    directory = pydicom.dcmread(SAMPLES / "dicomdirtests" / "DICOMDIR")
    for record in directory.DirectoryRecordSequence:
        record.ReferencedFileID = ["OUT", "SECRET"]
    directory.save_as(tmp_path / "p" / "DICOMDIR")
    data = (tmp_path / "p" / "DICOMDIR").read_bytes()
    (tmp_path / "p" / "DICOMDIR").write_bytes(data.replace(b"OUT\\SECRET", b"..\\secret "))
    (tmp_path / "p" / "notes.txt").write_text("hello")
    (tmp_path / "p" / ".hidden").write_text("hello")
    (tmp_path / "p" / "loop").symlink_to(tmp_path / "p")
    opened = []
    sys.addaudithook(lambda event, args: opened.append(str(args[0])) if event == "open" else None)
    volume = read_series(tmp_path / "p")
    seen = list(opened)
    np.testing.assert_array_equal(volume.array[0], array)
    assert [note.code for note in volume.notes] == ["W0147"]
    assert "notes.txt" in str(volume.notes[0])
    assert not [path for path in seen if path.startswith(str(tmp_path)) and not path.startswith(str(tmp_path / "p"))]


def test_links_to_slices_are_followed_and_a_broken_one_is_refused(tmp_path):
    array = write_series(tmp_path / "store")
    (tmp_path / "p").mkdir()
    for number, path in enumerate(sorted((tmp_path / "store").iterdir())):
        (tmp_path / "p" / f"{number}.dcm").symlink_to(path)
    np.testing.assert_array_equal(read_series(tmp_path / "p").array[0], array)
    next((tmp_path / "store").iterdir()).unlink()
    assert "E0143" in refusal(tmp_path / "p")


def test_files_without_preamble_or_with_a_program_in_it_are_read(tmp_path):
    array = write_series(tmp_path)
    for number, path in enumerate(sorted(tmp_path.iterdir())):
        data = path.read_bytes()
        path.write_bytes(data[132:] if number % 2 else b"MZ" + b"\x90" * 126 + data[128:])
    np.testing.assert_array_equal(read_series(tmp_path).array[0], array)


@pytest.mark.parametrize("keep", [0.995, 0.9, 0.6, 0.3])
def test_a_truncated_slice_is_refused_wherever_it_ends(tmp_path, keep):
    write_series(tmp_path)
    victim = sorted(tmp_path.iterdir())[-1]
    data = victim.read_bytes()
    victim.write_bytes(data[: int(len(data) * keep)])
    text = refusal(tmp_path)
    assert "E0101" in text or "E0102" in text
    assert victim.name in text


def test_an_empty_slice_file_is_refused(tmp_path):
    write_series(tmp_path)
    sorted(tmp_path.iterdir())[-1].write_bytes(b"")
    assert "E0102" in refusal(tmp_path)


def test_impossible_sizes_are_refused_before_memory_is_taken(tmp_path):
    ds = slice_of(np.zeros((ROWS, COLUMNS), np.uint16), 0, Rows=65535, Columns=65535, NumberOfFrames=10**6)
    save(ds, tmp_path / "huge.dcm")
    tracemalloc.start()
    assert "E0104" in refusal(tmp_path)
    assert tracemalloc.get_traced_memory()[1] < 2**24
    tracemalloc.stop()
    save(slice_of(np.zeros((ROWS, COLUMNS), np.uint16), 0, Rows=20000, Columns=20000), tmp_path / "huge.dcm")
    assert "E0101" in refusal(tmp_path)


def test_a_huge_declared_element_does_not_take_its_memory(tmp_path):
    path = save(slice_of(voxels()[0], 0), tmp_path / "a.dcm")
    data = bytearray(path.read_bytes())
    at = data.index(b"\x08\x00\x3e\x10LO")
    data[at + 4 : at + 12] = b"UT\0\0" + (2**31).to_bytes(4, "little")
    path.write_bytes(data)
    tracemalloc.start()
    text = refusal(path)
    assert tracemalloc.get_traced_memory()[1] < 2**24
    tracemalloc.stop()
    assert "E0101" in text or "E0102" in text


def test_a_deflated_bomb_is_refused_while_it_is_inflated(tmp_path, monkeypatch):
    path = SAMPLES / "image_dfl.dcm"
    volume = read_series(path)
    np.testing.assert_array_equal(volume.array[0, 0], pydicom.dcmread(path).pixel_array)
    monkeypatch.setattr("medseg.imaging.dicom_header.MAX_INFLATED_BYTES", 10**5)
    assert "E0104" in refusal(path)
    data = path.read_bytes()
    (tmp_path / "cut.dcm").write_bytes(data[: len(data) // 2])
    assert "E0101" in refusal(tmp_path / "cut.dcm")
    assert zlib.MAX_WBITS == 15


def test_compressed_frames_of_another_size_than_declared_are_refused(tmp_path):
    for name in ("MR_small_jp2klossless.dcm", "MR_small_jpeg_ls_lossless.dcm"):
        ds = pydicom.dcmread(SAMPLES / name)
        ds.Rows //= 2
        ds.save_as(tmp_path / name)
        assert "E0104" in refusal(tmp_path / name)


def test_a_missing_decoder_is_named_with_the_package_to_install(tmp_path, monkeypatch):
    from pydicom.pixels.decoders import JPEG2000LosslessDecoder

    monkeypatch.setattr(JPEG2000LosslessDecoder, "_available", {})
    text = refusal(SAMPLES / "MR_small_jp2klossless.dcm")
    assert "E0106" in text
    assert 'pip install "medseg[dicom]"' in text


def test_without_pydicom_the_package_to_install_is_named(tmp_path, monkeypatch):
    write_series(tmp_path)
    monkeypatch.setitem(sys.modules, "pydicom", None)
    assert 'pip install "medseg[dicom]"' in refusal(tmp_path)


@pytest.mark.parametrize(
    "name",
    ["MR_small_RLE", "MR_small_bigendian", "MR_small_expb", "MR_small_implicit", "MR_small_jp2klossless",
     "MR_small_jpeg_ls_lossless", "MR_small_padded"],
)  # fmt: skip
def test_every_lossless_coding_of_one_slice_gives_its_values(name):
    expected = pydicom.dcmread(SAMPLES / "MR_small.dcm").pixel_array
    np.testing.assert_array_equal(read_series(SAMPLES / f"{name}.dcm").array[0, 0], expected)


def test_series_compressed_in_other_ways_have_the_same_values(tmp_path):
    array = write_series(tmp_path)
    for path, syntax in zip(
        sorted(tmp_path.iterdir()),
        [pydicom.uid.RLELossless, pydicom.uid.JPEGLSLossless] * 4,
        strict=False,
    ):
        ds = pydicom.dcmread(path)
        ds.compress(syntax, generate_instance_uid=False)
        ds.save_as(path)
    np.testing.assert_array_equal(read_series(tmp_path).array[0], array)


def test_the_size_of_a_code_stream_is_found():
    jpeg = b"\xff\xd8\xff\xe0\x00\x04ab\xff\xc3\x00\x0b\x10\x01\x02\x03\x04\x01"
    assert coded_size(jpeg) == (0x0102, 0x0304)
    assert coded_size(b"\xff\xd8\xff\xe0\x00") is None
    assert coded_size(b"\0" * 64) is None


def test_pydicoms_own_files_are_read_as_pydicom_and_gdcm_read_them_or_refused():
    read, refused = 0, {}
    for path in sorted(SAMPLES.glob("*.dcm")):
        try:
            instance = read_instance(path)
            channels = instance.frames[0].coding.samples if instance and instance.frames else 1
            volume = read_series(path, channels=channels)
        except InputError as error:
            refused[path.name] = codes_of(error)
            continue
        ds = pydicom.dcmread(path, force=True)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of pydicom, about padding
            expected = ds.pixel_array if channels == 1 else pydicom.pixels.pixel_array(path)
        expected = expected * float(ds.get("RescaleSlope", 1)) + float(ds.get("RescaleIntercept", 0))
        found = volume.array[0] if channels == 1 else np.moveaxis(volume.array, 0, -1)
        np.testing.assert_allclose(found.squeeze(), expected.squeeze(), rtol=1e-6, err_msg=path.name)
        read += 1
    assert read >= 25
    assert all(code.startswith("E01") for found in refused.values() for code in found)


def files_of(folder: Path, uid: str) -> list[str]:
    """Files of a series in the order of their positions along the normal."""
    found = []
    for path in folder.rglob("*"):
        if not path.is_file() or path.read_bytes()[128:132] != b"DICM":
            continue
        ds = pydicom.dcmread(path, stop_before_pixels=True)
        if ds.SeriesInstanceUID == uid:
            place = np.array(ds.get("ImagePositionPatient", [0, 0, 0]), float)
            row, column = np.array(ds.get("ImageOrientationPatient", [1, 0, 0, 0, 1, 0]), float).reshape(2, 3)
            found.append((float(place @ np.cross(row, column)), str(path)))
    return [name for _, name in sorted(found)]


def series_folders(root: Path) -> list[Path]:
    return sorted({p.parent for p in root.rglob("*") if p.is_file() and is_dicom(p) and "bids" not in str(p)})


def test_all_real_series_equal_gdcm_or_are_refused_with_a_code(shared, caplog):
    caplog.set_level(logging.ERROR)
    compared, refused = 0, []
    for folder in series_folders(shared / "data" / "formats"):
        try:
            found = list_series(folder)
        except InputError as error:
            refused.append((folder.name, codes_of(error)))
            continue
        for series in found:
            try:
                volume = read_series(folder, series.uid)
            except InputError as error:
                refused.append((folder.name, codes_of(error)))
                assert any(p.severity == "error" for p in series.problems)
                continue
            assert (len(volume.array), *volume.grid.shape) == series.shape
            array, affine = gdcm(files_of(folder, series.uid))
            np.testing.assert_allclose(volume.array[0], array, rtol=1e-6, atol=1e-5, err_msg=folder.name)
            if volume.grid.shape[0] == 1:  # GDCM takes another thickness
                affine[:, 0] = volume.grid.affine[:, 0]
            np.testing.assert_allclose(volume.grid.affine, affine, atol=2e-3, err_msg=folder.name)
            compared += 1
    assert compared >= 14
    assert all(code and all(c.startswith("E01") for c in code) for _, code in refused)


def codes_of(error: InputError) -> set[str]:
    return {problem.code for problem in error.problems}


def test_labels_of_a_series_are_written_where_its_voxels_lie(tmp_path):
    write_series(tmp_path / "p")
    volume = read_series(tmp_path / "p")
    labels = (volume.array[0] > 2000).astype(np.uint8)
    write_labels(tmp_path / "p.nii.gz", labels, volume.grid, volume.source)
    back = read_volume(tmp_path / "p.nii.gz")
    np.testing.assert_array_equal(back.array[0], labels)
    np.testing.assert_allclose(nifti_affine(back.grid), nifti_affine(volume.grid), atol=1e-4)
    assert b"Canary" not in (tmp_path / "p.nii.gz").read_bytes()


def test_reading_takes_the_array_and_little_more(tmp_path):
    array = np.random.default_rng(0).integers(0, 4096, (24, 512, 512)).astype(np.uint16)
    write_series(tmp_path, array, RescaleSlope=1, RescaleIntercept=-1024)
    tracemalloc.start()
    volume = read_series(tmp_path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < volume.array.nbytes + 16 * 2**20


def test_headers_with_wrong_bytes_are_read_or_refused(tmp_path):
    rng = np.random.default_rng(11)
    slice_bytes = save(slice_of(voxels()[0], 0), tmp_path / "s.dcm").read_bytes()
    enhanced = write_enhanced(tmp_path / "e.dcm", voxels(), np.arange(SLICES)).read_bytes()
    seeds = [slice_bytes, enhanced, (SAMPLES / "MR_small_RLE.dcm").read_bytes()]
    path, found = tmp_path / "x.dcm", set()
    for k in range(300):
        data = bytearray(seeds[k % 3])
        for at in rng.integers(0, 2500 if rng.random() < 0.8 else len(data), rng.integers(1, 6)):
            data[at % len(data)] = rng.integers(0, 256)
        path.write_bytes(data[: rng.integers(1, len(data))] if k % 10 == 0 else data)
        try:
            read_series(path)
        except InputError as error:
            found |= codes_of(error)
    assert {"E0101", "E0102"} <= found


def test_a_binary_file_that_only_starts_like_dicom_is_ignored(tmp_path):
    array = write_series(tmp_path)
    (tmp_path / "weights").write_bytes(b"\x08\0\0\0" + bytes([0, 0, 200, 1]) + bytes(300))
    volume = read_series(tmp_path)
    np.testing.assert_array_equal(volume.array[0], array)
    assert [note.code for note in volume.notes] == ["W0147"]


def test_what_is_not_supported_spoils_only_its_own_series(tmp_path):
    array = write_series(tmp_path)
    screenshot = slice_of(np.zeros((ROWS, COLUMNS), np.uint16), 0, "1.2.77", PhotometricInterpretation="PALETTE COLOR")
    save(screenshot, tmp_path / "shot.dcm")
    np.testing.assert_array_equal(read_series(tmp_path, "1.2.3").array[0], array)
    assert "E0106" in refusal(tmp_path, "1.2.77")
    assert [p.code for p in list_series(tmp_path)[1].problems] == ["E0106"]
    screenshot.SeriesInstanceUID = "1.2.3"
    save(screenshot, tmp_path / "shot.dcm")
    assert "E0106" in refusal(tmp_path)


def test_a_slice_as_far_away_as_the_moon_is_refused_without_counting_the_way(tmp_path):
    def displace(ds, z):
        if z == SLICES - 1:
            ds.ImagePositionPatient = [float(f"{v:.6g}") for v in position(1e8)]

    write_series(tmp_path, change=displace)
    text = refusal(tmp_path)
    assert "E0150" in text or "E0121" in text
    assert len(text) < 300


def test_run_lengths_that_cannot_fill_the_declared_size_are_refused_before_memory_is_taken(tmp_path):
    ds = pydicom.dcmread(SAMPLES / "MR_small_RLE.dcm")
    ds.Rows = ds.Columns = 46_000
    ds.save_as(tmp_path / "a.dcm")
    assert "E0104" in refusal(tmp_path)
