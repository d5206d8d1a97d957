"""Scribe: writes down what the loop does, as soon as the numbers of a step have come from the device."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch

from medseg.machine import peak_memory_bytes
from medseg.progress import Progress
from medseg.training.journal import Journal, StepLine, ValidationLine
from medseg.training.readings import Readings
from medseg.training.step import Taken
from medseg.training.watch import Watch

MEMORY_EVERY = 50  # steps


@dataclass(frozen=True, slots=True)
class Draft:
    """What is known of a step before its numbers are: learning rate, seconds of training so far and of waiting.

    ``fraction`` is how much of the training is over.
    """

    taken: Taken
    lr: float
    seconds: float
    waited_s: float
    fraction: float


class Scribe:
    """Tells journal, watch and progress of steps and validations, in their order."""

    def __init__(self, journal: Journal, watch: Watch, progress: Progress) -> None:
        self.journal, self.watch, self.progress = journal, watch, progress
        self.readings: Readings[Draft] = Readings()
        self.done = 0

    def step(self, draft: Draft) -> None:
        """A step was taken; it is written down when its numbers are known.

        Raises:
            NonFiniteError: E1001 in this step, or in one of the few before it.
        """
        self._write(self.readings.add(draft, draft.taken.numbers))

    def catch_up(self) -> None:
        """Wait for the numbers of all steps.

        Raises:
            NonFiniteError: E1001 in one of them.
        """
        self._write(self.readings.drain())

    def validation(self, line: ValidationLine) -> None:
        """A validation was made."""
        self.catch_up()
        self.journal.write(line)
        self.watch.take(line)
        self.progress.update(self.done, "", self.watch.facts())

    def sync(self) -> None:
        """All that was done so far is in the journal and on the disk.

        Raises:
            NonFiniteError: E1001 in one of the last steps.
        """
        self.catch_up()
        self.journal.sync()

    def _write(self, arrived: Iterable[tuple[Draft, list[float]]]) -> None:
        for draft, numbers in arrived:
            loss, losses = draft.taken.losses(numbers)
            step = draft.taken.step + 1
            measured = step % MEMORY_EVERY == 1
            line = StepLine(
                step=step,
                loss=loss,
                lr=draft.lr,
                seconds=round(draft.seconds, 3),
                losses={name: round(value, 6) for name, value in losses.items()},
                waited_s=round(draft.waited_s, 4),
                memory_gb=_gb(peak_memory_bytes()) if measured else None,
                gpu_gb=_gb(_peak_gpu_bytes()) if measured else None,
            )
            self.journal.write(line)
            self.watch.take(line, len(draft.taken.cases))
            self.done = int(1000 * draft.fraction)
            self.progress.update(self.done, "", self.watch.facts())


def _peak_gpu_bytes() -> int | None:
    return torch.cuda.max_memory_reserved() if torch.cuda.is_initialized() else None


def _gb(count: int | None) -> float | None:
    """In 10⁹ bytes."""
    return None if count is None else round(count / 1e9, 3)
