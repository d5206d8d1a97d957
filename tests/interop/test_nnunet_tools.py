"""nnU-Net's own tools on our files: its accumulation of folds and its choice of a configuration read our summary.json.

They need an environment with nnU-Net (see ``nnunet`` in conftest.py) and the developers' data.
"""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
from phantoms import save_nifti

from medseg.evaluation.nnunet_summary import write_nnunet_summary
from medseg.evaluation.pairs import read_pair
from medseg.evaluation.postprocessing import apply, choose
from medseg.evaluation.scores import evaluate, find_pairs
from medseg.imaging.geometry import nifti_affine
from medseg.imaging.volumes import read_volume
from medseg.pipeline.evaluate import read_task
from medseg.records.scores import Measures

DATASET = "Dataset004_Hippocampus"
CONFIGURATIONS = ("2d", "3d_fullres")

pytestmark = pytest.mark.slow


def disturbed(labels: np.ndarray, seed: int, islands: int) -> np.ndarray:
    """A prediction (Z, Y, X): wrong voxels at random, and islands of label 1 in a corner."""
    rng = np.random.default_rng(seed)
    found = np.where((rng.random(labels.shape) < 0.1) & (labels > 0), 0, labels)
    for number in range(islands):
        found[1, 1 + 2 * number, 1:3] = 1
    return found


@pytest.fixture(scope="module")
def work(shared, tmp_path_factory) -> Path:
    """nnU-Net's three folders for six cases of the hippocampus, whose predictions of three folds are made up."""
    work, model = tmp_path_factory.mktemp("nnunet"), shared / "nnunet_model" / "hippocampus"
    plans, declaration = (next(model.rglob(name)) for name in ("plans.json", "dataset.json"))
    labels = sorted((shared / "data" / "hippocampus" / "labelsTr").glob("*.nii.gz"))[:6]
    preprocessed, raw = work / "preprocessed" / DATASET, work / "raw" / DATASET
    for folder in (preprocessed / "gt_segmentations", raw / "labelsTr"):
        folder.mkdir(parents=True)
        for path in labels:
            shutil.copy(path, folder)
    shutil.copy(plans, preprocessed / "nnUNetPlans.json")
    for folder in (preprocessed, raw):
        shutil.copy(declaration, folder)
    for quality, name in enumerate(CONFIGURATIONS):
        output = work / "results" / DATASET / f"nnUNetTrainer__nnUNetPlans__{name}"
        for number, path in enumerate(labels):
            volume = read_volume(path)
            array = disturbed(volume.array[0], 10 * number + quality, islands=3 - 2 * quality)
            target = output / f"fold_{number % 3}" / "validation" / path.name
            save_nifti(target, array.T.astype(np.uint8), nifti_affine(volume.grid))
        shutil.copy(plans, output / "plans.json")
        shutil.copy(declaration, output / "dataset.json")
    return work


def ask(python: str, work: Path, *arguments: str) -> dict:
    script = Path(__file__).with_name("run_nnunet_selection.py")
    command = [python, str(script), str(work), DATASET, *arguments]
    return json.loads(subprocess.run(command, capture_output=True, text=True, check=True, timeout=600).stdout)


def dice(summary: dict) -> float:
    return summary["foreground_mean"]["Dice"]


def test_their_tools_accept_our_summary_and_choose_as_with_their_own(nnunet, work):
    task = read_task(work / "raw" / DATASET)
    ours = {}
    for name, folder in ask(nnunet, work, "accumulate", *CONFIGURATIONS).items():
        theirs = json.loads((Path(folder) / "summary.json").read_text())
        pairs, problems = find_pairs(Path(folder), work / "raw" / DATASET / "labelsTr")
        assert problems == []
        write_nnunet_summary(evaluate(pairs, task, Measures()), pairs, Path(folder) / "summary.json")
        ours[name] = json.loads((Path(folder) / "summary.json").read_text())
        assert ours[name]["foreground_mean"] == pytest.approx(theirs["foreground_mean"])
        for value, metrics in theirs["mean"].items():
            assert ours[name]["mean"][value] == pytest.approx(metrics)
        for mine, other in zip(ours[name]["metric_per_case"], theirs["metric_per_case"], strict=True):
            assert mine["prediction_file"] == other["prediction_file"]
            for value, metrics in other["metrics"].items():
                assert mine["metrics"][value] == pytest.approx(metrics)
    found = ask(nnunet, work, "find_best", *CONFIGURATIONS)
    results = found["all_results"]
    for name, summary in ours.items():
        assert results[f"nnUNetTrainer__nnUNetPlans__{name}"] == dice(summary)
    best = max(ours, key=lambda name: dice(ours[name]))
    chosen = found["best_model_or_ensemble"]
    assert [model["configuration"] for model in chosen["selected_model_or_models"]] == [best]
    assert chosen["result_on_crossval_post_pp"] == pytest.approx(processed(work, best, task))
    assert chosen["result_on_crossval_post_pp"] > chosen["result_on_crossval_pre_pp"]


def processed(work: Path, name: str, task) -> float:
    """The mean Dice of our post-processing, chosen by nnU-Net's rule."""
    folder = work / "results" / DATASET / f"nnUNetTrainer__nnUNetPlans__{name}" / "crossval_results_folds_0_1_2"
    pairs = [read_pair(pair, task) for pair in find_pairs(folder, work / "raw" / DATASET / "labelsTr")[0]]
    steps = choose([(prediction, reference) for prediction, reference, _ in pairs], task)
    scores = []
    for label in (1, 2):
        masks = [(apply(p, steps, spacing) == label, r == label) for p, r, spacing in pairs]
        scores.append(np.mean([2 * (p & r).sum() / (p.sum() + r.sum()) for p, r in masks]))
    return float(np.mean(scores))
