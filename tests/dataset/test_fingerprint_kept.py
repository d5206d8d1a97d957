"""Measurements that are kept: nothing is read twice, whatever was killed, changed, damaged or added."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from phantoms import affine_ijk, anatomy, dataset_json, make_dataset, save_nifti
from tiny_runs import edit

from medseg.dataset import measurement, side_by_side
from medseg.dataset.fingerprint import measure
from medseg.dataset.layouts import read_dataset
from medseg.dataset.measurement import Distribution, thinned
from medseg.errors import EnvironmentFailure, InputError
from medseg.pipeline.plan import PlanOptions, plan_run
from medseg.pipeline.run_folder import RunFolder


@pytest.fixture
def data(tmp_path) -> Path:
    return make_dataset(tmp_path / "data", 6, channels=2)


@pytest.fixture
def read(monkeypatch) -> list[str]:
    """The ids of the cases that are really read, as they are."""
    ids: list[str] = []
    channels = measurement.read_channels

    def reading(paths):
        ids.append(paths[0].name[:7])
        return channels(paths)

    monkeypatch.setattr(measurement, "read_channels", reading)
    return ids


def keep(data: Path, store: Path):
    return measure(read_dataset(data), 1, store=store)


def test_what_is_kept_gives_the_same_fingerprint_without_reading_an_image(data, tmp_path, read):
    fresh = measure(read_dataset(data))
    first = keep(data, tmp_path / "kept")
    read.clear()
    again = keep(data, tmp_path / "kept")
    assert read == []
    assert fresh == first == again
    assert sorted(path.name for path in (tmp_path / "kept").iterdir()) == [
        f"case_{n:02d}.safetensors" for n in range(6)
    ]


def test_a_new_case_is_measured_alone_and_a_lost_one_is_forgotten(data, tmp_path, read):
    keep(data, tmp_path / "kept")
    read.clear()
    image, labels = anatomy(np.random.default_rng(50))
    for channel in range(2):
        save_nifti(data / "imagesTr" / f"case_09_{channel:04d}.nii.gz", image + channel, affine_ijk())
    save_nifti(data / "labelsTr" / "case_09.nii.gz", labels, affine_ijk())
    edit(data / "dataset.json", numTraining=7)
    more = keep(data, tmp_path / "kept")
    assert read == ["case_09"]
    assert more == measure(read_dataset(data))
    dataset = read_dataset(data)
    fewer = replace(dataset, cases=dataset.cases[2:])
    read.clear()
    assert measure(fewer, store=tmp_path / "kept").fingerprint.cases == more.fingerprint.cases[2:]
    assert read == []


@pytest.mark.parametrize("where", ["imagesTr/case_02_0001.nii.gz", "labelsTr/case_02.nii.gz"])
def test_a_case_with_a_changed_file_is_measured_again(data, tmp_path, read, where):
    before = keep(data, tmp_path / "kept")
    read.clear()
    image = nib.load(data / where)
    array = np.asarray(image.dataobj).copy()
    array[15, 13, 9] = 0
    save_nifti(data / where, array, image.affine)
    after = keep(data, tmp_path / "kept")
    assert read == ["case_02"]
    assert after != before
    assert after == measure(read_dataset(data))


def test_other_labels_or_an_ignored_one_are_measured_again(data, tmp_path, read):
    keep(data, tmp_path / "kept")
    read.clear()
    ignoring = dataset_json(6, labels={"background": 0, "outer": 1, "ignore": 2}, channel_names={"0": "A", "1": "B"})
    (data / "dataset.json").write_text(json.dumps(ignoring))
    assert keep(data, tmp_path / "kept") == measure(read_dataset(data))
    assert sorted(set(read)) == [f"case_{n:02d}" for n in range(6)]


def test_the_same_files_as_another_case_are_not_that_case(data, tmp_path, read):
    keep(data, tmp_path / "kept")
    for folder, endings in (("imagesTr", ("_0000", "_0001")), ("labelsTr", ("",))):
        for ending in endings:
            shutil.copy(data / folder / f"case_00{ending}.nii.gz", data / folder / f"case_03{ending}.nii.gz")
    shutil.copy(tmp_path / "kept" / "case_00.safetensors", tmp_path / "kept" / "case_03.safetensors")
    read.clear()
    found = keep(data, tmp_path / "kept")
    assert read == ["case_03"]
    assert [case.id for case in found.fingerprint.cases] == [f"case_{n:02d}" for n in range(6)]
    assert found.identical == (("case_00", "case_03"),)


@settings(max_examples=80, deadline=None)
@given(
    st.integers(0, 1500) | st.integers(0, 10**6), st.integers(0, 255), st.sampled_from(["cut", "flip", "empty", "text"])
)
def test_a_damaged_measurement_is_made_anew(kept_case, place, value, damage):
    dataset, store, fresh, whole = kept_case
    path = store / "case_00.safetensors"
    place %= len(whole)
    damaged = {
        "cut": whole[:place],
        "flip": whole[:place] + bytes([whole[place] ^ (value or 1)]) + whole[place + 1 :],
        "empty": b"",
        "text": b'{"medseg": 1}' * value,
    }
    path.write_bytes(damaged[damage])
    assert measure(dataset, store=store) == fresh
    assert measure(dataset, store=store) == fresh
    path.write_bytes(whole)


@pytest.fixture(scope="module")
def kept_case(tmp_path_factory):
    folder = tmp_path_factory.mktemp("kept")
    dataset = read_dataset(make_dataset(folder / "data", 2))
    fresh = measure(dataset, store=folder / "kept")
    return dataset, folder / "kept", fresh, (folder / "kept" / "case_00.safetensors").read_bytes()


def test_cases_without_labels_foreground_or_a_channel_are_kept_too(data, tmp_path, read):
    label = data / "labelsTr" / "case_01.nii.gz"
    image = nib.load(label)
    save_nifti(label, np.zeros(image.shape, np.uint8), image.affine)
    dataset = read_dataset(data)
    cases = list(dataset.cases)
    cases[2] = replace(cases[2], label=None)
    cases[3] = replace(cases[3], images=(cases[3].images[0], None))
    dataset = replace(dataset, cases=tuple(cases))
    fresh = measure(dataset)
    assert measure(dataset, store=tmp_path / "kept") == fresh
    read.clear()
    assert measure(dataset, store=tmp_path / "kept") == fresh
    assert read == []
    assert fresh.fingerprint.cases[3].sha256[1] == ""
    without = [replace(case, images=(case.images[0], None)) for case in cases]
    with pytest.raises(InputError, match=r"E0133.*MRI1"):
        measure(replace(dataset, cases=tuple(without)))


def test_what_one_run_measured_before_an_error_is_not_measured_again(data, tmp_path, read):
    broken = data / "imagesTr" / "case_04_0001.nii.gz"
    whole = broken.read_bytes()
    broken.write_bytes(whole[:-300])
    with pytest.raises(InputError, match="case_04"):
        keep(data, tmp_path / "kept")
    broken.write_bytes(whole)
    read.clear()
    assert keep(data, tmp_path / "kept") == measure(read_dataset(data))
    assert read[0] == "case_04"
    assert len(read) == 7


def test_a_disk_that_is_full_ends_the_measuring_with_its_own_error(data, tmp_path):
    (tmp_path / "kept").write_text("a file where the folder should be")
    with pytest.raises(EnvironmentFailure, match="E0501"):
        keep(data, tmp_path / "kept")


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(-50, 50), min_size=1, max_size=300), st.integers(1, 60))
def test_thinned_values_stand_for_equal_parts(values, most):
    distinct, counts = np.unique(np.array(values), return_counts=True)
    whole = Distribution(distinct.astype(np.float32), counts)
    small = thinned(whole, most)
    assert len(small.values) <= most
    if len(distinct) <= most:
        assert small is whole
        return
    middles = (np.arange(most) + 0.5) * len(values) / most
    np.testing.assert_array_equal(small.values, np.sort(np.array(values))[middles.astype(int)])


def test_images_of_sixteen_bits_keep_every_value(tmp_path, monkeypatch):
    values = np.random.default_rng(0).integers(-32768, 32767, 200_000).astype(np.int16)
    found = measurement._distribution(values)
    assert len(found.values) == len(np.unique(values))
    assert found.counts.sum() == 200_000


def test_no_more_cases_are_in_memory_than_half_of_it_holds_and_one_always_is(data, monkeypatch):
    dataset = read_dataset(data)
    case = dataset.cases[0]
    files = sum(path.stat().st_size for path in (*case.images, case.label))
    assert side_by_side.bytes_of_all(case) == 24 * files > side_by_side.bytes_of_largest(case)
    running, most = [], []
    channels = measurement.read_channels

    def reading(paths):
        running.append(1)
        most.append(len(running))
        try:
            return channels(paths)
        finally:
            running.pop()

    monkeypatch.setattr(measurement, "read_channels", reading)
    monkeypatch.setattr(side_by_side, "free_memory_bytes", lambda: 0)
    assert measure(dataset, 8) == measure(dataset, 1)
    assert max(most) == 1


def test_a_case_that_memory_did_not_suffice_for_is_tried_again_alone(data, monkeypatch):
    expected = measure(read_dataset(data))
    failures = iter([MemoryError])
    channels = measurement.read_channels

    def reading(paths):
        if "case_02" in paths[0].name and (failure := next(failures, None)):
            raise failure
        return channels(paths)

    monkeypatch.setattr(measurement, "read_channels", reading)
    assert measure(read_dataset(data), 2) == expected


def test_planning_anew_with_a_new_case_measures_only_that(data, tmp_path, read):
    plan_run(data, tmp_path / "run")
    for folder, endings in (("imagesTr", ("_0000", "_0001")), ("labelsTr", ("",))):
        for ending in endings:
            shutil.copy(data / folder / f"case_00{ending}.nii.gz", data / folder / f"case_08{ending}.nii.gz")
    edit(data / "dataset.json", numTraining=7)
    read.clear()
    plan_run(data, tmp_path / "run", PlanOptions(overwrite=True))
    assert read == ["case_08"]
    run = RunFolder(tmp_path / "run")
    assert run.read_fingerprint() == measure(read_dataset(data)).fingerprint
    assert run.read_splits().groups == dict.fromkeys(["case_00", "case_08"], "case_00 + case_08")
