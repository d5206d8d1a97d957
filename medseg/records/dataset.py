"""DatasetReference: which data set a run was planned for, and which of its cases."""

from __future__ import annotations

from pydantic import Field

from medseg.records.base import Record
from medseg.records.task import Task


class DatasetReference(Record):
    """The only place in a run that holds a path: the data set's folder, as absolute path on this machine."""

    schema_version: int = Field(default=1, ge=1, le=1)
    root: str
    task: Task
    cases: tuple[str, ...] = Field(min_length=1)
