"""Signals: SIGTERM, SIGUSR1 and the first Ctrl-C ask for a stop at the next safe point; a second one stops at once."""

from __future__ import annotations

import signal
from types import FrameType

NAMES = ("SIGINT", "SIGTERM", "SIGUSR1")  # SIGUSR1: SLURM's warning before the time is up


class StopRequest:
    """Remembers the signal that asked for a stop. Call it, in the main thread, to get its number, or None.

    Signals are caught from the first call on: whoever calls has safe points, whoever does not is stopped at once.
    """

    def __init__(self) -> None:
        self.number: int | None = None
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
        self.number = number
        signal.signal(number, signal.SIG_DFL if number != signal.SIGINT else signal.default_int_handler)
