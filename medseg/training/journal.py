"""Journal: ``log.jsonl``, one line per step and one per validation, which feed pictures, reports and loggers."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, Protocol

from pydantic import Field

from medseg.artefacts import commit
from medseg.records.base import Record, parse_record

NAME = "log.jsonl"

log = logging.getLogger(__name__)


class StepLine(Record):
    """One training step: its loss, its learning rate, and the seconds of training after it.

    ``losses`` are the parts of the loss by name. ``waited_s`` are the seconds that the step waited for its batch.
    ``memory_gb`` and ``gpu_gb`` (of 10⁹ bytes), written now and then, are the most that the process and its tensors on
    the GPU have taken so far.
    """

    step: int
    loss: float
    lr: float
    seconds: float
    losses: dict[str, float] = Field(default_factory=dict)
    waited_s: float | None = None
    memory_gb: float | None = None
    gpu_gb: float | None = None


class ValidationLine(Record):
    """Dice per label of whole validation volumes; None where no case has the label.

    ``smoothed`` is the moving average of the mean Dice, by which the best weights are chosen.
    """

    step: int
    dice: dict[str, float | None]
    seconds: float
    smoothed: float | None = None

    @property
    def mean_dice(self) -> float | None:
        """Mean over the labels that have a value."""
        values = [d for d in self.dice.values() if d is not None]
        return sum(values) / len(values) if values else None


Line = StepLine | ValidationLine


class Observer(Protocol):
    """Whoever is told of every line. What it raises makes it blind for the rest of the training, and nothing else."""

    def begin(self, lines: Sequence[Line]) -> None:
        """The journal was opened and holds these lines: none, or those of the training that goes on."""

    def write(self, line: Line) -> None:
        """One more line was written."""

    def sync(self) -> None:
        """What was written so far should be on the disk."""

    def close(self, *, finished: bool) -> None:
        """The training ended, or was interrupted and may go on later."""


@dataclass(frozen=True, slots=True)
class Journal:
    """An open ``log.jsonl``; lines after the step it was opened at have been dropped."""

    path: Path
    file: IO[str]
    observers: list[Observer] = field(default_factory=list)

    @classmethod
    def open(cls, folder: Path, step: int, observers: Sequence[Observer] = ()) -> Journal:
        """Open for appending, keeping only the lines of the first ``step`` steps."""
        path = folder / NAME
        steps, validations = read_journal(path)
        kept: list[Line] = [s for s in steps if s.step <= step]
        kept += [v for v in validations if v.step <= step]
        kept.sort(key=lambda line: (line.step, isinstance(line, ValidationLine)))
        commit(path, "".join(_encode(line) for line in kept).encode())
        journal = cls(path, path.open("a", encoding="utf-8"), list(observers))
        journal._tell(lambda observer: observer.begin(kept))
        return journal

    @classmethod
    def nowhere(cls, folder: Path) -> Journal:
        """A journal that keeps nothing: of a process beside the one that writes."""
        return cls(folder / NAME, Path(os.devnull).open("a", encoding="utf-8"))

    def write(self, line: Line) -> None:
        """Append one line."""
        self.file.write(_encode(line))
        self._tell(lambda observer: observer.write(line))

    def sync(self) -> None:
        """Everything written so far is on the disk."""
        self.file.flush()
        os.fsync(self.file.fileno())
        self._tell(lambda observer: observer.sync())

    def close(self, *, finished: bool = False) -> None:
        """Close the file; ``finished`` says whether the training came to its end."""
        self.file.close()
        self._tell(lambda observer: observer.close(finished=finished))

    def _tell(self, message: Callable[[Observer], None]) -> None:
        """Tell all observers; one that fails is told nothing more: to watch a training must never stop it."""
        for observer in tuple(self.observers):
            try:
                message(observer)
            except Exception as error:
                self.observers.remove(observer)
                what = f"{type(error).__name__}: {error}"
                log.warning("%s failed and is left out from here on: %s", type(observer).__name__, what)


def read_journal(path: Path) -> tuple[list[StepLine], list[ValidationLine]]:
    """Steps and validations of a ``log.jsonl``; a last line that was cut off by a crash is left out."""
    steps: list[StepLine] = []
    validations: list[ValidationLine] = []
    if path.is_file():
        for text in path.read_text(encoding="utf-8", errors="replace").splitlines():
            try:
                value: Any = json.loads(text)
            except ValueError:
                break
            if "dice" in value:
                validations.append(parse_record(value, ValidationLine, NAME))
            else:
                steps.append(parse_record(value, StepLine, NAME))
    return steps, validations


def _encode(line: Record) -> str:
    return json.dumps(line.model_dump(mode="json", exclude_defaults=True), allow_nan=False) + "\n"
