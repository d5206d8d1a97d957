"""Preprocessing a run: only the data that were planned, with the names of what changed."""

from __future__ import annotations

import re
import shutil

import nibabel as nib
import numpy as np
import pytest
from phantoms import affine_ijk, anatomy, save_nifti
from tiny_runs import CONFIGURATION, contents, cpu, edit, planned_run

from medseg.cli.main import main
from medseg.errors import IncompatibleError, InputError, IntegrityError, PartialFailure, UsageError
from medseg.pipeline.plan import PlanOptions, plan_run
from medseg.pipeline.preprocess import preprocess_run, verify_run
from medseg.pipeline.train import TrainOptions, train_run
from medseg.preparation import job
from medseg.preparation.store import open_store
from medseg.records.base import read_record, write_record
from medseg.records.plan import Plan


@pytest.fixture
def planned(tmp_path):
    return planned_run(tmp_path, cases=4)


def test_all_configurations_are_prepared_unless_one_is_named(planned):
    assert list(preprocess_run(planned, [CONFIGURATION], workers=1)) == [CONFIGURATION]
    assert not (planned / "prepared" / "2d").exists()
    manifests = preprocess_run(planned, workers=1)
    assert list(manifests) == ["2d", CONFIGURATION]
    assert all(list(m.cases) == [f"case_{n:02d}" for n in range(4)] for m in manifests.values())


def test_a_case_is_read_once_for_all_configurations_that_lack_it_and_the_stores_are_the_same(planned, monkeypatch):
    preprocess_run(planned, ["2d"], workers=1)
    preprocess_run(planned, [CONFIGURATION], workers=1)
    expected = contents(planned / "prepared")
    read = []
    real = job.read_channels
    monkeypatch.setattr(job, "read_channels", lambda paths: read.append(paths[0].name) or real(paths))
    preprocess_run(planned, workers=1)
    assert not read
    (planned / "prepared" / "2d" / "case_01.labels.b2nd").unlink()
    preprocess_run(planned, workers=1)
    assert read == ["case_01_0000.nii.gz"]
    assert contents(planned / "prepared") == expected
    shutil.rmtree(planned / "prepared")
    preprocess_run(planned, workers=1)
    assert sorted(read[1:]) == [f"case_{n:02d}_0000.nii.gz" for n in range(4)]  # several at a time
    assert contents(planned / "prepared") == expected


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


def test_verifying_counts_the_cases_and_names_what_is_damaged(planned):
    with pytest.raises(IncompatibleError, match="E0801"):
        verify_run(planned)
    preprocess_run(planned, workers=1)
    assert verify_run(planned) == {"2d": 4, CONFIGURATION: 4}
    for configuration, name in (("2d", "case_00.labels.b2nd"), (CONFIGURATION, "case_03.image.b2nd")):
        path = planned / "prepared" / configuration / name
        content = bytearray(path.read_bytes())
        content[-200] ^= 32
        path.write_bytes(content)
    with pytest.raises(IntegrityError) as caught:
        verify_run(planned)
    assert [(p.code, p.case, p.measured.split()[0]) for p in caught.value.problems] == [
        ("E0701", "case_00", "case_00.labels.b2nd"),
        ("E0701", "case_03", "case_03.image.b2nd"),
    ]
    preprocess_run(planned, workers=1)  # redoes the two
    assert verify_run(planned) == {"2d": 4, CONFIGURATION: 4}


def test_a_case_that_is_added_and_planned_is_prepared_alone(planned):
    """The channel is normalised by each case's own statistics; a CT's are of the data set, and change all cases."""
    preprocess_run(planned, [CONFIGURATION], workers=1)
    before = {path.name: path.stat().st_ino for path in (planned / "prepared" / CONFIGURATION).glob("case_*")}
    plan = read_record(planned / "plan.json", Plan)
    image, labels = anatomy(np.random.default_rng(1))
    save_nifti(planned.parent / "data" / "imagesTr" / "late_0000.nii.gz", image, affine_ijk())
    save_nifti(planned.parent / "data" / "labelsTr" / "late.nii.gz", labels, affine_ijk())
    edit(planned.parent / "data" / "dataset.json", numTraining=5)
    plan_run(planned.parent / "data", planned, PlanOptions(overwrite=True))
    write_record(planned / "plan.json", plan)  # the same decisions
    preprocess_run(planned, [CONFIGURATION], workers=1)
    after = {path.name: path.stat().st_ino for path in (planned / "prepared" / CONFIGURATION).glob("case_*")}
    assert after == before
    assert list(open_store(planned / "prepared" / CONFIGURATION).cases)[-1] == "late"


@pytest.mark.parametrize("change", ["a case is missing", "a file is missing", "a file was cut", "a record was altered"])
def test_training_refuses_prepared_cases_that_are_missing_or_altered(planned, change):
    preprocess_run(planned, [CONFIGURATION], workers=1)
    folder = planned / "prepared" / CONFIGURATION
    match change:
        case "a case is missing":
            edit(folder / "manifest.json", cases=lambda cases: {k: v for k, v in cases.items() if k != "case_01"})
        case "a file is missing":
            (folder / "case_01.labels.b2nd").unlink()
        case "a file was cut":
            path = folder / "case_01.image.b2nd"
            path.write_bytes(path.read_bytes()[:-9])
        case "a record was altered":
            edit(folder / "case_01.case.json", settings_sha256="0" * 64)
    with pytest.raises((IncompatibleError, IntegrityError)) as caught:
        train_run(planned, CONFIGURATION, "all", TrainOptions(epochs=1, device=cpu()))
    assert caught.value.problems[0].code == ("E0801" if change == "a case is missing" else "E0701")
    assert change == "a case is missing" or caught.value.problems[0].case == "case_01"


def test_a_flipped_byte_ends_training_with_the_chunk_s_name_and_preprocess_mends_it(planned, capsys):
    run = ["--run", str(planned), "--configuration", CONFIGURATION]
    assert main(["preprocess", *run, "--workers", "1"]) == 0
    path = planned / "prepared" / CONFIGURATION / "case_01.image.b2nd"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    capsys.readouterr()
    train = ["train", *run, "--fold", "all", "--epochs", "1", "--device", "cpu"]
    assert main(train) == 7
    assert re.search(r"error\[E0701\] case=case_01: case_01.image.b2nd .* chunk 0 of 1 ", capsys.readouterr().err)
    assert main(["preprocess", *run, "--workers", "1"]) == 0
    assert path.read_bytes() != bytes(content)
    assert main(["preprocess", *run, "--verify"]) == 0
