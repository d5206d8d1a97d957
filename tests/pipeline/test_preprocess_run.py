"""Preprocessing a run: only the data that were planned, with the names of what changed."""

from __future__ import annotations

import shutil

import nibabel as nib
import numpy as np
import pytest
from phantoms import affine_ijk, anatomy, save_nifti
from tiny_runs import CONFIGURATION, contents, edit, planned_run

from medseg.errors import IncompatibleError, InputError, PartialFailure, UsageError
from medseg.pipeline.preprocess import preprocess_run


@pytest.fixture
def planned(tmp_path):
    return planned_run(tmp_path, cases=4)


def test_all_configurations_are_prepared_unless_one_is_named(planned):
    assert list(preprocess_run(planned, [CONFIGURATION], workers=1)) == [CONFIGURATION]
    assert not (planned / "prepared" / "2d").exists()
    manifests = preprocess_run(planned, workers=1)
    assert list(manifests) == ["2d", CONFIGURATION]
    assert all(list(m.cases) == [f"case_{n:02d}" for n in range(4)] for m in manifests.values())


def test_preparing_again_changes_no_file(planned):
    preprocess_run(planned, [CONFIGURATION], workers=1)
    before = {path: path.stat().st_mtime_ns for path in (planned / "prepared").rglob("*.*")}
    preprocess_run(planned, [CONFIGURATION], workers=1)
    assert {path: path.stat().st_mtime_ns for path in (planned / "prepared").rglob("*.*")} == before


def test_a_batch_size_changed_in_the_plan_prepares_nothing_anew_and_a_spacing_everything(planned):
    preprocess_run(planned, [CONFIGURATION], workers=1)
    before = contents(planned / "prepared")
    edit(planned / "plan.json", configurations__3d_fullres__batch_size=3)
    preprocess_run(planned, [CONFIGURATION], workers=1)
    assert contents(planned / "prepared") == before
    edit(planned / "plan.json", configurations__3d_fullres__spacing_mm=[2.5, 1.1, 0.9])
    preprocess_run(planned, [CONFIGURATION], workers=1)
    after = contents(planned / "prepared")
    assert after.keys() == before.keys()
    assert all(after[name] != before[name] for name in after)


def test_a_file_that_changed_since_planning_is_refused_and_the_others_are_done(planned):
    image = planned.parent / "data" / "imagesTr" / "case_02_0000.nii.gz"
    loaded = nib.load(image)
    save_nifti(image, np.asarray(loaded.dataobj) + 1, loaded.affine)
    with pytest.raises(PartialFailure) as caught:
        preprocess_run(planned, [CONFIGURATION], workers=1)
    assert [(p.code, p.case) for p in caught.value.problems] == [("E0103", "case_02")]
    assert not (planned / "prepared" / CONFIGURATION / "manifest.json").exists()
    done = {path.name.partition(".")[0] for path in (planned / "prepared" / CONFIGURATION).glob("*.case.json")}
    assert done == {"case_00", "case_01", "case_03"}


def test_a_label_that_changed_after_preparing_is_noticed(planned):
    preprocess_run(planned, [CONFIGURATION], workers=1)
    label = planned.parent / "data" / "labelsTr" / "case_00.nii.gz"
    loaded = nib.load(label)
    save_nifti(label, np.flip(np.asarray(loaded.dataobj), 0), loaded.affine)
    with pytest.raises(PartialFailure, match=r"E0103.*case_00"):
        preprocess_run(planned, [CONFIGURATION], workers=1)


@pytest.mark.parametrize("change", ["new", "gone", "both"])
def test_cases_that_came_or_went_since_planning_are_refused_by_name(planned, change):
    data = planned.parent / "data"
    if change != "gone":
        image, labels = anatomy(np.random.default_rng(1))
        save_nifti(data / "imagesTr" / "late_0000.nii.gz", image, affine_ijk())
        save_nifti(data / "labelsTr" / "late.nii.gz", labels, affine_ijk())
    if change != "new":
        (data / "imagesTr" / "case_01_0000.nii.gz").unlink()
        (data / "labelsTr" / "case_01.nii.gz").unlink()
    with pytest.raises(IncompatibleError, match="E0803") as caught:
        preprocess_run(planned, [CONFIGURATION], workers=1)
    assert caught.value.exit_code == 8
    assert ("late" in str(caught.value)) == (change != "gone")
    assert ("case_01" in str(caught.value)) == (change != "new")
    assert not (planned / "prepared").exists()


def test_a_data_set_that_is_gone_is_named(planned):
    shutil.move(planned.parent / "data", planned.parent / "elsewhere")
    with pytest.raises(InputError, match=r"E0100.*data"):
        preprocess_run(planned, [CONFIGURATION], workers=1)


def test_a_configuration_that_the_plan_does_not_have_is_refused_before_anything_is_prepared(planned):
    with pytest.raises(UsageError, match=r"E0001.*3d_lowres.*2d, 3d_fullres"):
        preprocess_run(planned, [CONFIGURATION, "3d_lowres"], workers=1)
    assert not (planned / "prepared").exists()
