"""Samples per second: medseg's (read the patch, augment it) against nnU-Net's default transforms on as many cores.

nnU-Net's side gets its larger initial patch ready in memory and does not read at all: only batchgeneratorsv2 is timed,
as `nnUNetTrainer.get_training_transforms` sets it up, without the downsampling for deep supervision, in one process of
one torch thread for each core. Ours cuts the patches from volumes in memory, with as many threads in one process, and
again with as many processes of one thread. All take turns in one run; medians over the rounds, and how many times
nnU-Net's rate it is.

    python scripts/bench/augment.py --nnunet-python ENV/bin/python --cores 1 2
    python scripts/bench/augment.py --nnunet-python ENV/bin/python --patch 128 128 128 --channels 4 --labels 3
    python scripts/bench/augment.py --patch 40 56 40 --elastic 0.2       # ours alone

ENV has nnU-Net: pip install nnunetv2.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from statistics import median
from types import SimpleNamespace

PATCHES = {  # patch, channels, foreground labels
    "hippocampus": ([40, 56, 40], 1, 2),
    "ct": ([128, 128, 128], 1, 3),
    "brain": ([128, 128, 128], 4, 3),
    "thick slices": ([16, 256, 224], 1, 3),
    "picture": ([1, 512, 512], 3, 1),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nnunet-python", type=Path, metavar="PYTHON", help="of an environment with nnU-Net")
    parser.add_argument("--patch", type=int, nargs=3, metavar="N", help="z y x, 1 y x for pictures (default: several)")
    parser.add_argument("--channels", type=int, default=1, metavar="N")
    parser.add_argument("--labels", type=int, default=3, metavar="N", help="foreground labels")
    parser.add_argument(
        "--elastic", type=float, default=0.0, metavar="P", help="ours only: nnU-Net has none by default"
    )
    parser.add_argument("--cores", type=int, nargs="+", default=[1, 2], metavar="N")
    parser.add_argument("--seconds", type=float, default=5.0, help="of each measurement")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        work(json.loads(options.worker))
        return
    chosen = {"": (options.patch, options.channels, options.labels)} if options.patch else PATCHES
    print(f"{'':14} {'patch':>13} {'channels':>8} {'labels':>6} {'cores':>5}", end="")
    print(f" {'nnU-Net/s':>10} {'threads/s':>10} {'ratio':>6} {'processes/s':>12} {'ratio':>6}")
    for name, (patch, channels, labels) in chosen.items():
        for cores in options.cores:
            task = {"patch": patch, "channels": channels, "labels": labels, "elastic": options.elastic}
            theirs, threads, processes = measured(options, task, cores)
            size = "x".join(map(str, patch))
            print(f"{name:14} {size:>13} {channels:8d} {labels:6d} {cores:5d}", end="")
            print(
                f" {theirs:10.1f} {threads:10.1f} {threads / theirs:6.2f} {processes:12.1f} {processes / theirs:6.2f}"
            )


def measured(options: argparse.Namespace, task: dict, cores: int) -> tuple[float, float, float]:
    """Median samples per second of nnU-Net (NaN without its environment), our threads and our processes."""
    here = Path(sys.executable)
    sides = [
        [] if options.nnunet_python is None else start(options.nnunet_python, {**task, "side": "theirs"}, cores),
        start(here, {**task, "side": "ours", "threads": cores}, 1),
        start(here, {**task, "side": "ours", "threads": 1}, cores),
    ]
    try:
        counts = [[2, 2 * cores, 2][i] for i in range(3)]  # of each worker, to warm up and to see how fast it is
        for i, workers in enumerate(sides):
            rate = rate_of(workers, counts[i])
            if workers:
                counts[i] = max(12, int(rate * options.seconds / len(workers)))
        rounds = [
            [rate_of(workers, n) for workers, n in zip(sides, counts, strict=True)] for _ in range(options.rounds)
        ]
    finally:
        for worker in (w for workers in sides for w in workers):
            worker.stdin.close()
            worker.wait()
    theirs, threads, processes = (median(rates) for rates in zip(*rounds, strict=True))
    return theirs, threads, processes


def start(python: Path, task: dict, count: int) -> list[subprocess.Popen]:
    """Workers that wait for numbers of samples to make, once they say that they are ready."""
    command = [str(python), __file__, "--worker", json.dumps(task)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True, "env": environment}
    workers = [subprocess.Popen(command, **pipes) for _ in range(count)]
    for worker in workers:
        answer(worker)
    return workers


def answer(worker: subprocess.Popen) -> None:
    """Wait for its next line that is ours: nnU-Net prints too."""
    for line in worker.stdout:
        if line.strip() == "done":
            return
    raise SystemExit("a worker ended: see its message above")


def rate_of(workers: list[subprocess.Popen], count: int) -> float:
    """Samples per second when each worker makes ``count``."""
    if not workers:
        return float("nan")
    begun = time.perf_counter()
    for worker in workers:
        worker.stdin.write(f"{count}\n")
        worker.stdin.flush()
    for worker in workers:
        answer(worker)
    return count * len(workers) / (time.perf_counter() - begun)


def work(task: dict) -> None:
    """In a worker: make as many samples as each line of stdin says."""
    make = {"ours": ours, "theirs": theirs}[task["side"]](task)
    print("done", flush=True)
    for line in sys.stdin:
        make(int(line))
        print("done", flush=True)


def volume(task: dict, shape: list[int]) -> tuple:
    """A smooth noisy image (C, z, y, x) float32 and blocks of labels (z, y, x) int8."""
    import numpy as np

    rng = np.random.default_rng(os.getpid())
    image = rng.normal(size=(task["channels"], *shape)).astype(np.float32)
    coarse = rng.integers(0, task["labels"] + 1, [-(-n // 16) for n in shape]).astype(np.int8)
    labels = coarse.repeat(16, 0).repeat(16, 1).repeat(16, 2)[: shape[0], : shape[1], : shape[2]]
    return image, np.ascontiguousarray(labels)


def ours(task: dict) -> Callable[[int], None]:
    import numpy as np

    from medseg.training.batches import Sampling, stream

    z, y, x = task["patch"]
    image, labels = volume(task, [z if z == 1 else z * 3 // 2, y * 3 // 2, x * 3 // 2])
    classes = range(1, task["labels"] + 1)
    foreground = {index: np.flatnonzero(labels == index)[:10_000] for index in classes if (labels == index).any()}
    case = SimpleNamespace(
        record=SimpleNamespace(id="case"), image=image, labels=labels, previous=None, foreground=foreground
    )
    mirrored = (1, 2) if z == 1 else (0, 1, 2)
    sampling = Sampling((z, y, x), 1, 0.0, mirrored, seed=os.getpid(), flat=z == 1, elastic=task["elastic"])
    step = 0

    def make(count: int) -> None:
        nonlocal step
        batches = stream([case], sampling, step, task["threads"])  # type: ignore[list-item]  # like a stored case
        for _ in islice(batches, count):
            step += 1
        batches.close()  # what was made ahead is lost, and was timed

    return make


def theirs(task: dict) -> Callable[[int], None]:
    import torch
    from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer

    torch.set_num_threads(1)
    patch = task["patch"][1:] if task["patch"][0] == 1 else task["patch"]
    trainer = SimpleNamespace(
        configuration_manager=SimpleNamespace(patch_size=patch), print_to_log_file=lambda *texts: None
    )
    rotation, flat, initial, mirror_axes = nnUNetTrainer.configure_rotation_dummyDA_mirroring_and_inital_patch_size(
        trainer
    )
    transforms = nnUNetTrainer.get_training_transforms(
        tuple(patch),
        rotation,
        None,
        mirror_axes,
        flat,
        use_mask_for_norm=[False] * task["channels"],
        foreground_labels=list(range(1, task["labels"] + 1)),
    )
    initial = [int(n) for n in initial]
    image, labels = volume(task, [1] * (3 - len(initial)) + initial)
    image, labels = image.reshape(task["channels"], *initial), labels.reshape(1, *initial)

    def make(count: int) -> None:
        with torch.no_grad():
            for _ in range(count):
                sample = {"image": torch.from_numpy(image.copy()), "segmentation": torch.from_numpy(labels).short()}
                transforms(**sample)

    return make


if __name__ == "__main__":
    main()
