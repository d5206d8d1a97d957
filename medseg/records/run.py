"""Run manifest: what ran, on which hashes, with which versions, and how it ended for every case."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from medseg.records.base import Record


class CaseOutcome(Record):
    """How one case ended. ``outputs`` maps the files written to their SHA-256.

    ``quality`` is the Dice to be expected of a prediction if its probabilities are right, where it was asked for.
    """

    id: str
    status: Literal["done", "skipped", "failed"]
    key: str = ""
    outputs: dict[str, str] = Field(default_factory=dict)
    problems: tuple[str, ...] = ()
    seconds: float = Field(default=0, ge=0)
    quality: float | None = Field(default=None, ge=0, le=1)


class RunManifest(Record):
    """One command's account of itself."""

    schema_version: int = Field(default=1, ge=1, le=1)
    command: str
    medseg_version: str
    versions: dict[str, str] = Field(default_factory=dict)
    inputs: dict[str, str] = Field(default_factory=dict)
    settings: dict[str, str] = Field(default_factory=dict)
    cases: tuple[CaseOutcome, ...] = ()

    @property
    def failed(self) -> tuple[CaseOutcome, ...]:
        """The cases that have no output."""
        return tuple(case for case in self.cases if case.status == "failed")


class Fold(Record):
    """Case ids to train on and to validate on."""

    train: tuple[str, ...] = Field(min_length=1)
    val: tuple[str, ...]


SplitMethod = Literal["kfold", "balanced", "stratified", "given"]


class Splits(Record):
    """Cross-validation folds; every case validates in exactly one fold unless the splits were given by the user.

    ``method``: "kfold" as nnU-Net draws, "balanced" groups of different sizes, "stratified" by labels, "given" in a
    file. ``reason`` tells why. ``groups``: the group of each case that has one, ``grouped_by`` where it comes from.
    """

    schema_version: int = Field(default=1, ge=1, le=1)
    method: SplitMethod = "given"
    reason: str = ""
    seed: int | None = None
    grouped_by: str = ""
    groups: dict[str, str] = Field(default_factory=dict)
    folds: tuple[Fold, ...] = Field(min_length=1)
