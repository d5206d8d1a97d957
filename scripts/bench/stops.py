#!/usr/bin/env python3
"""Stops: how long `medseg train` takes to end after SIGTERM, with a checkpoint, at random times of a real training.

Every start goes on where the last one stopped. Prints the exit codes and the seconds from signal to end.

    python scripts/bench/stops.py RUN --configuration 3d_fullres --stops 20
"""

from __future__ import annotations

import argparse
import json
import random
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="a run whose configuration is prepared, and whose fold 0 is not trained")
    parser.add_argument("--configuration", default="3d_fullres")
    parser.add_argument("--stops", type=int, default=20)
    parser.add_argument("--longest", type=float, default=8.0, help="seconds of training before a signal, at most")
    arguments = parser.parse_args()
    command = [
        sys.executable,
        "-m",
        "medseg",
        "train",
        "--run",
        str(arguments.run),
        "--fold",
        "0",
        "--progress",
        "json",
    ]
    command += ["--configuration", arguments.configuration, "--iterations", "1000000", "--progress", "json"]
    rng, codes, seconds, steps = random.Random(0), [], [], 0
    for _ in range(arguments.stops):
        code, took, said = stop(command, rng.uniform(0, arguments.longest))
        step = int(said.partition("at step ")[2].partition(";")[0] or -1)
        assert step > steps, said  # it went on
        steps = step
        codes.append(code)
        seconds.append(took)
        print(f"exit {code} after {took:.2f} s: step {step}", flush=True)
    worst, middle = max(seconds), statistics.median(seconds)
    print(f"{arguments.stops} stops: exit codes {sorted(set(codes))}, median {middle:.2f} s, longest {worst:.2f} s")


def stop(command: list[str], after_s: float) -> tuple[int, float, str]:
    """Start the command, let it train this long, end it; exit code, seconds that took, and its last words."""
    process = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)
    assert process.stderr is not None
    lines = []
    for line in process.stderr:
        lines.append(line)
        event = json.loads(line) if line.startswith("{") else {}
        if event.get("event") == "update" and event["stage"].startswith("train"):
            break
    time.sleep(after_s)
    begun = time.monotonic()
    process.send_signal(signal.SIGTERM)
    said = "".join(lines[-3:]) + process.stderr.read()
    code = process.wait()
    return code, time.monotonic() - begun, said


if __name__ == "__main__":
    main()
