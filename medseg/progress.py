"""Progress: how long-running functions tell whoever called them how far they are.

Library functions take a ``Progress`` and are silent by default; the command line passes one that draws bars,
prints lines or writes JSON.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol


@dataclass(frozen=True, slots=True)
class Fact:
    """Something to watch, in words: what it is, its value, and what more there is to say; each is part of one line."""

    name: str
    value: str
    detail: str = ""


@dataclass(frozen=True, slots=True)
class Facts:
    """What is known right now: to be read, most important first, and as JSON values for programs.

    ``seconds_left`` is what the stage still takes; without it, whoever shows the progress reckons.
    """

    lines: tuple[Fact, ...] = ()
    values: Mapping[str, Any] = field(default_factory=dict)
    seconds_left: float | None = None


NOTHING = Facts()


class Progress(Protocol):
    """Receiver of progress. One stage at a time; ``done`` never falls."""

    def begin(self, stage: str, total: int, unit: str) -> None:
        """A stage of ``total`` units starts."""

    def update(self, done: int, note: str = "", facts: Facts = NOTHING) -> None:
        """``done`` units of the current stage are finished; ``note`` is one short line, such as the last case."""

    def end(self) -> None:
        """The current stage is over."""

    def say(self, message: str) -> None:
        """One line for the person watching, outside any bar."""


class Silent:
    """The default: says nothing."""

    def begin(self, stage: str, total: int, unit: str) -> None:
        """Nothing."""

    def update(self, done: int, note: str = "", facts: Facts = NOTHING) -> None:
        """Nothing."""

    def end(self) -> None:
        """Nothing."""

    def say(self, message: str) -> None:
        """Nothing."""


SILENT = Silent()


def never() -> int | None:
    """The stop signal of someone who never asks for a stop; others return the signal's number."""
    return None
