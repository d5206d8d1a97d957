"""Launch: what ``torchrun`` tells each of the processes that it starts, in variables of the environment."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import TYPE_CHECKING

from medseg.errors import Problem, UsageError

if TYPE_CHECKING:
    from medseg.training.launch import Launch

NEEDED = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def launched(environment: Mapping[str, str] = os.environ) -> bool:
    """Whether this process is one of several that were started together."""
    return all(name in environment for name in NEEDED) and environment["WORLD_SIZE"] != "1"


def launch_of(environment: Mapping[str, str] = os.environ) -> Launch | None:
    """How this process was started together with others, or None.

    Raises:
        UsageError: E0001 the variables make no sense.
    """
    from medseg.training.launch import Launch

    if not launched(environment):
        return None

    def number(name: str, default: str | None = None) -> int:
        text = environment.get(name, default) or ""
        if not text.isdecimal():
            raise UsageError(Problem("E0001", f"{name}={text}", "a number", "start the processes with torchrun"))
        return int(text)

    return Launch(
        rank=number("RANK"),
        size=number("WORLD_SIZE"),
        local_rank=number("LOCAL_RANK", "0"),
        local_size=number("LOCAL_WORLD_SIZE", "1"),
        host=environment["MASTER_ADDR"],
        port=number("MASTER_PORT"),
        hosted=environment.get("TORCHELASTIC_USE_AGENT_STORE") == "True",
        attempt=number("TORCHELASTIC_RESTART_COUNT", "0"),
    )


def refuse_launch(command: str) -> None:
    """Refuse to run a command several times at once on the same files.

    Raises:
        UsageError: E0001.
    """
    if launched():
        action = "start it once; medseg train is what torchrun can start"
        raise UsageError(Problem("E0001", f"medseg {command} was started as several processes", "one", action))
