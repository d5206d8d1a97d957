"""Fix: a copy with what can be mended, without what cannot, and never a changed input."""

from __future__ import annotations

import gzip
import hashlib
import json
import shutil
import struct
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import SimpleITK as sitk  # noqa: N813 - its customary name
from phantoms import dataset_json, make_dataset, make_dataset_2d, save_nifti
from PIL import Image

from medseg.artefacts import owned
from medseg.dataset.check import check_dataset
from medseg.dataset.layouts import read_dataset
from medseg.errors import EnvironmentFailure, IncompatibleError, InputError, OwnershipError, UsageError
from medseg.pipeline import fix
from medseg.pipeline.fix import MANIFEST, FixOptions, FixReport, fix_dataset


def image(folder: Path, case: int) -> Path:
    return folder / "imagesTr" / f"case_{case:02d}_0000.nii.gz"


def label(folder: Path, case: int) -> Path:
    return folder / "labelsTr" / f"case_{case:02d}.nii.gz"


def array(path: Path) -> np.ndarray:
    return np.asanyarray(nib.load(path).dataobj)


def patched(path: Path, offset: int, form: str, *values: float) -> None:
    raw = bytearray(gzip.decompress(path.read_bytes()))
    struct.pack_into("<" + form, raw, offset, *values)
    path.write_bytes(gzip.compress(bytes(raw), 1))


def state(folder: Path) -> dict[str, str]:
    files = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def changes(report: FixReport) -> dict[str, str]:
    return {case.id: "; ".join(case.changes) for case in report.mended}


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return make_dataset(tmp_path / "data", cases=4)


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "copy"


def test_what_is_sound_is_copied_byte_for_byte(data: Path, out: Path) -> None:
    before = state(data)
    report = fix_dataset(data, out)
    copied = state(out)
    assert {name: copied[name] for name in before if name != "dataset.json"} == {
        name: digest for name, digest in before.items() if name != "dataset.json"
    }
    assert set(copied) == {*before, MANIFEST}
    assert (report.mended, report.left_out, report.after.problems) == ((), (), ())
    assert state(data) == before


def test_voxels_that_are_not_finite_become_the_smallest_finite_value(data: Path, out: Path) -> None:
    old = nib.load(image(data, 1))
    voxels = array(image(data, 1)).copy()
    voxels[3, 4, 5], voxels[3, 4, 6], voxels[0, 0, 0] = np.nan, np.inf, -np.inf
    save_nifti(image(data, 1), voxels, old.affine)
    before = state(data)
    report = fix_dataset(data, out)
    mended = nib.load(image(out, 1))
    expected = np.where(np.isfinite(voxels), voxels, voxels[np.isfinite(voxels)].min())
    np.testing.assert_array_equal(mended.get_fdata(dtype=np.float32), expected)
    np.testing.assert_array_equal(mended.affine, nib.load(image(data, 1)).affine)
    assert mended.get_data_dtype() == np.float32
    assert "3 voxels" in changes(report)["case_01"]
    assert report.after.problems == ()
    assert state(data) == before


def test_float_labels_become_the_smallest_unsigned_type_with_their_own_header(data: Path, out: Path) -> None:
    old = nib.load(label(data, 2))
    labels = array(label(data, 2)).copy()
    save_nifti(label(data, 2), labels.astype(np.float64) + 0.0004, old.affine)
    report = fix_dataset(data, out)
    mended = nib.load(label(out, 2))
    np.testing.assert_array_equal(np.asanyarray(mended.dataobj), labels)
    assert mended.get_data_dtype() == np.uint8
    np.testing.assert_array_equal(mended.affine, old.affine)
    assert {problem.code for problem in report.before.problems} == {"W0130"}
    assert report.after.problems == ()


def test_a_label_grid_within_tolerance_gets_the_header_of_its_image(data: Path, out: Path) -> None:
    affine = nib.load(label(data, 0)).affine.copy()
    affine[:3, 3] += 0.3 * affine[:3, 0]
    save_nifti(label(data, 0), array(label(data, 0)), affine)
    report = fix_dataset(data, out)
    np.testing.assert_allclose(nib.load(label(out, 0)).affine, nib.load(image(data, 0)).affine, atol=1e-5)
    np.testing.assert_array_equal(array(label(out, 0)), array(label(data, 0)))
    assert "grid of the first image" in changes(report)["case_00"]
    assert report.after.problems == ()


def test_a_slightly_sheared_header_becomes_perpendicular(data: Path, out: Path) -> None:
    for path in (image(data, 3), label(data, 3)):
        affine = nib.load(path).affine.copy()
        affine[:3, 1] += 0.006 * affine[:3, 0] / np.linalg.norm(affine[:3, 0])
        patched(path, 252, "2h", 0, 2)
        patched(path, 280, "12f", *affine[:3].ravel())
    report = fix_dataset(data, out)
    assert {problem.code for problem in report.before.problems} == {"W0121"}
    assert report.after.problems == ()
    for path in (image(out, 3), label(out, 3)):
        columns = nib.load(path).affine[:3, :3]
        unit = columns / np.linalg.norm(columns, axis=0)
        assert abs(unit.T @ unit - np.eye(3)).max() < 1e-6
    np.testing.assert_array_equal(array(image(out, 3)), array(image(data, 3)))


def disagreeing(data: Path, case: int) -> None:
    for path in (image(data, case), label(data, case)):
        affine = nib.load(path).affine.copy()
        affine[:3, 3] += 25
        patched(path, 252, "2h", 1, 1)
        patched(path, 280, "12f", *affine[:3].ravel())


def test_two_valid_forms_that_differ_are_not_chosen_between_without_being_asked(data: Path, out: Path) -> None:
    disagreeing(data, 1)
    report = fix_dataset(data, out)
    assert {(problem.case, problem.code) for problem in report.left_out} == {("case_01", "E0122")}
    assert all("--geometry" in problem.action for problem in report.left_out)
    assert [case.id for case in report.after.cases] == ["case_00", "case_02", "case_03"]


@pytest.mark.parametrize("form", ["sform", "qform"])
def test_the_form_that_was_asked_for_becomes_the_only_one(data: Path, out: Path, form: str) -> None:
    disagreeing(data, 1)
    source = nib.load(image(data, 1))
    expected = source.get_sform() if form == "sform" else source.get_qform()
    report = fix_dataset(data, out, FixOptions(form=form))
    for path in (image(out, 1), label(out, 1)):
        mended = nib.load(path)
        np.testing.assert_allclose(mended.get_sform(), expected, atol=1e-4)
        np.testing.assert_allclose(mended.get_qform(), expected, atol=1e-4)
    np.testing.assert_array_equal(array(image(out, 1)), array(image(data, 1)))
    assert (report.left_out, report.after.problems) == ((), ())
    assert not list(out.rglob(".medseg*"))


@pytest.mark.parametrize(("value", "code"), [(0.5, "E0130"), (np.nan, "E0110"), (7, "E0131")])
def test_labels_that_only_the_chosen_form_lets_one_read_are_judged_too(
    data: Path, out: Path, value: float, code: str
) -> None:
    voxels = array(label(data, 1)).astype(np.float32)
    voxels[4, 4, 4] = value
    save_nifti(label(data, 1), voxels, nib.load(image(data, 1)).affine)
    disagreeing(data, 1)
    report = fix_dataset(data, out, FixOptions(form="qform"))
    assert {(problem.case, problem.code) for problem in report.left_out} == {("case_01", code)}
    assert not [path for path in out.rglob("*") if "case_01" in path.name]
    assert report.after.problems == ()


def test_the_only_valid_form_is_taken(data: Path, out: Path) -> None:
    expected = nib.load(image(data, 2)).get_qform()
    patched(image(data, 2), 280, "12f", *[np.nan] * 12)
    report = fix_dataset(data, out)
    np.testing.assert_allclose(nib.load(image(out, 2)).affine, expected, atol=1e-4)
    assert "header by its qform" in changes(report)["case_02"]
    assert report.after.problems == ()


def test_what_cannot_be_mended_is_left_out_and_listed(data: Path, out: Path) -> None:
    voxels = array(label(data, 0)).copy()
    voxels[2, 2, 2] = 7
    save_nifti(label(data, 0), voxels, nib.load(image(data, 0)).affine)
    label(data, 1).unlink()
    image(data, 2).write_bytes(image(data, 2).read_bytes()[:3000])
    report = fix_dataset(data, out)
    left_out = {("case_00", "E0131"), ("case_01", "E0144"), ("case_02", "E0101")}
    assert {(problem.case, problem.code) for problem in report.left_out} == left_out
    assert json.loads((out / "dataset.json").read_text())["numTraining"] == 1
    assert sorted(path.name for path in out.rglob("*.nii.gz")) == ["case_03.nii.gz", "case_03_0000.nii.gz"]
    written = json.loads((out / MANIFEST).read_text())
    assert {(row["case"], row["code"]) for row in written["left_out"]} == left_out


def test_nothing_is_written_where_no_case_can_be_kept(data: Path, out: Path) -> None:
    for case in range(4):
        label(data, case).write_bytes(b"")
    with pytest.raises(InputError) as refused:
        fix_dataset(data, out)
    assert {problem.code for problem in refused.value.problems} == {"E0101", "E0146"}
    assert not out.exists()


@pytest.mark.parametrize("drop", [False, True])
def test_duplicates_are_dropped_only_on_request(data: Path, out: Path, drop: bool) -> None:
    shutil.copy(image(data, 0), image(data, 2))
    shutil.copy(label(data, 0), label(data, 2))
    report = fix_dataset(data, out, FixOptions(drop_duplicates=drop))
    kept = [case.id for case in report.after.cases]
    assert kept == (["case_00", "case_01", "case_03"] if drop else [f"case_{n:02d}" for n in range(4)])


def test_a_stopped_copy_is_gone_on_with(data: Path, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real, done, stops = fix.mend_case, [], ["case_02"]

    def counted(case, *arguments):
        if case.id in stops:
            stops.clear()
            raise KeyboardInterrupt
        done.append(case.id)
        return real(case, *arguments)

    monkeypatch.setattr(fix, "mend_case", counted)
    with pytest.raises(KeyboardInterrupt):
        fix_dataset(data, out, FixOptions(workers=1))
    assert not (out / "dataset.json").exists()
    assert done == ["case_00", "case_01"]
    report = fix_dataset(data, out, FixOptions(workers=1))
    assert done == ["case_00", "case_01", "case_02", "case_03"]
    assert (len(report.cases), report.after.problems) == (4, ())
    whole = fix_dataset(data, out.with_name("whole"))
    assert state(out) == state(out.with_name("whole"))
    assert whole.cases == report.cases


def test_a_damaged_or_outdated_copy_is_made_again(data: Path, out: Path) -> None:
    fix_dataset(data, out)
    image(out, 0).write_bytes(b"damaged")
    save_nifti(label(data, 1), array(label(data, 1)) * 0 + 1, nib.load(image(data, 1)).affine)
    report = fix_dataset(data, out)
    assert image(out, 0).read_bytes() == image(data, 0).read_bytes()
    assert label(out, 1).read_bytes() == label(data, 1).read_bytes()
    assert report.after.errors == ()


def test_a_case_that_went_leaves_the_copy(data: Path, out: Path) -> None:
    fix_dataset(data, out)
    image(data, 3).unlink()
    label(data, 3).unlink()
    report = fix_dataset(data, out)
    assert not image(out, 3).exists()
    assert len(report.after.cases) == 3


@pytest.mark.parametrize("place", ["inside", "around", "same", "linked", "used", "file"])
def test_a_folder_that_is_not_its_own_is_refused(data: Path, tmp_path: Path, place: str) -> None:
    used = tmp_path / "used"
    used.mkdir()
    (used / "mine.txt").write_text("x")
    (tmp_path / "linked").symlink_to(data)
    places = {
        "inside": data / "copy",
        "around": tmp_path,
        "same": data,
        "linked": tmp_path / "linked" / "copy",
        "used": used,
        "file": used / "mine.txt",
    }
    before = state(tmp_path)
    with pytest.raises(UsageError):
        fix_dataset(data, places[place])
    assert state(tmp_path) == before


def test_a_copy_of_something_else_is_refused(data: Path, out: Path, tmp_path: Path) -> None:
    fix_dataset(data, out)
    with pytest.raises(IncompatibleError):
        fix_dataset(data, out, FixOptions(drop_duplicates=True))
    with pytest.raises(IncompatibleError):
        fix_dataset(make_dataset(tmp_path / "other", cases=2), out)


def test_two_at_a_time_are_refused(data: Path, out: Path) -> None:
    with owned(out), pytest.raises(OwnershipError):
        fix_dataset(data, out)


def test_a_full_disk_is_noticed_before_anything_is_written(
    data: Path, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fix.shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10, 9, 1))
    with pytest.raises(EnvironmentFailure):
        fix_dataset(data, out)
    assert not out.exists()


def test_a_decathlon_folder_becomes_one_file_per_channel(tmp_path: Path, out: Path) -> None:
    data = make_dataset(tmp_path / "data", cases=2, channels=2)
    for case in (0, 1):
        paths = [data / "imagesTr" / f"case_{case:02d}_{channel:04d}.nii.gz" for channel in (0, 1)]
        both = np.stack([array(path) for path in paths], axis=-1)
        save_nifti(data / "imagesTr" / f"case_{case:02d}.nii.gz", both, nib.load(paths[0]).affine)
        for path in paths:
            path.unlink()
    training = [
        {"image": f"./imagesTr/case_{n:02d}.nii.gz", "label": f"./labelsTr/case_{n:02d}.nii.gz"} for n in (0, 1)
    ]
    declared = {"name": "Task", "modality": {"0": "T1", "1": "T2"}, "labels": {"0": "background", "1": "a", "2": "b"}}
    (data / "dataset.json").write_text(json.dumps(declared | {"training": training, "numTraining": 2}))
    report = fix_dataset(data, out)
    assert report.after.problems == ()
    assert (report.after.dataset.layout, report.after.dataset.task) == ("nnunet", read_dataset(data).task)
    for channel in (0, 1):
        both = array(data / "imagesTr" / "case_01.nii.gz")
        np.testing.assert_array_equal(array(out / "imagesTr" / f"case_01_{channel:04d}.nii.gz"), both[..., channel])


def test_other_formats_are_converted(data: Path, out: Path) -> None:
    for path in [*data.rglob("*.nii.gz")]:
        sitk.WriteImage(sitk.ReadImage(path), path.with_name(path.name.replace(".nii.gz", ".mha")))
        path.rename(path.with_name("." + path.name))
    (data / "dataset.json").write_text(json.dumps(dataset_json(4, file_ending=".mha")))
    report = fix_dataset(data, out)
    assert (report.before.problems, report.after.problems, report.left_out) == ((), (), ())
    assert json.loads((out / "dataset.json").read_text())["file_ending"] == ".nii.gz"
    for folder, name in (("imagesTr", "case_02_0000.nii.gz"), ("labelsTr", "case_02.nii.gz")):
        old, new = nib.load(data / folder / f".{name}"), nib.load(out / folder / name)
        np.testing.assert_array_equal(np.asanyarray(new.dataobj), np.asanyarray(old.dataobj))
        np.testing.assert_allclose(new.affine, old.affine, atol=1e-4)


def test_pictures_in_a_lossy_format_are_kept_without_further_loss(tmp_path: Path, out: Path) -> None:
    data = make_dataset_2d(tmp_path / "data", cases=3)
    for path in sorted((data / "imagesTr").iterdir()):
        Image.open(path).save(path.with_suffix(".jpg"), quality=95)
        path.unlink()
    cases = {
        f"img_{n:02d}": {"images": [f"imagesTr/img_{n:02d}_0000.jpg"], "label": f"labelsTr/img_{n:02d}.png"}
        for n in range(3)
    }
    declared = json.loads((data / "dataset.json").read_text()) | {"dataset": cases, "licence": "CC0"}
    (data / "dataset.json").write_text(json.dumps(declared))
    report = fix_dataset(data, out)
    assert report.after.errors == ()
    copied = json.loads((out / "dataset.json").read_text())
    assert (copied["file_ending"], copied["licence"], "dataset" in copied) == (".png", "CC0", False)
    for n in range(3):
        expected = np.asarray(Image.open(data / "imagesTr" / f"img_{n:02d}_0000.jpg"))
        np.testing.assert_array_equal(np.asarray(Image.open(out / "imagesTr" / f"img_{n:02d}_0000.png")), expected)


def test_regions_ignore_and_missing_channels_are_declared_in_the_copy(tmp_path: Path, out: Path) -> None:
    data = make_dataset(tmp_path / "data", cases=3, channels=2)
    (data / "imagesTr" / "case_01_0001.nii.gz").unlink()
    labels = {"background": 0, "whole": [1, 2], "core": [2], "ignore": 3}
    names = {"0": "T1", "1": "T2"}
    changes = {
        "labels": labels,
        "regions_class_order": [1, 2],
        "channel_names": names,
        "missing_channels": {"case_01": [1]},
    }
    (data / "dataset.json").write_text(json.dumps(dataset_json(3, **changes)))
    report = fix_dataset(data, out)
    assert report.after.errors == ()
    assert read_dataset(out).task == read_dataset(data).task
    assert [case.images[1] is None for case in report.after.cases] == [False, True, False]


def test_real_float_labels_become_integers(shared: Path, tmp_path: Path, out: Path) -> None:
    glioma = shared / "data" / "glioma"
    data = tmp_path / "data"
    for folder in ("imagesTr", "labelsTr"):
        (data / folder).mkdir(parents=True)
        for path in glioma.joinpath(folder).glob("pat0003*"):
            (data / folder / path.name).symlink_to(path)
    declared = json.loads((glioma / "dataset.json").read_text()) | {"numTraining": 1}
    (data / "dataset.json").write_text(json.dumps(declared))
    report = fix_dataset(data, out)
    assert report.after.errors == ()
    (name,) = (path.name for path in (data / "labelsTr").iterdir())
    assert nib.load(out / "labelsTr" / name).get_data_dtype() == np.uint8
    np.testing.assert_array_equal(array(out / "labelsTr" / name), array(glioma / "labelsTr" / name))
    np.testing.assert_array_equal(nib.load(out / "labelsTr" / name).affine, nib.load(glioma / "labelsTr" / name).affine)
    assert check_dataset(out).label_types == {"uint8": 1}
