"""Prediction: the whole command of nnU-Net 2.8.1 and of medseg on one model and the same cases, in one run.

Both sides are processes of their own, timed from start to end, imports and all; the peak of memory is that of the
largest process of each (nnU-Net has several, which add up). medseg runs in its own choice of precision and in float32,
and in int8 where asked to (--precision int8), for which `medseg quantise` measures ranges on the same images before.
Labels are compared with nnU-Net's.

  hippocampus  a model of four stages, 20 small volumes, 8 mirrored views
  ct           a model of six stages, 128 x 128 x 128, 25 labels, one CT of 224 x 202 x 244, no mirroring

The models lie in ../shared; with --recorded so do nnU-Net's labels, its times are those of another machine, and nnU-Net
is not run. Export alone, without the network: scripts/bench/export.py.

    python scripts/bench/predict.py --case hippocampus ct --nnunet ENV
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[2]
SHARED = ROOT.parent / "shared"
sys.path.insert(0, str(ROOT / "tests"))

from nnunet_recorded import (  # noqa: E402
    ct_case,
    ct_output,
    ct_results,
    hippocampus,
    hippocampus_cases,
    labels_of,
    recorded_output,
)

RECORDED_S = {"hippocampus": 55.0, "ct": 180.0}


@dataclass(frozen=True)
class Work:
    """A model as nnU-Net's result folder, cases, and nnU-Net's labels of them where they are recorded."""

    results: Path
    images: Path
    recorded: dict[str, Path]
    mirror: bool


@dataclass(frozen=True)
class Taken:
    """Wall clock, user and system time, and the peak of memory of one process, of the median run."""

    seconds: float
    cpu: float
    peak_gb: float


def main() -> None:
    options = parse()
    with tempfile.TemporaryDirectory(dir=options.work) as folder:
        for case in options.case:
            compare(case, Path(folder) / case, options)


def compare(case: str, folder: Path, options: argparse.Namespace) -> None:
    folder.mkdir()
    work = made(case, folder, options)
    print(f"{case}: {len(work.recorded)} cases, {'mirrored views' if work.mirror else 'no mirroring'}", flush=True)
    theirs = folder / "theirs"
    if options.recorded:
        theirs.mkdir()
        for name in work.recorded:
            shutil.copy(work.recorded[name], theirs / f"{name}.nii.gz")
        whole = len(work.recorded) == len(hippocampus_cases(SHARED)) or case == "ct"
        reference = RECORDED_S[case] if whole else None
        print(f"  nnU-Net   {RECORDED_S[case]:8.1f} s for all cases (recorded on another machine: ratios say little)")
    else:
        taken = measure(nnunet_command(work, theirs, options), theirs, options, environment(work))
        reference = taken.seconds
        say("nnU-Net", taken, None)
        agreement("nnU-Net", labels_in(theirs, work), {name: labels_of(path) for name, path in work.recorded.items()})
    model, medseg = folder / "model", [sys.executable, "-m", "medseg"]
    subprocess.run([*medseg, "import", "nnunet", work.results, "--output", model], check=True, capture_output=True)
    if "int8" in options.precision:
        measuring = [*medseg, "quantise", "--model", model, "-i", work.images]
        subprocess.run(measuring, check=True, capture_output=True)
    for precision in options.precision:
        ours = folder / f"ours_{precision}"
        tta = "mirror" if work.mirror else "none"
        command = [*medseg, "predict", "--model", model, "-i", work.images, "-o", ours, "--tta", tta]
        small = precision == "int8"
        command += ["--device", options.device, "--precision", "auto" if small else precision]
        command += ["--backend", "int8" if small else options.backend, "--progress", "plain"]
        say(f"medseg {precision}", measure(command, ours, options, dict(os.environ)), reference)
        agreement("", labels_in(ours, work), labels_in(theirs, work))


def made(case: str, folder: Path, options: argparse.Namespace) -> Work:
    if case == "hippocampus":
        recorded = {
            name: recorded_output(SHARED, name, mirror=True) for name in hippocampus_cases(SHARED)[: options.cases]
        }
        images = folder / "images"
        images.mkdir()
        for name in recorded:
            shutil.copy(hippocampus(SHARED) / "input" / f"{name}_0000.nii.gz", images)
        results = folder / "Dataset004_Hippocampus" / "nnUNetTrainer__nnUNetPlans__3d_fullres"
        results.mkdir(parents=True)
        for name in ("plans.json", "dataset.json"):
            shutil.copy(hippocampus(SHARED) / name, results)
        shutil.copytree(hippocampus(SHARED) / "fold_0", results / "fold_0")
        return Work(results, images, recorded, mirror=True)
    if options.recorded:
        results = ct_results(SHARED, folder)
    else:  # nnU-Net wants more names of each weight
        script = SHARED / "tools" / "make_nnunet_ct_model.py"
        command = [options.nnunet / "bin" / "python", script, "--output", folder]
        done = subprocess.run(command, check=True, capture_output=True, text=True)
        results = Path(done.stdout.splitlines()[-1])
    return Work(results, ct_case(SHARED, folder), {"ct": ct_output(SHARED)}, mirror=False)


def nnunet_command(work: Work, output: Path, options: argparse.Namespace) -> list[object]:
    """What a user types: data set, configuration, fold; all else as nnU-Net has it."""
    number = work.results.parent.name.removeprefix("Dataset")[:3]
    program = options.nnunet / "bin" / "nnUNetv2_predict"
    command = [program, "-d", number, "-c", "3d_fullres", "-f", "0", "-i", work.images, "-o", output]
    return [*command, "-device", options.device, *([] if work.mirror else ["--disable_tta"])]


def environment(work: Work) -> dict[str, str]:
    place = str(work.results.parent.parent)
    return os.environ | dict.fromkeys(("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results"), place)


def measure(command: list[object], output: Path, options: argparse.Namespace, variables: dict[str, str]) -> Taken:
    """The run of the median time; every run starts with no output."""
    runs = []
    for _ in range(options.repeats):
        shutil.rmtree(output, ignore_errors=True)
        begun = time.perf_counter()
        process = subprocess.Popen(
            [str(part) for part in command], env=variables, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
        )
        assert process.stderr is not None
        told = process.stderr.read().decode()
        _, status, usage = os.wait4(process.pid, 0)
        seconds = time.perf_counter() - begun
        if status:
            raise SystemExit(f"{command[0]} failed:\n{told[-3000:]}")
        if options.told:
            print(told)
        runs.append(Taken(seconds, usage.ru_utime + usage.ru_stime, usage.ru_maxrss * 1024 / 1e9))
    middle = statistics.median_low(run.seconds for run in runs)
    return next(run for run in runs if run.seconds == middle)


def say(who: str, taken: Taken, reference: float | None) -> None:
    ratio = "" if reference is None else f", ratio {reference / taken.seconds:.1f}"
    print(
        f"  {who:16} {taken.seconds:8.1f} s ({taken.cpu:.1f} s of CPU), peak {taken.peak_gb:.2f} GB{ratio}", flush=True
    )


def labels_in(folder: Path, work: Work) -> dict[str, np.ndarray]:
    return {name: labels_of(folder / f"{name}.nii.gz") for name in work.recorded}


def agreement(who: str, ours: dict[str, np.ndarray], theirs: dict[str, np.ndarray]) -> None:
    """Equal voxels and Dice, of the worst case and label."""
    equal = min(float((ours[name] == theirs[name]).mean()) for name in ours)
    differing = sum(int((ours[name] != theirs[name]).sum()) for name in ours)
    dice = []
    for name, found in ours.items():
        for label in set(np.unique(theirs[name])) - {0}:
            a, b = found == label, theirs[name] == label
            dice.append(2 * int((a & b).sum()) / (int(a.sum()) + int(b.sum())))
    what = "its own recorded labels" if who else "nnU-Net's labels"
    print(f"    against {what}: {differing} voxels differ, {100 * equal:.4f} % equal in the worst case,", end=" ")
    print(f"Dice {statistics.mean(dice):.5f}, of the worst label {min(dice):.5f}", flush=True)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", nargs="+", choices=list(RECORDED_S), default=["hippocampus"])
    parser.add_argument("--nnunet", type=Path, metavar="ENV", help="environment with nnU-Net 2.8.1")
    parser.add_argument("--recorded", action="store_true", help="do not run nnU-Net; use its recorded labels")
    parser.add_argument("--cases", type=int, help="at most so many of the hippocampus")
    parser.add_argument("--precision", nargs="+", choices=["auto", "float32", "int8"], default=["auto", "float32"])
    parser.add_argument("--backend", choices=["auto", "torch", "openvino", "graphs"], default="auto", help="of medseg")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu", help="of both")
    parser.add_argument("--repeats", type=int, default=1, help="of each command; the median is told (default: 1)")
    parser.add_argument("--told", action="store_true", help="show what the commands say")
    parser.add_argument("--work", type=Path, help="folder for temporary files")
    options = parser.parse_args()
    if not options.recorded and options.nnunet is None:
        parser.error("name --nnunet ENV, or take what is --recorded")
    return options


if __name__ == "__main__":
    main()
