"""Check: every fault planted in a phantom data set is found, all in one run, and real data sets are clean."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from phantoms import affine_ijk, anatomy, dataset_json, make_dataset, make_dataset_2d, save_nifti
from PIL import Image

from medseg.dataset import case_check
from medseg.dataset.check import CheckReport, check_dataset
from medseg.dataset.labels import label_values
from medseg.errors import Problem
from medseg.progress import Silent

Found = set[tuple[str, str | None]]


def found(report: CheckReport) -> Found:
    return {(problem.code, problem.case) for problem in report.problems}


def edit(path: Path, change: Callable[[np.ndarray], np.ndarray], dtype: type | None = None) -> None:
    image = nib.load(path)
    array = change(np.asanyarray(image.dataobj).copy())
    save_nifti(path, array if dtype is None else array.astype(dtype), image.affine)


def put(value: float) -> Callable[[np.ndarray], np.ndarray]:
    """Write ``value`` into three voxels, the first at (i, j, k) = (4, 3, 2)."""

    def change(array: np.ndarray) -> np.ndarray:
        array = array.astype(np.float32)
        array[4, 3, 2] = array[5, 3, 2] = array[4, 6, 7] = value
        return array

    return change


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return make_dataset(tmp_path / "data", cases=4, channels=2)


def image(folder: Path, case: int, channel: int = 0) -> Path:
    return folder / "imagesTr" / f"case_{case:02d}_{channel:04d}.nii.gz"


def label(folder: Path, case: int) -> Path:
    return folder / "labelsTr" / f"case_{case:02d}.nii.gz"


def the(report: CheckReport, code: str) -> Problem:
    (problem,) = (problem for problem in report.problems if problem.code == code)
    return problem


def test_a_sound_data_set_has_no_problems(folder: Path) -> None:
    report = check_dataset(folder)
    assert report.problems == ()
    assert (len(report.cases), report.files_read, report.identical) == (4, 12, ())


def test_pictures_are_checked_too(tmp_path: Path) -> None:
    folder = make_dataset_2d(tmp_path, cases=3)
    assert check_dataset(folder).problems == ()
    Image.fromarray(np.zeros((40, 56), np.uint8)).save(folder / "labelsTr" / "img_01.png")
    Image.fromarray(np.full((41, 57), 255, np.uint8)).save(folder / "labelsTr" / "img_02.png")
    report = check_dataset(folder)
    assert ("W0134", "img_01") in found(report)
    assert {("E0119", "img_02"), ("E0131", "img_02")} <= found(report)


def test_all_faults_of_all_cases_are_found_in_one_run(tmp_path: Path) -> None:
    folder = make_dataset(tmp_path, cases=12, channels=2)
    edit(image(folder, 0), put(np.nan))
    edit(image(folder, 1, 1), put(-np.inf))
    edit(label(folder, 1), put(np.nan))
    edit(label(folder, 2), put(1.4))
    edit(label(folder, 3), put(7))
    edit(label(folder, 4), lambda array: array * 0)
    edit(image(folder, 5), lambda array: array * 0 + 3)
    edit(label(folder, 6), lambda array: array[:-1])
    affine = nib.load(image(folder, 7)).affine.copy()
    affine[:3, 3] += 2 * affine[:3, 1]
    save_nifti(image(folder, 7, 1), np.asanyarray(nib.load(image(folder, 7, 1)).dataobj), affine)
    whole = image(folder, 8).read_bytes()
    image(folder, 8).write_bytes(whole[: len(whole) * 7 // 10])
    label(folder, 9).write_bytes(b"")
    image(folder, 10, 1).unlink()
    label(folder, 11).unlink()
    report = check_dataset(folder)
    assert found(report) == {
        ("E0110", "case_00"),
        ("E0110", "case_01"),
        ("E0130", "case_02"),
        ("E0131", "case_03"),
        ("W0134", "case_04"),
        ("W0136", "case_05"),
        ("E0119", "case_06"),
        ("E0120", "case_07"),
        ("E0101", "case_08"),
        ("E0101", "case_09"),
        ("E0133", "case_10"),
        ("E0144", "case_11"),
    }
    assert len([problem for problem in report.problems if problem.code == "E0110"]) == 3
    assert [problem.severity for problem in report.problems] == ["error"] * 11 + ["warning"] * 2
    assert report.files_read == 3 * 10 - 2
    assert all(problem.action and len(str(problem)) <= 300 for problem in report.problems)


def test_a_finding_says_what_was_measured(folder: Path) -> None:
    edit(image(folder, 0), put(np.nan))
    edit(label(folder, 1), put(1.4))
    edit(label(folder, 2), put(7))
    affine = nib.load(label(folder, 3)).affine.copy()
    affine[:3, 3] += 3 * affine[:3, 0]
    save_nifti(label(folder, 3), np.asanyarray(nib.load(label(folder, 3)).dataobj), affine)
    report = check_dataset(folder)
    assert "channel 0 (MRI): 3 voxels are not finite, the first at (2, 3, 4) (z, y, x)" in the(report, "E0110").measured
    assert "3 voxels are no integers: 1.4" in the(report, "E0130").measured
    assert "7 (3 voxels)" in the(report, "E0131").measured
    assert "label against channel 0 (MRI): corners lie 3 voxels (2.7 mm) apart" in the(report, "E0120").measured


@pytest.mark.parametrize(("voxels", "code"), [(0.05, None), (0.3, "W0120"), (0.7, "E0120")])
def test_small_differences_between_grids_are_tolerated_or_noted(folder: Path, voxels: float, code: str | None) -> None:
    affine = nib.load(label(folder, 0)).affine.copy()
    affine[:3, 3] += voxels * affine[:3, 0]
    save_nifti(label(folder, 0), np.asanyarray(nib.load(label(folder, 0)).dataobj), affine)
    assert found(check_dataset(folder)) == ({(code, "case_00")} if code else set())


def test_a_flipped_label_of_the_same_shape_is_found(folder: Path) -> None:
    flipped = nib.load(label(folder, 0)).affine @ np.diag([-1, 1, 1, 1])
    save_nifti(label(folder, 0), np.asanyarray(nib.load(label(folder, 0)).dataobj), flipped)
    assert found(check_dataset(folder)) == {("E0120", "case_00")}


@pytest.mark.parametrize(
    ("value", "code"), [(1.0, None), (1.0005, "W0130"), (1.9995, "W0130"), (1.01, "E0130"), (0.5, "E0130"),
                        (-1, "E0131"), (70000, "E0131"), (1e12, "E0131"), (np.nan, "E0110"), (np.inf, "E0110")]
)  # fmt: skip
def test_float_labels_are_accepted_when_they_are_integers(folder: Path, value: float, code: str | None) -> None:
    edit(label(folder, 1), put(value))
    assert found(check_dataset(folder)) == ({(code, "case_01")} if code else set())


def test_the_ignore_value_is_declared_but_no_foreground(folder: Path) -> None:
    labels = {"background": 0, "outer": 1, "inner": 2, "ignore": 9}
    names = {"0": "MRI", "1": "MRI1"}
    (folder / "dataset.json").write_text(json.dumps(dataset_json(4, labels=labels, channel_names=names)))
    edit(label(folder, 0), lambda array: np.where(array > 0, 9, 0).astype(np.uint8))
    assert found(check_dataset(folder)) == {("W0134", "case_00")}


def test_labels_that_no_case_has_are_named(folder: Path) -> None:
    labels = {"background": 0, "outer": 1, "inner": 2, "spare": 5}
    names = {"0": "MRI", "1": "MRI1"}
    (folder / "dataset.json").write_text(json.dumps(dataset_json(4, labels=labels, channel_names=names)))
    assert the(check_dataset(folder), "W0132").measured == "label 5 (spare) is in no case"
    for case in range(4):
        edit(label(folder, case), lambda array: array * 0)
    assert found(check_dataset(folder)) == {("E0135", None)} | {("W0134", f"case_{case:02d}") for case in range(4)}


def test_the_same_image_under_two_ids_is_found_whatever_its_compression(folder: Path) -> None:
    for channel in (0, 1):
        copied = nib.load(image(folder, 1, channel))
        image(folder, 3, channel).unlink()
        nib.save(copied, image(folder, 3, channel).with_suffix(""))
        raw = image(folder, 3, channel).with_suffix("").read_bytes()
        image(folder, 3, channel).with_suffix("").unlink()
        image(folder, 3, channel).write_bytes(gzip.compress(raw, 1))
    label(folder, 3).write_bytes(label(folder, 1).read_bytes())
    report = check_dataset(folder)
    assert [problem.code for problem in report.problems] == ["W0141", "W0141"]
    assert report.identical == (("case_01", "case_03"),)


def test_a_channel_copied_within_a_case_is_found(folder: Path) -> None:
    image(folder, 2, 1).write_bytes(image(folder, 2, 0).read_bytes())
    report = check_dataset(folder)
    assert found(report) == {("W0141", "case_02")}
    assert report.identical == ()


def test_structure_and_declaration_are_part_of_the_report(folder: Path) -> None:
    (folder / "imagesTr" / "case_00_0000.nii.gz").rename(folder / "imagesTr" / "CASE_01_0000.nii.gz")
    (folder / "imagesTr" / "notes.txt").write_text("x")
    label(folder, 2).unlink()
    label(folder, 2).symlink_to(folder / "gone.nii.gz")
    report = check_dataset(folder)
    assert found(report) == {
        ("E0133", "CASE_01"),
        ("E0133", "case_00"),
        ("E0143", "case_02"),
        ("W0147", None),
        ("W0148", None),
    }
    (folder / "dataset.json").write_text("{}")
    broken = check_dataset(folder)
    assert broken.dataset is None
    assert broken.cases == ()
    assert {code for code, _ in found(broken)} == {"E0145"}


def test_notes_of_the_reader_are_part_of_the_report(folder: Path) -> None:
    loaded = nib.load(image(folder, 0))
    loaded.set_sform(None, 0)
    loaded.set_qform(None, 0)
    loaded.header["pixdim"][1:4] = (0.9, 1.1, 2.0)
    raw = np.asanyarray(loaded.dataobj)
    new = nib.Nifti1Image(raw, None, loaded.header)
    new.header["sform_code"] = new.header["qform_code"] = 0
    nib.save(new, image(folder, 0))
    assert ("W0123", "case_00") in found(check_dataset(folder))


def test_a_reader_that_fails_unexpectedly_does_not_stop_the_others(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = case_check.read_volume

    def broken(path: Path, channels: int) -> object:
        if path.name == "case_01.nii.gz":
            raise ZeroDivisionError("a bug")
        return real(path, channels)

    monkeypatch.setattr(case_check, "read_volume", broken)
    report = check_dataset(folder)
    assert found(report) == {("E7000", "case_01")}
    assert report.files_read == 11


def test_the_report_is_the_same_for_any_number_of_workers(folder: Path) -> None:
    edit(label(folder, 0), put(7))
    edit(image(folder, 3), lambda array: array * 0)
    image(folder, 2).write_bytes(image(folder, 1).read_bytes())
    assert check_dataset(folder, workers=1).problems == check_dataset(folder, workers=4).problems


def test_progress_counts_cases(folder: Path) -> None:
    class Recorder(Silent):
        def __init__(self) -> None:
            self.events: list[object] = []

        def begin(self, stage: str, total: int, unit: str) -> None:
            self.events.append((stage, total, unit))

        def update(self, done: int, note: str = "") -> None:
            self.events.append(done)

        def end(self) -> None:
            self.events.append("end")

    recorder = Recorder()
    check_dataset(folder, progress=recorder)
    assert recorder.events == [("check", 4, "cases"), 1, 2, 3, 4, "end"]


@pytest.mark.parametrize("dtype", [np.uint8, np.int16, np.int32, np.uint64, np.float32, np.float64])
def test_label_values_count_like_numpy(dtype: type) -> None:
    array = np.random.default_rng(0).integers(0, 60, (130, 100, 101)).astype(dtype)
    array[::7, 3, 5] = 65535 if np.dtype(dtype).itemsize > 2 else 99
    values, counts = np.unique(array, return_counts=True)
    assert label_values(array).counts == dict(zip(values.astype(int).tolist(), counts.tolist(), strict=True))
    assert label_values(array[:, ::2, ::-1]).fractional == 0


def test_label_values_keep_values_out_of_range_and_fractions_apart() -> None:
    values = label_values(np.array([[-3.0, 1e6, 2.0, 2.0004], [0.5, 2.7, 0, 1e6]]))
    assert values.counts == {-3: 1, 0: 1, 2: 2, 1000000: 2}
    assert (values.fractional, values.examples) == (2, (0.5, 2.7))


@pytest.mark.parametrize("name", ["cardiac", "nuclei", "membranes", "glioma", "ms_lesions"])
def test_real_data_sets_are_clean(shared: Path, name: str) -> None:
    report = check_dataset(shared / "data" / name)
    assert report.problems == ()
    assert report.files_read == sum(len(set(case.images)) + 1 for case in report.cases)


def test_real_hippocampus_images_on_another_scale_are_named_and_nothing_else(shared: Path) -> None:
    folder = shared / "data" / "hippocampus"
    report = check_dataset(folder)
    named = {problem.case for problem in report.problems}
    assert {problem.code for problem in report.problems} == {"W0127"}
    top = {
        case.id: float(np.percentile(np.asanyarray(nib.load(case.images[0]).dataobj), 99.5)) for case in report.cases
    }
    assert named == {case for case, value in top.items() if value > 1e5}
    assert 0 < len(named) < 40
    assert max(value for case, value in top.items() if case not in named) < 2e4


def test_the_brief_names_a_few_of_every_kind(folder: Path) -> None:
    for case in range(4):
        edit(label(folder, case), lambda array: array * 0)
    brief = check_dataset(folder).brief
    assert [line.partition(" ")[0] for line in brief] == ["error[E0135]:", *["warning[W0134]"] * 3, "warning[W0134]:"]
    assert "1 more; medseg check lists them" in brief[-1]


def test_real_scribbles_with_an_ignore_label_are_clean(shared: Path, tmp_path: Path) -> None:
    cardiac = shared / "data" / "cardiac"
    (tmp_path / "imagesTr").symlink_to(cardiac / "imagesTr")
    (tmp_path / "labelsTr").symlink_to(cardiac / "labelsScribble")
    (tmp_path / "dataset.json").symlink_to(cardiac / "dataset_scribble.json")
    report = check_dataset(tmp_path)
    assert report.problems == ()
    assert report.dataset.task.ignore_value == 4


def test_a_real_ct_and_its_spleen_are_clean(shared: Path, tmp_path: Path) -> None:
    scan = shared / "data" / "formats" / "bids_testing" / "ct_scan"
    (tmp_path / "imagesTr").mkdir()
    (tmp_path / "labelsTr").mkdir()
    (tmp_path / "imagesTr" / "spleen_0000.nii.gz").symlink_to(scan / "sub-spleen2" / "ct" / "sub-spleen2_ct.nii.gz")
    labels = scan / "derivatives" / "labels" / "sub-spleen2" / "ct" / "sub-spleen2_ct_seg-manual.nii.gz"
    (tmp_path / "labelsTr" / "spleen.nii.gz").symlink_to(labels)
    declared = dataset_json(1, channel_names={"0": "CT"}, labels={"background": 0, "spleen": 1})
    (tmp_path / "dataset.json").write_text(json.dumps(declared))
    assert check_dataset(tmp_path).problems == ()


def test_an_undeclared_structure_of_a_real_ct_is_named(shared: Path, tmp_path: Path) -> None:
    ct = shared / "data" / "ct_thorax"
    (tmp_path / "imagesTr").mkdir()
    (tmp_path / "labelsTr").mkdir()
    (tmp_path / "imagesTr" / "ct_0000.nii.gz").symlink_to(ct / "image.nii.gz")
    (tmp_path / "labelsTr" / "ct.nii.gz").symlink_to(ct / "labels25.nii.gz")
    labels = {"background": 0} | {f"s{n}": n for n in range(1, 24)}
    (tmp_path / "dataset.json").write_text(json.dumps(dataset_json(1, channel_names={"0": "CT"}, labels=labels)))
    report = check_dataset(tmp_path)
    assert found(report) == {("E0131", "ct")}
    counts = label_values(np.asanyarray(nib.load(ct / "labels25.nii.gz").dataobj)).counts
    assert f"24 ({counts[24]} voxels)" in str(report.problems[0])


def test_one_voxel_and_one_slice_are_data_too(tmp_path: Path) -> None:
    for name, shape in (("voxel", (1, 1, 1)), ("slice", (7, 9, 1)), ("row", (8, 1, 1))):
        _, labels = anatomy(np.random.default_rng(0), shape)
        save_nifti(
            tmp_path / "imagesTr" / f"{name}_0000.nii.gz",
            np.arange(labels.size).reshape(shape).astype("f4"),
            affine_ijk(),
        )
        save_nifti(tmp_path / "labelsTr" / f"{name}.nii.gz", np.ones(shape, np.uint8), affine_ijk())
    (tmp_path / "dataset.json").write_text(json.dumps(dataset_json(3, labels={"background": 0, "a": 1})))
    assert found(check_dataset(tmp_path)) == {("W0137", "voxel"), ("W0137", "row"), ("W0139", "voxel")}
