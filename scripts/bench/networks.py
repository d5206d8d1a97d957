"""Networks and losses at equal training time: Dice, steps, seconds per step and peak memory, and what they gain.

Each is planned, trained on fold 0 for the same time and validated, as `medseg run` does it, in a process of its own.
The data set is prepared once for each plan that prepares it otherwise. A row gives the mean validation Dice and its
difference to the first row's: `plain` with `dice-ce`, in the same run.

    python scripts/bench/networks.py --dataset ../shared/data/nuclei --work WORK --time 5m --configuration 2d
    python scripts/bench/networks.py --dataset ../shared/data/hippocampus --work WORK --time 5m \\
        --networks unetpp transunet --losses focal border-ce
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

NETWORKS = ["residual", "unet2015", "unet2015-linear", "attention", "unetpp", "resnet-unet", "transunet"]
LOSSES = ["dice", "ce", "focal", "iou", "border-ce"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True, help="run folders go here; finished rows are kept")
    parser.add_argument("--time", default="5m", help="training time of each row")
    parser.add_argument("--configuration", default="3d_fullres")
    parser.add_argument("--networks", nargs="*", default=NETWORKS, help="with the loss dice-ce")
    parser.add_argument("--losses", nargs="*", default=LOSSES, help="of the plain network")
    parser.add_argument("--splits", type=Path, help="folds to use")
    options = parser.parse_args()
    pairs = [("plain", "dice-ce"), *((n, "dice-ce") for n in options.networks), *(("plain", x) for x in options.losses)]
    print(f"{'network':16} {'loss':17} {'Dice':>7} {'gain':>8} {'steps':>7} {'s/step':>8} {'GB':>6}")
    reference = None
    for network, loss in pairs:
        row = measured(options, network, loss)
        if row is None:
            print(f"{network:16} {loss:17} failed: see {options.work / f'{network}_{loss}.log'}", flush=True)
            continue
        reference = row["dice"] if reference is None else reference
        print(
            f"{network:16} {loss:17} {row['dice']:7.4f} {row['dice'] - reference:+8.4f} {row['steps']:7d} "
            f"{row['seconds'] / max(1, row['steps']):8.3f} {row['memory_gb']:6.2f}",
            flush=True,
        )


def measured(options: argparse.Namespace, network: str, loss: str) -> dict | None:
    """One row, from its file if it is finished."""
    name = f"{network}_{loss}"
    done, log = options.work / f"{name}.json", options.work / f"{name}.log"
    if done.is_file():
        return json.loads(done.read_text())
    options.work.mkdir(parents=True, exist_ok=True)
    run = options.work / name
    shutil.rmtree(run, ignore_errors=True)
    command = ["--network", network, "--loss", loss]
    command += [] if options.splits is None else ["--splits", str(options.splits)]
    steps = [
        ["plan", str(options.dataset), "--run", str(run), "--time-budget", options.time, *command],
        ["preprocess", "--run", str(run), "--configuration", options.configuration],
        ["train", "--run", str(run), "--configuration", options.configuration, "--fold", "0"],
    ]
    steps[-1] += ["--time-budget", options.time]
    with log.open("w") as output:
        for step in steps:
            child = subprocess.Popen([sys.executable, "-m", "medseg", *step], stdout=output, stderr=output)
            _, status, usage = os.wait4(child.pid, 0)
            child.returncode = os.waitstatus_to_exitcode(status)
            if child.returncode:
                return None
    card = json.loads((run / "models" / options.configuration / "fold_0" / "model.json").read_text())
    scores = [value for value in card["scores"].values() if value is not None]
    row = {
        "dice": sum(scores) / max(1, len(scores)),
        "steps": card["steps"],
        "seconds": card["training_seconds"],
        "memory_gb": usage.ru_maxrss * 1024 / 1e9,  # of the training process and its children, the largest
    }
    done.write_text(json.dumps(row))
    shutil.rmtree(run / "prepared", ignore_errors=True)
    return row


if __name__ == "__main__":
    main()
