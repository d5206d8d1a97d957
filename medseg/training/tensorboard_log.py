"""TensorBoard log: a journal as one event file, which ``tensorboard --logdir`` shows."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from medseg.training.journal import Line
from medseg.training.scalars import scalars

FLUSH_EVERY_S = 10.0


class TensorBoard:
    """An observer that writes ``FOLDER/events.out.tfevents.*``.

    When a training goes on, the file is made anew from the journal, and the one before is emptied: there is never a
    step twice, nor one that was lost. An entry tells a TensorBoard that is looking to forget what it has seen.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.records: Any = None
        self.zero = self.flushed = 0.0

    def begin(self, lines: Sequence[Line]) -> None:
        """Start a file with the lines that there are."""
        from tensorboard.compat.proto.event_pb2 import Event, SessionLog
        from tensorboard.summary.writer.record_writer import RecordWriter

        self.folder.mkdir(parents=True, exist_ok=True)
        before = sorted(self.folder.glob("events.out.tfevents.*"))
        now = time.time()
        # The name sorts behind those before it, and TensorBoard wants "tfevents" in it.
        self.records = RecordWriter((self.folder / f"events.out.tfevents.{now:020.6f}.medseg").open("xb"))
        self.zero = now - (lines[-1].seconds if lines else 0.0)
        self._add(Event(wall_time=self.zero, file_version="brain.Event:2"))
        self._add(Event(wall_time=self.zero, step=0, session_log=SessionLog(status=SessionLog.START)))
        for line in lines:
            self.write(line)
        self.sync()
        for path in before:  # a TensorBoard that reads the newest of them would not get over its disappearing
            if path == before[-1]:
                os.truncate(path, 0)
            else:
                path.unlink()

    def write(self, line: Line) -> None:
        """One event with the line's numbers; its time is that of the training."""
        from tensorboard.compat.proto.event_pb2 import Event
        from tensorboard.compat.proto.summary_pb2 import Summary

        values = [Summary.Value(tag=name, simple_value=value) for name, value in scalars(line).items()]
        self._add(Event(wall_time=self.zero + line.seconds, step=line.step, summary=Summary(value=values)))
        if time.monotonic() - self.flushed > FLUSH_EVERY_S:
            self.sync()

    def sync(self) -> None:
        """Hand what was written to the system."""
        self.records.flush()
        self.flushed = time.monotonic()

    def close(self, *, finished: bool) -> None:
        """Close the file."""
        self.records.close()

    def _add(self, event: Any) -> None:
        self.records.write(event.SerializeToString())
