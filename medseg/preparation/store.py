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

from medseg.artefacts import sha256_of
from medseg.errors import IncompatibleError, InputError, IntegrityError, MedsegError, Problem
from medseg.preparation.arrays import Array, CheckedArray, damaged
from medseg.preparation.foreground import Components, Locations, locate_components, split_foreground
from medseg.progress import SILENT, Progress
from medseg.records.base import read_record
from medseg.records.preparation import ArrayChecks, PreparedCaseRecord, StoreManifest

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
        self._components: dict[int, Components] | None = None
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
    def components(self) -> dict[int, Components]:
        """Locations of each component of each class, found in the labels when they are first asked for, then kept."""
        if self._components is None:
            self._components = locate_components(np.asarray(self.labels[:]), self.record.id)
        return self._components

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


def _nbytes(shape: Sequence[int], dtype: np.dtype[Any]) -> int:
    return int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
