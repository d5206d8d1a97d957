"""Predictions refined, post-processed otherwise, cut at a depth, and with attention maps; refinement by selection."""

from __future__ import annotations

import shutil
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from tiny_runs import CONFIGURATION, cpu, edit

import medseg.pipeline.select
import medseg.pipeline.train
from medseg.errors import UsageError
from medseg.evaluation.crossfit import Judged
from medseg.evaluation.gain import real_gain
from medseg.imaging.volumes import read_channels, read_volume
from medseg.inference.model import load_model, prepare_stages
from medseg.networks.skip_unet import attention_maps
from medseg.pipeline.predict import PredictOptions, predict_files
from medseg.pipeline.processing import processing, processing_named, refinement_named
from medseg.pipeline.select import SelectOptions, select_run
from medseg.pipeline.train import TrainOptions, train_run
from medseg.records.base import write_record
from medseg.records.model import PostProcessing, Refinement
from medseg.records.plan import Plan

STRONG = Refinement(smoothness_weight=20, smoothness_mm=3, appearance_weight=0)


def predict(run: Path, output: Path, **options):
    manifest = predict_files(
        run,
        run.parent / "data" / "imagesTs",
        output,
        PredictOptions(device=cpu(), configuration=CONFIGURATION, **options),
    )
    assert not manifest.failed, manifest
    return manifest


def labels(output: Path, case: str = "new_00") -> np.ndarray:
    return read_volume(output / f"{case}.nii.gz").array[0]


def test_predictions_are_refined_when_asked_and_done_anew(finished, tmp_path):
    assert predict(finished, tmp_path).settings["refinement"] == "none"
    plain = labels(tmp_path)
    manifest = predict(finished, tmp_path, refinement=STRONG)
    assert [case.status for case in manifest.cases] == ["done", "done"]
    assert manifest.settings["refinement"] == "mean-field"
    refined = labels(tmp_path)
    assert 0 < (plain != refined).mean() < 0.1
    assert {case.status for case in predict(finished, tmp_path, refinement=STRONG).cases} == {"skipped"}


def test_post_processing_is_replaced_by_a_file_or_by_none(finished, tmp_path):
    write_record(tmp_path / "steps.json", PostProcessing(min_mm3={1: 1e6, 2: 1e6}, refinement=STRONG))
    predict(finished, tmp_path / "a", postprocessing=processing_named(str(tmp_path / "steps.json")))
    assert not labels(tmp_path / "a").any()
    steps = processing(
        processing_named(str(tmp_path / "steps.json")), PredictOptions(refinement="none"), _task(finished)
    )
    assert (steps.refinement, steps.min_mm3) == (None, {1: 1e6, 2: 1e6})
    predict(finished, tmp_path / "b", postprocessing=processing_named("none"))
    assert labels(tmp_path / "b").any()
    wrong = PostProcessing(keep_largest_labels=(7,))
    with pytest.raises(UsageError, match="label number 7"):
        predict(finished, tmp_path / "c", postprocessing=wrong)


def _task(run: Path):
    return Plan.model_validate_json((run / "plan.json").read_text()).task


def test_refinements_are_named_in_a_few_words():
    assert refinement_named("none") is None
    assert refinement_named("mean-field") == Refinement()
    assert refinement_named("mean-field:iterations=3,appearance_mm=1.5") == Refinement(iterations=3, appearance_mm=1.5)
    for wrong in ("crf", "mean-field:strength=2", "mean-field:iterations=0", "mean-field:iterations", ""):
        with pytest.raises(UsageError, match="smoothness_weight"):
            refinement_named(wrong)


@pytest.fixture(scope="module")
def trained(prepared, tmp_path_factory):
    """Runs of three stages with other networks, trained for a few steps."""

    def train(name: str, **network) -> Path:
        folder = tmp_path_factory.mktemp(name)
        shutil.copytree(prepared.parent / "data", folder / "data")
        run = Path(shutil.copytree(prepared, folder / "run"))

        def changed(configurations: dict) -> dict:
            configurations[CONFIGURATION]["network"] |= {
                "name": name,
                "features": [4, 6, 8],
                "kernels": [[3, 3, 3]] * 3,
                "strides": [[1, 1, 1], [1, 2, 2], [2, 2, 2]],
                "convs_encoder": [1, 1, 1],
                "convs_decoder": [1, 1],
            }
            return configurations

        edit(run / "plan.json", configurations=changed)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(medseg.pipeline.train, "training_picture", lambda path, points: None)
            train_run(run, CONFIGURATION, "0", TrainOptions(epochs=2, device=cpu()))
        return run

    return train


def test_attention_maps_are_images_on_the_files_grid_of_what_the_gates_let_pass(trained, tmp_path):
    run = trained("attention")
    manifest = predict(run, tmp_path, attention_maps=True)
    names = [f"attention/new_00/level_{level}.nii.gz" for level in (1, 2)]
    assert set(names) <= set(manifest.cases[0].outputs)
    source = run.parent / "data" / "imagesTs" / "new_00_0000.nii.gz"
    model = load_model(run, cpu(), CONFIGURATION)
    prepared = prepare_stages(model, read_channels([source]))[0]
    image = nib.load(source)
    for name in names:
        found = nib.load(tmp_path / name)
        assert found.shape == image.shape
        np.testing.assert_allclose(found.affine, image.affine, atol=1e-5)
        values = found.get_fdata()
        assert 0 <= values.min() < values.max() <= 1
    alone = tmp_path / "alone"  # with one tile as large as the volume nothing is averaged
    edit(run / "models" / CONFIGURATION / "fold_0" / "model.json", plan=lambda plan: _one_tile(plan, prepared.image))
    predict(run, alone, attention_maps=True)
    patch = [-(-n // 4) * 4 for n in prepared.image.shape[1:]]
    before = [(p - n) // 2 for p, n in zip(patch, prepared.image.shape[1:], strict=True)]
    padded = np.zeros((1, 1, *patch), np.float32)
    inner = tuple(slice(b, b + n) for b, n in zip(before, prepared.image.shape[1:], strict=True))
    padded[(0, 0, *inner)] = prepared.image[0]
    finest = attention_maps(model.networks[0], torch.from_numpy(padded))[0][0, 0].numpy()[inner]
    values = nib.load(alone / names[0]).get_fdata()
    assert abs(np.median(values[values > 0]) - np.median(finest)) < 0.05
    assert abs(values.max() - finest.max()) < 0.05


def _one_tile(plan: dict, image: np.ndarray) -> dict:
    plan["configurations"][CONFIGURATION]["patch_size"] = [-(-n // 4) * 4 for n in image.shape[1:]]
    return plan


def test_unetpp_is_cut_at_a_depth_and_other_networks_are_refused(trained, finished, tmp_path):
    run = trained("unetpp")
    predict(run, tmp_path)
    whole = labels(tmp_path)
    assert {case.status for case in predict(run, tmp_path, depth=1).cases} == {"done"}
    assert whole.shape == labels(tmp_path).shape
    with pytest.raises(UsageError, match="1 to 2"):
        predict(run, tmp_path, depth=3)
    with pytest.raises(UsageError, match="plain"):
        predict(finished, tmp_path, depth=1)
    with pytest.raises(UsageError, match="network plain"):
        predict(finished, tmp_path, attention_maps=True)
    with pytest.raises(UsageError, match="one of them"):
        predict(run, tmp_path, attention_maps=True, uncertainty=True)


def test_refinement_is_selected_only_where_its_gain_is_real(finished, tmp_path, monkeypatch):
    shutil.copytree(finished.parent / "data", tmp_path / "data")
    run = Path(shutil.copytree(finished, tmp_path / "run"))
    options = SelectOptions((CONFIGURATION,), device=cpu(), refinement=Refinement())
    selection = select_run(run, options)
    assert selection.postprocessing.refinement is None  # two cases cannot tell
    assert any("Refine by a mean field: mean Dice" in sentence for sentence in selection.evidence)
    files = list((run / "selection" / f"{CONFIGURATION}_refined").glob("*.nii.gz"))
    assert len(files) == len(selection.cases)
    stamps = [path.stat().st_mtime_ns for path in files]
    monkeypatch.setattr(medseg.pipeline.select, "real_gain", lambda *_: (True, "yes"))
    kept = select_run(run, options)
    assert kept.postprocessing.refinement == Refinement()
    assert [path.stat().st_mtime_ns for path in files] == stamps  # made once
    manifest = predict_files(run, run.parent / "data" / "imagesTs", tmp_path / "out", PredictOptions(device=cpu()))
    assert manifest.settings["refinement"] == "mean-field"


def test_a_gain_is_real_when_it_is_larger_than_chance_and_no_label_pays_for_it():
    rng = np.random.default_rng(0)
    plain = rng.uniform(0.6, 0.8, (12, 2))

    def judged(dice: np.ndarray) -> Judged:
        return Judged(("a", "b"), dice, dice, PostProcessing())

    assert real_gain("x", judged(plain), judged(plain + 0.02))[0]
    assert not real_gain("x", judged(plain), judged(plain))[0]
    assert not real_gain("x", judged(plain), judged(plain + 0.00005))[0]
    assert not real_gain("x", judged(plain), judged(plain + rng.normal(0.001, 0.05, plain.shape)))[0]
    kept, told = real_gain("x", judged(plain), judged(plain + np.array([0.05, -0.01])))
    assert not kept
    assert "but b would fall" in told
    assert not real_gain("x", judged(plain[:4]), judged(plain[:4] + 0.05))[0]
    gone = plain.copy()
    gone[:6, 0] = np.nan  # rightly empty: counts as 1
    assert real_gain("x", judged(plain), judged(gone))[0]
