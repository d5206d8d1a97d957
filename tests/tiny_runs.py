"""Tiny runs: the whole pipeline on phantoms with a network of a few hundred weights, in seconds on one core."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
from phantoms import affine_ijk, anatomy, make_dataset, make_dataset_2d, save_nifti

CONFIGURATION = "3d_fullres"
STEPS_PER_EPOCH = 5
WEAK = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}


def cpu():
    """The processor in float32: the same numbers every time."""
    from medseg.networks.device import choose_device

    return choose_device("cpu", "float32")


def tiny(configuration: dict) -> None:
    """Shrink a configuration of a ``plan.json`` in place."""
    axes = len(configuration["patch_size"])
    configuration["patch_size"] = [8, 16, 16][-axes:]
    configuration["batch_size"] = 2
    configuration["network"] |= {
        "features": [4, 8],
        "kernels": [[3] * axes] * 2,
        "strides": [[1] * axes, [2] * axes],
        "convs_encoder": [1, 1],
        "convs_decoder": [1],
    }
    configuration["training"] |= {"iterations_per_epoch": STEPS_PER_EPOCH, "momentum": 0.9, "initial_lr": 0.05}


def edit(path: Path, **changes: object) -> dict:
    """Change fields of a JSON file; ``a__b=1`` sets ``["a"]["b"]``, a callable gets the old value."""
    whole = json.loads(path.read_text())
    for name, value in changes.items():
        *parents, last = name.split("__")
        place = whole
        for parent in parents:
            place = place[int(parent) if isinstance(place, list) else parent]
        place[last] = value(place[last]) if callable(value) else value
    path.write_text(json.dumps(whole, indent=1))
    return whole


def shrink(run: Path) -> None:
    """Make every configuration of a planned run tiny, as a user would: by editing ``plan.json``."""

    def all_tiny(configurations: dict) -> dict:
        for configuration in configurations.values():
            tiny(configuration)
        return configurations

    edit(run / "plan.json", configurations=all_tiny)


def add_held_out(dataset: Path, count: int = 2, seed: int = 9) -> None:
    """``imagesTs`` and ``labelsTs`` of phantoms ``new_00`` …"""
    rng = np.random.default_rng(seed)
    for index in range(count):
        image, labels = anatomy(rng)
        affine = affine_ijk(degrees=(-6, 9, 4), origin=tuple(rng.uniform(-30, 30, 3)))
        save_nifti(dataset / "imagesTs" / f"new_{index:02d}_0000.nii.gz", image, affine)
        save_nifti(dataset / "labelsTs" / f"new_{index:02d}.nii.gz", labels, affine)


def planned_run(folder: Path, cases: int = 6) -> Path:
    """``folder/data`` and ``folder/run`` with a tiny plan."""
    from medseg.pipeline.plan import plan_run

    make_dataset(folder / "data", cases)
    add_held_out(folder / "data")
    plan_run(folder / "data", folder / "run")
    shrink(folder / "run")
    return folder / "run"


def prepared_run(folder: Path, cases: int = 6) -> Path:
    """A planned run whose 3D configuration is prepared."""
    from medseg.pipeline.preprocess import preprocess_run

    run = planned_run(folder, cases)
    preprocess_run(run, [CONFIGURATION], workers=1)
    return run


def finished_run(folder: Path) -> Path:
    """Everything: fold 0 trained until it knows the phantoms, held-out images segmented, drawn and scored."""
    from medseg.pipeline.run import RunOptions, run_all
    from medseg.pipeline.train import TrainOptions

    run = planned_run(folder)
    result = run_all(folder / "data", run, RunOptions(training=TrainOptions(epochs=12), device=cpu(), workers=1))
    assert result.held_out is not None
    return run


def finished_run_2d(folder: Path) -> Path:
    """A run on RGB pictures, its ``2d`` configuration trained for a few steps."""
    from medseg.pipeline.plan import plan_run
    from medseg.pipeline.run import RunOptions, run_all
    from medseg.pipeline.train import TrainOptions

    make_dataset_2d(folder / "data", 6)
    plan_run(folder / "data", folder / "run")
    shrink(folder / "run")
    run_all(folder / "data", folder / "run", RunOptions(training=TrainOptions(epochs=10), device=cpu(), workers=1))
    return folder / "run"


def command(*arguments: object) -> list[str]:
    """The command line of medseg in a process of its own."""
    return [sys.executable, "-m", "medseg", *map(str, arguments)]


def run_command(*arguments: object, **options: object) -> subprocess.CompletedProcess[str]:
    """Run medseg in a process of its own to its end, on one core."""
    environment = os.environ | WEAK
    return subprocess.run(
        command(*arguments), capture_output=True, text=True, timeout=120, check=False, env=environment, **options
    )


def contents(folder: Path) -> dict[str, bytes]:
    """Bytes of every file below a folder by its relative path."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}
