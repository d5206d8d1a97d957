"""Volumes by file name: endings, channels that must share a grid, and labels on the grid of their source."""

from __future__ import annotations

from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from phantoms import affine_ijk, anatomy, save_nifti
from PIL import Image

from medseg.errors import InputError
from medseg.imaging.images2d import picture_grid
from medseg.imaging.volumes import (
    IMAGE_ENDINGS,
    file_ending,
    nonfinite,
    read_channels,
    read_volume,
    strip_ending,
    write_labels,
)
from medseg.records.grid import Source


def channel(
    path: Path, value: float, affine: np.ndarray | None = None, dtype: type = np.int16, shape=(6, 9, 5)
) -> Path:
    array = (np.arange(np.prod(shape)).reshape(shape) % 90 + value).astype(dtype)
    save_nifti(path, array, affine_ijk() if affine is None else affine)
    return path


def code_of(error: pytest.ExceptionInfo[InputError]) -> str:
    return error.value.problems[0].code


@pytest.mark.parametrize(
    ("name", "stem", "ending"),
    [
        ("case.nii.gz", "case", ".nii.gz"),
        ("case.NII.GZ", "case", ".nii.gz"),
        ("a.b.nii", "a.b", ".nii"),
        ("x_0000.png", "x_0000", ".png"),
        ("scan.tiff", "scan", ".tiff"),
        ("notes.txt", "notes.txt", None),
        ("archive.gz", "archive.gz", None),
    ],
)
def test_endings_are_told_apart(name: str, stem: str, ending: str | None) -> None:
    assert strip_ending(name) == stem
    assert file_ending(name) == ending


def test_an_unsupported_ending_lists_the_supported_ones(tmp_path: Path) -> None:
    with pytest.raises(InputError) as error:
        read_volume(tmp_path / "a.xyz")
    assert code_of(error) == "E0106"
    assert all(ending in str(error.value) for ending in IMAGE_ENDINGS)


def test_what_is_not_there_is_said(tmp_path: Path) -> None:
    (tmp_path / "link.nii.gz").symlink_to(tmp_path / "gone.nii.gz")
    (tmp_path / "folder.nii").mkdir()
    for name, code in (("none.nii", "E0100"), ("link.nii.gz", "E0143"), ("folder.nii", "E0106")):
        with pytest.raises(InputError) as error:
            read_volume(tmp_path / name)
        assert code_of(error) == code


def test_channels_are_stacked_in_the_order_given(tmp_path: Path) -> None:
    paths = [
        channel(tmp_path / f"{n}.nii.gz", n, dtype=kind) for n, kind in enumerate((np.int16, np.uint8, np.float32))
    ]
    volume = read_channels(paths)
    assert volume.array.dtype == np.float32
    assert volume.source.path == str(paths[0])
    for n, path in enumerate(paths):
        assert np.array_equal(volume.array[n], nib.load(path).get_fdata().T)


def test_a_repeated_path_is_one_file_with_that_many_channels(tmp_path: Path) -> None:
    array = np.arange(6 * 9 * 5 * 2, dtype=np.int16).reshape(6, 9, 5, 2)
    save_nifti(tmp_path / "a.nii.gz", array, affine_ijk())
    assert np.array_equal(read_channels([tmp_path / "a.nii.gz"] * 2).array, array.T)
    single = channel(tmp_path / "b.nii.gz", 0)
    with pytest.raises(InputError) as error:
        read_channels([single] * 2)
    assert code_of(error) == "E0133"
    three = read_channels([tmp_path / "a.nii.gz", tmp_path / "a.nii.gz", single])
    assert np.array_equal(three.array[:2], array.T)


@pytest.mark.parametrize(("voxels", "outcome"), [(0.05, "silent"), (0.3, "W0120"), (0.8, "E0120")])
def test_channels_must_share_a_grid(
    tmp_path: Path, voxels: float, outcome: str, caplog: pytest.LogCaptureFixture
) -> None:
    moved = affine_ijk()
    moved[:3, 3] += voxels * moved[:3, 0]
    paths = [channel(tmp_path / "a.nii.gz", 0), channel(tmp_path / "b.nii.gz", 1, moved)]
    if outcome == "E0120":
        with pytest.raises(InputError) as error:
            read_channels(paths)
        assert code_of(error) == "E0120"
    else:
        assert np.allclose(read_channels(paths).grid.affine, read_volume(paths[0]).grid.affine)
        assert ("W0120" in caplog.text) == (outcome == "W0120")


def test_channels_of_another_shape_are_refused(tmp_path: Path) -> None:
    paths = [channel(tmp_path / "a.nii.gz", 0), channel(tmp_path / "b.nii.gz", 1, shape=(6, 9, 4))]
    with pytest.raises(InputError) as error:
        read_channels(paths)
    assert code_of(error) == "E0119"


def test_labels_keep_the_format_that_the_path_names(tmp_path: Path) -> None:
    image, labels = anatomy(np.random.default_rng(0))
    save_nifti(tmp_path / "a.nii.gz", image, affine_ijk())
    volume = read_volume(tmp_path / "a.nii.gz")
    for name in ("out.nii", "out.nii.gz", "OUT.NII.GZ"):
        write_labels(tmp_path / name, labels.T, volume.grid, volume.source)
        assert np.array_equal(read_volume(tmp_path / name).array[0].T, labels)
    assert (tmp_path / "OUT.NII.GZ").read_bytes()[:2] == b"\x1f\x8b"
    with pytest.raises(InputError) as error:
        write_labels(tmp_path / "out.png", labels.T, volume.grid, volume.source)
    assert code_of(error) == "E0111"
    with pytest.raises(ValueError, match="do not lie"):
        write_labels(tmp_path / "out.nii", labels, volume.grid, volume.source)


def test_labels_of_a_picture_go_to_a_picture_or_to_nifti(tmp_path: Path) -> None:
    Image.fromarray(np.zeros((7, 11, 3), np.uint8)).save(tmp_path / "a.png")
    volume = read_channels([tmp_path / "a.png"] * 3)
    labels = np.arange(77).reshape(1, 7, 11) % 3
    for name in ("b.png", "b.tif", "b.nii.gz", "b.mha", "b.seg.nrrd"):
        write_labels(tmp_path / name, labels, volume.grid, volume.source)
        assert np.array_equal(read_volume(tmp_path / name).array[0], labels)
    assert np.array_equal(read_volume(tmp_path / "b.nii.gz").grid.affine, picture_grid(7, 11).affine)
    with pytest.raises(InputError):
        write_labels(tmp_path / "b.mhd", labels, volume.grid, Source("", ""))


def test_values_that_are_not_finite_are_counted_and_placed() -> None:
    array = np.ones((2, 3, 4, 5), np.float32)
    assert nonfinite(array) is None
    assert nonfinite(array.astype(np.int16)) is None
    array[1, 0, 2, 3], array[1, 2, 0, 0] = np.nan, -np.inf
    assert nonfinite(array) == (2, (1, 0, 2, 3))
