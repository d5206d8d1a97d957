"""Case and Dataset: which files belong together. In memory only; paths never enter plans or models."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from medseg.records.task import Task


@dataclass(frozen=True, slots=True)
class Case:
    """One subject: an image file per channel in the order of ``Task.channels``, and its label file if there is one.

    A file that holds several channels (an RGB picture, a 4D NIfTI) stands once for each of them; None stands for a
    channel that the data set declares missing for this case. A path may be a folder with a DICOM series. Cases of one
    ``group`` (a patient, for instance) belong on the same side of every split.
    """

    id: str
    images: tuple[Path | None, ...]
    label: Path | None = None
    group: str | None = None

    @property
    def files(self) -> tuple[Path, ...]:
        """The image files, each once, in the order of the channels; at least one."""
        return tuple(dict.fromkeys(path for path in self.images if path is not None))


@dataclass(frozen=True, slots=True)
class Dataset:
    """A task with its training cases, sorted by id, and the folder or list file they were read from."""

    root: Path
    layout: str
    task: Task
    cases: tuple[Case, ...]
    file_ending: str
