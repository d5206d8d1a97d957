"""Planning a run: what is kept, what is refused, and how an edit that is wrong is named."""

from __future__ import annotations

import json
import shutil

import pytest
from phantoms import make_dataset
from tiny_runs import edit

from medseg.errors import IncompatibleError, InputError, IntegrityError
from medseg.pipeline.device_plan import Request
from medseg.pipeline.plan import PlanOptions, plan_run
from medseg.pipeline.run_folder import RunFolder
from medseg.pipeline.split import SplitOptions


@pytest.fixture
def data(tmp_path):
    return make_dataset(tmp_path / "data", 4)


@pytest.fixture
def planned(data, tmp_path):
    plan_run(data, tmp_path / "run")
    return tmp_path / "run"


def test_a_plan_that_was_edited_by_hand_is_kept(data, planned):
    edit(planned / "plan.json", configurations__3d_fullres__batch_size=3, reasons=[])
    content = (planned / "plan.json").read_bytes()
    plan = plan_run(data, planned)
    assert plan.configurations["3d_fullres"].batch_size == 3
    assert (planned / "plan.json").read_bytes() == content


def test_overwrite_makes_the_plan_anew(data, planned):
    before = (planned / "plan.json").read_bytes()
    edit(planned / "plan.json", configurations__3d_fullres__batch_size=3)
    plan_run(data, planned, PlanOptions(overwrite=True))
    assert (planned / "plan.json").read_bytes() == before


@pytest.mark.parametrize("name", ["plan.json", "fingerprint.json", "splits.json", "dataset.json"])
def test_a_damaged_file_is_refused_and_overwrite_mends_it(data, planned, name):
    before = (planned / name).read_bytes()
    (planned / name).write_bytes(before[: len(before) // 2])
    with pytest.raises(IntegrityError, match=rf"E0711.*{name}"):
        plan_run(data, planned)
    plan_run(data, planned, PlanOptions(overwrite=True))
    assert (planned / name).read_bytes() == before


def test_other_data_are_refused(data, planned, tmp_path):
    content = (planned / "plan.json").read_bytes()
    other = make_dataset(tmp_path / "other", 4, seed=5)
    with pytest.raises(IncompatibleError, match=r"E0802.*other data") as caught:
        plan_run(other, planned)
    assert caught.value.exit_code == 8
    assert (planned / "plan.json").read_bytes() == content


def test_a_changed_image_is_refused_until_the_plan_is_made_anew(data, planned, tmp_path):
    other = make_dataset(tmp_path / "other", 4, seed=5)
    for folder, suffix in (("imagesTr", "_0000"), ("labelsTr", "")):
        shutil.copy(other / folder / f"case_01{suffix}.nii.gz", data / folder / f"case_02{suffix}.nii.gz")
    with pytest.raises(IncompatibleError, match="E0802"):
        plan_run(data, planned)
    before = RunFolder(planned).read_fingerprint()
    plan_run(data, planned, PlanOptions(overwrite=True))
    assert RunFolder(planned).read_fingerprint() != before


def test_other_memory_is_refused_and_the_message_says_what_the_plan_was_made_with(data, planned):
    with pytest.raises(IncompatibleError, match=r"E0802.*made with --memory 8 vs"):
        plan_run(data, planned, PlanOptions(Request(memory_gb=12)))


def test_other_labels_are_refused(data, planned):
    edit(data / "dataset.json", labels={"background": 0, "rim": 1, "core": 2})
    with pytest.raises(IncompatibleError, match=r"E0802.*other channels or labels"):
        plan_run(data, planned)


@pytest.mark.parametrize(
    ("field", "value", "named"),
    [
        ("batch_size", 0, "configurations.3d_fullres.batch_size"),
        ("patch_size", [10, 16, 16], "configurations.3d_fullres: Value error, patch_size 10 of axis 0"),
        ("spacing_mm", [1, 1], "configurations.3d_fullres: Value error, spacing_mm"),
        ("batchsize", 2, "configurations.3d_fullres.batchsize: Extra inputs"),
        ("network__features", "many", "configurations.3d_fullres.network.features"),
        ("training__initial_lr", -1, "configurations.3d_fullres.training.initial_lr"),
        ("training__mirror_axes", [0, 3], "configurations.3d_fullres: Value error, mirror_axes"),
        ("normalisation", [{"scheme": "pct"}], "configurations.3d_fullres.normalisation.0.scheme"),
    ],
)
def test_an_edit_that_is_wrong_is_refused_with_the_name_of_the_field(planned, field, value, named):
    edit(planned / "plan.json", **{f"configurations__3d_fullres__{field}": value})
    with pytest.raises(IntegrityError) as caught:
        RunFolder(planned).read_plan()
    assert caught.value.exit_code == 7
    assert {p.code for p in caught.value.problems} == {"E0711"}
    assert named in str(caught.value)


def test_all_wrong_fields_are_named_at_once(planned):
    changes = {f"configurations__{name}__batch_size": 0 for name in ("2d", "3d_fullres")}
    edit(planned / "plan.json", budget__memory_gb=-1, **changes)
    with pytest.raises(IntegrityError) as caught:
        RunFolder(planned).read_plan()
    assert len(caught.value.problems) == 3


@pytest.mark.parametrize("value", ["NaN", "Infinity", '1, "memory_gb": 2'])
def test_a_plan_that_is_not_strict_json_is_refused(planned, value):
    text = (planned / "plan.json").read_text()
    (planned / "plan.json").write_text(text.replace('"memory_gb": 8.0', f'"memory_gb": {value}'))
    with pytest.raises(IntegrityError, match="E0711"):
        RunFolder(planned).read_plan()


def test_splits_of_ones_own_are_taken_over_and_stay(data, tmp_path):
    cases = [f"case_{n:02d}" for n in range(4)]
    folds = [{"train": cases[:2], "val": cases[2:]}, {"train": cases[2:], "val": cases[:2]}]
    (tmp_path / "splits_final.json").write_text(json.dumps(folds))
    plan_run(data, tmp_path / "run", PlanOptions(splits=SplitOptions(tmp_path / "splits_final.json")))
    plan_run(data, tmp_path / "run")
    splits = RunFolder(tmp_path / "run").read_splits()
    assert [fold.model_dump(mode="json") for fold in splits.folds] == folds


def test_splits_that_name_unknown_cases_are_refused(data, tmp_path):
    (tmp_path / "mine.json").write_text(json.dumps([{"train": ["case_00", "case_77"], "val": ["case_01"]}]))
    with pytest.raises(InputError, match=r"E0161.*case_77"):
        plan_run(data, tmp_path / "run", PlanOptions(splits=SplitOptions(tmp_path / "mine.json")))
    assert not (tmp_path / "run" / "plan.json").exists()


def test_planning_again_writes_nothing(data, planned):
    before = {path: path.stat().st_mtime_ns for path in planned.iterdir()}
    plan_run(data, planned)
    assert {path: path.stat().st_mtime_ns for path in planned.iterdir()} == before


def test_a_run_folder_that_was_not_planned_says_how_to_plan_it(tmp_path):
    with pytest.raises(InputError, match=r"E0100.*medseg plan"):
        RunFolder(tmp_path).read_plan()
