"""Signals: SIGTERM, SIGUSR1 and the first Ctrl-C ask for a stop at the next safe point; a second one stops at once."""

from __future__ import annotations

import signal
from types import FrameType


class StopRequest:
    """Remembers the signal that asked for a stop; call it to get its number, or None."""

    def __init__(self) -> None:
        self.number: int | None = None

    def __call__(self) -> int | None:
        """The signal's number, or None while nobody asked."""
        return self.number

    def listen(self) -> StopRequest:
        """Install the handlers (in the main thread) and return itself."""
        for name in ("SIGINT", "SIGTERM", "SIGUSR1"):  # SIGUSR1: SLURM's warning before the time is up
            if hasattr(signal, name):
                signal.signal(getattr(signal, name), self._handle)
        return self

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self.number = number
        signal.signal(number, signal.SIG_DFL if number != signal.SIGINT else signal.default_int_handler)
