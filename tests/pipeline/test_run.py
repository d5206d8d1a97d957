"""Everything in one go: what is there in the end, what a second command does, what stops it early."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path

import numpy as np
import pytest
from phantoms import affine_ijk, save_nifti
from tiny_runs import CONFIGURATION, contents, cpu, planned_run

import medseg.pipeline.train
from medseg.errors import InputError, UsageError
from medseg.pipeline.run import RunOptions, run_all
from medseg.pipeline.train import TrainOptions
from medseg.records.base import read_record
from medseg.records.run import RunManifest
from medseg.records.scores import Scores

OPTIONS = {"training": TrainOptions(epochs=1), "workers": 1}


@pytest.fixture(autouse=True)
def without_curves(monkeypatch):
    """Drawing the curves takes most of a tiny training."""
    monkeypatch.setattr(medseg.pipeline.train, "training_picture", lambda path, points: None)


@pytest.fixture
def planned(tmp_path):
    return planned_run(tmp_path, cases=4)


def do(run, **options):
    return run_all(run.parent / "data", run, RunOptions(device=cpu(), **(OPTIONS | options)))


def test_a_finished_run_holds_predictions_scores_and_pictures_of_the_held_out_images(finished):
    assert {p.name for p in (finished / "predictions").iterdir()} == {"new_00.nii.gz", "new_01.nii.gz", "predict.json"}
    assert {p.name for p in (finished / "pictures").iterdir()} == {"new_00.png", "new_01.png"}
    assert {p.name for p in (finished / "scores").iterdir()} == {"held-out.json", "held-out.csv"}
    assert read_record(finished / "scores" / "held-out.json", Scores).mean_dice > 0.8  # the network has learnt
    assert not list(finished.rglob(".medseg*"))


def test_the_same_command_again_does_nothing_again(planned):
    first = do(planned)
    assert first.complete
    before = contents(planned)
    again = do(planned)
    assert again.cards == first.cards
    assert [case.status for case in again.predictions.cases] == ["skipped", "skipped"]
    after = contents(planned)
    del before["predictions/predict.json"], after["predictions/predict.json"]  # says that they were skipped
    assert after == before


def test_held_out_images_are_found_beside_the_file_that_names_the_data_set(planned):
    result = run_all(planned.parent / "data" / "dataset.json", planned, RunOptions(device=cpu(), **OPTIONS))
    assert len(result.predictions.cases) == 2
    assert result.held_out is not None


def test_every_fold_asked_for_is_trained_and_averaged(planned):
    result = do(planned, folds=("1", "all"))
    assert [card.fold for card in result.cards] == ["1", "all"]
    assert set(result.predictions.inputs) == {"3d_fullres fold_1", "3d_fullres fold_all"}


@pytest.mark.parametrize("options", [{"folds": ("0", "9")}, {"configuration": "3d_lowres"}])
def test_a_fold_or_configuration_that_does_not_exist_is_refused_before_any_work(planned, options):
    with pytest.raises(UsageError, match="E0001"):
        do(planned, **options)
    assert not (planned / "prepared").exists()


def test_a_data_set_with_errors_is_refused_with_all_of_them(tmp_path, planned):
    data = planned.parent / "data"
    shape = (30, 26, 18)
    save_nifti(data / "labelsTr" / "case_00.nii.gz", np.full(shape, 9, np.uint8), affine_ijk())
    (data / "labelsTr" / "case_01.nii.gz").unlink()
    with pytest.raises(InputError) as caught:
        run_all(data, tmp_path / "fresh", RunOptions(device=cpu()))
    assert {"case_00", "case_01"} <= {p.case for p in caught.value.problems}
    assert not (tmp_path / "fresh").exists()


def test_warnings_of_the_check_are_logged_before_anything_is_trained(planned, caplog):
    path = planned.parent / "data" / "imagesTr" / "readme.txt"
    path.write_text("x")
    with caplog.at_level(logging.WARNING, "medseg"), pytest.raises(UsageError):
        do(planned, folds=("9",))
    assert any("W0147" in message for message in caplog.messages)


@pytest.mark.parametrize("held_out", ["none", "hidden files only", "images without labels"])
def test_a_data_set_without_held_out_labels_is_only_segmented_and_without_images_only_trained(planned, held_out):
    data = planned.parent / "data"
    shutil.rmtree(data / "labelsTs")
    if held_out != "images without labels":
        shutil.rmtree(data / "imagesTs")
    if held_out == "hidden files only":
        (data / "imagesTs").mkdir()
        (data / "imagesTs" / ".DS_Store").write_text("x")
    result = do(planned)
    assert result.complete
    assert result.held_out is None
    assert (result.predictions is not None) == (held_out == "images without labels")
    assert len(result.pictures) == (2 if held_out == "images without labels" else 0)


def test_one_held_out_image_that_is_broken_does_not_take_the_scores_of_the_others_with_it(planned):
    (planned.parent / "data" / "imagesTs" / "new_00_0000.nii.gz").write_bytes(b"broken")
    result = do(planned)
    assert not result.complete
    assert [case.id for case in result.predictions.failed] == ["new_00"]
    assert {row.case for row in result.held_out.cases} == {"new_01"}
    manifest = json.loads((planned / "predictions" / "predict.json").read_text())
    assert RunManifest.model_validate(manifest).failed
    assert (planned / "models" / CONFIGURATION / "fold_0" / "model.json").is_file()


def test_a_run_ends_with_a_report_and_one_that_fails_is_only_a_warning(finished, tmp_path, monkeypatch, caplog):
    page = (finished / "report.html").read_text()
    assert "Held-out images" in page or "held-out images" in page
    shutil.copytree(finished.parent / "data", tmp_path / "data")
    run = Path(shutil.copytree(finished, tmp_path / "run"))
    (run / "report.html").unlink()

    def broken(*arguments, **options):
        raise RuntimeError("no room on the page")

    monkeypatch.setattr("medseg.pipeline.run.report_run", broken)
    result = run_all(tmp_path / "data", run, RunOptions(training=TrainOptions(epochs=12), device=cpu(), workers=1))
    assert result.complete
    assert result.report is None
    assert "no report: no room on the page" in caplog.text
