"""History: a training's journal as the points that its curves are drawn from."""

from __future__ import annotations

from pathlib import Path

from medseg.reporting.figures import HistoryPoint
from medseg.training.journal import read_journal


def training_history(journal: Path) -> tuple[HistoryPoint, ...]:
    """Losses and validations of a ``log.jsonl`` by step, seconds since the training began; see ``read_journal``."""
    steps, validations = read_journal(journal)
    points = [HistoryPoint(s.step, s.seconds, train_loss=s.loss, learning_rate=s.lr) for s in steps]
    points += [HistoryPoint(v.step, v.seconds, mean_dice=v.mean_dice, dice=v.dice) for v in validations]
    return tuple(sorted(points, key=lambda point: point.step))
