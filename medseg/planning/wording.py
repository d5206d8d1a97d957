"""Wording: numbers as they stand in the planner's sentences."""

from __future__ import annotations

from collections.abc import Iterable

AXES = ("z", "y", "x")


def times(values: Iterable[float]) -> str:
    """``40×56×40``, at most five significant digits each."""
    return "×".join(number(value) for value in values)


def number(value: float) -> str:
    """Integers as they are, other numbers with at most five significant digits."""
    return str(int(value)) if float(value).is_integer() else f"{value:.5g}"


def millions(value: float) -> str:
    """``53.1 million``."""
    return f"{value / 1e6:.4g} million"


def gigabytes(size: float) -> str:
    """``7.2 GB``."""
    return f"{size / 1e9:.3g} GB"


def duration(seconds: float) -> str:
    """``0.31 s``, ``20 min``, ``12 h``."""
    if seconds < 120:
        return f"{seconds:.2g} s"
    return f"{seconds / 60:.3g} min" if seconds < 7200 else f"{seconds / 3600:.3g} h"
