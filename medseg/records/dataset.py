"""DatasetReference: which data set a run was planned for, and which of its cases."""

from __future__ import annotations

from pydantic import Field

from medseg.records.base import Record
from medseg.records.task import Task


class DatasetReference(Record):
    """The only place in a run that holds paths: the data set's folder or list file.

    ``root`` is absolute; ``relative_root``, seen from the run folder, is tried where ``root`` is not there: run and
    data may have been moved together.
    """

    schema_version: int = Field(default=1, ge=1, le=1)
    root: str
    relative_root: str | None = None
    task: Task
    cases: tuple[str, ...] = Field(min_length=1)
