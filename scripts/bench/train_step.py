"""Seconds of a training step: medseg's loop against nnU-Net's, with the same plan, batch, patch and data, in one run.

nnU-Net's side is its own: `nnUNetTrainer` with its network, loss, optimiser, data loader, augmentation and number of
processes that make batches, in float32 on a CPU and as it trains on a GPU. Ours is the loop that `medseg train` runs,
with the precision that its self-test chooses. Both get the same noisy phantoms: what is in them costs nothing. One
side after the other, each in a process of its own, as many rounds as asked for; the first steps of each are left out.

A row gives the median seconds of a step, the share of them spent waiting for data, and what making a batch takes on one
core as a share of the step: above 100 % one core cannot feed the network.

    python scripts/bench/train_step.py --nnunet-python ENV/bin/python --case hippocampus
    python scripts/bench/train_step.py --nnunet-python ENV/bin/python --case six-stage --iterations 2
    python scripts/bench/train_step.py --nnunet-python ENV/bin/python --case six-stage --device cuda --iterations 50

ENV has nnU-Net: pip install nnunetv2.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from types import SimpleNamespace

CASES = {  # patch, batch, features, shape of the phantoms
    "hippocampus": ((40, 56, 40), 9, (32, 64, 128, 256), (36, 50, 35)),
    "six-stage": ((128, 128, 128), 2, (32, 64, 128, 256, 320, 320), (150, 190, 170)),
}
DATASET = "Dataset999_Phantoms"
PHANTOMS = 10
WARM_UP = {"ours": 3, "theirs": 1}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nnunet-python", type=Path, metavar="PYTHON", help="of an environment with nnU-Net")
    parser.add_argument("--case", choices=list(CASES), default="hippocampus")
    parser.add_argument(
        "--iterations", type=int, default=5, help="of nnU-Net in each round; ours makes 4 times as many"
    )
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--precision", choices=["auto", "float32"], default="auto", help="ours")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="of torch, both sides (default: all cores)")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        task = json.loads(options.worker)
        result = {"ours": ours, "theirs": theirs}[task["side"]](task)
        print("\nresult " + json.dumps(result), flush=True)
        return
    results: dict[str, list[dict]] = {"theirs": [], "ours": []}
    with tempfile.TemporaryDirectory() as folder:
        task = {"case": options.case, "device": options.device, "precision": options.precision}
        task |= {"threads": options.threads, "folder": folder}
        for _ in range(options.rounds):
            if options.nnunet_python is not None:
                theirs_task = {**task, "plans": plans(options.case), "side": "theirs"}
                theirs_task["iterations"] = options.iterations
                results["theirs"].append(run(options.nnunet_python, theirs_task))
            own = {**task, "side": "ours", "iterations": 4 * options.iterations}
            results["ours"].append(run(Path(sys.executable), own))
    report(options, results)


def report(options: argparse.Namespace, results: dict[str, list[dict]]) -> None:
    patch, batch, features, _ = CASES[options.case]
    size = "x".join(map(str, patch))
    print(
        f"{options.case}: patch {size}, batch {batch}, features {features}, {options.device}, {options.threads} threads"
    )
    print(f"{'':8} {'steps':>5} {'s/step':>8} {'waiting':>8} {'s/batch on a core':>18} {'of a step':>10}  precision")
    seconds = {}
    for side, name in (("theirs", "nnU-Net"), ("ours", "medseg")):
        steps = [s for result in results[side] for s in result["steps"]]
        if not steps:
            continue
        seconds[side] = median(steps)
        waited = [w for result in results[side] for w in result["waited"]]
        waiting = f"{sum(waited) / sum(steps):8.1%}" if waited else f"{'?':>8}"
        made = median([s for result in results[side] for s in result["batches"]])
        print(
            f"{name:8} {len(steps):5d} {seconds[side]:8.3f} {waiting} {made:18.3f} {made / seconds[side]:10.1%}", end=""
        )
        print(f"  {results[side][0]['precision']}")
    if len(seconds) == 2:
        print(f"medseg makes {seconds['theirs'] / seconds['ours']:.2f} times as many iterations per second")


def run(python: Path, task: dict) -> dict:
    """One side in a process of its own; its last line is the result."""
    folder = Path(task["folder"])
    environment = {**os.environ, "OMP_NUM_THREADS": str(task["threads"])}
    names = ("raw", "preprocessed", "results")
    environment |= {f"nnUNet_{name}": str(folder / name) for name in names}
    command = [str(python), __file__, "--worker", json.dumps(task)]
    with (folder / f"{task['side']}.log").open("w+") as errors:
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=errors, text=True, env=environment)
        lines = [line for line in done.stdout.splitlines() if line.startswith("result ")]
        if not lines:
            errors.seek(0)
            raise SystemExit(f"{task['side']} failed:\n{errors.read()[-3000:]}")
    return json.loads(lines[-1].removeprefix("result "))


def configuration(case: str):
    """The plan of a case, as medseg writes it."""
    from medseg.records.network import NetworkPlan
    from medseg.records.plan import ConfigurationPlan, Normalisation
    from medseg.records.training import TrainingPlan

    patch, batch, features, shape = CASES[case]
    stages = len(features)
    return ConfigurationPlan(
        name="3d_fullres",
        spacing_mm=(1.0, 1.0, 1.0),
        patch_size=patch,
        batch_size=batch,
        median_shape=tuple(float(n) for n in shape),
        normalisation=(Normalisation(scheme="zscore"),),
        network=NetworkPlan(
            features=features,
            kernels=((3, 3, 3),) * stages,
            strides=((1, 1, 1), *[(2, 2, 2)] * (stages - 1)),
            convs_encoder=(2,) * stages,
            convs_decoder=(2,) * (stages - 1),
        ),
        training=TrainingPlan(batch_dice=False, mirror_axes=(0, 1, 2)),
    )


def own_task():
    from medseg.records.task import Channel, Label, Task

    labels = ("background", "anterior", "posterior")
    return Task(
        channels=(Channel(name="MRI"),), labels=tuple(Label(name=name, value=v) for v, name in enumerate(labels))
    )


def plans(case: str) -> dict:
    """The same plan as nnU-Net's plans.json."""
    from medseg.interop.nnunet_plans import Naming, nnunet_plans
    from medseg.records.fingerprint import Intensity
    from medseg.records.plan import Plan

    intensity = Intensity(mean=0, median=0, std=1, min=-4, max=4, percentile_00_5=-3, percentile_99_5=3)
    planned = configuration(case)
    plan = Plan(preset="nnunet", task=own_task(), intensities=(intensity,), configurations={planned.name: planned})
    measured = SimpleNamespace(spacing_mm=(1.0, 1.0, 1.0), shape_after_crop=CASES[case][3])
    return nnunet_plans(plan, SimpleNamespace(cases=[measured]), Naming.of(plan, DATASET, "SimpleITKIO"))


def phantom(case: str, index: int) -> tuple:
    """A noisy image (1, z, y, x) float32, labels int8: two halves of an ellipsoid; sizes vary by a tenth."""
    import numpy as np

    rng = np.random.default_rng(index)
    shape = [int(n * rng.uniform(0.9, 1.1)) for n in CASES[case][3]]
    z, y, x = np.meshgrid(*[np.linspace(-1, 1, n) for n in shape], indexing="ij", sparse=True)
    inside = (z / 0.6) ** 2 + (y / 0.7) ** 2 + (x / 0.5) ** 2 < 1
    labels = np.where(inside, np.where(y > 0, 2, 1), 0).astype(np.int8)
    return (labels + rng.normal(size=shape))[None].astype(np.float32), labels


def ours(task: dict) -> dict:
    import numpy as np
    import torch

    from medseg.networks.device import choose_device
    from medseg.training.batches import Sampling, make_batch
    from medseg.training.journal import NAME, read_journal
    from medseg.training.loop import Settings, train
    from medseg.training.schedule import Length

    torch.set_num_threads(task["threads"])
    cases = []
    for index in range(PHANTOMS):
        image, labels = phantom(task["case"], index)
        foreground = {value: np.flatnonzero(labels == value)[:10_000] for value in (1, 2)}
        name = f"case_{index}"
        record = SimpleNamespace(id=name)
        cases.append(
            SimpleNamespace(
                record=record, image=image, labels=labels, previous=None, foreground=foreground, provenance=(name,)
            )
        )
    planned, device = configuration(task["case"]), choose_device(task["device"], task["precision"])
    settings = Settings(own_task(), planned, Length(steps=WARM_UP["ours"] + task["iterations"]), device)
    with tempfile.TemporaryDirectory() as folder:
        train(cases, settings, Path(folder))
        steps, _ = read_journal(Path(folder) / NAME)
    seconds = np.diff([step.seconds for step in steps])[WARM_UP["ours"] - 1 :].tolist()
    waited = [getattr(step, "waited_s", None) for step in steps[WARM_UP["ours"] :]]
    torch.set_num_threads(1)
    sampling, batches = Sampling.of(planned, own_task(), 0), []
    for step in range(10):
        begun = time.perf_counter()
        make_batch(cases, sampling, step)
        batches.append(time.perf_counter() - begun)
    precision = str(device.dtype).removeprefix("torch.")
    return {"steps": seconds, "waited": [] if None in waited else waited, "batches": batches, "precision": precision}


def theirs(task: dict) -> dict:
    import numpy as np
    import torch
    from nnunetv2.training.dataloading.nnunet_dataset import nnUNetDatasetBlosc2
    from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer

    torch.set_num_threads(task["threads"])  # as nnUNetv2_train does for a CPU
    labels = {"background": 0, "anterior": 1, "posterior": 2}
    description = {"channel_names": {"0": "MRI"}, "labels": labels, "numTraining": PHANTOMS, "file_ending": ".nii.gz"}
    planned = task["plans"]["configurations"]["3d_fullres"]
    folder = Path(task["folder"]) / "preprocessed" / DATASET / planned["data_identifier"]
    shutil.rmtree(folder, ignore_errors=True)  # of the round before: nothing is written over
    folder.mkdir(parents=True)
    for index in range(PHANTOMS):
        image, segmentation = phantom(task["case"], index)
        places = {v: np.argwhere(segmentation[None] == v)[:10_000] for v in (1, 2)}
        nnUNetDatasetBlosc2.save_case(
            image, segmentation[None], {"class_locations": places}, str(folder / f"case_{index}")
        )
    (folder.parent / "dataset.json").write_text(json.dumps(description))
    device = torch.device(task["device"])
    trainer = nnUNetTrainer({**task["plans"], "continue_training": False}, "3d_fullres", "all", description, device)
    trainer.initialize()
    loader, validation_loader = trainer.get_dataloaders()
    trainer.network.train()
    steps, waited = [], []
    for _ in range(WARM_UP["theirs"] + task["iterations"]):
        begun = time.perf_counter()
        batch = next(loader)
        ready = time.perf_counter()
        trainer.train_step(batch)
        steps.append(time.perf_counter() - begun)
        waited.append(ready - begun)
    generator = loader.generator if hasattr(loader, "generator") else loader.data_loader
    for one in (loader, validation_loader):
        if hasattr(one, "_finish"):
            one._finish()
    torch.set_num_threads(1)
    batches = []
    for _ in range(4):
        begun = time.perf_counter()
        next(generator)
        batches.append(time.perf_counter() - begun)
    kept = WARM_UP["theirs"]
    precision = "float32" if device.type == "cpu" else "float16"
    return {"steps": steps[kept:], "waited": waited[kept:], "batches": batches, "precision": precision}


if __name__ == "__main__":
    main()
