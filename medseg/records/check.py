"""Check and fix on file: the report of ``medseg check --json``, and what ``--fix`` did."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field

from medseg.errors import CODES, Problem
from medseg.records.base import Record


class ProblemRecord(Record):
    """A problem; ``title`` is the code in words, ``fixable`` says whether ``--fix`` can mend it."""

    severity: Literal["error", "warning"]
    code: str
    title: str
    case: str | None
    measured: str
    expected: str
    action: str
    fixable: bool = False

    @classmethod
    def of(cls, problem: Problem, fixable: bool = False) -> Self:
        """The record of a problem."""
        return cls(
            severity=problem.severity,
            code=problem.code,
            title=CODES[problem.code],
            case=problem.case,
            measured=problem.measured,
            expected=problem.expected,
            action=problem.action,
            fixable=fixable,
        )


class LabelRecord(Record):
    """How often a label occurs."""

    name: str
    value: int
    cases: int
    voxels: int


class Spread(Record):
    """Smallest, median and largest over the cases, (z, y, x) in canonical orientation."""

    smallest: tuple[float, float, float]
    median: tuple[float, float, float]
    largest: tuple[float, float, float]


class CheckRecord(Record):
    """The report of ``medseg check``. Cases are those whose files are all there."""

    schema_version: int = Field(default=1, ge=1, le=1)
    layout: str | None
    channels: tuple[str, ...] = ()
    cases: int
    files_read: int
    errors: int
    warnings: int
    problems: tuple[ProblemRecord, ...]
    identical: tuple[tuple[str, ...], ...] = ()
    duplicates: tuple[tuple[str, ...], ...] = ()
    labels: tuple[LabelRecord, ...] = ()
    label_types: dict[str, int] = Field(default_factory=dict)
    orientations: dict[str, int] = Field(default_factory=dict)
    shape: Spread | None = None
    spacing_mm: Spread | None = None


class MendedCase(Record):
    """A case of the copy: SHA-256 of its files before and after, and what was changed; nothing if only copied."""

    id: str
    inputs: dict[str, str]
    outputs: dict[str, str]
    changes: tuple[str, ...] = ()


class FixManifest(Record):
    """What ``medseg check --fix`` did; a folder that holds one is its copy."""

    schema_version: int = Field(default=1, ge=1, le=1)
    settings: dict[str, str]
    finished: bool = False
    cases: tuple[MendedCase, ...] = ()
    left_out: tuple[ProblemRecord, ...] = ()
