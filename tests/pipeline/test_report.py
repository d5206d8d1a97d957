"""Reports on tiny runs: finished, hardly begun, with parts missing or damaged, and on predictions alone."""

from __future__ import annotations

import json
import re
import shutil

import nibabel as nib
import numpy as np
import pytest
from tiny_runs import cpu, edit

from medseg.errors import IncompatibleError, InputError, UsageError
from medseg.pipeline.pictures import draw_pictures
from medseg.pipeline.predict import PredictOptions, predict_files
from medseg.pipeline.report import report_run
from medseg.pipeline.report_cases import choose
from medseg.pipeline.report_predictions import PredictionReportOptions, report_predictions
from medseg.pipeline.run_folder import RunFolder
from medseg.records.base import read_record
from medseg.records.scores import Scores


@pytest.fixture
def copied(finished, tmp_path):
    """A finished run beside its data set, to be written to."""
    shutil.copytree(finished.parent / "data", tmp_path / "data")
    return shutil.copytree(finished, tmp_path / "run")


def cases(text: str) -> list[str]:
    return re.findall(r'<article class="case" id="case-\d+">\s*<h3>(\S+)', text)


def test_a_finished_run_is_reported_with_everything(copied):
    page = report_run(copied, pictures=3)
    text = page.read_text(encoding="utf-8")
    assert page == copied / "report.html"
    for section in ("flags", "scores", "cases", "viewer-section", "data", "plan", "training", "methods", "provenance"):
        assert f'<section id="{section}"' in text
    shown = cases(text)
    assert shown[:2] == ["new_00", "new_01"] or shown[:2] == ["new_01", "new_00"]
    assert len(shown) > 2  # validation cases too
    assert "Not shown" not in text
    held_out = read_record(copied / "scores" / "held-out.json", Scores)
    assert f"<dd>{held_out.mean_dice:.3f}<small>95" in text or f"<dd>{held_out.mean_dice:.3f}</dd>" in text
    card = json.loads((copied / "models" / "3d_fullres" / "fold_0" / "model.json").read_text())
    assert card["weights_sha256"] in text
    assert f"--fold 0 --epochs {round(card['steps'] / card['training']['iterations_per_epoch'])}" in text
    assert str(copied) not in text  # names of folders stay at home


def test_reports_on_the_same_run_are_the_same(copied, tmp_path):
    first = report_run(copied, tmp_path / "a.html", pictures=1).read_bytes()
    assert report_run(copied, tmp_path / "b.html", pictures=1).read_bytes() == first


def test_a_run_that_is_only_prepared_has_a_report(prepared, tmp_path):
    text = report_run(prepared, tmp_path / "page.html").read_text(encoding="utf-8")
    assert "No training has finished yet." in text
    assert '<section id="plan"' in text
    assert '<section id="scores"' not in text


def test_a_run_whose_data_set_is_gone_is_reported_without_pictures(copied, tmp_path):
    edit(copied / "dataset.json", root=str(tmp_path / "nowhere"), relative_root=None)
    text = report_run(copied).read_text(encoding="utf-8")
    assert "no pictures" in text
    assert "E0100" in text
    assert cases(text) == []
    assert '<section id="scores"' in text


def test_damaged_parts_are_named_and_the_rest_is_reported(copied):
    fold = copied / "models" / "3d_fullres" / "fold_0"
    (fold / "validation.json").write_text("{")
    (copied / "fingerprint.json").write_text("[]")
    (copied / "predictions" / "new_00.nii.gz").write_bytes(b"not gzip")
    with (fold / "log.jsonl").open("a") as journal:
        journal.write('{"step": 3, "lo')
    text = report_run(copied).read_text(encoding="utf-8")
    for name in ("validation.json", "fingerprint", "new_00"):
        assert name in text[text.index("Not shown") : text.index('<section id="flags"')]
    assert cases(text) == ["new_01"]


def test_a_folder_that_is_no_run_is_refused(tmp_path):
    with pytest.raises(InputError, match="E0100"):
        report_run(tmp_path)


def test_pictures_can_be_left_out(copied):
    text = report_run(copied, pictures=0).read_text(encoding="utf-8")
    assert "<img" not in text
    assert 'class="volume"' not in text


def test_cases_are_chosen_by_mean_dice_and_ties_by_name(finished):
    rows = read_record(finished / "scores" / "held-out.json", Scores).cases
    row = next(r for r in rows if r.status == "ok")
    made = [row.model_copy(update={"case": f"c{n}", "dice": dice}) for n, dice in enumerate((0.9, 0.5, 0.7, 0.5, 0.8))]
    assert choose(made, 9) == [("c1", "worst"), ("c3", ""), ("c2", "median"), ("c4", ""), ("c0", "best")]
    assert choose(made, 3) == [("c1", "worst"), ("c2", "median"), ("c0", "best")]
    assert choose(made, 1) == [("c1", "worst")]
    assert choose(made, 0) == []
    assert choose([], 5) == []
    assert choose(made[:1], 5) == [("c0", "worst")]
    assert choose(made[:2], 5) == [("c1", "worst"), ("c0", "best")]


def test_predictions_are_reported_with_what_is_known(copied):
    folder, data = copied / "predictions", copied.parent / "data"
    alone = report_predictions(folder).read_text(encoding="utf-8")
    assert "label 1" in alone
    assert "name the model with --model" in alone
    known = PredictionReportOptions(copied, data / "imagesTs", None, 2)
    text = report_predictions(folder, None, known).read_text(encoding="utf-8")
    assert sorted(cases(text)) == ["new_00", "new_01"]
    assert "Predicted volumes" in text
    assert '<section id="scores"' not in text
    scored = PredictionReportOptions(copied, data / "imagesTs", data / "labelsTs", 2)
    assert '<section id="scores"' in report_predictions(folder, None, scored).read_text(encoding="utf-8")


def test_predictions_of_another_model_are_refused(copied):
    edit(copied / "predictions" / "predict.json", inputs={"3d_fullres fold_0": "00" * 32})
    with pytest.raises(IncompatibleError, match="E0802"):
        report_predictions(copied / "predictions", None, PredictionReportOptions(copied))


def test_images_without_a_model_and_folders_without_a_manifest_are_refused(copied, tmp_path):
    with pytest.raises(UsageError, match="--model"):
        report_predictions(copied / "predictions", None, PredictionReportOptions(images=tmp_path))
    with pytest.raises(InputError, match=r"predict\.json"):
        report_predictions(tmp_path)


def test_predict_draws_previews_and_draws_again_only_what_is_new(finished, tmp_path):
    images = finished.parent / "data" / "imagesTs"
    options = PredictOptions(device=cpu(), preview=True)
    predict_files(finished, images, tmp_path, options)
    pictures = sorted((tmp_path / "previews").iterdir())
    assert [p.name for p in pictures] == ["new_00.png", "new_01.png"]
    before = [p.stat().st_mtime_ns for p in pictures]
    pictures[1].unlink()
    manifest = predict_files(finished, images, tmp_path, options)
    assert [case.status for case in manifest.cases] == ["skipped", "skipped"]
    assert pictures[0].stat().st_mtime_ns == before[0]
    assert pictures[1].is_file()


def test_labels_that_do_not_lie_on_the_image_cost_only_their_picture(copied, tmp_path, caplog):
    data = copied.parent / "data"
    shifted = nib.load(data / "labelsTs" / "new_00.nii.gz")
    cut = np.asarray(shifted.dataobj)[:-2]
    nib.save(nib.Nifti1Image(cut, shifted.affine), data / "labelsTs" / "new_00.nii.gz")
    task = RunFolder(copied).read_plan().task
    drawn = draw_pictures(data / "imagesTs", copied / "predictions", data / "labelsTs", task, tmp_path / "pictures")
    assert [path.name for path in drawn] == ["new_01.png"]
    assert "new_00 is not drawn" in caplog.text
    assert "E0119" in caplog.text
