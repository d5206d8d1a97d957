"""Selecting by cross-validation, following the recipe in predictions, and joining predictions."""

from __future__ import annotations

import json
import shutil
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from run_records import SCHEMAS, check_records
from tiny_runs import cpu, edit, planned_run

import medseg.pipeline.train
from medseg.errors import IncompatibleError, InputError, UsageError
from medseg.imaging.volumes import read_volume
from medseg.pipeline import validate
from medseg.pipeline.ensemble import EnsembleOptions, ensemble_folders
from medseg.pipeline.evaluate import EvaluateOptions, evaluate_files
from medseg.pipeline.predict import PredictOptions, predict_files
from medseg.pipeline.preprocess import preprocess_run
from medseg.pipeline.run_folder import RunFolder
from medseg.pipeline.select import SelectOptions, select_run
from medseg.pipeline.train import TrainOptions, train_run
from medseg.records.base import read_record, write_record
from medseg.records.model import ModelCard, PostProcessing
from medseg.records.selection import Member, Selection

BOTH = ("2d", "3d_fullres")


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """A run of two folds: both configurations have fold 0, 3d_fullres has fold 1 too."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(medseg.pipeline.train, "training_picture", lambda path, points: None)
        run = planned_run(tmp_path_factory.mktemp("select"), cases=6)
        names = [f"case_{n:02d}" for n in range(6)]
        edit(
            run / "splits.json", folds=[{"train": names[3:], "val": names[:3]}, {"train": names[:3], "val": names[3:]}]
        )
        preprocess_run(run, list(BOTH), workers=1)
        for name, fold in (("2d", "0"), ("3d_fullres", "0"), ("3d_fullres", "1")):
            train_run(run, name, fold, TrainOptions(epochs=6, device=cpu()))
    return run


@pytest.fixture
def run(trained, tmp_path) -> Path:
    shutil.copytree(trained.parent / "data", tmp_path / "data")
    return Path(shutil.copytree(trained, tmp_path / "run"))


def select(run: Path, **options) -> Selection:
    return select_run(run, SelectOptions(**({"device": cpu()} | options)))


def predict(run: Path, output: Path, **options):
    return predict_files(run, run.parent / "data" / "imagesTs", output, PredictOptions(device=cpu(), **options))


def recipe(run: Path, *names: str) -> None:
    """Write a recipe of these configurations with fold 0."""
    found = read_record(run / "selection.json", Selection)
    members = []
    for name in names:
        card = json.loads((run / "models" / name / "fold_0" / "model.json").read_text())
        weight = 1 / len(names)
        members.append(
            Member(configuration=name, folds=("0",), weights_sha256=(card["weights_sha256"],), weight=weight)
        )
    write_record(run / "selection.json", found.model_copy(update={"members": tuple(members)}))


def weights_of(run: Path, name: str) -> list[str]:
    cards = [run / "models" / name / f"fold_{fold}" / "model.json" for fold in "01"]
    return [json.loads(card.read_text())["weights_sha256"] for card in cards]


def labels(path: Path) -> np.ndarray:
    return read_volume(path).array[0]


def test_configurations_are_compared_on_the_cases_of_both_and_what_is_missing_is_said(run):
    selection = select(run)
    assert selection.cases == ("case_00", "case_01", "case_02")
    assert {candidate.name for candidate in selection.candidates} == {"2d", "3d_fullres", "2d + 3d_fullres"}
    assert "2d lacks fold 1" in selection.missing
    assert any("3 of 6 cases" in sentence for sentence in selection.missing)
    for candidate in selection.candidates[:1]:
        name = candidate.configurations[0]
        rows = json.loads((run / "models" / name / "fold_0" / "validation.json").read_text())
        assert candidate.mean_dice_unprocessed == pytest.approx(rows["mean_dice"])
    assert read_record(run / "selection.json", Selection) == selection
    alone = select(run, configurations=("3d_fullres",))
    assert len(alone.cases) == 6
    assert alone.members[0].folds == ("0", "1")


def test_every_record_of_a_selection_reads_back_equal(run, tmp_path):
    select(run)
    assert {name for name in SCHEMAS if name.startswith("selection")} <= check_records(
        run, tmp_path, ("plan.json", "splits.json")
    )


def test_ensembles_are_predicted_once_and_again_only_after_damage(run, monkeypatch):
    first = select(run)
    folder = run / "selection" / "2d+3d_fullres"
    assert not [path for path in (run / "selection").iterdir() if path.is_file()]  # no map stays
    before = {path.name: path.stat().st_mtime_ns for path in folder.glob("*.nii.gz")}
    assert len(before) == 3
    (folder / "case_01.nii.gz").write_bytes(b"damaged")
    assert select(run).candidates == first.candidates
    after = {path.name: path.stat().st_mtime_ns for path in folder.glob("*.nii.gz")}
    assert [name for name in before if before[name] != after[name]] == ["case_01.nii.gz"]


def test_an_ensemble_of_folders_is_the_mean_of_their_maps_and_what_the_recipe_predicts(run, tmp_path):
    select(run)
    recipe(run, *BOTH)
    for name in BOTH:
        predict(run, tmp_path / name, configuration=name, folds=("0",), probabilities="uint16")
    manifest = predict(run, tmp_path / "recipe", probabilities="uint16")
    assert manifest.settings["configuration"] == "2d + 3d_fullres"
    joined = ensemble_folders([tmp_path / name for name in BOTH], tmp_path / "joined")
    assert [case.status for case in joined.cases] == ["done", "done"]
    for case in ("new_00", "new_01"):
        maps = [
            np.stack([nib.load(tmp_path / n / f"probabilities/{case}/label_{v}.nii.gz").get_fdata() for v in range(3)])
            for n in BOTH
        ]
        mean = (maps[0] + maps[1]) / 2
        sure = np.sort(mean, axis=0)[-1] - np.sort(mean, axis=0)[-2] > 1e-4
        expected = mean.argmax(0)
        found = np.asarray(nib.load(tmp_path / "joined" / f"{case}.nii.gz").dataobj)
        assert sure.mean() > 0.99
        np.testing.assert_array_equal(found[sure], expected[sure])
        for value in range(3):
            written = nib.load(tmp_path / "recipe" / f"probabilities/{case}/label_{value}.nii.gz").get_fdata()
            np.testing.assert_allclose(written, mean[value], atol=2e-5)
    again = predict(run, tmp_path / "recipe", probabilities="uint16")
    assert {case.status for case in again.cases} == {"skipped"}


def entropy(shares: np.ndarray) -> np.ndarray:
    return -np.where(shares > 0, shares * np.log(np.maximum(shares, 1e-12)), 0).sum(0)


def maps_of(folder: Path, case: str) -> np.ndarray:
    return np.stack([nib.load(folder / f"probabilities/{case}/label_{v}.nii.gz").get_fdata() for v in range(3)])


def test_an_ensemble_tells_how_far_its_networks_lie_apart_and_how_sure_it_is(run, tmp_path, monkeypatch):
    monkeypatch.setattr("medseg.evaluation.probabilities.SLAB_VOXELS", 2000)
    select(run)
    recipe(run, *BOTH)
    edit(run / "selection.json", members__1__folds=["0", "1"], members__1__weights_sha256=weights_of(run, "3d_fullres"))
    edit(run / "selection.json", members__0__weight=0.25, members__1__weight=0.75)
    wanted = {"probabilities": "uint16", "uncertainty": True}
    manifest = predict(run, tmp_path / "out", **wanted, preview=True)
    for name in BOTH:
        predict(
            run, tmp_path / name, configuration=name, folds=("0", "1") if name == "3d_fullres" else ("0",), **wanted
        )
    for outcome in manifest.cases:
        plane, solid = (maps_of(tmp_path / name, outcome.id) for name in BOTH)
        mean = 0.25 * plane + 0.75 * solid
        within = nib.load(tmp_path / "3d_fullres" / f"uncertainty/{outcome.id}.nii.gz").get_fdata() * np.log(2)
        between = entropy(mean) - 0.25 * entropy(plane) - 0.75 * entropy(solid)
        expected = (between + 0.75 * within) / np.log(3)  # three networks, three classes
        found = nib.load(tmp_path / "out" / f"uncertainty/{outcome.id}.nii.gz")
        np.testing.assert_allclose(found.get_fdata(), np.clip(expected, 0, 1), atol=2e-4)
        assert found.get_fdata().max() > 0.01
        inside = [mean.argmax(0) == v for v in (1, 2)]
        dice = [2 * mean[v][m].sum() / (m.sum() + mean[v].sum()) for v, m in enumerate(inside, 1) if m.any()]
        assert outcome.quality == pytest.approx(np.mean(dice), abs=1e-3)
        assert (tmp_path / "out" / "previews" / f"{outcome.id}.png").is_file()
    assert {case.status for case in predict(run, tmp_path / "out", **wanted).cases} == {"skipped"}
    assert {case.status for case in predict(run, tmp_path / "out", uncertainty=True).cases} == {"done"}


def test_predictions_follow_the_recipe_unless_a_configuration_is_named(run, tmp_path):
    with pytest.raises(UsageError, match="several configurations"):
        predict(run, tmp_path / "out")
    select(run)
    recipe(run, "2d")
    assert predict(run, tmp_path / "out").settings["configuration"] == "2d"
    named = predict(run, tmp_path / "named", configuration="3d_fullres")
    assert named.settings["configuration"] == "3d_fullres"


def test_a_recipe_whose_models_were_trained_again_is_refused(run, tmp_path):
    select(run)
    recipe(run, "2d")
    edit(run / "selection.json", members__0__weights_sha256=lambda old: ["0" * 64])
    with pytest.raises(IncompatibleError, match="E0802"):
        predict(run, tmp_path / "out")


def test_runs_without_validated_folds_or_without_common_cases_are_refused(run):
    with pytest.raises(UsageError, match="E0001"):
        select(run, configurations=("4d",))
    shutil.rmtree(run / "models" / "3d_fullres" / "fold_0")
    with pytest.raises(InputError, match="E0146"):
        select(run)
    shutil.rmtree(run / "models")
    with pytest.raises(InputError, match="E0100"):
        select(run)


@pytest.fixture
def three(tmp_path, run) -> list[Path]:
    """Three predictions of one case with labels 0 to 2, without maps."""
    reference = nib.load(run.parent / "data" / "labelsTs" / "new_00.nii.gz")
    rng = np.random.default_rng(0)
    folders = []
    for name in "abc":
        array = rng.integers(0, 3, reference.shape).astype(np.uint8)
        (tmp_path / name).mkdir()
        nib.save(nib.Nifti1Image(array, reference.affine), tmp_path / name / "new_00.nii.gz")
        folders.append(tmp_path / name)
    return folders


def test_votes_go_to_the_majority_and_ties_to_the_first(three, tmp_path):
    manifest = ensemble_folders(three, tmp_path / "out", EnsembleOptions(by="vote"))
    assert manifest.cases[0].status == "done"
    a, b, c = (labels(folder / "new_00.nii.gz") for folder in three)
    expected = np.where((b == c) & (a != b), b, a)
    np.testing.assert_array_equal(labels(tmp_path / "out" / "new_00.nii.gz"), expected)


def test_what_does_not_fit_fails_case_by_case_and_nonsense_is_refused(three, tmp_path):
    manifest = ensemble_folders(three, tmp_path / "out")
    assert "--vote" in manifest.cases[0].problems[0]
    (three[1] / "new_00.nii.gz").rename(three[1] / "other.nii.gz")
    manifest = ensemble_folders(three, tmp_path / "out", EnsembleOptions(by="vote"))
    assert [case.status for case in manifest.cases] == ["failed", "failed"]
    with pytest.raises(UsageError, match="two or more"):
        ensemble_folders(three[:1], tmp_path / "out")
    with pytest.raises(UsageError, match="overwritten"):
        ensemble_folders(three, three[0])
    with pytest.raises(UsageError, match="weights"):
        ensemble_folders(three, tmp_path / "out", EnsembleOptions(weights=(1.0,)))
    with pytest.raises(InputError, match="E0100"):
        ensemble_folders([three[0], tmp_path / "nowhere"], tmp_path / "out")


def test_nnunets_archives_are_joined_too(three, tmp_path, run):
    task = RunFolder(run).read_plan().task
    rng, found = np.random.default_rng(1), []
    for folder in three[:2]:
        shape = labels(folder / "new_00.nii.gz").shape
        maps = rng.random((3, *shape)).astype(np.float32)
        np.savez_compressed(folder / "new_00.npz", probabilities=maps)
        found.append(maps)
    options = EnsembleOptions(weights=(3.0, 1.0), task=task)
    ensemble_folders(three[:2], tmp_path / "out", options)
    expected = (3 * found[0] + found[1]).argmax(0)
    np.testing.assert_array_equal(labels(tmp_path / "out" / "new_00.nii.gz"), expected)


def test_what_was_predicted_with_maps_is_scored_with_its_calibration(run, tmp_path):
    predict(run, tmp_path / "out", configuration="3d_fullres", probabilities="uint8")
    task, data = RunFolder(run).read_plan().task, run.parent / "data"
    options = EvaluateOptions(probabilities=tmp_path / "out")
    scores = evaluate_files(tmp_path / "out", data / "labelsTs", task, options=options)
    assert scores.problems == ()
    for row in scores.cases:
        maps = tmp_path / "out" / "probabilities" / row.case
        believed = nib.load(maps / f"label_{row.values[0]}.nii.gz").get_fdata()
        truth = np.asarray(nib.load(data / "labelsTs" / f"{row.case}.nii.gz").dataobj) == row.values[0]
        assert row.calibration is not None
        # the box around the structure has fewer voxels than the volume, so its mean error is at least that of all
        assert row.calibration.brier >= ((believed - truth) ** 2).mean() - 1e-9
        assert row.calibration.brier < 0.5


def test_folds_that_finish_at_the_same_time_choose_post_processing_from_the_cases_of_both(run, monkeypatch):
    folder, name = RunFolder(run), "3d_fullres"
    cards = [read_record(run / "models" / name / f"fold_{fold}" / "model.json", ModelCard) for fold in "01"]
    for card in cards:
        (run / "models" / name / f"fold_{card.fold}" / "model.json").unlink()
    (run / "models" / name / "postprocessing.json").unlink()
    honest, at_once = validate.choose_post_processing, []

    def slow(*arguments):
        at_once.append(len(list((run / "models" / name).glob("fold_*/model.json"))))
        time.sleep(0.3)
        honest(*arguments)

    monkeypatch.setattr(validate, "choose_post_processing", slow)
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(lambda card: validate.finish_fold(folder, card), cards))
    assert at_once == [0, 1]
    chosen = read_record(run / "models" / name / "postprocessing.json", PostProcessing)
    assert "over 6 cases" in chosen.evidence[0]
    assert not list((run / "models" / name).glob(".*lock*"))
