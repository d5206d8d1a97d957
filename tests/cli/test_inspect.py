"""``medseg inspect`` and DICOM folders given to ``medseg predict``."""

from __future__ import annotations

import json
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from dicom_phantoms import COLUMNS, ROWS, SLICES, affine_ras, voxels, write_series
from phantoms import affine_ijk, save_nifti
from PIL import Image

from medseg.cli.main import main
from medseg.dataset.layouts import scan_inputs
from medseg.imaging.geometry import nifti_affine
from medseg.imaging.volumes import read_volume
from medseg.records.task import Channel, Label, Task


def task(channels: int = 1) -> Task:
    return Task(
        name="t",
        channels=tuple(Channel(name=f"c{n}") for n in range(channels)),
        labels=(Label(name="background", value=0), Label(name="a", value=1)),
    )


def test_every_series_is_shown_with_what_is_needed_to_choose_it(tmp_path, capsys):
    write_series(tmp_path / "p" / "a")
    write_series(tmp_path / "p" / "b", series="1.2.9", SeriesDescription="scout\x1b[2J", SeriesNumber=9)
    write_series(tmp_path / "p" / "c", series="1.2.99", SeriesNumber=10, change=lambda ds, z: z != 3)
    assert main(["inspect", str(tmp_path)]) == 3
    shown = capsys.readouterr()
    lines = shown.out.splitlines()
    assert [line.split()[0] for line in lines] == ["p#1", "p#2", "p#3"]
    assert "CT 7 files 'thorax t1 post'  7 × 14 × 11  3 × 0.7 × 0.9 mm" in lines[0]
    assert "uint16 4 to 4095" in lines[0]
    assert "\x1b" not in shown.out
    assert "cannot be read" in lines[2]
    assert "E0150" in shown.err
    assert main(["inspect", f"{tmp_path / 'p'}#1.2.9", "--json"]) == 3  # 1.2.99 starts so, too
    capsys.readouterr()
    assert main(["inspect", f"{tmp_path / 'p'}#scout", "--json"]) == 0
    (row,) = json.loads(capsys.readouterr().out)
    assert (row["number"], row["shape"], row["axes"], row["problems"]) == (2, [SLICES, ROWS, COLUMNS], "SPL", [])


def test_files_of_any_format_are_shown(tmp_path, capsys):
    array = np.arange(5 * 6 * 7 * 2, dtype=np.float32).reshape(5, 6, 7, 2)
    array[0, 0, 0, 0] = np.nan
    save_nifti(tmp_path / "a.nii.gz", array, affine_ijk())
    Image.fromarray(np.arange(12, dtype=np.uint8).reshape(3, 4)).save(tmp_path / "b.png")
    (tmp_path / "c.nii").write_bytes(b"broken")
    assert main(["inspect", str(tmp_path)]) == 3
    shown = capsys.readouterr()
    first, second, third = shown.out.splitlines()
    assert "2 × 7 × 6 × 5" in first
    assert "float32 1 to 419" in first
    assert "1 × 3 × 4" in second
    assert "uint8 0 to 11" in second
    assert "cannot be read" in third
    assert "E0102" in shown.err
    assert main(["inspect", str(tmp_path / "absent")]) == 3
    (tmp_path / "empty").mkdir()
    assert main(["inspect", str(tmp_path / "empty")]) == 3


def test_a_folder_of_dicom_files_is_a_case_and_so_is_each_folder_in_a_folder(tmp_path):
    write_series(tmp_path / "one")
    (case,) = scan_inputs(tmp_path / "one", task()).cases
    assert (case.id, case.images) == ("one", (tmp_path / "one",))
    write_series(tmp_path / "all" / "P_1")
    write_series(tmp_path / "all" / "P_2" / "study" / "t1")
    (tmp_path / "all" / "nothing").mkdir()
    assert [case.id for case in scan_inputs(tmp_path / "all", task()).cases] == ["P_1", "P_2"]
    chosen = scan_inputs(Path(f"{tmp_path / 'all'}#t1 post"), task()).cases
    assert [(case.id, case.images[0].name) for case in chosen] == [("P_1", "P_1#t1 post"), ("P_2", "P_2#t1 post")]
    np.testing.assert_array_equal(read_volume(chosen[0].images[0]).array[0], voxels())


def test_folders_with_channel_numbers_are_the_channels_of_a_case(tmp_path):
    write_series(tmp_path / "case_0000")
    write_series(tmp_path / "case_0001", series="1.2.5")
    (case,) = scan_inputs(tmp_path, task(2)).cases
    assert (case.id, [image.name for image in case.images]) == ("case", ["case_0000", "case_0001"])


def test_images_of_another_format_come_before_dicom(tmp_path):
    save_nifti(tmp_path / "a.nii.gz", np.zeros((4, 5, 6), np.uint8), affine_ijk())
    write_series(tmp_path / "p")
    assert [case.id for case in scan_inputs(tmp_path, task()).cases] == ["a"]


@pytest.mark.parametrize("faulty", [False, True])
def test_dicom_folders_are_segmented_on_their_own_grid(finished, tmp_path, capsys, faulty):
    array = np.kron(voxels(5), np.ones((2, 2, 2), np.uint16))
    write_series(tmp_path / "in" / "good", array)
    if faulty:
        write_series(tmp_path / "in" / "bad", change=lambda ds, z: z != 2)
    command = ["predict", "--model", str(finished), "-i", str(tmp_path / "in"), "-o", str(tmp_path / "out")]
    assert main([*command, "--device", "cpu", "--progress", "none"]) == (4 if faulty else 0)
    assert ("E0150" in capsys.readouterr().err) == faulty
    labels = nib.load(tmp_path / "out" / "good.nii.gz")
    assert labels.shape == array.shape[::-1]
    np.testing.assert_allclose(labels.affine, affine_ras()[:, [2, 1, 0, 3]], atol=1e-4)
    np.testing.assert_allclose(nifti_affine(read_volume(tmp_path / "in" / "good").grid), labels.affine, atol=1e-4)
    assert main([*command, "--device", "cpu", "--progress", "none"]) == (4 if faulty else 0)
    assert "1 were there already" in capsys.readouterr().out
