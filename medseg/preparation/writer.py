"""Writer: a prepared case's files, written as soon as what is in them is known and put in place together."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from medseg.artefacts import Stage, json_bytes, staging
from medseg.errors import InputError, Problem
from medseg.preparation.arrays import checks_of, chunk_layout, encode_array, pack, packed_bytes
from medseg.preparation.foreground import sample_foreground
from medseg.preparation.store import CASE, FOREGROUND, IMAGE, LABELS, Provenance, check_id
from medseg.records.grid import Int3
from medseg.records.preparation import ArrayChecks, Preparation, PreparedCaseRecord, StorePrecision


def write_case(
    folder: Path,
    case_id: str,
    image: NDArray[np.float32],
    labels: NDArray[np.signedinteger[Any]],
    preparation: Preparation,
    provenance: Provenance,
    dimensions: int,
    precision: StorePrecision = "float32",
) -> str:
    """Commit a prepared case; its record comes last. Equal arguments give equal bytes.

    Args:
        folder: of the configuration.
        case_id: names the files.
        image: (C, Z, Y, X) float32.
        labels: (Z, Y, X) class indices on the same grid, IGNORE (-1) where ignored.
        preparation: of the image.
        provenance: hashes of the settings and the source files.
        dimensions: of the patches that will be read, 2 or 3; decides how the arrays are cut into blocks.
        precision: of the image on disk; reading gives float32 in any case.

    Returns:
        SHA-256 of the record's file, for the manifest.

    Raises:
        InputError: E0142 ``case_id`` cannot name a file.
        EnvironmentFailure: E0501, E0502 the files cannot be written.
        ValueError: image, labels and preparation do not lie on the same grid.
    """
    with staging(folder) as stage:
        writer = CaseWriter(stage, case_id, preparation, dimensions)
        writer.write_image(pack_image(case_id, image, preparation, dimensions, precision))
        writer.write_labels(labels)
        return writer.commit(provenance)


@dataclass(slots=True)
class Packed:
    """A compressed image (C, Z, Y, X) in memory; it is let go when its bytes are made."""

    array: Any
    channels: int

    def take(self) -> Any:
        """What is packed, once."""
        array, self.array = self.array, None
        return array


def pack_image(
    case_id: str, image: NDArray[np.float32], preparation: Preparation, dimensions: int, precision: StorePrecision
) -> Packed:
    """Compress an image, so that the caller can let it go before it is written. The arguments are ``write_case``'s."""
    _must_fit(image.shape[1:], preparation)
    stored = _rounded(image, case_id) if precision == "float16" else image
    chunks, blocks = _layout(preparation, len(image) * stored.itemsize, dimensions)
    return Packed(pack(stored, (len(image), *chunks), (len(image), *blocks)), len(image))


class CaseWriter:
    """Writes a case's files as soon as what is in them is known: image and labels from two threads, if that helps.

    ``write_image``, ``write_labels``, then ``commit``. They raise as ``write_case`` does.
    """

    def __init__(self, stage: Stage, case_id: str, preparation: Preparation, dimensions: int) -> None:
        check_id(case_id)
        self.preparation = preparation
        self._stage, self._case_id, self._dimensions = stage, case_id, dimensions
        self._hashes: dict[str, str] = {}
        self._checks: dict[str, ArrayChecks] = {}
        self._counts: dict[int, int] = {}
        self._channels = 0

    def write_image(self, image: Packed) -> None:
        """Write what ``pack_image`` returned."""
        self._channels = image.channels
        self._write(IMAGE, packed_bytes(image.take()))

    def write_labels(self, labels: NDArray[np.signedinteger[Any]]) -> None:
        """Write labels (Z, Y, X), int8 where that holds them, and the foreground."""
        _must_fit(labels.shape, self.preparation)
        small = labels.astype(np.int8, copy=False) if labels.max() <= np.iinfo(np.int8).max else labels
        self._counts, locations = sample_foreground(small, self._case_id)
        self._write(LABELS, encode_array(small, *_layout(self.preparation, small.itemsize, self._dimensions)))
        self._write(FOREGROUND, encode_array(locations))

    def commit(self, provenance: Provenance) -> str:
        """Put all in place, a record last that vouches for it; SHA-256 of the record's file."""
        names = [f"{self._case_id}{ending}" for ending in (IMAGE, LABELS, FOREGROUND)]
        record = PreparedCaseRecord(
            id=self._case_id,
            source_sha256=provenance.source_sha256,
            settings_sha256=provenance.settings_sha256,
            preparation=self.preparation,
            channels=self._channels,
            files={name: self._hashes[name] for name in names},
            checks={name: self._checks[name] for name in names},
            foreground_voxels=self._counts,
        )
        content = json_bytes(record.to_json())
        self._stage.write(f"{self._case_id}{CASE}", content)
        self._stage.commit([*names, f"{self._case_id}{CASE}"])
        return hashlib.sha256(content).hexdigest()

    def _write(self, ending: str, content: bytes) -> None:
        name = f"{self._case_id}{ending}"
        self._hashes[name] = hashlib.sha256(content).hexdigest()
        self._checks[name] = checks_of(content)
        self._stage.write(name, content)


def _layout(preparation: Preparation, voxel_bytes: int, dimensions: int) -> tuple[Int3, Int3]:
    return chunk_layout(preparation.target_shape, preparation.target_spacing_mm, voxel_bytes, dimensions)


def _must_fit(shape: tuple[int, ...], preparation: Preparation) -> None:
    if shape != preparation.target_shape:
        raise ValueError(f"image or labels {shape}, preparation {preparation.target_shape}")


def _rounded(image: NDArray[np.float32], case_id: str) -> NDArray[np.float16]:
    """The image in half precision: 11 significant bits, values up to 65 504.

    Raises:
        InputError: E0104 values are too large for it.
    """
    largest = max(abs(float(image.min())), abs(float(image.max())))
    if largest > float(np.finfo(np.float16).max):
        raise InputError(
            Problem("E0104", f"voxels of {largest:.3g}", "at most 65504 in float16", "use --store float32", case_id)
        )
    return image.astype(np.float16)
