"""Task: what goes in (channels) and what comes out (classes, regions, ignore label)."""

from __future__ import annotations

from typing import Self

from pydantic import Field, model_validator

from medseg.records.base import Record


class Channel(Record):
    """One input channel. ``name`` is nnU-Net's channel name: it chooses the normalisation ("CT" → CT scheme)."""

    name: str = Field(min_length=1, max_length=200)


class Label(Record):
    """One output class: ``value`` in the label files, its index in the network is its place in ``Task.labels``."""

    name: str = Field(min_length=1, max_length=200)
    value: int = Field(ge=0, le=65535)


class Region(Record):
    """A group of label values that the network learns as one overlapping target (for instance "whole tumour")."""

    name: str = Field(min_length=1, max_length=200)
    values: tuple[int, ...] = Field(min_length=1)


class Task(Record):
    """Channels, labels sorted by value with background 0 first, optional regions and ignore value."""

    name: str = Field(default="dataset", max_length=200)
    channels: tuple[Channel, ...] = Field(min_length=1, max_length=256)
    labels: tuple[Label, ...] = Field(min_length=2, max_length=65535)
    regions: tuple[Region, ...] = ()
    regions_order: tuple[int, ...] = ()
    ignore_value: int | None = Field(default=None, ge=1, le=65535)

    @model_validator(mode="after")
    def _check(self) -> Self:
        values = [label.value for label in self.labels]
        if values != sorted(set(values)) or values[0] != 0:
            raise ValueError(f"label values must start with background 0 and be unique and sorted, found {values}")
        if self.ignore_value in values:
            raise ValueError(f"ignore value {self.ignore_value} is also the value of a class")
        if len({label.name for label in self.labels}) != len(values):
            raise ValueError("label names must be unique")
        unknown = {v for region in self.regions for v in region.values} - set(values)
        if unknown:
            raise ValueError(f"regions use undeclared label values {sorted(unknown)}")
        if len(self.regions_order) != len(self.regions):
            raise ValueError("regions_class_order must give one value per region")
        return self

    @property
    def foreground(self) -> tuple[Label, ...]:
        """All labels but the background."""
        return self.labels[1:]

    @property
    def values(self) -> tuple[int, ...]:
        """Label values by class index: ``values[0] == 0``."""
        return tuple(label.value for label in self.labels)

    @property
    def outputs(self) -> int:
        """Channels of the network's output: regions if there are any, else classes with background."""
        return len(self.regions) or len(self.labels)
