"""Models of every kind that nnU-Net makes, with random weights: nnU-Net itself and medseg give the same labels.

Set NNUNET_PYTHON to the Python of an environment with nnunetv2 2.8.1, and run with --slow.
"""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
from nnunet_phantoms import NETWORK, RESIDUAL, configuration, plans, write_results
from nnunet_ties import differing
from phantoms import affine_ijk, anatomy, save_nifti
from tiny_models import TWO_D

from medseg.cli.main import main
from medseg.imaging.volumes import read_channels
from medseg.inference.model import load_model, on_grid_of, prepare_stages, segment_stage
from medseg.interop.nnunet_models import import_nnunet
from medseg.networks.device import choose_device

AGREEMENT = 0.99  # random weights decide many voxels by less than half precision
FLAT = {"patch_size": [16, 12], "spacing": [1.1, 0.9], "median_image_size_in_voxels": [26.0, 30.0]}
REGIONS = {"labels": {"background": 0, "whole": [1, 2, 3], "core": [2, 3], "tip": 3}, "regions_class_order": [1, 2, 3]}
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "plain": ("3d_fullres", {}),
    "residual": ("3d_fullres", {"network": RESIDUAL}),
    "2d": ("2d", {"network": TWO_D, "changes": FLAT}),
    "thick slices": ("3d_fullres", {"changes": {"spacing": [7.0, 1.1, 0.9]}}),
    "coarse": ("3d_lowres", {"changes": {"spacing": [3.1, 2.2, 1.8]}}),
    "regions": ("3d_fullres", {"declared": REGIONS}),
    "axes exchanged": (
        "3d_fullres",
        {"written": {"transpose_forward": [1, 0, 2], "transpose_backward": [1, 0, 2]}},
    ),
}


def save_image(folder: Path) -> Path:
    image, _ = anatomy(np.random.default_rng(4))
    save_nifti(folder / "case_0000.nii.gz", image, affine_ijk())
    return folder


def run_nnunet(python: str, results: Path, images: Path, output: Path, *previous: Path) -> None:
    output.mkdir()
    script = Path(__file__).with_name("run_nnunet.py")
    command = [python, script, results, images, output, "0", *previous]
    done = subprocess.run(command, capture_output=True, check=False, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-2000:]


def check_same_labels(results: Path, images: Path, theirs: Path, folder: Path) -> None:
    model, ours = folder / "model", folder / "ours"
    assert main(["import", "nnunet", str(results), "--output", str(model)]) == 0
    options = ["--tta", "mirror", "--precision", "float32", "--device", "cpu", "--progress", "none"]
    assert main(["predict", "--model", str(model), "-i", str(images), "-o", str(ours), *options]) == 0
    found = [np.asanyarray(nib.load(where / "case.nii.gz").dataobj) for where in (ours, theirs)]
    assert len(np.unique(found[1])) > 1
    assert (found[0] == found[1]).mean() > AGREEMENT
    loaded = load_model(model, choose_device("cpu", "float32"))
    if loaded.previous is None and not loaded.plan.task.regions:
        (seen,) = prepare_stages(loaded, read_channels([images / "case_0000.nii.gz"]))
        assert differing(loaded, seen, found[1].transpose(), mirror=True).worst <= 1


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_a_model_of_any_kind_gives_the_labels_that_nnunet_gives(tmp_path, nnunet, kind):
    name, made = KINDS[kind]
    network = made.get("network", NETWORK)
    written = plans({name: configuration(network, **made.get("changes", {}))}, **made.get("written", {}))
    results = write_results(tmp_path / "Dataset900_X", written, name, network, **made.get("declared", {}))
    images = save_image(tmp_path / "images")
    run_nnunet(nnunet, results, images, tmp_path / "theirs")
    check_same_labels(results, images, tmp_path / "theirs", tmp_path)


@pytest.mark.slow
def test_each_stage_of_a_cascade_gives_the_labels_that_nnunet_gives(tmp_path, nnunet):
    both = {
        "3d_lowres": configuration(spacing=[4.0, 2.2, 1.8]),
        "3d_fullres": configuration(),
        "3d_cascade_fullres": {"inherits_from": "3d_fullres", "previous_stage": "3d_lowres"},
    }
    folder, images = tmp_path / "Dataset900_X", save_image(tmp_path / "images")
    first = write_results(folder, plans(both), "3d_lowres")
    second = write_results(folder, plans(both), "3d_cascade_fullres", channels=3)
    run_nnunet(nnunet, first, images, tmp_path / "coarse")
    run_nnunet(nnunet, second, images, tmp_path / "theirs", tmp_path / "coarse")
    import_nnunet(second, tmp_path / "model")
    model = load_model(tmp_path / "model", choose_device("cpu", "float32"))
    assert model.previous is not None
    seen = prepare_stages(model, read_channels([images / "case_0000.nii.gz"]))
    coarse, theirs = (
        np.asanyarray(nib.load(tmp_path / name / "case.nii.gz").dataobj).transpose() for name in ("coarse", "theirs")
    )
    assert (segment_stage(model.previous, seen[0], mirror=True) == coarse).mean() > AGREEMENT
    previous = on_grid_of(seen[1].preparation, coarse.astype(np.int16), model.configuration)
    assert (segment_stage(model, seen[1], previous, mirror=True) == theirs).mean() > AGREEMENT
