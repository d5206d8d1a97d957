#!/usr/bin/env python3
"""Networks and losses at equal training time, on one 2D and one 3D data set: Dice, steps, memory, and what they gain.

Every network is trained with `dice-ce`, every loss with the network `plain`: planned, prepared and trained as `medseg
run` does it, in processes of their own, each for the same seconds. Of the data set, in the order of its ids, every
fifth case is held out; `--validation` of these, evenly spread, are segmented whole and scored. The table gives the mean
Dice, the gain over `plain` with `dice-ce` with the 95 % interval of its mean over cases (one training each: chance of
the training is not in it), steps, seconds per step, peak memory of the training process, and the number of weights.

Each entry is written to WORK/results.json when it is done. The same command goes on with those that are missing and
tries those again that failed; other `--seconds` measure anew, and so does `--again` with those that `--only` names. The
table is printed at the end and by `--table`; the script ends with 1 if an entry that was trained for 150 s or more has
failed, or has a lower Dice than every network should have by then.

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
from functools import partial
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


SETS = {
    "2d": DataSet("nuclei", "2d", "2D, nuclei (RGB microscopy)", FLOOR_2D),
    "3d": DataSet("hippocampus", "3d_fullres", "3D, hippocampus (MR)", FLOOR_3D),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("../shared/data"), help="holds nuclei/ and hippocampus/")
    parser.add_argument("--work", type=Path, required=True, help="results, logs, and the run in hand")
    parser.add_argument("--seconds", type=int, default=300, help="of training, for each entry (default: 300)")
    parser.add_argument("--sets", nargs="+", choices=SETS, default=list(SETS))
    parser.add_argument("--only", nargs="+", metavar="NAME", help="these networks (with dice-ce) and losses (of plain)")
    parser.add_argument("--validation", type=int, default=20, help="cases that are scored (default: 20)")
    parser.add_argument("--again", action="store_true", help="measure what was measured before anew")
    parser.add_argument("--keep", action="store_true", help="keep the run folders")
    parser.add_argument("--table", action="store_true", help="measure nothing, print the table")
    options = parser.parse_args()
    unknown = set(options.only or ()) - {name for entry in ENTRIES for name in entry}
    if unknown:
        parser.error(f"--only {' '.join(sorted(unknown))}: choose of {', '.join((*NETWORKS, *MONAIS, *LOSSES))}")
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
    known = partial(results.has, seconds=options.seconds)
    todo = [(name, entry) for name, entry in wanted if options.again or not known(name, entry)]
    for number, (name, (network, loss)) in enumerate(todo, start=1):
        begun = time.monotonic()
        told = f"[{number}/{len(todo)}] {name} {network} {loss}"
        print(f"{told}: {datetime.now(UTC):%H:%M:%S} UTC", file=sys.stderr, flush=True)
        row = measured(options, name, network, loss)
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


def measured(options: argparse.Namespace, name: str, network: str, loss: str) -> dict[str, Any]:
    """Plan, prepare and train one entry from the beginning; its row, or why there is none."""
    data = SETS[name]
    folder = options.work / f"{name}_{network}_{loss}"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    run, log, splits = folder / "run", options.work / f"{folder.name}.log", folder / "splits.json"
    splits.write_text(json.dumps([held_out(options.data / data.folder, options.validation)]))
    budget, configuration = f"{options.seconds}s", ["--run", run, "--configuration", data.configuration]
    plan = ["plan", options.data / data.folder, "--run", run, "--network", network, "--loss", loss, "--splits", splits]
    commands = [
        [*plan, "--time-budget", budget],
        ["preprocess", *configuration],
        ["train", *configuration, "--fold", "0", "--time-budget", budget],
    ]
    with log.open("w") as output:
        for command in commands:
            status, peak_bytes = finished([*command, "--progress", "plain"], output)
            if status:
                return {"failed": f"medseg {command[0]} ended with {status}: {last_line(log)}"}
    try:
        row = read_row(run, data, peak_bytes)
    except (OSError, ValueError, KeyError, subprocess.CalledProcessError) as error:
        return {"failed": f"{type(error).__name__}: {error}"}
    if not options.keep:
        shutil.rmtree(folder)
    return row


def held_out(dataset: Path, validation: int) -> dict[str, list[str]]:
    """Every fifth case is not trained on; of these ``validation``, evenly spread, are scored."""
    ending = json.loads((dataset / "dataset.json").read_text())["file_ending"]
    cases = sorted(path.name.removesuffix(ending) for path in (dataset / "labelsTr").glob(f"*{ending}"))
    fifth = cases[::5]
    scored = fifth if len(fifth) <= validation else [fifth[i * len(fifth) // validation] for i in range(validation)]
    return {"train": [case for case in cases if case not in set(fifth)], "val": scored}


def finished(command: list[Any], output: Any) -> tuple[int, int]:
    """Exit status and peak resident bytes (``ru_maxrss``) of a medseg command and of what it waited for."""
    child = subprocess.Popen([sys.executable, "-m", "medseg", *map(str, command)], stdout=output, stderr=output)
    try:
        _, status, usage = os.wait4(child.pid, 0)
    except BaseException:
        child.terminate()
        raise
    child.returncode = os.waitstatus_to_exitcode(status)
    return child.returncode, usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024)


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
        "training_s": card["training_seconds"],
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
            f"| {row['training_s'] / max(1, row['steps']):.3f} | {size} | {row['peak_gb']:.2f} "
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
