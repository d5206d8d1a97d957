"""Fingerprints: oracles are numpy on arrays read by nibabel, and nnU-Net's own fingerprint of the same data."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from phantoms import affine_ijk, dataset_json, make_dataset, make_dataset_2d, save_nifti

from medseg.dataset import fingerprint as module
from medseg.dataset import measurement
from medseg.dataset.fingerprint import from_nnunet, measure
from medseg.dataset.layouts import read_dataset
from medseg.errors import InputError, IntegrityError, MedsegError, ResourceError
from medseg.planning.planner import make_plan
from medseg.records.fingerprint import Fingerprint


def foregrounds(folder: Path, channel: int = 0) -> list[np.ndarray]:
    """Foreground values of each case, read by nibabel."""
    found = []
    for path in sorted((folder / "labelsTr").glob("*.nii.gz")):
        image = folder / "imagesTr" / path.name.replace(".nii.gz", f"_{channel:04d}.nii.gz")
        labels = np.asanyarray(nib.load(path).dataobj)
        found.append(np.asanyarray(nib.load(image).dataobj)[labels > 0].astype(np.float64))
    return found


def weighted(cases: list[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """All values, and weights that give every case the same part."""
    return np.concatenate(cases), np.concatenate([np.full(len(case), 1 / len(case)) for case in cases])


def test_statistics_are_those_of_all_cases_in_equal_parts(tmp_path):
    folder = make_dataset(tmp_path / "d", cases=4, channels=2)
    found = measure(read_dataset(folder)).fingerprint
    for channel, intensity in enumerate(found.intensities):
        values, weights = weighted(foregrounds(folder, channel))
        mean = np.average(values, weights=weights)
        std = np.average((values - mean) ** 2, weights=weights) ** 0.5
        percentiles = np.percentile(values, (0.5, 50, 99.5), weights=weights, method="inverted_cdf")
        np.testing.assert_allclose((intensity.mean, intensity.std), (mean, std), rtol=1e-12)
        assert (intensity.min, intensity.max) == (values.min(), values.max())
        np.testing.assert_allclose(
            (intensity.percentile_00_5, intensity.median, intensity.percentile_99_5), percentiles, rtol=1e-6
        )


def test_large_cases_are_thinned_to_evenly_spaced_ranks(tmp_path, monkeypatch):
    dataset = read_dataset(make_dataset(tmp_path / "d", cases=3))
    exact = measure(dataset).fingerprint.intensities[0]
    monkeypatch.setattr(module, "MAX_VALUES", 3 * 400)
    thinned = measure(dataset).fingerprint.intensities[0]
    assert (thinned.mean, thinned.std, thinned.min, thinned.max) == (exact.mean, exact.std, exact.min, exact.max)
    values, weights = weighted(foregrounds(dataset.root))
    for share, value in ((0.005, thinned.percentile_00_5), (0.5, thinned.median), (0.995, thinned.percentile_99_5)):
        assert weights[values <= value].sum() / 3 == pytest.approx(share, abs=1 / 400)


def test_any_number_of_workers_gives_the_same_fingerprint(tmp_path):
    dataset = read_dataset(make_dataset(tmp_path / "d", cases=5, channels=2))
    assert measure(dataset, workers=1).fingerprint == measure(dataset, workers=4).fingerprint


def test_shapes_and_spacings_are_canonical_after_the_crop_to_nonzero(tmp_path):
    folder = make_dataset(tmp_path / "d", cases=1)
    image_path = folder / "imagesTr" / "case_00_0000.nii.gz"
    label_path = folder / "labelsTr" / "case_00.nii.gz"
    image = np.asanyarray(nib.load(image_path).dataobj).copy()
    labels = np.asanyarray(nib.load(label_path).dataobj).copy()
    image[:3], image[-2:], image[:, :4], image[:, :, -5:] = 0, 0, 0, 0
    save_nifti(image_path, image, affine_ijk())
    save_nifti(label_path, labels, affine_ijk())
    upright = measure(read_dataset(folder)).fingerprint
    case = upright.cases[0]
    i, j, k = image.shape
    assert case.shape_after_crop == (k - 5, j - 4, i - 5)
    assert case.spacing_mm == pytest.approx((2.0, 1.1, 0.9))
    assert case.relative_size_after_cropping == pytest.approx((k - 5) * (j - 4) * (i - 5) / (i * j * k))
    assert case.voxels_per_label == {v: int((labels == v).sum()) for v in (0, 1, 2)}
    inside = image[3:-2, 4:, :-5][labels[3:-2, 4:, :-5] > 0]
    assert upright.intensities[0].mean == pytest.approx(inside.mean(dtype=np.float64), rel=1e-12)

    turned_affine = affine_ijk() @ flip_and_permute(image.shape)
    save_nifti(image_path, image[:, ::-1].transpose(1, 2, 0), turned_affine)
    save_nifti(label_path, labels[:, ::-1].transpose(1, 2, 0), turned_affine)
    turned = measure(read_dataset(folder)).fingerprint
    assert turned.cases[0].shape_after_crop == case.shape_after_crop
    assert turned.cases[0].spacing_mm == pytest.approx(case.spacing_mm)
    assert turned.intensities == upright.intensities


def flip_and_permute(shape: tuple[int, int, int]) -> np.ndarray:
    """Index map of ``array[:, ::-1].transpose(1, 2, 0)``: its voxel (a, b, c) was (c, n - 1 - a, b)."""
    matrix = np.zeros((4, 4))
    matrix[0, 2] = matrix[2, 1] = matrix[3, 3] = 1
    matrix[1, 0], matrix[1, 3] = -1, shape[1] - 1
    return matrix


def test_ignored_voxels_are_not_foreground(tmp_path):
    folder = make_dataset(tmp_path / "d", cases=2)
    everything = measure(read_dataset(folder)).fingerprint
    ignoring = dataset_json(2, labels={"background": 0, "outer": 1, "ignore": 2})
    (folder / "dataset.json").write_text(json.dumps(ignoring))
    found = measure(read_dataset(folder)).fingerprint
    assert found.intensities[0].mean < 110 < 115 < everything.intensities[0].mean  # the inner label is bright
    assert found.cases[0].voxels_per_label == everything.cases[0].voxels_per_label


def test_a_case_without_foreground_changes_no_statistics(tmp_path):
    folder = make_dataset(tmp_path / "d", cases=3)
    label = folder / "labelsTr" / "case_01.nii.gz"
    image = nib.load(label)
    save_nifti(label, np.zeros(image.shape, np.uint8), image.affine)
    found = measure(read_dataset(folder)).fingerprint
    assert len(found.cases) == 3
    values, weights = weighted([case for case in foregrounds(folder) if len(case)])
    assert found.intensities[0].mean == pytest.approx(np.average(values, weights=weights))


def test_no_foreground_anywhere_is_refused(tmp_path):
    folder = make_dataset(tmp_path / "d", cases=2)
    for label in (folder / "labelsTr").iterdir():
        image = nib.load(label)
        save_nifti(label, np.zeros(image.shape, np.uint8), image.affine)
    assert codes(lambda: measure(read_dataset(folder))) == [("E0135", None)]


def test_all_failing_cases_are_reported_together_and_named(tmp_path):
    folder = make_dataset(tmp_path / "d", cases=5)
    image = folder / "imagesTr" / "case_00_0000.nii.gz"
    loaded = nib.load(image)
    broken = np.asanyarray(loaded.dataobj).copy()
    broken[4, 5, 6] = np.nan
    save_nifti(image, broken, loaded.affine)
    save_nifti(folder / "labelsTr" / "case_01.nii.gz", np.ones((4, 5, 6), np.uint8), affine_ijk())
    truncated = folder / "imagesTr" / "case_03_0000.nii.gz"
    truncated.write_bytes(truncated.read_bytes()[:-500])
    found = codes(lambda: measure(read_dataset(folder), workers=3))
    assert [case for _, case in found] == ["case_00", "case_01", "case_03"]
    assert [code for code, _ in found][:2] == ["E0110", "E0119"]


def test_undeclared_and_fractional_labels_are_refused(tmp_path):
    folder = make_dataset(tmp_path / "d", cases=3)
    for name, change in (("case_00", 7.0), ("case_02", 0.4)):
        path = folder / "labelsTr" / f"{name}.nii.gz"
        loaded = nib.load(path)
        labels = np.asanyarray(loaded.dataobj).astype(np.float32)
        labels[3, 4, 5] = change
        save_nifti(path, labels, loaded.affine)
    assert codes(lambda: measure(read_dataset(folder))) == [("E0131", "case_00"), ("E0130", "case_02")]


def test_running_out_of_memory_names_the_case_and_is_not_blamed_on_the_data(tmp_path, monkeypatch):
    dataset = read_dataset(make_dataset(tmp_path / "d", cases=3))
    read = measurement.read_channels

    def hungry(paths):
        if "case_01" in paths[0].name:
            raise MemoryError
        return read(paths)

    monkeypatch.setattr(measurement, "read_channels", hungry)
    with pytest.raises(ResourceError, match=r"E0600.*case_01"):
        measure(dataset, workers=2)


def test_a_bug_in_one_case_comes_out_with_the_name_of_the_case(tmp_path, monkeypatch):
    dataset = read_dataset(make_dataset(tmp_path / "d", cases=3))
    monkeypatch.setattr(measurement, "nonzero_box", lambda image: 1 / 0)
    with pytest.raises(ZeroDivisionError) as caught:
        measure(dataset, workers=2)
    assert "case case_0" in caught.value.__notes__[0]


def test_a_data_set_without_cases_is_refused(tmp_path):
    dataset = replace(read_dataset(make_dataset(tmp_path / "d", cases=1)), cases=())
    assert codes(lambda: measure(dataset)) == [("E0146", None)]


def test_pictures_have_single_slices_and_as_many_channels_as_colours(tmp_path):
    dataset = read_dataset(make_dataset_2d(tmp_path / "d"))
    found = measure(dataset).fingerprint
    assert {case.shape_after_crop[0] for case in found.cases} == {1}
    assert len(found.intensities) == 3
    assert found.intensities[0].mean > found.intensities[2].mean
    assert list(make_plan(found, dataset.task).configurations) == ["2d"]


def test_the_record_reads_back_equal(tmp_path):
    found = measure(read_dataset(make_dataset(tmp_path / "d", cases=2))).fingerprint
    assert Fingerprint.model_validate(json.loads(json.dumps(found.to_json()))) == found


@pytest.mark.parametrize("broken", [{}, {"spacings": [[1, 1, 1]], "shapes_after_crop": []}, {"spacings": 3}])
def test_a_damaged_fingerprint_of_nnunet_is_refused(broken):
    with pytest.raises(IntegrityError, match="dataset_fingerprint"):
        from_nnunet(broken)


def test_hippocampus_gives_nnunets_fingerprint_and_plan(shared):
    theirs = from_nnunet(json.loads((shared / "nnunet_model/hippocampus/dataset_fingerprint.json").read_text()))
    dataset = read_dataset(shared / "data" / "hippocampus")
    ours = measure(dataset, workers=2).fingerprint
    assert [case.shape_after_crop for case in ours.cases] == [case.shape_after_crop for case in theirs.cases]
    assert [case.spacing_mm for case in ours.cases] == [pytest.approx(case.spacing_mm) for case in theirs.cases]
    assert ours.median_relative_size_after_cropping == theirs.median_relative_size_after_cropping
    found, expected = ours.intensities[0], theirs.intensities[0]
    assert (found.min, found.max) == (expected.min, expected.max)
    assert found.mean == pytest.approx(expected.mean, abs=5 * expected.std / 1e4)  # 1e8 draws: standard error std/1e4
    assert found.std == pytest.approx(expected.std, rel=1e-3)
    assert found.median == pytest.approx(expected.median, rel=1e-3)
    assert found.percentile_00_5 == pytest.approx(expected.percentile_00_5, rel=1e-3)
    assert found.percentile_99_5 == pytest.approx(expected.percentile_99_5, rel=1e-3)
    plan = make_plan(ours, dataset.task)
    two, three = plan.configurations["2d"], plan.configurations["3d_fullres"]
    assert (two.patch_size, two.batch_size) == ((56, 40), 281)
    assert (three.patch_size, three.batch_size) == ((40, 56, 40), 7)
    assert three.network.strides == ((1, 1, 1), (2, 2, 2), (2, 2, 2), (2, 2, 2))


def test_cardiac_slices_keep_their_thickness_and_leave_it_unhalved(shared):
    dataset = read_dataset(shared / "data" / "cardiac")
    found = measure(dataset, workers=2).fingerprint
    case = dataset.cases[7]
    image = nib.load(case.images[0])
    assert sorted(found.cases[7].spacing_mm) == pytest.approx(sorted(image.header.get_zooms()[:3]))
    pairs = zip(sorted(found.cases[7].shape_after_crop), sorted(image.shape), strict=True)
    assert all(cropped <= full for cropped, full in pairs)
    plan = make_plan(found, dataset.task)
    three = plan.configurations["3d_fullres"]
    assert three.spacing_mm[0] == max(three.spacing_mm)
    assert three.network.kernels[0] == (1, 3, 3)
    assert three.network.strides[1] == (1, 2, 2)


def codes(call) -> list[tuple[str, str | None]]:
    with pytest.raises(MedsegError) as caught:
        call()
    assert isinstance(caught.value, InputError)
    return [(problem.code, problem.case) for problem in caught.value.problems]
