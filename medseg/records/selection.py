"""Selection: which models predict together, and what comes after, chosen by cross-validation, with the evidence."""

from __future__ import annotations

from typing import Self

from pydantic import Field, model_validator

from medseg.records.base import Record
from medseg.records.model import PostProcessing


class Member(Record):
    """One configuration that takes part, the folds whose networks are averaged, and the hashes of their weights.

    ``weight`` is the share of its probabilities in the mean.
    """

    configuration: str
    folds: tuple[str, ...] = Field(min_length=1)
    weights_sha256: tuple[str, ...] = Field(min_length=1)
    weight: float = Field(gt=0, le=1)


class Candidate(Record):
    """One configuration, or two whose probabilities are averaged, scored on the cases that all validated.

    ``networks``: how many of a fold work on a case, stages of cascades among them. ``mean_dice`` and ``dice`` are with
    post-processing that for each case was chosen on the other folds; ``mean_dice_unprocessed`` is without any (None in
    files of old releases, whose ``mean_dice`` was so). ``gain`` over the candidate that was best among cheaper ones, as
    mean over labels of the mean over cases, with its 95 % interval.
    """

    configurations: tuple[str, ...] = Field(min_length=1)
    networks: int = Field(ge=1)
    mean_dice: float | None = Field(default=None, ge=0, le=1)
    mean_dice_ci: tuple[float, float] | None = None
    mean_dice_unprocessed: float | None = Field(default=None, ge=0, le=1)
    dice: dict[str, float | None] = Field(default_factory=dict)
    gain: float | None = None
    gain_ci: tuple[float, float] | None = None

    @property
    def name(self) -> str:
        """For people: ``2d`` or ``2d + 3d_fullres``."""
        return " + ".join(self.configurations)


class Selection(Record):
    """The recipe that ``medseg predict`` follows, and why: ``cases`` are those that decided.

    ``postprocessing`` is chosen on all of them; ``mean_dice`` is the chosen candidate's.
    """

    schema_version: int = Field(default=1, ge=1, le=1)
    medseg_version: str
    members: tuple[Member, ...] = Field(min_length=1)
    postprocessing: PostProcessing
    mean_dice: float | None = Field(default=None, ge=0, le=1)
    cases: tuple[str, ...]
    candidates: tuple[Candidate, ...]
    evidence: tuple[str, ...]
    missing: tuple[str, ...] = ()

    @model_validator(mode="after")
    def _check(self) -> Self:
        if abs(sum(member.weight for member in self.members) - 1) > 1e-6:
            raise ValueError("the weights of the members do not add up to 1")
        if any(len(member.folds) != len(member.weights_sha256) for member in self.members):
            raise ValueError("each fold needs the hash of its weights")
        return self
