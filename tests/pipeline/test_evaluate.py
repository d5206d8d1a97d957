"""Evaluating files: what is missing is said, what is written is strict."""

from __future__ import annotations

import csv
import json
import shutil

import nibabel as nib
import numpy as np
import pytest
from phantoms import affine_ijk, anatomy, dataset_json, save_nifti

from medseg.errors import InputError, PartialFailure, UsageError
from medseg.pipeline.evaluate import (
    EvaluateOptions,
    compare_files,
    evaluate_files,
    named_labels,
    raise_if_partial,
    read_task,
)
from medseg.pipeline.run_folder import RunFolder
from medseg.records.base import read_record
from medseg.records.comparison import Comparison
from medseg.records.scores import Measures, Scores


@pytest.fixture
def data(tmp_path):
    """A data set of which only the declaration and the references are there."""
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "dataset.json").write_text(json.dumps(dataset_json(2)))
    return tmp_path / "data"


@pytest.fixture
def folders(data, tmp_path):
    """Predictions, which are the references moved by a voxel, references, and the task."""
    for index in range(2):
        labels = anatomy(np.random.default_rng(index))[1]
        save_nifti(tmp_path / "references" / f"new_{index:02d}.nii.gz", labels, affine_ijk())
        save_nifti(tmp_path / "predictions" / f"new_{index:02d}.nii.gz", np.roll(labels, 1, axis=1), affine_ijk())
    return tmp_path / "predictions", tmp_path / "references", read_task(data)


def refuse(constant):
    raise AssertionError(f"{constant} is no JSON")


def dice(a: np.ndarray, b: np.ndarray) -> float:
    return 2 * (a & b).sum() / (a.sum() + b.sum())


def test_scores_are_those_of_the_files(folders):
    predictions, references, task = folders
    scores = evaluate_files(predictions, references, task)
    assert len(scores.cases) == 4
    for row in scores.cases:
        a, b = (np.asarray(nib.load(f / f"{row.case}.nii.gz").dataobj) for f in (predictions, references))
        assert row.dice == pytest.approx(dice(a == row.values[0], b == row.values[0]), abs=1e-12)
    assert scores.problems == ()
    raise_if_partial(scores.problems)


def test_a_missing_prediction_is_a_partial_failure_with_the_name_of_the_case(folders, tmp_path):
    predictions, references, task = folders
    (predictions / "new_01.nii.gz").unlink()
    scores = evaluate_files(predictions, references, task, tmp_path / "scores.json")
    with pytest.raises(PartialFailure, match=r"E0100.*case=new_01") as caught:
        raise_if_partial(scores.problems)
    assert caught.value.exit_code == 4
    recorded = read_record(tmp_path / "scores.json", Scores)
    assert {row.case for row in recorded.cases} == {"new_00"}
    assert [p.case for p in recorded.problems] == ["new_01"]


def test_a_prediction_on_another_grid_is_refused_and_the_others_are_scored(folders):
    predictions, references, task = folders
    moved = nib.load(predictions / "new_00.nii.gz")
    save_nifti(predictions / "new_00.nii.gz", np.asarray(moved.dataobj), moved.affine + np.eye(4)[:, [3, 3, 3, 0]] * 4)
    scores = evaluate_files(predictions, references, task)
    assert {row.case for row in scores.cases} == {"new_01"}
    with pytest.raises(PartialFailure, match=r"case=new_00"):
        raise_if_partial(scores.problems)


def test_a_prediction_without_reference_is_no_failure(folders):
    predictions, references, task = folders
    (references / "new_00.nii.gz").unlink()
    scores = evaluate_files(predictions, references, task)
    assert [p.code for p in scores.problems] == ["W0147"]
    raise_if_partial(scores.problems)


def test_nothing_to_score_is_refused(folders, tmp_path):
    predictions, references, task = folders
    with pytest.raises(InputError, match="E0100"):
        evaluate_files(predictions, tmp_path / "nowhere", task)
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="E0146"):
        evaluate_files(tmp_path / "empty", references, task)


def test_json_is_strict_and_csv_is_complete_also_where_a_structure_was_missed(folders, tmp_path):
    predictions, references, task = folders
    empty = nib.load(predictions / "new_00.nii.gz")
    save_nifti(predictions / "new_00.nii.gz", np.zeros(empty.shape, np.uint8), empty.affine)
    scores = evaluate_files(predictions, references, task, tmp_path / "deep" / "scores.json")
    value = json.loads((tmp_path / "deep" / "scores.json").read_text(), parse_constant=refuse)
    assert value["mean_dice"] == scores.mean_dice
    with (tmp_path / "deep" / "scores.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(r["case"], r["label"]) for r in rows] == [(r.case, r.label) for r in scores.cases]
    missed = [r for r in rows if r["case"] == "new_00"]
    assert [(r["status"], r["hd95_mm"], float(r["dice"])) for r in missed] == [("missed", "inf", 0.0)] * 2


def test_two_files_are_a_pair_whatever_they_are_called(folders, tmp_path):
    predictions, references, task = folders
    shutil.copy(predictions / "new_00.nii.gz", tmp_path / "mine.nii.gz")
    scores = evaluate_files(tmp_path / "mine.nii.gz", references / "new_00.nii.gz", task)
    assert {row.case for row in scores.cases} == {"new_00"}


def test_the_json_file_is_not_to_be_called_like_the_csv(folders, tmp_path):
    with pytest.raises(UsageError, match="E0001"):
        evaluate_files(*folders, tmp_path / "scores.csv")
    assert not (tmp_path / "scores.csv").exists()


def test_the_task_is_that_of_a_data_set(data, tmp_path):
    assert read_task(data) == read_task(data / "dataset.json")
    with pytest.raises(InputError, match="E0100"):
        read_task(tmp_path / "dataset.json")
    (tmp_path / "labels.json").write_text("{}")
    with pytest.raises(InputError, match="E0145"):
        read_task(tmp_path / "labels.json")


@pytest.mark.parametrize("name", ["", "dataset.json", "plan.json"])
def test_the_task_is_that_of_a_run_too(finished, name):
    assert read_task(finished / name) == RunFolder(finished).read_plan().task


def test_predictions_of_undeclared_labels_are_refused(folders, tmp_path):
    predictions, references, _ = folders
    shutil.copy(references.parent / "references" / "new_00.nii.gz", tmp_path / "keep.nii.gz")
    (tmp_path / "task").mkdir()
    (tmp_path / "task" / "dataset.json").write_text(
        json.dumps(
            {
                "channel_names": {"0": "MRI"},
                "labels": {"background": 0, "outer": 1},
                "numTraining": 1,
                "file_ending": ".nii.gz",
            }
        )
    )
    with pytest.raises(InputError, match="E0131"):
        evaluate_files(predictions, references, read_task(tmp_path / "task"))


# ---------------------------------------------------------------- what is measured besides


def measured(**changes: object) -> EvaluateOptions:
    return EvaluateOptions(measures=Measures(**changes), workers=1)


def test_only_the_named_labels_are_scored_and_their_means_are_theirs(folders):
    scores = evaluate_files(*folders, options=measured(labels=("inner",)))
    assert {row.label for row in scores.cases} == {"inner"}
    assert [summary.label for summary in scores.labels] == ["inner"]
    assert scores.mean_dice == pytest.approx(np.mean([row.dice for row in scores.cases]))
    with pytest.raises(UsageError, match=r"no label or region middle.*one of outer, inner"):
        evaluate_files(*folders, options=measured(labels=("middle",)))
    with pytest.raises(UsageError, match="no label or region middle"):
        evaluate_files(*folders, options=measured(label_tolerances_mm={"middle": 1.0}))


def test_labels_may_be_named_by_their_value(folders):
    task = folders[2]
    assert named_labels(["2", "outer"], task) == ("inner", "outer")
    assert named_labels(["7"], task) == ("7",)


def test_every_label_may_have_its_own_tolerance_and_several_may_be_measured(folders, tmp_path):
    chosen = measured(tolerance_mm=0.5, label_tolerances_mm={"inner": 2.0}, more_tolerances_mm=(0.5, 2.0, 50.0))
    scores = evaluate_files(*folders, tmp_path / "scores.json", chosen)
    for row in scores.cases:
        assert row.nsd == row.nsd_at[0 if row.label == "outer" else 1]
        assert row.nsd_at[0] < row.nsd_at[1] <= row.nsd_at[2] == 1
    with (tmp_path / "scores.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["tolerance_mm"] for row in rows] == ["0.5", "2.0"] * 2
    assert rows[0]["nsd_at_50_mm"] == "1.0"


def test_lesions_and_calibration_are_measured_on_request(folders, tmp_path):
    predictions, references, task = folders
    (tmp_path / "probabilities").mkdir()
    for case in ("new_00", "new_01"):
        labels = np.asarray(nib.load(references / f"{case}.nii.gz").dataobj).T
        certain = np.stack([labels == value for value in task.values]).astype(np.float16)
        np.savez(tmp_path / "probabilities" / f"{case}.npz", probabilities=certain)
    chosen = EvaluateOptions(measures=Measures(lesion_overlap=0.5), probabilities=tmp_path / "probabilities")
    scores = evaluate_files(predictions, references, task, tmp_path / "scores.json", chosen)
    assert read_record(tmp_path / "scores.json", Scores) == scores
    for row in scores.cases:
        assert (row.lesions.expected, row.lesions.found, row.lesions.f1) == (1, 1, 1.0)
        assert (row.calibration.brier, row.calibration.ece) == (0, 0)
    assert scores.labels[0].lesions.total.expected == 2
    assert scores.labels[0].ece.mean == 0
    (tmp_path / "probabilities" / "new_01.npz").unlink()
    scores = evaluate_files(predictions, references, task, None, chosen)
    assert [(p.code, p.case) for p in scores.problems] == [("E0100", "new_01")]
    assert (scores.cases[-1].calibration, scores.unscored) == (None, ())


def test_a_case_of_one_side_has_a_status_of_its_own(folders, tmp_path):
    predictions, references, task = folders
    (predictions / "new_00.nii.gz").rename(predictions / "extra.nii.gz")
    for folder in (predictions, references):
        shutil.copy(references / "new_01.nii.gz", folder / "cut.nii.gz")
    (predictions / "cut.nii.gz").write_bytes((predictions / "new_01.nii.gz").read_bytes()[:200])
    expected = {"cut": "failed", "extra": "no reference", "new_00": "no prediction"}
    scores = evaluate_files(predictions, references, task, tmp_path / "scores.json")
    assert {case.case: case.status for case in scores.unscored} == expected
    with (tmp_path / "scores.csv").open(newline="") as file:
        found = {row["case"]: row["status"] for row in csv.DictReader(file) if not row["label"]}
    assert found == expected
    allowed = evaluate_files(predictions, references, task, None, EvaluateOptions(allow_missing=True))
    assert allowed.unscored == scores.unscored
    assert [p.case for p in allowed.problems] == ["extra", "cut"]


def test_two_folders_or_their_scores_compare_alike(folders, tmp_path):
    predictions, references, task = folders
    other = tmp_path / "other"
    for path in predictions.iterdir():
        labels = nib.load(references / path.name)
        save_nifti(other / path.name, np.asarray(labels.dataobj), labels.affine)
    comparison = compare_files((predictions, other), references, task, tmp_path / "c.json")
    assert read_record(tmp_path / "c.json", Comparison) == comparison
    assert {(t.mean_b, t.pairs) for t in comparison.tests if t.measure == "dice"} == {(1.0, 2)}
    assert all(t.better == "neither" for t in comparison.tests)  # two cases prove nothing
    for side, name in ((predictions, "a.json"), (other, "b.json")):
        evaluate_files(side, references, task, tmp_path / name)
    again = compare_files((tmp_path / "a.json", tmp_path / "b.json"), None, None)
    assert again.tests == comparison.tests
    with pytest.raises(UsageError, match="--references and --task"):
        compare_files((predictions, tmp_path / "b.json"), None, None)
    with pytest.raises(InputError, match="E0100"):
        compare_files((tmp_path / "a.json", tmp_path / "gone.json"), None, None)


def test_nnunets_summary_is_written_beside_the_rest(folders, tmp_path):
    evaluate_files(*folders, options=EvaluateOptions(nnunet_summary=tmp_path / "out" / "summary.json"))
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert summary.keys() == {"foreground_mean", "mean", "metric_per_case"}
