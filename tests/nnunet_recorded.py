"""What nnU-Net 2.8.1 was recorded to predict, with its models and inputs; in ../shared, which may not be there."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import nibabel as nib
import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file


def hippocampus(shared: Path) -> Path:
    """A result folder with one fold, ``input``, ``output_mirroring`` and ``output_no_mirroring``; CPU, float32."""
    return shared / "nnunet_model" / "hippocampus"


def hippocampus_cases(shared: Path) -> list[str]:
    """The names of the twenty cases."""
    return [path.name.removesuffix("_0000.nii.gz") for path in sorted((hippocampus(shared) / "input").iterdir())]


def recorded_output(shared: Path, case: str, *, mirror: bool) -> Path:
    """nnU-Net's label file of a hippocampus case."""
    return hippocampus(shared) / ("output_mirroring" if mirror else "output_no_mirroring") / f"{case}.nii.gz"


def labels_of(path: Path) -> NDArray[np.integer]:
    """Labels as (Z, Y, X), the axes of the file."""
    labels: NDArray[np.integer] = np.asanyarray(nib.load(path).dataobj).transpose()
    return labels


def ct_results(shared: Path, folder: Path) -> Path:
    """The six-stage CT model as a result folder that medseg imports; nnU-Net itself wants more names of each weight.

    For nnU-Net there is ``tools/make_nnunet_ct_model.py``, which needs its Python.
    """
    recorded = shared / "nnunet_model"
    results = folder / "Dataset900_CT25" / "nnUNetTrainer__nnUNetPlans__3d_fullres"
    (results / "fold_0").mkdir(parents=True)
    for name in ("plans.json", "dataset.json"):
        (results / name).write_text(json.dumps(json.loads((recorded / f"ct25_{name}").read_text())))
    weights = {name: w.float() for name, w in load_file(recorded / "ct25_weights_fp16.safetensors").items()}
    checkpoint = {
        "network_weights": weights,
        "init_args": {"configuration": "3d_fullres", "fold": 0},
        "trainer_name": "nnUNetTrainer",
        "inference_allowed_mirroring_axes": (0, 1, 2),
    }
    torch.save(checkpoint, results / "fold_0" / "checkpoint_final.pth")
    return results


def ct_case(shared: Path, folder: Path) -> Path:
    """The folder with the one case of 1.5 mm whose labels are recorded, ``ct_0000.nii.gz``; made in a few seconds."""
    made = folder / "made"
    script = shared / "tools" / "make_ct_case.py"
    command = [sys.executable, str(script), "--spacing", "1.5", "1.5", "1.5", "--output", str(made)]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    images = folder / "images"
    images.mkdir()
    (made / "ct_0000.nii.gz").rename(images / "ct_0000.nii.gz")
    return images


def ct_output(shared: Path) -> Path:
    """nnU-Net's labels of that case; CPU, float32, no mirroring."""
    return shared / "nnunet_model" / "ct25_expected.nii.gz"
