"""Progress: how long-running functions tell whoever called them how far they are.

Library functions take a ``Progress`` and are silent by default; the command line passes one that draws bars,
prints lines or writes JSON.
"""

from __future__ import annotations

from typing import Protocol


class Progress(Protocol):
    """Receiver of progress. One stage at a time; ``done`` never falls."""

    def begin(self, stage: str, total: int, unit: str) -> None:
        """A stage of ``total`` units starts."""

    def update(self, done: int, note: str = "") -> None:
        """``done`` units of the current stage are finished; ``note`` is one short line of current facts."""

    def end(self) -> None:
        """The current stage is over."""

    def say(self, message: str) -> None:
        """One line for the person watching, outside any bar."""


class Silent:
    """The default: says nothing."""

    def begin(self, stage: str, total: int, unit: str) -> None:
        """Nothing."""

    def update(self, done: int, note: str = "") -> None:
        """Nothing."""

    def end(self) -> None:
        """Nothing."""

    def say(self, message: str) -> None:
        """Nothing."""


SILENT = Silent()


def never() -> int | None:
    """The stop signal of someone who never asks for a stop; others return the signal's number."""
    return None
