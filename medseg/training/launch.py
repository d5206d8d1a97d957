"""Launch: how the processes of one training were started, and how they find each other."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from medseg.errors import Problem, UsageError
from medseg.training.beats import Beats, gone
from medseg.training.world import ALONE, World

JOIN_S = 300.0  # for all processes to come
FOR_EVER = timedelta(days=365)  # of gloo, whose waits are watched by ``World``
STUCK = timedelta(minutes=10)  # of NCCL, which ends the process then


@dataclass(frozen=True, slots=True)
class Launch:
    """How a launcher started this process: its number of how many, on the machine and in all, and where they meet.

    ``hosted`` says that the launcher itself keeps the meeting point; else the first process does. ``attempt`` counts
    how often the launcher started them all anew.
    """

    rank: int
    size: int
    local_rank: int
    local_size: int
    host: str
    port: int
    hosted: bool = False
    attempt: int = 0

    def __post_init__(self) -> None:
        if not (0 <= self.rank < self.size and 0 <= self.local_rank < self.local_size <= self.size):
            found = f"process {self.rank} of {self.size}, {self.local_rank} of {self.local_size} on this machine"
            raise UsageError(Problem("E0001", found, "numbers from 0 on", "start the processes with torchrun"))


@contextlib.contextmanager
def joined(launch: Launch | None, device: torch.device) -> Iterator[World]:
    """The world that a launcher made, while the block runs; ``ALONE`` without one.

    Args:
        launch: how this process was started, None: alone.
        device: of the network: NCCL for CUDA, gloo otherwise.

    Raises:
        ResourceError: E0602 not all processes came, or one is gone.
    """
    if launch is None or launch.size == 1:
        yield ALONE
        return
    try:
        store = _meet(launch)
        dist.init_process_group("gloo", store=store, rank=launch.rank, world_size=launch.size, timeout=FOR_EVER)
        control = dist.group.WORLD
        data = control if device.type != "cuda" else dist.new_group(backend="nccl", timeout=STUCK)
        beats = Beats(store.clone(), launch.rank, launch.size)
    except (RuntimeError, ValueError) as error:
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise gone(f"process {launch.rank} of {launch.size} did not find the others ({reason})") from error
    world = World(launch.rank, launch.size, launch.local_size, control, data, beats)
    try:
        world.agree(None, 0.0)  # all are there: from here on a death is noticed within seconds
        yield world
    finally:
        beats.stop()
        with contextlib.suppress(RuntimeError):
            dist.destroy_process_group()


def _meet(launch: Launch) -> Any:
    """The store in which the processes of this attempt find each other."""
    master, timeout = launch.rank == 0 and not launch.hosted, timedelta(seconds=JOIN_S)
    host, port = launch.host, launch.port
    store = dist.TCPStore(host, port, launch.size, master, timeout, False)  # type: ignore[attr-defined]
    return dist.PrefixStore(f"medseg/{launch.attempt}", store)  # type: ignore[attr-defined]
