"""Signals: SIGTERM, SIGUSR1 and the first Ctrl-C ask for a stop at the next safe point; a later one stops at once."""

from __future__ import annotations

import signal
import time
from types import FrameType

NAMES = ("SIGINT", "SIGTERM", "SIGUSR1")  # SIGUSR1: SLURM's warning before the time is up
TOGETHER_S = 1.0  # a launcher and a batch system may pass on the same request: one, though it comes twice


class StopRequest:
    """Remembers the signal that asked for a stop. Call it, in the main thread, to get its number, or None.

    Signals are caught from the first call on: whoever calls has safe points, whoever does not is stopped at once.
    """

    def __init__(self) -> None:
        self.number: int | None = None
        self.asked = 0.0
        self.listening = False

    def __call__(self) -> int | None:
        """The signal's number, or None while nobody asked."""
        if not self.listening:
            self.listening = True
            for name in NAMES:
                if hasattr(signal, name):
                    signal.signal(getattr(signal, name), self._handle)
        return self.number

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.number is None:
            self.number, self.asked = number, time.monotonic()
        elif time.monotonic() - self.asked > TOGETHER_S:
            signal.signal(number, signal.SIG_DFL if number != signal.SIGINT else signal.default_int_handler)
            signal.raise_signal(number)
