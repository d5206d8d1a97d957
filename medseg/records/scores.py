"""Scores: how predictions compare with references, per case and label, with the definitions that were used.

JSON has no infinity: an infinite distance is ``null``, and ``status`` says which kind of null it is.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field, PositiveFloat, model_validator

from medseg.errors import Problem
from medseg.records.base import Record

Status = Literal["ok", "both empty", "missed", "spurious"]
TargetKind = Literal["label", "region"]
Unpaired = Literal["no prediction", "no reference", "failed"]

DEFINITIONS: dict[str, str] = {
    "status": "ok: in both; missed: in the reference only; spurious: in the prediction only; both empty: in neither. "
    "Missed and spurious give dice 0, nsd 0 and infinite distances (null in JSON, inf in CSV). Both empty gives no "
    "numbers and does not enter means.",
    "dice": "2 TP / (2 TP + FP + FN), voxels, 0 to 1",
    "iou": "TP / (TP + FP + FN), voxels, 0 to 1",
    "precision": "TP / (TP + FP), voxels, 0 to 1; none if the prediction is empty",
    "recall": "TP / (TP + FN), voxels, 0 to 1; none if the reference is empty",
    "border": "mask voxels with a face neighbour outside the mask (6 neighbours, 4 in 2D images); outside the volume "
    "counts as outside the mask; distances run between voxel centres",
    "hd_mm": "largest border distance of both directions, mm",
    "hd95_mm": "larger of the two directions' 95th percentiles of border distances, mm",
    "assd_mm": "mean of the border distances of both directions together, mm",
    "nsd": "share of both masks' border voxels within the tolerance of the other border, 0 to 1; the tolerance is "
    "tolerance_mm, or the label's own in label_tolerances_mm; nsd_at holds those of more_tolerances_mm",
    "volume_error_ml": "volume of the prediction minus volume of the reference, ml",
    "relative_volume_error": "volume_error_ml / reference_ml; none if the reference is empty",
    "area_mm2": "surface area in mm² by Crofton's formula in 13 directions (Lehmann and Legland, Insight Journal "
    "2012), weighted by the directions' shares of the sphere at the spacing; none for flat images",
    "lesions": "pieces connected through faces, edges and corners. Found: a piece of the reference of which the "
    "prediction covers at least the share lesion_overlap. False: a piece of the prediction of which the reference "
    "covers less than that share. Sensitivity: found / all of the reference; precision: not false / all of the "
    "prediction; F1: their harmonic mean, 0 if there are pieces and none was found, none if there are no pieces",
    "calibration": "one structure against the rest, in the box of the reference and of all probabilities of 0.5 or "
    "more, grown by 10 mm. brier: mean squared difference of probability and truth. ece: expected calibration error, "
    "10 equal bins of the probability, mean of |mean probability - share of true voxels| weighted by voxels",
    "ignore": "voxels that the reference leaves unannotated are removed from prediction and reference before scoring",
    "means": "over the cases that have a number; infinite distances are left out of means and counted as infinite",
    "median": "over the cases that have a number and those with an infinite distance; none if it is infinite itself",
    "ci": "95 % interval of the mean over cases, bootstrap: 2000 seeded draws of whole cases, bias-corrected and "
    "accelerated (Efron 1987); none for fewer than 3 cases",
    "mean_dice": "mean over labels (over regions where the task has them) of the mean over cases",
}


class Measures(Record):
    """What to measure: tolerances of the surface Dice, the rule for lesions, and which labels and regions."""

    tolerance_mm: float = Field(default=2.0, ge=0)
    label_tolerances_mm: dict[str, float] = Field(default_factory=dict)
    more_tolerances_mm: tuple[float, ...] = ()
    lesion_overlap: PositiveFloat | None = Field(default=None, le=1)
    labels: tuple[str, ...] = ()
    """Names of the labels and regions to score; empty: all."""

    @model_validator(mode="after")
    def _check(self) -> Measures:
        if min((*self.label_tolerances_mm.values(), *self.more_tolerances_mm), default=0) < 0:
            raise ValueError("tolerances must not be negative")
        return self

    def tolerance_of(self, label: str) -> float:
        """The tolerance in mm of a label's or region's ``nsd``."""
        return self.label_tolerances_mm.get(label, self.tolerance_mm)


class Lesions(Record):
    """Pieces of one label in one case; see ``DEFINITIONS["lesions"]``."""

    expected: int = Field(ge=0)
    found: int = Field(ge=0)
    predicted: int = Field(ge=0)
    false_positives: int = Field(ge=0)

    @property
    def sensitivity(self) -> float | None:
        """Share of the reference's pieces that were found."""
        return self.found / self.expected if self.expected else None

    @property
    def precision(self) -> float | None:
        """Share of the prediction's pieces that are not false."""
        return 1 - self.false_positives / self.predicted if self.predicted else None

    @property
    def f1(self) -> float | None:
        """Harmonic mean of sensitivity and precision."""
        if not self.expected and not self.predicted:
            return None
        sensitivity, precision = self.sensitivity or 0.0, self.precision or 0.0
        both = sensitivity + precision
        return 2 * sensitivity * precision / both if both else 0.0


class Calibration(Record):
    """How far probabilities can be believed; see ``DEFINITIONS["calibration"]``."""

    brier: float = Field(ge=0, le=1)
    ece: float = Field(ge=0, le=1)


class CaseScore(Record):
    """One label or region of one case. ``values`` are the label values that it is made of."""

    case: str
    label: str
    kind: TargetKind = "label"
    values: tuple[int, ...]
    status: Status
    dice: float | None = Field(ge=0, le=1)
    iou: float | None = Field(ge=0, le=1)
    precision: float | None = Field(ge=0, le=1)
    recall: float | None = Field(ge=0, le=1)
    hd_mm: float | None = Field(default=None, ge=0)
    hd95_mm: float | None = Field(ge=0)
    assd_mm: float | None = Field(ge=0)
    nsd: float | None = Field(ge=0, le=1)
    nsd_at: tuple[float | None, ...] = ()
    true_positives: int = Field(ge=0)
    false_positives: int = Field(ge=0)
    false_negatives: int = Field(ge=0)
    true_negatives: int | None = Field(default=None, ge=0)
    prediction_ml: float = Field(ge=0)
    reference_ml: float = Field(ge=0)
    volume_error_ml: float
    relative_volume_error: float | None = None
    prediction_area_mm2: float | None = Field(default=None, ge=0)
    reference_area_mm2: float | None = Field(default=None, ge=0)
    lesions: Lesions | None = None
    calibration: Calibration | None = None


class Statistic(Record):
    """Spread of one measure over ``cases`` finite numbers; ``infinite`` more cases had no finite one."""

    mean: float | None = None
    ci: tuple[float, float] | None = None
    std: float | None = None
    median: float | None = None
    cases: int = Field(default=0, ge=0)
    infinite: int = Field(default=0, ge=0)


class LesionSummary(Record):
    """Pieces of one label over all cases: the mean of the cases' figures, and the pieces of all cases as one heap."""

    sensitivity: Statistic
    precision: Statistic
    f1: Statistic
    false_positives_per_case: float = Field(ge=0)
    total: Lesions


class LabelSummary(Record):
    """One label or region over all cases."""

    label: str
    kind: TargetKind = "label"
    values: tuple[int, ...]
    cases: int = Field(ge=0)
    both_empty: int = Field(ge=0)
    missed: int = Field(ge=0)
    spurious: int = Field(ge=0)
    dice: Statistic
    iou: Statistic
    precision: Statistic
    recall: Statistic
    hd_mm: Statistic = Statistic()
    hd95_mm: Statistic
    assd_mm: Statistic
    nsd: Statistic
    nsd_at: tuple[Statistic, ...] = ()
    volume_error_ml: Statistic
    relative_volume_error: Statistic = Statistic()
    lesions: LesionSummary | None = None
    brier: Statistic = Statistic()
    ece: Statistic = Statistic()


class UnscoredCase(Record):
    """A case without scores: one side has no file, or the pair could not be scored (see ``Scores.problems``)."""

    case: str
    status: Unpaired


class Scores(Record):
    """All case scores, their summaries per label, and the pairs that could not be scored."""

    schema_version: int = Field(default=1, ge=1, le=1)
    tolerance_mm: float = Field(ge=0)
    label_tolerances_mm: dict[str, float] = Field(default_factory=dict)
    more_tolerances_mm: tuple[float, ...] = ()
    lesion_overlap: float | None = None
    definitions: dict[str, str] = Field(default_factory=lambda: dict(DEFINITIONS))
    mean_dice: float | None = Field(default=None, ge=0, le=1)
    mean_dice_ci: tuple[float, float] | None = None
    mean_nsd: float | None = Field(default=None, ge=0, le=1)
    mean_nsd_ci: tuple[float, float] | None = None
    labels: tuple[LabelSummary, ...] = ()
    cases: tuple[CaseScore, ...] = ()
    unscored: tuple[UnscoredCase, ...] = ()
    problems: tuple[Problem, ...] = ()
