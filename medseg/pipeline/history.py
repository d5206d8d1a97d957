"""History: a training's journal as the points that its curves are drawn from."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from medseg.reporting.figures import HistoryPoint
from medseg.training.journal import StepLine, read_journal


def training_history(journal: Path) -> tuple[HistoryPoint, ...]:
    """Losses and validations of a ``log.jsonl`` by step, seconds since the training began; see ``read_journal``."""
    steps, validations = read_journal(journal)
    shares = _wait_shares(steps, {v.step for v in validations})
    points = [
        HistoryPoint(s.step, s.seconds, train_loss=s.loss, learning_rate=s.lr, losses=s.losses, wait_share=share)
        for s, share in zip(steps, shares, strict=True)
    ]
    points += [
        HistoryPoint(v.step, v.seconds, mean_dice=v.mean_dice, dice=v.dice, smoothed_dice=v.smoothed)
        for v in validations
    ]
    return tuple(sorted(points, key=lambda point: point.step))


def _wait_shares(steps: Sequence[StepLine], validated: set[int]) -> Iterator[float | None]:
    """Of each step's time the share that it waited for its batch; None where not known, as right after a validation."""
    previous: StepLine | None = None
    for line in steps:
        share = None
        if previous is not None and line.waited_s is not None and previous.step not in validated:
            took = line.seconds - previous.seconds
            share = min(1.0, line.waited_s / took) if took > 0 else None
        previous = line
        yield share
