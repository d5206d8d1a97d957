"""Fixtures of the command line."""

from __future__ import annotations

import logging
import signal
from collections.abc import Callable
from dataclasses import dataclass

import pytest

from medseg.cli.main import main


@dataclass(frozen=True)
class Ended:
    """Exit code and what was written."""

    code: int
    out: str
    err: str

    @property
    def problems(self) -> list[str]:
        """The lines about problems on stderr."""
        return [line for line in self.err.splitlines() if line.startswith("medseg: ")]


@pytest.fixture
def medseg(capsys) -> Callable[..., Ended]:
    """Run a command in this process; logging and signals are as before afterwards."""
    logger = logging.getLogger("medseg")
    before = logger.handlers, logger.level, logger.propagate
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)}

    def run(*arguments: object) -> Ended:
        capsys.readouterr()
        try:
            code = main([str(a) for a in arguments])
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)
            logger.handlers, logger.level, logger.propagate = before
        return Ended(code, *capsys.readouterr())

    return run
