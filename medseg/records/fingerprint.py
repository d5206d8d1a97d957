"""Fingerprint: what the planner knows about a data set. Quantities as nnU-Net v2 defines them."""

from __future__ import annotations

from pydantic import Field

from medseg.records.base import Record


class Intensity(Record):
    """Statistics of one channel over foreground voxels (label > 0); every case has the same weight."""

    mean: float
    median: float
    std: float = Field(ge=0)
    min: float
    max: float
    percentile_00_5: float
    percentile_99_5: float


class CasePrint(Record):
    """One case: shape after cropping to nonzero (z, y, x), spacing, and the files' SHA-256 (images, then label).

    ``label_centres_mm`` are along the canonical z, y, x, from the corner of the crop.
    """

    id: str
    shape_after_crop: tuple[int, int, int]
    spacing_mm: tuple[float, float, float]
    relative_size_after_cropping: float = Field(gt=0, le=1)
    voxels_per_label: dict[int, int] = Field(default_factory=dict)
    label_centres_mm: dict[int, tuple[float, float, float]] = Field(default_factory=dict)
    sha256: tuple[str, ...] = ()


class Fingerprint(Record):
    """All cases sorted by id, and per channel the intensity statistics."""

    schema_version: int = Field(default=1, ge=1, le=1)
    cases: tuple[CasePrint, ...] = Field(min_length=1)
    intensities: tuple[Intensity, ...] = Field(min_length=1)
    median_relative_size_after_cropping: float = Field(gt=0, le=1)
