"""Model card: what stands beside the weights, so that a model folder predicts on its own."""

from __future__ import annotations

from typing import Self

from pydantic import Field, PositiveFloat, model_validator

from medseg.records.base import Record
from medseg.records.plan import Orientation, Plan
from medseg.records.training import TrainingPlan

CARD, WEIGHTS = "model.json", "weights.safetensors"  # the files of a model folder


class NnunetOrigin(Record):
    """What nnU-Net called things in the model that was imported."""

    dataset: str = Field(max_length=200)
    plans: str = Field(max_length=200)
    trainer: str = Field(max_length=200)
    reader: str = Field(max_length=200)
    file_ending: str = Field(max_length=20)


class ModelCard(Record):
    """Plan, configuration and fold of the weights beside it, with their SHA-256 and how they came to be.

    ``batch_size`` and ``training`` are what was used: a time budget may have changed what the plan says. ``length`` is
    how long it was to train; ``steps`` is where these weights are from. ``scores`` are Dice by label of the validation
    cases: of all of them when the training is over, before of those watched while training.
    ``orientation`` says on which axes the network sees volumes: canonical ones, or those of the file as they are, which
    is how most models that were ``imported`` learned.
    """

    schema_version: int = Field(default=1, ge=1, le=1)
    configuration: str
    fold: str
    plan: Plan
    weights_sha256: str
    medseg_version: str
    torch_version: str
    settings_sha256: str
    batch_size: int = Field(ge=1)
    training: TrainingPlan
    steps: int = Field(ge=0)
    training_seconds: float = Field(default=0, ge=0)
    length: str = ""
    scores: dict[str, float | None] = Field(default_factory=dict)
    orientation: Orientation = "canonical"
    imported: NnunetOrigin | None = None

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.configuration not in self.plan.configurations:
            raise ValueError(f"configuration {self.configuration!r} is not in the plan")
        return self


class Refinement(Record):
    """A mean field over the probabilities, see ``medseg.inference.refine``.

    Weights are in nats: what a voxel's label loses when all its neighbours, as far as they are like it, have another
    one. Widths are standard deviations: of distance in mm, None for the finest spacing (smoothness) and 1.5 times that
    (appearance); of the difference of normalised intensities.
    """

    iterations: int = Field(default=5, ge=1, le=50)
    smoothness_weight: float = Field(default=1.0, ge=0, le=100)
    smoothness_mm: PositiveFloat | None = None
    appearance_weight: float = Field(default=3.0, ge=0, le=100)
    appearance_mm: PositiveFloat | None = None
    appearance_intensity: PositiveFloat = 0.5


class PostProcessing(Record):
    """What is done to a prediction, in the order of the fields. Chosen by cross-validation.

    ``refinement``: of the probabilities, before labels are made of them; the other steps change labels.

    ``keep_largest_foreground``: only the largest component of all foreground together. ``keep_largest_labels``: of
    single labels, class indices (places in ``Task.labels``). ``keep_largest_groups``: of labels whose union is looked
    at, such as regions. ``min_mm3``: components of a class index that are smaller. ``fill_holes_labels``: background
    that one class index encloses becomes that class.
    """

    refinement: Refinement | None = None
    keep_largest_foreground: bool = False
    keep_largest_labels: tuple[int, ...] = ()
    keep_largest_groups: tuple[tuple[int, ...], ...] = ()
    min_mm3: dict[int, PositiveFloat] = Field(default_factory=dict)
    fill_holes_labels: tuple[int, ...] = ()
    evidence: tuple[str, ...] = ()
