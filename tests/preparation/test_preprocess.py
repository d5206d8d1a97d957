"""Preprocessing a data set: resumable, the same bytes whatever happens, one case never costs another."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from prepared_phantoms import files_of, make_plan, make_task, read_phantoms
from test_prepare import naive

from medseg.errors import (
    IncompatibleError,
    InputError,
    MedsegError,
    OwnershipError,
    PartialFailure,
    ResourceError,
)
from medseg.preparation import job
from medseg.preparation import preprocess as module
from medseg.preparation.preprocess import preprocess, settings_sha256
from medseg.preparation.store import open_store, verify
from medseg.progress import Silent
from medseg.records.case import Case, Dataset
from medseg.records.plan import Normalisation


@pytest.fixture(scope="session")
def raw(tmp_path_factory):
    return read_phantoms(tmp_path_factory.mktemp("raw") / "data", 4)


@pytest.fixture
def dataset(raw, tmp_path):
    """A copy that a test may damage."""
    copy = tmp_path / "raw"
    for path in raw.root.rglob("*.*"):
        (copy / path.relative_to(raw.root)).parent.mkdir(parents=True, exist_ok=True)
        (copy / path.relative_to(raw.root)).write_bytes(path.read_bytes())
    return read_phantoms(copy, 4)


class Told(Silent):
    """Progress that remembers stages with the cases of each."""

    def __init__(self) -> None:
        self.stages: dict[str, list[str]] = {}

    def begin(self, stage, total, unit):
        self.stages[stage] = []

    def update(self, done, note=""):
        list(self.stages.values())[-1].append(note)


def run(dataset, store, workers=1, **changes) -> Told:
    told = Told()
    plan, configuration = make_plan(**changes)
    preprocess(dataset, plan, configuration.name, store, workers=workers, progress=told)
    return told


def test_every_case_lands_in_the_store_with_its_hashes(dataset, tmp_path):
    told = run(dataset, tmp_path / "store")
    assert told.stages == {"prepare": [case.id for case in dataset.cases]}
    store = open_store(tmp_path / "store")
    assert store.cases == tuple(case.id for case in dataset.cases)
    assert verify(store) == ()
    for case_id in store.cases:
        case = store.case(case_id)
        assert case.image.shape[1:] == case.labels.shape == case.record.preparation.target_shape
        assert abs(case.image[:].mean()) < 0.05
        assert set(np.unique(case.labels[:])) == {0, 1, 2}
        assert set(case.foreground) == {1, 2}


@pytest.mark.parametrize("spacing", [(1.5, 1.0, 1.2), (1.0, 1.2)])
def test_workers_do_not_change_a_byte(dataset, tmp_path, spacing):
    run(dataset, tmp_path / "one", spacing=spacing)
    run(dataset, tmp_path / "two", workers=2, spacing=spacing)
    assert files_of(tmp_path / "one") == files_of(tmp_path / "two")


def test_what_killed_workers_leave_is_swept_away(dataset, tmp_path):
    class Litter(Silent):
        def update(self, done, note=""):
            (tmp_path / "store" / f".medseg-{done}.tmp.case.json").write_text("half")

    plan, configuration = make_plan()
    preprocess(dataset, plan, configuration.name, tmp_path / "store", workers=1, progress=Litter())
    run(dataset, tmp_path / "clean")
    assert files_of(tmp_path / "store") == files_of(tmp_path / "clean")


def test_a_second_run_only_checks(dataset, tmp_path):
    run(dataset, tmp_path / "store")
    before = {path.name: path.stat().st_ino for path in (tmp_path / "store").iterdir()}
    told = run(dataset, tmp_path / "store")
    assert list(told.stages) == ["check prepared cases"]
    assert before == {path.name: path.stat().st_ino for path in (tmp_path / "store").iterdir()}


def test_the_batch_size_redoes_nothing_and_the_spacing_everything(dataset, tmp_path):
    run(dataset, tmp_path / "store")
    assert "prepare" not in run(dataset, tmp_path / "store", batch_size=7).stages
    assert len(run(dataset, tmp_path / "store", spacing=(1.5, 1.0, 1.3)).stages["prepare"]) == 4


def test_settings_are_what_decides_the_voxels():
    plan, configuration = make_plan()
    first = settings_sha256(plan, configuration)
    assert settings_sha256(*make_plan(batch_size=9)) == first
    other = plan.intensities[0].model_copy(update={"mean": 1.0})
    assert settings_sha256(plan.model_copy(update={"intensities": (other,)}), configuration) == first
    ct, ct_configuration = make_plan(normalisation=Normalisation(scheme="ct"))
    changed = ct.model_copy(update={"intensities": (other,)})
    assert settings_sha256(ct, ct_configuration) != settings_sha256(changed, ct_configuration)
    for change in (
        {"transpose": (0, 2, 1)},
        {"spacing": (1.5, 1.0, 1.1)},
        {"task": make_task(4)},
        {"task": make_task(ignore_value=9)},
        {"normalisation": Normalisation(scheme="none")},
    ):
        assert settings_sha256(*make_plan(**change)) != first


def test_a_damaged_file_is_noticed_and_its_case_redone(dataset, tmp_path):
    store = tmp_path / "store"
    run(dataset, store)
    expected = files_of(store)
    content = bytearray(expected["case_02.image.b2nd"])
    content[len(content) // 2] ^= 1
    (store / "case_02.image.b2nd").write_bytes(content)
    (store / "case_03.case.json").write_text("{}")
    assert run(dataset, store).stages["prepare"] == ["case_02", "case_03"]
    assert files_of(store) == expected


def test_a_changed_source_redoes_its_case(dataset, tmp_path):
    run(dataset, tmp_path / "store")
    path = dataset.cases[1].label
    image = nib.load(path)
    labels = np.asarray(image.dataobj).copy()
    labels[labels == 2] = 1
    nib.save(nib.Nifti1Image(labels, image.affine, image.header), path)
    assert run(dataset, tmp_path / "store").stages["prepare"] == ["case_01"]
    assert set(open_store(tmp_path / "store").case("case_01").foreground) == {1}


def test_cases_that_left_the_data_set_leave_the_store(dataset, tmp_path):
    run(dataset, tmp_path / "store")
    fewer = replace(dataset, cases=dataset.cases[1:])
    told = run(fewer, tmp_path / "store")
    assert "prepare" not in told.stages
    assert open_store(tmp_path / "store").cases == ("case_01", "case_02", "case_03")
    assert not list((tmp_path / "store").glob("case_00*"))
    run(fewer, tmp_path / "fresh")
    assert files_of(tmp_path / "store") == files_of(tmp_path / "fresh")


def damage(dataset: Dataset) -> None:
    """Case 0 is cut short, case 2 has an undeclared label."""
    path = dataset.cases[0].images[0]
    path.write_bytes(path.read_bytes()[:-500])
    image = nib.load(dataset.cases[2].label)
    labels = np.asarray(image.dataobj).copy()
    labels[0, 0, 0] = 77
    nib.save(nib.Nifti1Image(labels, image.affine, image.header), dataset.cases[2].label)


@pytest.mark.parametrize("workers", [1, 2])
def test_bad_cases_are_all_reported_and_cost_no_other(dataset, tmp_path, workers):
    damage(dataset)
    with pytest.raises(PartialFailure) as caught:
        run(dataset, tmp_path / "store", workers=workers)
    assert [problem.case for problem in caught.value.problems] == ["case_00", "case_02"]
    assert "77" in str(caught.value.problems[1])
    with pytest.raises(IncompatibleError, match="E0801"):
        open_store(tmp_path / "store")
    names = set(files_of(tmp_path / "store"))
    assert {"case_01.case.json", "case_03.case.json"} <= names
    assert not any(name.startswith(("case_00", "case_02", ".medseg")) for name in names)


def test_a_failing_rerun_takes_the_old_manifest_away(dataset, tmp_path):
    run(dataset, tmp_path / "store")
    damage(dataset)
    with pytest.raises(PartialFailure):
        run(dataset, tmp_path / "store")
    with pytest.raises(IncompatibleError, match="E0801"):
        open_store(tmp_path / "store")


def test_when_every_case_is_bad_the_input_is_refused(dataset, tmp_path):
    without = tuple(Case(case.id, case.images) for case in dataset.cases)
    with pytest.raises(InputError) as caught:
        run(replace(dataset, cases=without), tmp_path / "store")
    assert [problem.code for problem in caught.value.problems] == ["E0144"] * 4


def test_memory_and_bugs_decide_the_exit_code_before_bad_input(dataset, tmp_path, monkeypatch):
    real = job.prepare
    damage(dataset)

    def fail(volume, plan, configuration, orientation, error=MemoryError, threads=1):
        if volume.source.path.endswith("case_01_0000.nii.gz"):
            raise error("x")
        return real(volume, plan, configuration, orientation)

    monkeypatch.setattr(job, "prepare", fail)
    with pytest.raises(ResourceError, match=r"E0600. case=case_01") as caught:
        run(dataset, tmp_path / "store")
    assert [problem.case for problem in caught.value.problems] == ["case_00", "case_01", "case_02"]
    monkeypatch.setattr(job, "prepare", lambda v, p, c, o, threads: fail(v, p, c, o, ZeroDivisionError))
    with pytest.raises(MedsegError, match="ZeroDivisionError") as caught:
        run(dataset, tmp_path / "store")
    assert caught.value.exit_code == 70


def test_two_processes_cannot_prepare_into_one_folder(dataset, tmp_path):
    with module.owned(tmp_path / "store"), pytest.raises(OwnershipError, match="E0901"):
        run(dataset, tmp_path / "store")


def test_a_plan_of_another_task_or_without_the_configuration_is_refused(dataset, tmp_path):
    plan, _ = make_plan()
    with pytest.raises(IncompatibleError, match=r"E0802.*3d_lowres"):
        preprocess(dataset, plan, "3d_lowres", tmp_path / "store")
    with pytest.raises(IncompatibleError, match=r"E0802.*labels"):
        run(dataset, tmp_path / "store", task=make_task(5))
    with pytest.raises(InputError, match="E0146"):
        run(replace(dataset, cases=()), tmp_path / "store")
    with pytest.raises(InputError, match=r"E0140.*case_00"):
        run(replace(dataset, cases=dataset.cases[:1] * 2), tmp_path / "store")


def test_several_channels_are_prepared_together(tmp_path):
    dataset = read_phantoms(tmp_path / "raw", 1, channels=2)
    run(dataset, tmp_path / "store", task=make_task(channels=2))
    case = open_store(tmp_path / "store").case("case_00")
    assert case.image.shape[0] == case.record.channels == 2
    assert len(case.record.source_sha256) == 3


def interrupt(folder: Path, **numbers: int) -> None:
    command = [sys.executable, Path(__file__).with_name("interruptions.py"), folder, *map(str, numbers.values())]
    done = subprocess.run(command, capture_output=True, text=True, timeout=3600)
    assert done.returncode == 0, done.stderr


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_killed_anywhere_or_out_of_space_it_resumes_to_the_same_bytes(tmp_path):
    interrupt(tmp_path, seed=20240711, cases=3, kills=6, points=3)


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_fifty_kills_and_twenty_full_disks_later_the_bytes_are_the_same(tmp_path):
    interrupt(tmp_path, seed=5, cases=20, kills=50, points=20)


def test_a_store_keeps_its_number_type_until_another_is_asked_for(dataset, tmp_path):
    plan, configuration = make_plan()
    for precision, expected, redone in (
        ("float16", "float16", True),
        (None, "float16", False),
        ("float32", "float32", True),
        (None, "float32", False),
    ):
        told = Told()
        preprocess(dataset, plan, configuration.name, tmp_path / "store", 1, told, precision=precision)
        store = open_store(tmp_path / "store")
        assert (store.manifest.precision, "prepare" in told.stages) == (expected, redone)
        assert store.manifest.settings_sha256 == settings_sha256(plan, configuration)  # what train asks for
        assert verify(store) == ()
        assert store.case("case_00").image[:].dtype == np.float32


def test_cases_that_need_more_memory_than_is_free_are_named_and_prepared_alone(dataset, tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(module, "memory_for_cases", lambda workers: 1000)
    run(dataset, tmp_path / "store", workers=2)
    assert caplog.text.count("it is prepared alone") == 4
    assert verify(open_store(tmp_path / "store")) == ()


@pytest.mark.parametrize(
    ("name", "cases", "spacing", "classes"),
    [("hippocampus", 3, (1.0, 1.0, 1.0), 3), ("cardiac", 2, (7.0, 1.3, 1.4), 4)],
)
def test_real_data_end_to_end_equals_a_naive_computation(shared, tmp_path, name, cases, spacing, classes):
    folder = shared / "data" / name
    images = sorted((folder / "imagesTr").glob("*.nii.gz"))[3 : 3 + cases]
    listed = [Case(p.name[:-12], (p,), folder / "labelsTr" / f"{p.name[:-12]}.nii.gz") for p in images]
    dataset = Dataset(folder, "nnunet", make_task(classes), tuple(listed), ".nii.gz")
    run(dataset, tmp_path / "store", task=make_task(classes), spacing=spacing)
    store = open_store(tmp_path / "store")
    for path, case_id in zip(images, store.cases, strict=True):
        case = store.case(case_id)
        expected = naive(path, spacing, "zscore")
        assert np.abs(case.image[0] - expected).max() < 2e-6 * np.ptp(expected)
        for index, drawn in case.foreground.items():
            assert (case.labels[:].ravel()[drawn] == index).all()
