"""Models given to nnU-Net: read back by our own importer, and run by nnU-Net itself where that is installed.

Set NNUNET_PYTHON to the Python of an environment with nnunetv2 for the latter.
"""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from nnunet_phantoms import NETWORK, RESIDUAL, configuration, plans, write_results
from phantoms import affine_ijk, anatomy, save_nifti
from tiny_models import make_configuration, make_plan, make_region_task, make_task

from medseg.cli.main import main
from medseg.errors import InputError, UsageError
from medseg.interop.nnunet_checkpoint import read_checkpoint
from medseg.interop.nnunet_export import dataset_json, export_nnunet
from medseg.interop.nnunet_models import import_nnunet
from medseg.networks.build import build_network
from medseg.networks.weights import save_weights
from medseg.records.base import write_record
from medseg.records.model import CARD, WEIGHTS, ModelCard
from medseg.records.network import NetworkPlan
from medseg.records.task import Task
from medseg.records.training import Laterality


def own_model(folder: Path, network: NetworkPlan = NETWORK, task: Task | None = None, **training: object) -> Path:
    """A model folder of ours with random weights."""
    task = task or make_task(3)
    patch = (8, 16, 12)
    chosen = make_configuration(patch, network, name="3d_fullres", mirror_axes=(0, 1, 2), **training)
    plan = make_plan(chosen, task)
    weights = build_network(network, 1, task.outputs, seed=3)
    fold = folder / "3d_fullres" / "fold_0"
    card = ModelCard(
        configuration="3d_fullres",
        fold="0",
        plan=plan,
        weights_sha256=save_weights(fold / WEIGHTS, weights),
        medseg_version="0",
        torch_version=torch.__version__,
        settings_sha256="",
        batch_size=2,
        training=plan.configurations["3d_fullres"].training,
        steps=1,
    )
    write_record(fold / CARD, card)
    return folder


@pytest.mark.parametrize("network", [NETWORK, RESIDUAL], ids=["plain", "residual"])
def test_what_was_exported_is_imported_with_the_same_weights_and_plan(tmp_path, network):
    model = own_model(tmp_path / "model", network)
    (results,) = export_nnunet(model, tmp_path / "Dataset500_X").folders
    card = import_nnunet(results, tmp_path / "back").cards[0]
    first = json.loads((model / "3d_fullres" / "fold_0" / CARD).read_text())
    assert card.weights_sha256 == first["weights_sha256"]
    ours = first["plan"]["configurations"]["3d_fullres"]
    back = card.plan.to_json()["configurations"]["3d_fullres"]
    same = ("spacing_mm", "patch_size", "normalisation", "resampling", "network")
    assert {key: back[key] for key in same} == {key: ours[key] for key in same}
    assert card.orientation == "canonical"


def test_imported_models_go_back_as_they_came(tmp_path):
    both = {
        "3d_lowres": configuration(spacing=[4.0, 2.2, 1.8]),
        "3d_fullres": configuration(),
        "3d_cascade_fullres": {"inherits_from": "3d_fullres", "previous_stage": "3d_lowres"},
    }
    results = write_results(tmp_path / "in", plans(both), "3d_cascade_fullres", channels=3, folds=("0", "all"))
    first = write_results(tmp_path / "in", plans(both), "3d_lowres")
    import_nnunet(tmp_path / "in", tmp_path / "model")
    exported = export_nnunet(tmp_path / "model", tmp_path / "out", folds=("0",))
    assert [folder.name for folder in exported.folders] == [results.name, first.name]
    for before, after in zip((results, first), exported.folders, strict=True):
        old, new = (read_checkpoint(f / "fold_0" / "checkpoint_final.pth") for f in (before, after))
        assert set(old.weights) == set(new.weights)
        assert all(torch.equal(old.weights[name], new.weights[name]) for name in old.weights)
        assert json.loads((after / "plans.json").read_text())["image_reader_writer"] == "SimpleITKIO"


def test_labels_regions_and_the_ignore_label_are_written_in_nnunets_words():
    written = dataset_json(make_region_task(), ".nii.gz")
    assert written["labels"] == {"background": 0, "whole": [2, 4, 7], "core": [4, 7], "tip": [4]}
    assert written["regions_class_order"] == [2, 7, 4]
    assert dataset_json(make_task(3, ignore_value=3), ".nii.gz")["labels"]["ignore"] == 3
    assert "ignore" not in dataset_json(make_task(3, ignore_value=9), ".nii.gz")["labels"]


def test_what_nnunet_cannot_do_is_refused_or_told(tmp_path):
    gaps = Task.model_validate(
        {"channels": [{"name": "MRI"}], "labels": [{"name": f"l{v}", "value": v} for v in (0, 2, 5)]}
    )
    with pytest.raises(InputError, match="label values"):
        export_nnunet(own_model(tmp_path / "gaps", task=gaps), tmp_path / "out")
    with pytest.raises(InputError, match="pictures"):
        export_nnunet(own_model(tmp_path / "flat"), tmp_path / "out", file_ending=".png")
    with pytest.raises(UsageError, match="file ending"):
        export_nnunet(tmp_path / "flat", tmp_path / "out", file_ending=".dcm")
    sided = own_model(tmp_path / "sided", laterality=Laterality(axis=2, pairs=((1, 2),)))
    exported = export_nnunet(sided, tmp_path / "out")
    assert "left and right" in exported.notes[0]
    stored = read_checkpoint(exported.folders[0] / "fold_0" / "checkpoint_final.pth")
    assert stored.mirror_axes == (0, 1)
    with pytest.raises(UsageError, match="is there already"):
        export_nnunet(sided, tmp_path / "out")


@pytest.mark.slow
@pytest.mark.parametrize("network", [NETWORK, RESIDUAL], ids=["plain", "residual"])
def test_nnunet_predicts_the_same_labels_with_a_model_of_ours(tmp_path, nnunet, network):
    model = own_model(tmp_path / "model", network)
    image, _ = anatomy(np.random.default_rng(4))
    affine = affine_ijk()[:, [2, 0, 1, 3]] @ np.diag([1, -1, 1, 1])  # axes in another order, one of them backwards
    save_nifti(tmp_path / "images" / "case_0000.nii.gz", image.transpose(2, 0, 1)[:, ::-1], affine)
    assert main(["export", "nnunet", str(model), "--output", str(tmp_path / "out")]) == 0
    (results,) = (tmp_path / "out").iterdir()
    options = ["--tta", "mirror", "--precision", "float32", "--device", "cpu", "--progress", "none"]
    ours = ["predict", "--model", str(model), "-i", str(tmp_path / "images"), "-o", str(tmp_path / "ours")]
    assert main([*ours, *options]) == 0
    (tmp_path / "theirs").mkdir()
    script = Path(__file__).with_name("run_nnunet.py")
    places = [results, tmp_path / "images", tmp_path / "theirs"]
    done = subprocess.run([nnunet, script, *places, "0"], capture_output=True, check=False, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    found = [np.asanyarray(nib.load(tmp_path / who / "case.nii.gz").dataobj) for who in ("ours", "theirs")]
    assert len(np.unique(found[1])) > 1
    assert (found[0] == found[1]).mean() > 0.998  # random weights decide many voxels by less than half precision
    shutil.rmtree(tmp_path / "out")
