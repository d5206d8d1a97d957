"""Ranks: processes that train together, forked from a script that has imported everything once.

Importing torch takes longer than what they do. A test names one of the functions here; each process writes what it
returns as JSON.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

TIME_LIMIT_S = 30


@dataclass(frozen=True)
class Ended:
    """How a process ended: its exit code (negative: killed by that signal), what it returned, what it printed."""

    code: int
    result: Any
    errors: str


class Ranks:
    """The script, and the processes that it forks for one call at a time."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.count = folder, 0
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        self.script = subprocess.Popen(
            [sys.executable, __file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            bufsize=1,
            env=environment,
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.script.stdin.close()
        self.script.wait(timeout=60)
        self.script.stdout.close()

    def call(self, name: str, *arguments: Any, size: int = 2) -> list[Ended]:
        """Run a function of ``FUNCTIONS`` in ``size`` processes and wait for their ends."""
        self.count += 1
        folder = self.folder / str(self.count)
        folder.mkdir()
        order = {"name": name, "arguments": arguments, "size": size, "folder": str(folder)}
        self.script.stdin.write(json.dumps(order) + "\n")
        codes = json.loads(self.script.stdout.readline())
        return [Ended(code, _read(folder / f"{rank}.json"), _text(folder / f"{rank}.txt")) for rank, code in codes]

    def results(self, name: str, *arguments: Any, size: int = 2) -> list[Any]:
        """What the processes of a call return, none of which may fail."""
        ended = self.call(name, *arguments, size=size)
        assert all(one.code == 0 for one in ended), "\n".join(one.errors for one in ended)
        return [one.result for one in ended]


def _read(path: Path) -> Any:
    return json.loads(path.read_text()) if path.is_file() else None


def _text(path: Path) -> str:
    return path.read_text() if path.is_file() else ""


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def losses(world: Any, name: str, batch: bool, regions: bool) -> tuple[float, list[list[float]]]:
    """A loss of this process's share of a fixed batch, and its gradient with respect to the whole batch."""
    import torch
    from test_losses import REGIONS, WEIGHTS

    from medseg.training.loss import Choice, supervised_loss

    generator = torch.Generator().manual_seed(3)
    labels = torch.randint(0, 4, (5, 6, 4, 8), generator=generator)
    labels[1:3, 2:] = -1
    labels[4] = -1  # a sample that nobody annotated
    logits = torch.randn((5, 3 if regions else 4, 6, 4, 8), generator=generator)
    number, shares = world.share
    mine = range(5 * number // shares, 5 * (number + 1) // shares)
    coarse = torch.randn((5, logits.shape[1], 3, 2, 4), generator=generator)
    given = logits.clone().requires_grad_()
    second = coarse.clone().requires_grad_()
    value = supervised_loss(
        [given[mine.start : mine.stop], second[mine.start : mine.stop], coarse[mine.start : mine.stop]],
        labels[mine.start : mine.stop],
        batch_dice=batch,
        regions=REGIONS if regions else None,
        choice=Choice(name, WEIGHTS, (1.0, 1.0, 1.0)),
        world=world,
    )
    value.backward()
    world.sum_gradients([given, second])
    return float(value.detach()), [given.grad.flatten().tolist(), second.grad.flatten().tolist()]


def all_losses(world: Any) -> list[Any]:
    """``losses`` of every kind, in the order of ``kinds``."""
    return [losses(world, *kind) for kind in kinds()]


def kinds() -> list[tuple[str, bool, bool]]:
    """Name of the loss, sums over the batch or samples, regions or classes."""
    from medseg.records.training import LOSS_NAMES

    return [(name, batch, regions) for name in LOSS_NAMES for batch in (True, False) for regions in (True, False)]


def messages(world: Any) -> dict[str, Any]:
    """One of each kind of message."""
    import torch

    from medseg.training.losses import mean_of_largest

    weights = torch.full((2, 3), float(world.rank))
    world.spread([weights])
    values = torch.arange(3.0) + world.rank
    total, count = world.sums(values, torch.tensor(2 + world.rank))
    return {
        "spread": weights.tolist(),
        "sums": [total.tolist(), float(count)],
        "mean": float(world.mean(torch.full((1 + world.rank,), float(world.rank)))),
        "gather": world.gather(values).tolist(),
        "largest": float(mean_of_largest(torch.tensor([4.0, 1, 1][: world.rank + 1]), 4, world)),
        "stop": world.agree(15 if world.rank == world.size - 1 else None, 7.0 + world.rank),
        "nobody": world.agree(None, 0.0),
        "text": world.text("µm" if world.first else "other"),
        "empty": world.text("" if world.first else "other"),
    }


def late(world: Any, seconds: float) -> str:
    """The first process works for longer than the others look."""
    from medseg.training import world as module

    module.LOOK_S = 0.1
    if world.first:
        time.sleep(seconds)
    return str(world.text("done"))


def dies(world: Any, rank: int, where: str) -> None:
    """One process is killed, the others wait for a message from it."""
    import torch

    if world.rank == rank:
        os.kill(os.getpid(), signal.SIGKILL)
    values = torch.ones(3, requires_grad=True)
    values.sum().backward()
    {"agree": lambda: world.agree(None, 0), "sums": lambda: world.sums(values), "text": lambda: world.text("")}.get(
        where, lambda: world.sum_gradients([values])
    )()


def stands_still(world: Any, rank: int) -> None:
    """One process is stopped, so that its connections stay open."""
    from medseg.training import beats
    from medseg.training import world as module

    module.LOOK_S, beats.SILENCE_S = 0.2, 1.5
    if world.rank == rank:
        os.kill(os.getpid(), signal.SIGSTOP)
    world.agree(None, 0)


KINDS = ("batch Dice", "Dice of samples", "ignored voxels", "regions", "two parts", "odd batch", "2d")


def settings_of(kind: str, steps: int) -> Any:
    """What is trained: a task and a configuration for the cases of ``store_kind``."""
    import torch
    from tiny_models import FLAT_KERNELS, TWO_D, make_configuration, make_region_task, make_task

    from medseg.networks.device import Device
    from medseg.training.loop import Settings
    from medseg.training.schedule import Length

    changes: dict[str, Any] = {"momentum": 0.9, "batch_dice": kind != "Dice of samples"}
    patch, network, batch_size = (4, 8, 6), FLAT_KERNELS, 3 if kind == "odd batch" else 4
    if kind == "two parts":
        changes["accumulate"] = 4  # two in each of two processes
    if kind == "2d":
        patch, network = (8, 6), TWO_D
    configuration = make_configuration(patch, network, batch_size, **changes)
    task = make_region_task() if kind == "regions" else make_task(3)
    return Settings(task, configuration, Length(steps=steps), Device(torch.device("cpu"), torch.float32, "test"), 3)


def store_kind(folder: Path, kind: str) -> None:
    """Three cases; of those with ignored voxels each has another part annotated."""
    from tiny_models import blobs, store_case

    for index, shape in enumerate([(7, 12, 9), (6, 11, 13), (9, 10, 12)]):
        image, labels = blobs(shape, index)
        if kind == "ignored voxels":
            labels[:, index * 2 :: index + 2] = -1
        store_case(folder, f"case_{index}", image, labels, 2 if kind == "2d" else 3)


def cases_of(folder: Path) -> list[Any]:
    """The cases of a folder, in memory."""
    from medseg.preparation.store import StoredCase, read_case_record

    return [StoredCase(folder, read_case_record(folder, f"case_{index}")).load() for index in range(3)]


def trains(world: Any, kind: str, store: str, folder: str, steps: int, trouble: dict[str, int] | None = None) -> Any:
    """Train; ``trouble`` at a step of one rank: a request to stop, or a kill. Hash of the weights, and the steps."""
    import hashlib
    from dataclasses import replace

    from medseg.errors import Stopped
    from medseg.training.loop import Hooks, train

    trouble = trouble or {}
    asked = iter(range(10_000))

    def stop() -> int | None:
        if next(asked) < trouble.get("step", 10_000) or world.rank != trouble["rank"]:
            return None
        if trouble["signal"] == signal.SIGKILL:
            os.kill(os.getpid(), signal.SIGKILL)
        return trouble["signal"]

    settings = replace(settings_of(kind, steps), checkpoint_s=trouble.get("checkpoint_s", 300.0))
    try:
        trained = train(cases_of(Path(store)), settings, Path(folder), Hooks(stop_signal=stop), world)
    except Stopped as stopped:
        return [stopped.exit_code, str(stopped).partition("at step ")[2].partition(";")[0]]
    digest = hashlib.sha256()
    for value in trained.network.state_dict().values():
        digest.update(value.numpy().tobytes())
    return [digest.hexdigest(), trained.steps]


def elsewhere(world: Any, kind: str, store: str, folder: str, steps: int) -> Any:
    """Train in a folder of each process's own."""
    return trains(world, kind, store, str(Path(folder) / str(world.rank)), steps)


FUNCTIONS: dict[str, Callable[..., Any]] = {
    f.__name__: f for f in (all_losses, messages, late, dies, stands_still, trains, elsewhere)
}


def main() -> None:
    """Fork processes for each line on stdin; write how they ended."""
    import torch

    import medseg.training.loop
    import medseg.training.loss
    import medseg.training.world  # noqa: F401

    torch.set_num_threads(1)
    sys.path.insert(0, str(Path(__file__).parent))
    sys.path.insert(0, str(Path(__file__).parents[1]))
    warm_up()
    for line in sys.stdin:
        order = json.loads(line)
        port = free_port()
        children = {fork(order, rank, port): rank for rank in range(order["size"])}
        codes = []
        until = time.monotonic() + TIME_LIMIT_S
        while children:
            pid, status = os.waitpid(-1, os.WNOHANG)
            if pid:
                codes.append((children.pop(pid), os.waitstatus_to_exitcode(status)))
            elif time.monotonic() > until or (codes and set(stopped(children)) == set(children)):
                for child in children:  # too late, or only those are left that stand still
                    os.kill(child, signal.SIGKILL)
            else:
                time.sleep(0.005)
        print(json.dumps(sorted(codes)), flush=True)


def warm_up() -> None:
    """Train for a step: torch imports much of itself only then, and each process would."""
    from medseg.training.world import ALONE

    with tempfile.TemporaryDirectory() as folder:
        store_kind(Path(folder), "batch Dice")
        trains(ALONE, "batch Dice", folder, str(Path(folder) / "training"), 1)


def stopped(children: dict[int, int]) -> list[int]:
    """Those that stand still."""
    return [pid for pid in children if Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "T"]


def fork(order: dict[str, Any], rank: int, port: int) -> int:
    """Fork one process; its number."""
    child = os.fork()
    if child:
        return child
    folder = Path(order["folder"])
    os.dup2(os.open(folder / f"{rank}.txt", os.O_CREAT | os.O_WRONLY), 2)
    code = 70
    try:
        import torch

        from medseg.errors import MedsegError
        from medseg.training.launch import Launch, joined

        size = order["size"]
        launch = Launch(rank, size, rank, size, "127.0.0.1", port)
        with joined(launch, torch.device("cpu")) as world:
            result = FUNCTIONS[order["name"]](world, *order["arguments"])
        (folder / f"{rank}.json").write_text(json.dumps(result))
        code = 0
    except MedsegError as error:
        print(error, file=sys.stderr, flush=True)
        code = error.exit_code
    except BaseException as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr, flush=True)
    os._exit(code)


if __name__ == "__main__":
    main()
