"""Journal: ``log.jsonl``, one line per step and one per validation, from which pictures and reports are made."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from medseg.artefacts import commit
from medseg.records.base import Record, parse_record

NAME = "log.jsonl"


class StepLine(Record):
    """One training step: its loss, its learning rate, and the seconds of training after it."""

    step: int
    loss: float
    lr: float
    seconds: float


class ValidationLine(Record):
    """Dice per label of whole validation volumes; None where no case has the label."""

    step: int
    dice: dict[str, float | None]
    seconds: float

    @property
    def mean_dice(self) -> float | None:
        """Mean over the labels that have a value."""
        values = [d for d in self.dice.values() if d is not None]
        return sum(values) / len(values) if values else None


@dataclass(frozen=True, slots=True)
class Journal:
    """An open ``log.jsonl``; lines after the step it was opened at have been dropped."""

    path: Path
    file: IO[str]

    @classmethod
    def open(cls, folder: Path, step: int) -> Journal:
        """Open for appending, keeping only the lines of the first ``step`` steps."""
        path = folder / NAME
        steps, validations = read_journal(path)
        kept: list[StepLine | ValidationLine] = [s for s in steps if s.step <= step]
        kept += [v for v in validations if v.step <= step]
        kept.sort(key=lambda line: (line.step, isinstance(line, ValidationLine)))
        commit(path, "".join(_encode(line) for line in kept).encode())
        return cls(path, path.open("a", encoding="utf-8"))

    def write(self, line: StepLine | ValidationLine) -> None:
        """Append one line."""
        self.file.write(_encode(line))

    def sync(self) -> None:
        """Everything written so far is on the disk."""
        self.file.flush()
        os.fsync(self.file.fileno())

    def close(self) -> None:
        """Close the file."""
        self.file.close()


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
    return json.dumps(line.to_json(), allow_nan=False) + "\n"
