#!/usr/bin/env python3
"""Networks and losses at equal training time, on one 2D and one 3D data set: Dice, steps, memory, and what they gain.

Every network is trained with `dice-ce`, every loss with the network `plain`: planned, prepared and trained by medseg's
commands, in processes of their own, in batches of two with patches that grow, each for as many steps as fit into the
same seconds. What a step takes is measured before, in turns with one of `plain` with `dice-ce`, in units of what that
took at first: so each entry has the same time on a machine that others slow down, too.

Of the data set, in the order of its ids, every fifth case is held out; `--validation` of these, evenly spread, are
segmented whole and scored. The table gives the mean Dice, the gain over `plain` with `dice-ce` with the 95 % interval
of its mean over cases (one training each: chance of the training is not in it), steps, seconds per step, peak memory
of the training process, and the number of weights.

Each entry is written to WORK/results.json when it is done. The same command goes on with those that are missing and
tries those again that failed; other `--seconds` measure anew. The table is printed at the end and by `--table`; the
script ends with 1 if an entry that was trained for 150 s or more has failed, or has a lower Dice than every network
should have by then.

    python scripts/bench/networks.py --data ../shared/data --work WORK --seconds 300
    python scripts/bench/networks.py --data ../shared/data --work WORK --seconds 10 --sets 3d --only plain focal
    python scripts/bench/networks.py --work WORK --seconds 300 --table
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
from scipy.stats import t as student

NETWORKS = ("plain", "residual", "unet2015", "unet2015-linear", "attention", "unetpp", "resnet-unet", "transunet")
MONAIS = ("swinunetr", "unetr", "segresnet", "mednext")
LOSSES = ("dice", "ce", "focal", "iou", "border-ce")
ENTRIES = [(name, "dice-ce") for name in (*NETWORKS, *MONAIS)] + [("plain", loss) for loss in LOSSES]


@dataclass(frozen=True, slots=True)
class DataSet:
    """A folder below ``--data``, the configuration to train, what it is, and the Dice that every network must pass."""

    folder: str
    configuration: str
    words: str
    floor: float


FLOOR_2D, FLOOR_3D, LEAST_SECONDS = 0.75, 0.5, 150  # lowest: 0.80 and, in 3D, 0.56 of `unetr`, then 0.68

TURNS, CASES = 8, 5  # steps that are timed, the first to warm up; cases that the batch is drawn from

SETS = {
    "2d": DataSet("nuclei", "2d", "2D, nuclei (RGB microscopy)", FLOOR_2D),
    "3d": DataSet("hippocampus", "3d_fullres", "3D, hippocampus (MR)", FLOOR_3D),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("../shared/data"), help="holds nuclei/ and hippocampus/")
    parser.add_argument("--work", type=Path, help="results, logs, and the run in hand")
    parser.add_argument("--cost", nargs=3, metavar=("OWN", "REFERENCE", "NAME"), help="of a step of two runs, as JSON")
    parser.add_argument("--seconds", type=int, default=300, help="of training, for each entry (default: 300)")
    parser.add_argument("--sets", nargs="+", choices=SETS, default=list(SETS))
    parser.add_argument("--only", nargs="+", metavar="NAME", help="these networks (with dice-ce) and losses (of plain)")
    parser.add_argument("--validation", type=int, default=20, help="cases that are scored (default: 20)")
    parser.add_argument("--keep", action="store_true", help="keep the run folders")
    parser.add_argument("--table", action="store_true", help="measure nothing, print the table")
    options = parser.parse_args()
    unknown = set(options.only or ()) - {name for entry in ENTRIES for name in entry}
    if unknown:
        parser.error(f"--only {' '.join(sorted(unknown))}: choose of {', '.join((*NETWORKS, *MONAIS, *LOSSES))}")
    if options.cost:
        print(json.dumps(step_seconds(*map(Path, options.cost[:2]), options.cost[2])))
        return
    if options.work is None:
        parser.error("--work is needed")
    options.work.mkdir(parents=True, exist_ok=True)
    results = Results(options.work / "results.json")
    if not options.table:
        measure_all(options, results)
    low = []
    for name in options.sets:
        print_table(SETS[name], results, name, options.seconds)
        low += too_low(SETS[name], results, name, options.seconds)
    if low and options.seconds >= LEAST_SECONDS:
        sys.exit("\n".join(low))


def measure_all(options: argparse.Namespace, results: Results) -> None:
    """Every entry that is missing, one after the other; one that fails is told and does not stop the others."""
    wanted = [(name, entry) for name in options.sets for entry in ENTRIES if chosen(entry, options.only)]
    todo = [(name, entry) for name, entry in wanted if not results.has(name, entry, options.seconds)]
    for number, (name, (network, loss)) in enumerate(todo, start=1):
        begun = time.monotonic()
        told = f"[{number}/{len(todo)}] {name} {network} {loss}"
        print(f"{told}: {datetime.now(UTC):%H:%M:%S} UTC", file=sys.stderr, flush=True)
        row = measured(options, name, network, loss, results)
        results.put(name, (network, loss), options.seconds, row)
        found = row.get("failed") or f"Dice {row['dice']:.4f}, {row['steps']} steps"
        print(f"{told}: {found}, {time.monotonic() - begun:.0f} s", file=sys.stderr, flush=True)


def chosen(entry: tuple[str, str], only: list[str] | None) -> bool:
    """Whether ``--only`` names the entry: `plain` and `dice-ce` name the reference."""
    network, loss = entry
    return only is None or (network in only and loss == "dice-ce") or (loss in only and network == "plain")


class Results:
    """Rows by data set, network, loss and seconds, in a JSON file that is replaced at every row."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.rows: dict[str, dict[str, Any]] = json.loads(path.read_text()) if path.is_file() else {}

    @staticmethod
    def key(name: str, entry: tuple[str, str], seconds: int) -> str:
        return f"{name} {' '.join(entry)} {seconds}s"

    def has(self, name: str, entry: tuple[str, str], seconds: int) -> bool:
        return "dice" in self.rows.get(self.key(name, entry, seconds), {})

    def put(self, name: str, entry: tuple[str, str], seconds: int, row: dict[str, Any]) -> None:
        self.rows[self.key(name, entry, seconds)] = row
        self.path.parent.mkdir(parents=True, exist_ok=True)
        temporary = self.path.with_suffix(".tmp")
        temporary.write_text(json.dumps(self.rows, indent=1))
        temporary.replace(self.path)

    def get(self, name: str, entry: tuple[str, str], seconds: int) -> dict[str, Any] | None:
        return self.rows.get(self.key(name, entry, seconds))


def measured(options: argparse.Namespace, name: str, network: str, loss: str, results: Results) -> dict[str, Any]:
    """Plan, prepare and train one entry from the beginning; its row, or why there is none."""
    data, log = SETS[name], options.work / f"{name}_{network}_{loss}.log"
    folder, reference = options.work / log.stem, options.work / f"{name}_reference_{options.seconds}s"
    try:
        with log.open("w") as output:
            if not (reference / "plan.json").is_file():
                planned(options, data, reference, *ENTRIES[0], output)
            command(["preprocess", "--run", reference, "--configuration", data.configuration], output)
            shutil.rmtree(folder, ignore_errors=True)
            run = folder / "run"
            planned(options, data, run, network, loss, output)
            of_run = ["--run", run, "--configuration", data.configuration]
            command(["preprocess", *of_run], output)
            known = results.rows.setdefault(f"{name} step {options.seconds}s", {})
            steps = steps_within(options.seconds, run, reference, data.configuration, known)
            peak_bytes = command(["train", *of_run, "--fold", "0", "--iterations", steps, "--recipe", "fast"], output)
        row = read_row(run, data, peak_bytes) | {"seconds_per_step": options.seconds / steps}
    except (OSError, ValueError, KeyError, RuntimeError, subprocess.CalledProcessError) as error:
        return {"failed": f"{type(error).__name__}: {error}; {last_line(log)}"}
    if not options.keep:
        shutil.rmtree(folder)
    return row


def planned(options: argparse.Namespace, data: DataSet, run: Path, network: str, loss: str, output: Any) -> None:
    """A plan with one fold and batches of two, as a short training by the clock has them."""
    run.mkdir(parents=True, exist_ok=True)
    splits = run.parent / f"{run.name}_splits.json"
    splits.write_text(json.dumps([held_out(options.data / data.folder, options.validation)]))
    what = ["plan", options.data / data.folder, "--run", run, "--network", network, "--loss", loss, "--splits", splits]
    command([*what, "--time-budget", f"{options.seconds}s"], output)
    plan = json.loads((run / "plan.json").read_text())
    plan["configurations"][data.configuration]["batch_size"] = 2
    (run / "plan.json").write_text(json.dumps(plan, indent=1))


def steps_within(seconds: float, run: Path, reference: Path, name: str, known: dict[str, float]) -> int:
    """How many steps fit, were the machine as fast as when the reference was first measured, which ``known`` keeps."""
    from medseg.records.base import read_record
    from medseg.records.plan import Plan
    from medseg.training.growth import grown

    ask = [sys.executable, __file__, "--cost", run, reference, name]
    own_s, reference_s = json.loads(subprocess.run(ask, capture_output=True, check=True, text=True).stdout)
    known.setdefault("seconds", reference_s)
    configuration = grown(read_record(run / "plan.json", Plan).configurations[name])
    return max(1, round(seconds / (own_s * known["seconds"] / reference_s) * steps_per_step(configuration)))


def steps_per_step(configuration: Any) -> float:
    """How many steps take as long as one with the planned patch, where patches grow with the number of steps."""
    voxels, before, cost = math.prod(configuration.patch_size) * configuration.batch_size, 0.0, 0.0
    for phase in configuration.training.growth:
        cost += (phase.until - before) * math.prod(phase.patch_size) * phase.batch_size / voxels
        before = phase.until
    return 1 / (cost + 1 - before)


def step_seconds(own: Path, reference: Path, name: str) -> list[float]:
    """The fastest training step of each run on a batch of its data, taken in turns."""

    from medseg.networks.device import choose_device
    from medseg.pipeline.run_folder import RunFolder
    from medseg.preparation.store import open_store
    from medseg.records.base import read_record
    from medseg.records.plan import Plan
    from medseg.training.batches import Sampling, make_batch
    from medseg.training.loop import build
    from medseg.training.loss import region_table
    from medseg.training.schedule import Length
    from medseg.training.settings import Settings
    from medseg.training.step import take_step

    device, steps = choose_device(), []
    for run in (own, reference):
        plan = read_record(run / "plan.json", Plan)
        configuration, store = plan.configurations[name], open_store(RunFolder(run).prepared(name))
        settings = Settings(plan.task, configuration, Length(steps=TURNS), device)
        cases = [store.case(case) for case in list(store.manifest.cases)[:CASES]]
        batch = make_batch(cases, Sampling.of(configuration, plan.task, 0), 0)
        steps.append((*build(settings), batch, 1e-6, settings, region_table(plan.task)))
    fastest = [math.inf, math.inf]
    for turn in range(TURNS):
        for which, arguments in enumerate(steps):
            begun = time.monotonic()
            take_step(*arguments, frugal=False)
            if turn:
                fastest[which] = min(fastest[which], time.monotonic() - begun)
    return fastest


def held_out(dataset: Path, validation: int) -> dict[str, list[str]]:
    """Every fifth case is not trained on; of these ``validation``, evenly spread, are scored."""
    ending = json.loads((dataset / "dataset.json").read_text())["file_ending"]
    cases = sorted(path.name.removesuffix(ending) for path in (dataset / "labelsTr").glob(f"*{ending}"))
    fifth = cases[::5]
    scored = fifth if len(fifth) <= validation else [fifth[i * len(fifth) // validation] for i in range(validation)]
    return {"train": [case for case in cases if case not in set(fifth)], "val": scored}


def command(words: list[Any], output: Any) -> int:
    """Run a medseg command; the peak resident bytes (``ru_maxrss``) of it and of what it waited for."""
    ask = [sys.executable, "-m", "medseg", *map(str, words), "--progress", "plain"]
    child = subprocess.Popen(ask, stdout=output, stderr=output)
    try:
        _, status, usage = os.wait4(child.pid, 0)
    except BaseException:
        child.terminate()
        raise
    child.returncode = os.waitstatus_to_exitcode(status)
    if child.returncode:
        raise RuntimeError(f"medseg {words[0]} ended with {child.returncode}")
    return usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def last_line(log: Path) -> str:
    lines = log.read_text(errors="replace").strip().splitlines()
    return lines[-1][:300] if lines else ""


def read_row(run: Path, data: DataSet, peak_bytes: int) -> dict[str, Any]:
    """What the model card, the scores and the network say."""
    fold = run / "models" / data.configuration / "fold_0"
    card, scores = json.loads((fold / "model.json").read_text()), json.loads((fold / "validation.json").read_text())
    by_case: dict[str, list[float]] = {}
    for case in scores["cases"]:
        if case["dice"] is not None:  # both empty
            by_case.setdefault(case["case"], []).append(case["dice"])
    show = [sys.executable, "-m", "medseg", "info", "--plan", run, "--configuration", data.configuration, "--json"]
    info = json.loads(subprocess.run(show, capture_output=True, check=True, text=True).stdout)
    plan = card["plan"]["configurations"][data.configuration]
    return {
        "dice": card["scores"]["mean"],
        "labels": {label: value for label, value in card["scores"].items() if label != "mean"},
        "cases": {case: sum(values) / len(values) for case, values in by_case.items()},
        "steps": card["steps"],
        "peak_gb": peak_bytes / 1e9,
        "weights": info["parameters"],
        "patch": plan["patch_size"],
        "batch": card["batch_size"],
        "medseg": card["medseg_version"],
        "torch": card["torch_version"],
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, {os.environ.get('OMP_NUM_THREADS', 'all')} threads",
        "when": f"{datetime.now(UTC):%Y-%m-%d %H:%M}",
    }


def print_table(data: DataSet, results: Results, name: str, seconds: int) -> None:
    """Markdown, in the order of ``ENTRIES``; entries that were not measured are left out."""
    rows = [(entry, results.get(name, entry, seconds)) for entry in ENTRIES]
    rows = [(entry, row) for entry, row in rows if row is not None]
    if not rows:
        return
    reference = results.get(name, ("plain", "dice-ce"), seconds) or {}
    scored = max((len(row.get("cases", ())) for _, row in rows), default=0)
    print(f"\n{data.words}; {seconds} s of training each, {scored} held-out cases\n")
    print("| network | loss | Dice | gain (95 % CI) | steps | s/step | patch, batch | peak GB | weights |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- | --- |")
    for (network, loss), row in rows:
        if "failed" in row:
            print(f"| `{network}` | `{loss}` | failed: {row['failed'][:120]} | | | | | | |")
            continue
        size = f"{' × '.join(map(str, row['patch']))}, {row['batch']}"
        print(
            f"| `{network}` | `{loss}` | {row['dice']:.4f} | {gain(row, reference)} | {row['steps']} "
            f"| {row['seconds_per_step']:.3f} | {size} | {row['peak_gb']:.2f} "
            f"| {row['weights'] / 1e6:.1f} M |"
        )


def too_low(data: DataSet, results: Results, name: str, seconds: int) -> list[str]:
    """A line for each entry that failed or lies below the floor."""
    rows = [(entry, results.get(name, entry, seconds)) for entry in ENTRIES]
    found = {" ".join((name, *entry)): row.get("dice") for entry, row in rows if row is not None}
    return [f"{entry}: {dice} is below {data.floor}" for entry, dice in found.items() if not (dice or 0) >= data.floor]


def gain(row: dict[str, Any], reference: dict[str, Any]) -> str:
    """Mean difference to the reference over the cases, with Student's interval."""
    common = sorted(set(row["cases"]) & set(reference.get("cases", ())))
    if row is reference or len(common) < 3:
        return ""
    differences = np.array([row["cases"][case] - reference["cases"][case] for case in common])
    half = student.ppf(0.975, len(common) - 1) * differences.std(ddof=1) / math.sqrt(len(common))
    return f"{differences.mean():+.4f} ({differences.mean() - half:+.4f} to {differences.mean() + half:+.4f})"


if __name__ == "__main__":
    main()
