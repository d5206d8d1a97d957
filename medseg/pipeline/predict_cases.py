"""Stream of cases: while one is segmented, the next is read and prepared, and the last one written."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

from medseg.errors import EnvironmentFailure, Problem, Stopped
from medseg.inference.need import PROCESS_BYTES
from medseg.pipeline.predict_case import (
    Job,
    ReadCase,
    failed,
    problems_of,
    read_case,
    segment_case,
    write_case,
)
from medseg.pipeline.room import GB, NoRoomYetError
from medseg.progress import Progress
from medseg.records.case import Case
from medseg.records.run import CaseOutcome

ENGINE_BYTES = 250 * 2**20  # OpenVINO, and what converting and compiling leave, measured


class CaseStream:
    """All cases of a command, in order; ``before`` are the outcomes of an earlier command in the same folder."""

    def __init__(self, job: Job, before: Mapping[str, CaseOutcome], progress: Progress) -> None:
        self.job, self.before, self.progress = job, before, progress
        self.writing: deque[Future[CaseOutcome]] = deque()
        self.told_bytes = 0
        self.told_time = False

    def predict(self, cases: Sequence[Case], stop_signal: Callable[[], int | None]) -> Iterator[CaseOutcome]:
        """Outcomes in order.

        Raises:
            EnvironmentFailure: E0501, E0502 the output cannot be written.
            Stopped: by ``stop_signal``, asked before every case.
        """
        with ThreadPoolExecutor(1, "medseg-read") as reader, ThreadPoolExecutor(1, "medseg-write") as writer:
            ahead = reader.submit(self._read, cases[0])
            for index, case in enumerate(cases):
                current = ahead
                if index + 1 < len(cases):
                    current.exception()  # one case is prepared at a time, so that three are in memory, not four
                    ahead = reader.submit(self._read, cases[index + 1])
                if (signal_number := stop_signal()) is not None:
                    ahead.cancel()
                    yield from self._written(0)
                    stopped = Problem("E1300", f"stopped after {index} cases", "", "the same command goes on here")
                    raise Stopped(stopped, signal_number)
                try:
                    read = current.result()
                    if isinstance(read, NoRoomYetError):
                        yield from self._written(0)
                        if index + 1 < len(cases):
                            ahead.exception()
                        read = read_case(case, self.job, self.before.get(case.id), alone=True)
                    if isinstance(read, CaseOutcome):
                        yield from self._written(0)
                        yield read
                        continue
                    self._tell_need(read)
                    segmented = segment_case(read, self.job)
                    self._tell_time(read, time.monotonic() - segmented.begun)
                except EnvironmentFailure:
                    raise
                except Exception as error:
                    yield from self._written(0)
                    yield failed(case.id, problems_of(error, case.id))
                    continue
                del read, current
                yield from self._written(0)
                self.writing.append(writer.submit(write_case, segmented, self.job))
                del segmented
            yield from self._written(0)

    def _read(self, case: Case) -> CaseOutcome | ReadCase | NoRoomYetError:
        """Read ahead; a case that has no room beside others comes back as such, to be read again alone."""
        try:
            return read_case(case, self.job, self.before.get(case.id), alone=False)
        except NoRoomYetError as error:
            return error

    def _written(self, waiting: int) -> Iterator[CaseOutcome]:
        """Outcomes of the cases that are being written, but for the last ``waiting``."""
        while len(self.writing) > waiting:
            yield self.writing.popleft().result()

    def _tell_need(self, read: ReadCase) -> None:
        """Say what a case takes, when it is more than was said before."""
        needed = read.need.together_bytes
        if needed > 1.05 * self.told_bytes:
            self.told_bytes = needed
            tested = any(stage.backend.tested for stage in self.job.model.stages)
            process = PROCESS_BYTES + (ENGINE_BYTES if tested else 0)
            memory = f"up to {(process + needed) / GB:.1f} GB of memory"
            self.progress.say(f"{read.case.id}: {read.need.in_words}, {memory}")

    def _tell_time(self, read: ReadCase, seconds: float) -> None:
        """Say what a tile takes, once it was measured."""
        each = seconds / max(1, read.need.tiles)
        if not self.told_time:
            self.told_time = True
            self.progress.say(f"{read.case.id}: {seconds:.1f} s, {each:.2f} s for each tile with all its passes")
