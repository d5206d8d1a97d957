"""The store: the prepared cases of one configuration on disk, each vouched for by hashes, listed by a manifest.

Per case there are ``<id>.image.b2nd`` (C, Z, Y, X) float32 or float16, ``<id>.labels.b2nd`` (Z, Y, X) class indices,
``<id>.foreground.b2nd`` locations of each class, and ``<id>.case.json``, a ``PreparedCaseRecord`` that is committed
last. ``manifest.json`` is the only list of cases: what it does not name does not exist. What is read is verified.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from medseg.artefacts import Stage, json_bytes, sha256_of, staging
from medseg.errors import IncompatibleError, InputError, IntegrityError, MedsegError, Problem
from medseg.preparation.arrays import (
    Array,
    CheckedArray,
    checks_of,
    chunk_layout,
    damaged,
    encode_array,
    pack,
    packed_bytes,
)
from medseg.preparation.foreground import Locations, sample_foreground, split_foreground
from medseg.progress import SILENT, Progress
from medseg.records.base import read_record
from medseg.records.grid import Int3
from medseg.records.preparation import ArrayChecks, Preparation, PreparedCaseRecord, StoreManifest, StorePrecision

MANIFEST = "manifest.json"
IMAGE, LABELS, FOREGROUND, CASE = ".image.b2nd", ".labels.b2nd", ".foreground.b2nd", ".case.json"

_SAFE_ID = re.compile(r"[^\s./\\:\x00-\x1f][^/\\:\x00-\x1f]{0,199}")


@dataclass(frozen=True, slots=True)
class Provenance:
    """What a prepared case was made from: the hash of the settings, and of each source file's bytes."""

    settings_sha256: str
    source_sha256: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class PreviousLabels:
    """Where a previous stage's labels of a case lie, the hash of the weights that predicted them, and checksums."""

    path: Path
    weights_sha256: str
    checks: ArrayChecks


class StoredCase:
    """One prepared case, which threads can share. What is read from disk is verified when it is first read.

    ``image`` is (C, Z, Y, X) float32, ``labels`` (Z, Y, X) int8 or int16 class indices with -1 where ignored; both are
    sliced like numpy arrays. ``foreground`` maps class index to linear indices (C order) of its drawn voxels.
    ``previous``, of a cascade's second stage only, are the (Z, Y, X) class indices that the first stage predicted.
    Reading raises ``IntegrityError`` (E0701) where a file is missing or has changed; the case and the chunk are named.
    """

    def __init__(self, folder: Path, record: PreparedCaseRecord, previous: PreviousLabels | None = None) -> None:
        self.record = record
        self._previous = previous
        self._folder = folder
        self._in_memory: tuple[NDArray[np.float32], NDArray[Any], NDArray[Any] | None] | None = None
        self._foreground: dict[int, Locations] | None = None
        self._opened: dict[str, Array] = {}

    @property
    def image(self) -> Array:
        """(C, Z, Y, X) float32."""
        return self._in_memory[0] if self._in_memory else self._open(IMAGE)

    @property
    def labels(self) -> Array:
        """(Z, Y, X) class indices."""
        return self._in_memory[1] if self._in_memory else self._open(LABELS)

    @property
    def foreground(self) -> dict[int, Locations]:
        """Drawn locations by class; ANNOTATED (-1) if some voxels are ignored. Read once, then kept."""
        if self._foreground is None:
            self._foreground = split_foreground(self.record.foreground_voxels, self._open(FOREGROUND)[:])
        return self._foreground

    @property
    def previous(self) -> Array | None:
        """(Z, Y, X) class indices that a previous stage predicted, or None."""
        if self._previous is None:
            return None
        return self._in_memory[2] if self._in_memory else self._open_previous(self._previous)

    @property
    def provenance(self) -> tuple[str, ...]:
        """The id, and hashes of all that the case was made from."""
        before = () if self._previous is None else (self._previous.weights_sha256,)
        return (self.record.id, self.record.settings_sha256, *self.record.source_sha256, *before)

    @property
    def nbytes(self) -> int:
        """Memory that ``load`` takes for image and labels."""
        arrays = (self.image, self.labels, self.previous)
        return sum(_nbytes(array.shape, array.dtype) for array in arrays if array is not None)

    def after(self, previous: PreviousLabels) -> StoredCase:
        """The same case with the labels of a previous stage."""
        return StoredCase(self._folder, self.record, previous)

    def load(self) -> StoredCase:
        """The same case with image and labels as numpy arrays in memory."""
        loaded, previous = StoredCase(self._folder, self.record, self._previous), self.previous
        before = None if previous is None else np.asarray(previous[:])
        loaded._in_memory = (np.asarray(self.image[:]), np.asarray(self.labels[:]), before)
        loaded._foreground = self.foreground
        return loaded

    def _open(self, ending: str) -> Array:
        if ending not in self._opened:
            name = f"{self.record.id}{ending}"
            if name not in self.record.checks:
                raise IntegrityError(damaged(name, self.record.id, "not in the record"))
            self._opened[ending] = CheckedArray(self._folder / name, self.record.checks[name], self.record.id)
        return self._opened[ending]

    def _open_previous(self, previous: PreviousLabels) -> Array:
        name = str(previous.path)
        if name not in self._opened:
            self._opened[name] = CheckedArray(previous.path, previous.checks, self.record.id)
        return self._opened[name]


@dataclass(frozen=True, slots=True)
class Store:
    """A complete prepared data set: its folder and its manifest."""

    folder: Path
    manifest: StoreManifest

    @property
    def cases(self) -> tuple[str, ...]:
        """Case ids, sorted."""
        return tuple(sorted(self.manifest.cases))

    def case(self, case_id: str) -> StoredCase:
        """One case by its id.

        Raises:
            IncompatibleError: E0802 the manifest does not name it.
            IntegrityError: E0701 its record is not the one the manifest vouches for, or a file is missing or cut.
        """
        if case_id not in self.manifest.cases:
            raise IncompatibleError(
                Problem("E0802", f"case {case_id!r} is not in the prepared data set", "", "run preprocess again")
            )
        path = self.folder / f"{case_id}{CASE}"
        try:
            content = path.read_bytes()
        except OSError as error:
            raise IntegrityError(damaged(path.name, case_id, error.strerror or "")) from error
        if hashlib.sha256(content).hexdigest() != self.manifest.cases[case_id]:
            raise IntegrityError(damaged(path.name, case_id, "another content than the manifest says"))
        record = read_record(path, PreparedCaseRecord)
        problems = _missing_or_cut(self.folder, record)
        if problems:
            raise IntegrityError(problems)
        return StoredCase(self.folder, record)


def open_store(folder: Path) -> Store:
    """Open a prepared data set by its manifest; nothing else is read.

    Raises:
        IncompatibleError: E0801 there is no manifest: preprocessing did not run, or did not finish.
        IntegrityError: E0711 the manifest does not follow its schema.
    """
    path = Path(folder) / MANIFEST
    if not path.is_file():
        raise IncompatibleError(
            Problem("E0801", f"prepared data set in {folder} is incomplete: no {MANIFEST}", "", "run preprocess")
        )
    return Store(Path(folder), read_record(path, StoreManifest))


def verify(store: Store, progress: Progress = SILENT) -> tuple[Problem, ...]:
    """Hash every file of the store again: an E0701 for each that is missing or not as it was written."""
    problems: list[Problem] = []
    progress.begin("verify", len(store.cases), "cases")
    for done, case_id in enumerate(store.cases, start=1):
        try:
            problems += _damaged_files(store.folder, store.case(case_id).record)
        except MedsegError as error:
            problems += error.problems
        progress.update(done, case_id)
    progress.end()
    return tuple(problems)


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


def finished(folder: Path, case_id: str, provenance: Provenance) -> str | None:
    """SHA-256 of the case's record if the case was made from the same sources and settings and is undamaged."""
    record = read_case_record(folder, case_id)
    if record is None or Provenance(record.settings_sha256, record.source_sha256) != provenance:
        return None
    if _damaged_files(Path(folder), record):
        return None
    return sha256_of(Path(folder) / f"{case_id}{CASE}")


def read_case_record(folder: Path, case_id: str) -> PreparedCaseRecord | None:
    """The record of a case, or None if there is none that can be read."""
    try:
        record = read_record(Path(folder) / f"{case_id}{CASE}", PreparedCaseRecord)
    except MedsegError:
        return None
    return record if record.id == case_id else None


def case_files(folder: Path) -> dict[str, str]:
    """Case id by name of every file in ``folder`` that is called like a file of a case."""
    names = [path.name for path in Path(folder).iterdir()]
    endings = (IMAGE, LABELS, FOREGROUND, CASE)
    return {name: name.removesuffix(end) for name in names for end in endings if name.endswith(end)}


def check_id(case_id: str) -> None:
    """Refuse an id that cannot name files in one folder.

    Raises:
        InputError: E0142.
    """
    if not _SAFE_ID.fullmatch(case_id):
        raise InputError(
            Problem("E0142", f"case id {case_id!r} cannot name a file", "", "rename the case's files", case_id)
        )


def _damaged_files(folder: Path, record: PreparedCaseRecord) -> list[Problem]:
    expected = {f"{record.id}{ending}" for ending in (IMAGE, LABELS, FOREGROUND)}
    problems = [damaged(name, record.id, "not in the record") for name in sorted(expected - record.files.keys())]
    for name, digest in record.files.items():
        if name not in expected:
            problems.append(damaged(name, record.id, "not a file of the case"))
            continue
        try:
            if sha256_of(folder / name) != digest:
                problems.append(damaged(name, record.id, "other bytes than were written"))
        except OSError as error:
            problems.append(damaged(name, record.id, error.strerror or "cannot be read"))
    return problems


def _missing_or_cut(folder: Path, record: PreparedCaseRecord) -> list[Problem]:
    """A look at names and sizes, cheap enough to be taken at every start."""
    problems = []
    for name, checks in record.checks.items():
        try:
            size = (folder / name).stat().st_size
        except OSError as error:
            problems.append(damaged(name, record.id, error.strerror or "cannot be read"))
            continue
        if size != checks.file_bytes:
            problems.append(damaged(name, record.id, f"{size} bytes instead of {checks.file_bytes}"))
    return problems


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


def _nbytes(shape: Sequence[int], dtype: np.dtype[Any]) -> int:
    return int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
