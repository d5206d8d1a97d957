"""Int8 ranges: between which values the inputs of a network's convolutions lie; beside its weights."""

from __future__ import annotations

from typing import Self

from pydantic import Field, model_validator

from medseg.records.base import Record

INT8 = "int8.json"  # in the folder of a fold


class LayerRange(Record):
    """The lowest and the highest value of each input channel of a convolution."""

    low: tuple[float, ...] = Field(min_length=1)
    high: tuple[float, ...] = Field(min_length=1)

    @model_validator(mode="after")
    def _check(self) -> Self:
        if len(self.low) != len(self.high) or any(low > high for low, high in zip(self.low, self.high, strict=True)):
            raise ValueError("low and high are not those of the same channels")
        return self


class Int8Ranges(Record):
    """Ranges by the name of the convolution, measured with these weights on ``cases``."""

    schema_version: int = Field(default=1, ge=1, le=1)
    weights_sha256: str
    medseg_version: str
    cases: tuple[str, ...] = Field(min_length=1)
    layers: dict[str, LayerRange] = Field(min_length=1)
