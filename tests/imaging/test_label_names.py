"""Names of classes in label files: NIfTI's header extension, and formats that have no place for them."""

from __future__ import annotations

import json
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import SimpleITK
from phantoms import affine_ijk, save_nifti

from medseg.imaging.volumes import LABEL_ENDINGS, read_volume, volume_sha256, write_labels
from medseg.records.task import Label

SHAPE = (6, 9, 5)
CLASSES = (Label(name="background", value=0), Label(name='Läsion "1"', value=1), Label(name="b" * 150, value=7))


def source(path: Path, kind: type = nib.Nifti1Image):
    if kind is nib.Nifti1Image:
        save_nifti(path, np.zeros(SHAPE, np.float32), affine_ijk())
    else:
        nib.save(kind(np.zeros(SHAPE, np.float32), affine_ijk()), path)
    return read_volume(path)


@pytest.mark.parametrize("kind", [nib.Nifti1Image, nib.Nifti2Image])
@pytest.mark.parametrize("ending", [".nii", ".nii.gz"])
def test_names_are_json_in_a_comment_that_nibabel_finds_and_itk_passes_over(
    tmp_path: Path, kind: type, ending: str
) -> None:
    volume = source(tmp_path / "a.nii.gz", kind)
    labels = np.arange(270).reshape(volume.grid.shape) % 2 * 7
    for count in range(1, 4):
        path = tmp_path / f"out{ending}"
        write_labels(path, labels, volume.grid, volume.source, CLASSES[:count])
        image = nib.load(path)
        (extension,) = image.header.extensions
        assert extension.get_code() == 6
        content = extension.get_content()
        found = json.loads(content if isinstance(content, str) else content.rstrip(b"\0"))
        assert found == {"labels": {str(label.value): label.name for label in CLASSES[:count]}}
        assert np.array_equal(np.asanyarray(image.dataobj).T, labels)
        if kind is nib.Nifti1Image:  # ITK reads no NIfTI-2
            assert np.array_equal(SimpleITK.GetArrayFromImage(SimpleITK.ReadImage(str(path))), labels)
        back = read_volume(path)
        assert np.array_equal(back.array[0], labels)
        assert np.array_equal(back.grid.affine, volume.grid.affine)
        assert int(image.dataobj.offset) % 16 == 0


def test_without_names_the_file_is_what_it_was(tmp_path: Path) -> None:
    volume = source(tmp_path / "a.nii.gz")
    labels = np.ones(volume.grid.shape, np.uint8)
    write_labels(tmp_path / "out.nii", labels, volume.grid, volume.source)
    raw = (tmp_path / "out.nii").read_bytes()
    assert len(raw) == 352 + 270
    assert raw[348:352] == bytes(4)


@pytest.mark.parametrize("ending", [e for e in LABEL_ENDINGS if e not in (".png", ".bmp")])
def test_every_format_takes_names_and_equal_labels_give_equal_files(tmp_path: Path, ending: str) -> None:
    volume = source(tmp_path / "a.nii.gz")
    labels = np.arange(270).reshape(volume.grid.shape) % 3
    first = write_labels(tmp_path / f"b{ending}", labels, volume.grid, volume.source, CLASSES)
    assert first == write_labels(tmp_path / f"c{ending}", labels, volume.grid, volume.source, CLASSES)
    assert np.array_equal(read_volume(tmp_path / f"b{ending}").array[0], labels)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.nii.gz", f"b{ending}", f"c{ending}"]


def test_the_hash_of_a_detached_header_follows_its_data(tmp_path: Path) -> None:
    image = SimpleITK.GetImageFromArray(np.zeros(SHAPE, np.uint8))
    for name in ("a.mhd", "a.nhdr", "a.mha"):
        SimpleITK.WriteImage(image, str(tmp_path / name))
        before = volume_sha256(tmp_path / name)
        assert before == volume_sha256(tmp_path / name)
        (data,) = [p for p in tmp_path.iterdir() if p.stem == "a" and p.suffix in (".raw", ".mha")]
        damaged = bytearray(data.read_bytes())
        damaged[-1] ^= 1
        data.write_bytes(damaged)
        assert volume_sha256(tmp_path / name) != before
        for path in tmp_path.iterdir():
            path.unlink()
