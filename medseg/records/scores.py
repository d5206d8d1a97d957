"""Scores: how predictions compare with references, per case and label, with the definitions that were used.

JSON has no infinity: an infinite distance is ``null``, and ``status`` says which kind of null it is.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from medseg.errors import Problem
from medseg.records.base import Record

Status = Literal["ok", "both empty", "missed", "spurious"]
TargetKind = Literal["label", "region"]

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
    "hd95_mm": "larger of the two directions' 95th percentiles of border distances, mm",
    "assd_mm": "mean of the border distances of both directions together, mm",
    "nsd": "share of both masks' border voxels within tolerance_mm of the other border, 0 to 1",
    "volume_error_ml": "volume of the prediction minus volume of the reference, ml",
    "ignore": "voxels that the reference leaves unannotated are removed from prediction and reference before scoring",
    "means": "over the cases that have a number; infinite distances are left out of means and counted as infinite",
    "mean_dice": "mean over labels (over regions where the task has them) of the mean over cases",
}


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
    hd95_mm: float | None = Field(ge=0)
    assd_mm: float | None = Field(ge=0)
    nsd: float | None = Field(ge=0, le=1)
    true_positives: int = Field(ge=0)
    false_positives: int = Field(ge=0)
    false_negatives: int = Field(ge=0)
    prediction_ml: float = Field(ge=0)
    reference_ml: float = Field(ge=0)
    volume_error_ml: float


class Statistic(Record):
    """Spread of one measure over ``cases`` finite numbers; ``infinite`` more cases had no finite one."""

    mean: float | None = None
    std: float | None = None
    median: float | None = None
    cases: int = Field(default=0, ge=0)
    infinite: int = Field(default=0, ge=0)


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
    hd95_mm: Statistic
    assd_mm: Statistic
    nsd: Statistic
    volume_error_ml: Statistic


class Scores(Record):
    """All case scores, their summaries per label, and the pairs that could not be scored."""

    schema_version: int = Field(default=1, ge=1, le=1)
    tolerance_mm: float = Field(ge=0)
    definitions: dict[str, str] = Field(default_factory=lambda: dict(DEFINITIONS))
    mean_dice: float | None = Field(default=None, ge=0, le=1)
    mean_nsd: float | None = Field(default=None, ge=0, le=1)
    labels: tuple[LabelSummary, ...] = ()
    cases: tuple[CaseScore, ...] = ()
    problems: tuple[Problem, ...] = ()
