#!/usr/bin/env python3
"""Time to Dice: `medseg run` on one data set with several time budgets and seeds, scored on whole validation volumes.

Every entry is one command in a process of its own, from the files to the scores of fold 0: what a user types. Run
nothing beside it: a budget is seconds, and how many steps fit is the point. Entries are written to WORK/results.json
when they are done; the same command goes on with those that are missing. The table is printed at the end.

    python scripts/bench/time_to_dice.py ../shared/data/hippocampus --work WORK \\
        --splits ../shared/data/hippocampus/split_160_40.json --budgets 5m 10m 20m:3 60m
    python scripts/bench/time_to_dice.py ../shared/data/cardiac --work WORK --budgets 20m \\
        --configurations 2d 3d_fullres --options "--group regex:(patient[0-9]+)_"
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import statistics
import subprocess
import sys
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, help="a data set")
    parser.add_argument("--work", type=Path, required=True, help="runs and results.json are kept here")
    parser.add_argument("--budgets", nargs="+", default=["5m", "10m", "20m:3", "60m"], help="TIME, or TIME:SEEDS")
    parser.add_argument("--configurations", nargs="+", default=["3d_fullres"])
    parser.add_argument("--splits", type=Path, help="folds to use; the first is trained")
    parser.add_argument("--options", default="", help="further options of medseg run, as one text")
    arguments = parser.parse_args()
    results: list[dict[str, Any]] = _read(arguments.work)
    for name in arguments.configurations:
        for budget, seeds in (_parts(text) for text in arguments.budgets):
            for seed in range(seeds):
                entry = {"data": arguments.data.name, "configuration": name, "budget": budget, "seed": seed}
                if not any(entry.items() <= done.items() for done in results):
                    print(f"{datetime.now(UTC):%H:%M:%S}  {entry}", flush=True)
                    results.append(entry | train(arguments, entry))
                    _write(arguments.work, results)
    print(table([done for done in results if done["data"] == arguments.data.name]))


def train(arguments: argparse.Namespace, entry: dict[str, Any]) -> dict[str, Any]:
    """Run one entry and read what came out."""
    run = arguments.work / "_".join(str(value) for value in entry.values())
    command = [sys.executable, "-m", "medseg", "run", str(arguments.data), "--run", str(run), "--progress", "plain"]
    command += ["--configuration", entry["configuration"], "--time-budget", entry["budget"]]
    command += ["--seed", str(entry["seed"]), *(("--splits", str(arguments.splits)) if arguments.splits else ())]
    before = os.getloadavg()[0]
    begun = time.monotonic()
    with (arguments.work / f"{run.name}.log").open("w") as log:
        done = subprocess.run([*command, *shlex.split(arguments.options)], stdout=log, stderr=log, check=False)
    wall = time.monotonic() - begun
    if done.returncode:
        sys.exit(f"exit {done.returncode}: see {log.name}")
    card = json.loads((run / "models" / entry["configuration"] / "fold_0" / "model.json").read_text())
    found = {"scores": card["scores"], "steps": card["steps"], "batch_size": card["batch_size"]}
    times = {"training_s": card["training_seconds"], "wall_s": round(wall), "load_before": before}
    return found | times | {"cores": os.cpu_count()}


def table(results: list[dict[str, Any]]) -> str:
    """One line for each budget: the scores of its seeds."""
    lines = ["| configuration | budget | steps | Dice of labels | mean Dice |", "| --- | --- | --- | --- | --- |"]
    for name, budget in dict.fromkeys((r["configuration"], r["budget"]) for r in results):
        found = [r for r in results if (r["configuration"], r["budget"]) == (name, budget)]
        means = [r["scores"]["mean"] for r in found]
        labels = [label for label in found[0]["scores"] if label != "mean"]
        dice = [statistics.mean(r["scores"][label] for r in found) for label in labels]
        spread = f" ({', '.join(f'{m:.4f}' for m in means)})" if len(means) > 1 else ""
        each = " / ".join(f"{d:.3f}" for d in dice)
        steps = " / ".join(str(r["steps"]) for r in found)
        lines.append(f"| {name} | {budget} | {steps} | {each} | **{statistics.mean(means):.4f}**{spread} |")
    return "\n".join(lines)


def _parts(text: str) -> tuple[str, int]:
    budget, _, seeds = text.partition(":")
    return budget, int(seeds or 1)


def _read(work: Path) -> list[dict[str, Any]]:
    work.mkdir(parents=True, exist_ok=True)
    path = work / "results.json"
    return json.loads(path.read_text()) if path.is_file() else []


def _write(work: Path, results: list[dict[str, Any]]) -> None:
    temporary = work / "results.json.new"
    temporary.write_text(json.dumps(results, indent=1))
    temporary.replace(work / "results.json")


if __name__ == "__main__":
    main()
