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
