"""Origin: whose weights a training begins from, and which channels and labels of that model are taken over."""

from __future__ import annotations

from typing import Annotated, Self

from pydantic import Field, StringConstraints, model_validator

from medseg.records.base import Record

ALL_CASES, FIRST = "all", "0"

Sha256 = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]
FoldName = Annotated[str, StringConstraints(pattern=r"^(all|[0-9]{1,4})$")]


class NameMap(Record):
    """``names`` that the model has, in its order; ``places`` holds, for each name of the new task, its place there.

    None is what the model does not know.
    """

    names: tuple[str, ...] = Field(min_length=1)
    places: tuple[int | None, ...] = Field(min_length=1)

    @model_validator(mode="after")
    def _check(self) -> Self:
        if any(place is not None and not 0 <= place < len(self.names) for place in self.places):
            raise ValueError(f"places {self.places} must be places of {len(self.names)} names, or null")
        return self


class Origin(Record):
    """What a model gives to a new training.

    ``outputs`` are those of the network: regions if both tasks have them, else labels with the background; all are
    new where only one of them has regions. ``weights`` holds the SHA-256 of the model's weights by configuration and
    fold; the files are kept in the run folder.
    """

    channels: NameMap
    labels: NameMap
    outputs: NameMap
    weights: dict[str, dict[FoldName, Sha256]] = Field(min_length=1)

    @model_validator(mode="after")
    def _check(self) -> Self:
        if not all(self.weights.values()):
            raise ValueError("weights must name a fold of every configuration")
        return self

    def fold_for(self, configuration: str, fold: str) -> str:
        """The model's fold that ``fold`` begins from: the one of the same name, else that of all cases, else the first.

        On the data set that the model was trained on, the fold of the same name has not seen the validation cases.
        """
        there = self.weights[configuration]
        return next((name for name in (fold, ALL_CASES, FIRST) if name in there), min(there))
