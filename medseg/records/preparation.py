"""Preparation: how one case was brought from its file to the network's grid — enough to undo it."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from medseg.records.base import Record

StorePrecision = Literal["float32", "float16"]


class Preparation(Record):
    """The steps in order: file grid → canonical (permute, flip) → transpose → crop → normalise → resample.

    ``to_canonical`` holds, for each canonical axis (z, y, x), the source array axis it was taken from, and
    ``flipped`` whether that axis was reversed. ``transpose`` is the plan's. ``crop_box`` is (start, stop) per axis of
    the transposed canonical array. ``spacing_mm`` and ``target_spacing_mm`` are per axis of the transposed array.
    """

    source_shape: tuple[int, int, int]
    to_canonical: tuple[int, int, int]
    flipped: tuple[bool, bool, bool]
    transpose: tuple[int, int, int]
    uncropped_shape: tuple[int, int, int]
    crop_box: tuple[tuple[int, int], tuple[int, int], tuple[int, int]]
    spacing_mm: tuple[float, float, float]
    target_spacing_mm: tuple[float, float, float]
    target_shape: tuple[int, int, int]

    @property
    def cropped_shape(self) -> tuple[int, int, int]:
        """Shape after cropping, before resampling."""
        (a, b), (c, d), (e, f) = self.crop_box
        return b - a, d - c, f - e


class ArrayChecks(Record):
    """Checksums of an array's file: CRC-32 of its header, and of each chunk in C order, compressed as it lies there."""

    file_bytes: int = Field(ge=1)
    header_bytes: int = Field(ge=1)
    header_crc32: int = Field(ge=0, lt=2**32)
    chunks_crc32: tuple[int, ...]


class PreparedCaseRecord(Record):
    """What the store knows of a case: its hashes, shapes and how it was prepared.

    ``files`` holds the SHA-256 of each file, ``checks`` the checksums with which parts of it are verified as they are
    read. ``settings_sha256`` covers the number type of the image too, if it is not float32.
    """

    id: str
    source_sha256: tuple[str, ...]
    settings_sha256: str
    preparation: Preparation
    channels: int = Field(ge=1)
    files: dict[str, str]
    checks: dict[str, ArrayChecks]
    foreground_voxels: dict[int, int] = Field(default_factory=dict)


class StoreManifest(Record):
    """The prepared data set of one configuration: committed last, and the only list of its cases."""

    schema_version: int = Field(default=1, ge=1, le=1)
    configuration: str
    settings_sha256: str
    precision: StorePrecision = "float32"
    cases: dict[str, str] = Field(min_length=1)
