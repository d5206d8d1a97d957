"""Statistics: what a label of a case measures, its volume and pieces, and the intensities of images within it."""

from __future__ import annotations

from pydantic import Field

from medseg.records.base import Record


class Intensities(Record):
    """Of the voxels of one label in one image: mean, standard deviation and percentiles, in the image's own unit."""

    image: str
    mean: float
    sd: float = Field(ge=0)
    minimum: float
    percentile_05: float
    median: float
    percentile_95: float
    maximum: float


class LabelStatistics(Record):
    """One label of one case; a label that is not there has no voxels and no intensities."""

    case: str
    label: str
    value: int = Field(ge=1)
    voxels: int = Field(ge=0)
    volume_ml: float = Field(ge=0)
    components: int = Field(ge=0)
    intensities: tuple[Intensities, ...] = ()


class Statistics(Record):
    """The labels of all cases, and the cases that could not be read."""

    schema_version: int = Field(default=1, ge=1, le=1)
    rows: tuple[LabelStatistics, ...] = ()
    problems: tuple[str, ...] = ()
