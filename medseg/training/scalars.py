"""Scalars: the numbers of a journal's line under the names that TensorBoard and MLflow show."""

from __future__ import annotations

import re
from collections.abc import Iterable

from medseg.training.journal import Line, ValidationLine

LONGEST = 100  # characters of a label's name; MLflow allows 250 for all


def scalars(line: Line) -> dict[str, float]:
    """Name → value of all that a line holds, in its order; a label without a value is left out."""
    if isinstance(line, ValidationLine):
        values = dict(zip(_labels(line.dice), line.dice.values(), strict=True))
        means = {"validation/mean Dice": line.mean_dice, "validation/smoothed Dice": line.smoothed}
        return {name: value for name, value in (means | values).items() if value is not None}
    found: dict[str, float | None] = {"loss/total": line.loss}
    found |= {f"loss/{name}": value for name, value in line.losses.items()}
    found |= {"learning rate": line.lr, "seconds/waiting for data": line.waited_s}
    found |= {"memory/process GB": line.memory_gb, "memory/GPU GB": line.gpu_gb}
    return {name: value for name, value in found.items() if value is not None}


def _labels(labels: Iterable[str]) -> list[str]:
    """``Dice/LABEL`` for each, with ``_`` for what MLflow refuses; names that are the same then are numbered."""
    names: list[str] = []
    for label in labels:
        plain = re.sub(r"[^\w .:-]", "_", label)[:LONGEST]
        name = f"Dice/{plain if plain.strip('.') else '_' * len(plain) or '_'}"
        names.append(name if name not in names else f"{name} {len(names) + 1}")
    return names
