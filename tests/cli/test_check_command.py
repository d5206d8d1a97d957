"""``medseg check``: the printed report, the JSON one, images without a data set, and the corrected copy."""

from __future__ import annotations

import json
import shutil

import nibabel as nib
import numpy as np
import pytest
from phantoms import make_dataset, make_dataset_2d, save_nifti

from medseg.dataset import side_by_side
from medseg.records.check import CheckRecord, FixManifest


@pytest.fixture
def data(tmp_path):
    return make_dataset(tmp_path / "my data", cases=9)


def put_nan(data, case):
    path = data / "imagesTr" / f"case_{case:02d}_0000.nii.gz"
    voxels = np.asanyarray(nib.load(path).dataobj).copy()
    voxels[1, 2, 3] = np.nan
    save_nifti(path, voxels, nib.load(path).affine)


def test_the_report_says_what_the_data_are_and_what_to_do_next(medseg, data):
    ended = medseg("check", data)
    assert ended.code == 0
    assert ended.out.startswith("nnU-Net v2 data set\n  read       9 cases, 18 files\n  channels   MRI\n")
    assert "  spacing    2 × 1.1 × 0.9 mm (z × y × x)\n" in ended.out
    assert "  label 2    inner, in every case\n" in ended.out
    assert ended.out.endswith(f"Next: medseg run '{data}' --run RUN --time-budget 15m\n")
    assert "check: 9/9 cases" in ended.err


def test_long_lists_are_cut_short_unless_all_is_asked_for(medseg, data):
    for case in range(7):
        put_nan(data, case)
    short, full = medseg("check", data), medseg("check", data, "--all")
    assert (short.code, full.code) == (3, 3)
    assert "error E0110  not-a-number or infinite voxels in 7 cases" in short.out
    assert "  … and 3 more (--all shows them)" in short.out
    assert short.out.count("3 voxels") == full.out.count("3 voxels")
    assert [f"case_{case:02d}" in full.out for case in range(7)] == [True] * 7
    assert "case_05" not in short.out
    assert "--fix COPY mends 7 of these problems" in short.out


def test_the_json_report_follows_its_record(medseg, data):
    put_nan(data, 3)
    ended = medseg("check", data, "--json")
    record = CheckRecord.model_validate_json(ended.out)
    assert (ended.code, record.cases, record.files_read, record.errors, record.warnings) == (3, 9, 18, 1, 0)
    (problem,) = record.problems
    assert (problem.code, problem.case, problem.severity, problem.fixable) == ("E0110", "case_03", "error", True)
    assert record.schema_version == 1
    assert [(label.name, label.cases) for label in record.labels] == [("outer", 9), ("inner", 9)]
    assert record.spacing_mm.median == pytest.approx((2.0, 1.1, 0.9), rel=1e-5)


def test_a_folder_of_images_and_a_single_file_can_be_checked(medseg, data, tmp_path):
    put_nan(data, 3)
    folder = medseg("check", data / "imagesTr")
    assert folder.code == 3
    assert folder.out.startswith("Images without a data set\n  read       9 cases, 9 files\n")
    assert "case_03_0000.nii.gz  channel 0: 1 voxel is not finite" in folder.out
    one = medseg("check", data / "imagesTr" / "case_04_0000.nii.gz")
    assert (one.code, one.out.splitlines()[-1]) == (0, "1 image, 1 file read: 0 errors, 0 warnings")
    pictures = make_dataset_2d(tmp_path / "pictures", cases=2) / "imagesTr"
    assert medseg("check", pictures).code == 0


def test_a_truncated_single_file_ends_with_3(medseg, data):
    path = data / "imagesTr" / "case_04_0000.nii.gz"
    path.write_bytes(path.read_bytes()[:2000])
    ended = medseg("check", path)
    assert ended.code == 3
    assert "error E0101  file truncated in 1 case" in ended.out


def test_fix_writes_a_copy_and_says_what_it_did(medseg, data, tmp_path):
    put_nan(data, 3)
    (data / "labelsTr" / "case_05.nii.gz").unlink()
    ended = medseg("check", data, "--fix", tmp_path / "copy")
    assert ended.code == 4
    assert ended.out.startswith("Mended 1 case, copied 7 unchanged\n  case_03: case_03_0000.nii.gz: 1 voxels")
    assert "Left out 1 case\n  case_05: E0144" in ended.out
    assert ended.out.endswith("8 complete cases, 0 errors, 0 warnings\n")
    FixManifest.model_validate_json((tmp_path / "copy" / "medseg-fix.json").read_text())
    assert medseg("check", tmp_path / "copy").code == 0
    again = medseg("check", data, "--fix", tmp_path / "copy", "--json")
    value = json.loads(again.out)
    assert [row["case"] for row in value["fix"]["left_out"]] == ["case_05"]
    assert value["fix"]["after"]["errors"] == 0


def test_fix_of_a_sound_data_set_ends_with_0_and_refuses_a_folder_in_use(medseg, data, tmp_path):
    assert medseg("check", data, "--fix", tmp_path / "copy").code == 0
    refused = medseg("check", data, "--fix", data / "copy")
    assert (refused.code, refused.out) == (2, "")
    assert "error[E0001]" in refused.err
    assert medseg("check", data, "--geometry", "sform").code == 2


def test_ctrl_c_while_checking_ends_with_130_and_starts_no_more_cases(medseg, data, monkeypatch):
    started = []

    def stopping(*arguments, **options):
        started.append(1)
        raise KeyboardInterrupt

    monkeypatch.setattr(side_by_side, "wait", stopping)
    ended = medseg("check", data, "--workers", "2")
    assert (ended.code, started) == (130, [1])
    assert "Traceback" not in ended.err


def test_what_readers_warn_of_is_said_once_in_the_report(medseg, data):
    for name in ("imagesTr/case_02_0000.nii.gz", "labelsTr/case_02.nii.gz"):
        image = nib.load(data / name)
        image.header["sform_code"] = image.header["qform_code"] = 0
        plain = nib.Nifti1Image(np.asanyarray(image.dataobj), None)
        plain.header.set_zooms((0.9, 1.1, 2.0))
        shutil.move(data / name, data / name.replace("case_02", ".old"))
        plain.header["sform_code"] = plain.header["qform_code"] = 0
        nib.save(plain, data / name)
    ended = medseg("check", data, "--progress", "none")
    assert (ended.code, ended.err) == (0, "")
    assert "warning W0123  no orientation in the header in 1 case" in ended.out
