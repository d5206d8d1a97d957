"""Beats: how the processes of a training notice that one of them is gone.

A process that dies closes its connections, which the others notice at once; one that stands still, or whose machine
is gone, no longer sends the heartbeat that the others look for while they wait.
"""

from __future__ import annotations

import contextlib
import threading
import time
from typing import Any

from medseg.errors import Problem, ResourceError

BEAT_S = 2.0  # between two heartbeats
SILENCE_S = 60.0  # without a heartbeat: the process is gone


class Beats:
    """Heartbeats: a thread counts up this process's, and ``look`` tells whether those of the others still rise."""

    def __init__(self, store: Any, rank: int, size: int) -> None:
        self.store, self.rank, self.size = store, rank, size
        self.seen: dict[int, tuple[bytes, float]] = {}
        self.over = threading.Event()
        self.lock = threading.Lock()
        self._beat(0)
        self.thread = threading.Thread(target=self._run, name="medseg-heartbeat", daemon=True)
        self.thread.start()

    def look(self) -> None:
        """Raise if a process has been silent for long.

        Raises:
            ResourceError: E0602.
        """
        now = time.monotonic()
        for other in range(self.size):
            if other == self.rank:
                continue
            count = self._count(other)
            before, since = self.seen.get(other, (None, now))
            if count != before:
                self.seen[other] = count, now
            elif now - since > SILENCE_S:
                raise gone(f"process {other} of this training has not been heard of for {now - since:.0f} s")

    def stop(self) -> None:
        """End the thread."""
        self.over.set()
        self.thread.join(timeout=BEAT_S)

    def _run(self) -> None:
        count = 0
        while not self.over.wait(BEAT_S):
            count += 1
            with contextlib.suppress(RuntimeError):  # the meeting point is gone: the others notice by themselves
                self._beat(count)

    def _beat(self, count: int) -> None:
        with self.lock:
            self.store.set(f"beat/{self.rank}", str(count))

    def _count(self, other: int) -> bytes:
        """The last heartbeat of a process; b"" if there was none yet, or nobody can be asked."""
        key = f"beat/{other}"
        try:
            with self.lock:
                return bytes(self.store.get(key)) if self.store.check([key]) else b""
        except RuntimeError:
            return b""


def gone(what: str) -> ResourceError:
    """The error for a process that is no longer there, or never came."""
    action = "see what it said last; the same command goes on from the last checkpoint"
    return ResourceError(Problem("E0602", what, "", action))
