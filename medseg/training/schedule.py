"""Schedule: how long a training lasts, and the learning rate at each point of it."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

from medseg.errors import Problem, UsageError

POWER = 0.9  # nnU-Net: exponent of its polynomial schedule

_UNITS = {"s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}


@dataclass(frozen=True, slots=True)
class Length:
    """How long to train: exactly one of ``steps`` and ``seconds``."""

    steps: int | None = None
    seconds: float | None = None

    def __post_init__(self) -> None:
        if (self.steps is None) == (self.seconds is None):
            raise ValueError("give steps or seconds")
        if not 0 < (self.steps or self.seconds or 0) < math.inf:
            raise ValueError(f"{self} is no length")

    def fraction(self, step: int, elapsed_s: float) -> float:
        """How much of the training is over, in [0, 1], after ``step`` steps that took ``elapsed_s``.

        A budget in steps depends on the step alone, so that a resumed run equals an undisturbed one; a budget in
        seconds follows the clock, so that the schedule fits the time on a machine of any speed.
        """
        if self.steps is not None:
            return min(1.0, step / self.steps)
        assert self.seconds is not None
        return min(1.0, elapsed_s / self.seconds)

    def __str__(self) -> str:
        return f"{self.steps} steps" if self.steps is not None else f"{self.seconds:g} s"


def poly(initial_lr: float, fraction: float) -> float:
    """Learning rate when ``fraction`` of the training is over: initial · (1 - fraction)^0.9."""
    return float(initial_lr * (1 - fraction) ** POWER)


def parse_duration(text: str) -> float:
    """Seconds of ``90s``, ``10m``, ``1.5h``, ``2d`` or a sum like ``1h30m``; a bare number is minutes.

    Raises:
        UsageError: E0001.
    """
    if re.fullmatch(r"\d+(\.\d+)?", text):
        seconds = float(text) * 60
    elif re.fullmatch(r"(\d+(\.\d+)?[smhd])+", text):
        seconds = sum(float(number) * _UNITS[unit] for number, unit in re.findall(r"(\d+(?:\.\d+)?)([smhd])", text))
    else:
        raise UsageError(Problem("E0001", f"{text!r} is not a duration", "90s, 10m or 1h30m", "give a duration"))
    if not 0 < seconds < math.inf:
        raise UsageError(Problem("E0001", f"{text[:40]!r} is {seconds:g} s", "more than 0 s", "give a duration"))
    return seconds
