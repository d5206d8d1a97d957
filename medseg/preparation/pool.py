"""A pool of processes that takes case after case, survives the death of any, and loses no case's outcome.

Every worker has a pipe and a pulse of its own, so that a death or a standstill is noticed within seconds, costs only
the case that it had, and can name it. Cases start when the memory that they need is left.
"""

from __future__ import annotations

import functools
import itertools
import logging
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnContext, SpawnProcess
from typing import Any, Generic, Self, TypeVar

from medseg.errors import EnvironmentFailure, MedsegError, Problem, ResourceError

logger = logging.getLogger(__name__)

PULSE_S = 0.5
LOOK_S = 1.0  # between two looks at the pulses
STANDSTILL_S = 20.0  # without a pulse: a stopped process; a busy one beats, for its pulse is a thread of its own
START_S = 300.0  # until the first pulse; importing from a network disk takes its time

Job = TypeVar("Job")
Result = TypeVar("Result")


def run_cases(
    function: Callable[[Job], Result],
    jobs: Mapping[str, Job],
    workers: int,
    needs: Mapping[str, int] | None = None,
    memory: int | None = None,
    threads: int = 1,
) -> Iterator[tuple[str, Result | MedsegError]]:
    """Run ``function`` on every job and yield (case id, result or error) as they end.

    A worker that dies or stands still takes no other case with it: its case is tried once more when all others are
    done, alone, then given up with E0601. After an ``EnvironmentFailure`` (disk full, read-only) no further case is
    started.

    Args:
        function: of a module (workers are spawned and import it); what it raises becomes the case's outcome.
        jobs: its argument by case id; jobs and results must pickle.
        workers: processes; 1 runs everything in this process.
        needs: bytes of memory that each case is estimated to take.
        memory: bytes that cases may need together; one that needs more than all of it runs alone.
        threads: cases at a time, if everything runs in this process; they are small then.

    Raises:
        ResourceError: E0601 worker processes cannot be started at all.
    """
    if workers <= 1:
        yield from _in_this_process(function, jobs, threads)
        return
    lost: list[str] = []
    with _Crew(function, workers) as crew:
        for case_id, outcome in _work_off(crew, jobs, _Room(needs or {}, memory)):
            if isinstance(outcome, _Lost):
                logger.warning("case %s: %s; it is tried again alone at the end", case_id, outcome.reason)
                lost.append(case_id)
            else:
                yield case_id, outcome
    for case_id in lost:
        with _Crew(function, 1) as crew:
            for _, outcome in _work_off(crew, {case_id: jobs[case_id]}, _Room({}, None)):
                yield case_id, _given_up(case_id, outcome) if isinstance(outcome, _Lost) else outcome


def _in_this_process(
    function: Callable[[Job], Result], jobs: Mapping[str, Job], threads: int
) -> Iterator[tuple[str, Result | MedsegError]]:
    """One case after the other, in order; with more threads, the next ones are begun before one has ended."""
    if threads <= 1:
        for case_id, job in jobs.items():
            result = _guarded(function, case_id, job)
            yield case_id, result
            if isinstance(result, EnvironmentFailure):
                return
        return
    waiting = iter(jobs.items())
    with ThreadPoolExecutor(threads) as pool:
        begun = {i: pool.submit(_guarded, function, i, job) for i, job in itertools.islice(waiting, threads)}
        while begun:
            case_id, result = next(iter(begun)), begun.pop(next(iter(begun))).result()
            if isinstance(result, EnvironmentFailure):
                waiting = iter(())
            begun |= {i: pool.submit(_guarded, function, i, job) for i, job in itertools.islice(waiting, 1)}
            yield case_id, result


@dataclass(frozen=True, slots=True)
class _Lost:
    """The outcome of a case whose worker died or was killed, and why."""

    reason: str


@dataclass(slots=True)
class _Room:
    """How much memory cases need, and may need together."""

    needs: Mapping[str, int]
    memory: int | None
    taken: dict[str, int] = field(default_factory=dict)

    def holds(self, case_id: str) -> bool:
        """Whether a case can start beside those that run; the first always can."""
        if self.memory is None or not self.taken:
            return True
        return sum(self.taken.values()) + self.needs.get(case_id, 0) <= self.memory

    def take(self, case_id: str) -> None:
        """A case starts."""
        self.taken[case_id] = self.needs.get(case_id, 0)

    def leave(self, case_id: str) -> None:
        """A case ended."""
        del self.taken[case_id]


def _work_off(
    crew: _Crew[Job, Result], jobs: Mapping[str, Job], room: _Room
) -> Iterator[tuple[str, Result | MedsegError | _Lost]]:
    """Give every job to the crew, in order but for those that there is no room for yet; yield as they end."""
    waiting = list(jobs)
    while waiting or room.taken:
        for case_id in list(waiting):
            if not crew.has_hands:
                break
            if room.holds(case_id):
                room.take(case_id)
                crew.start(case_id, jobs[case_id])
                waiting.remove(case_id)
        for case_id, outcome in crew.ended():
            room.leave(case_id)
            if isinstance(outcome, EnvironmentFailure):
                waiting.clear()
            yield case_id, outcome


@dataclass(slots=True)
class _Worker:
    """A process, the pipe to it, its pulse, and the case it has; ``silent_s`` counts the time without a pulse."""

    process: SpawnProcess
    pipe: Connection
    pulse: Any
    case_id: str | None = None
    seen: int = 0
    silent_s: float = 0.0


class _Crew(Generic[Job, Result]):
    """Worker processes: started when they are needed, replaced when they die, gone when the block is left."""

    def __init__(self, function: Callable[[Job], Result], size: int) -> None:
        self._function, self._size = function, size
        self._workers: list[_Worker] = []
        self._context: SpawnContext = multiprocessing.get_context(
            "spawn"
        )  # fork is unsafe beside threads (BLAS, torch)
        self._looked = time.monotonic()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for worker in self._workers:
            worker.pipe.close()  # an idle worker ends at the end of its pipe
            if worker.case_id is not None:
                worker.process.kill()
        for worker in self._workers:
            worker.process.join(5)
            if worker.process.is_alive():
                worker.process.kill()
                worker.process.join()

    @property
    def has_hands(self) -> bool:
        """Whether a case can be started."""
        return len(self._workers) < self._size or any(worker.case_id is None for worker in self._workers)

    def start(self, case_id: str, job: Job) -> None:
        """Give a case to an idle worker, or to a new one."""
        worker = next((worker for worker in self._workers if worker.case_id is None), None) or self._hire()
        worker.case_id = case_id
        try:
            worker.pipe.send((case_id, job))
        except OSError:  # it died while it was idle: told by ``ended``
            logger.debug("worker %s is gone", worker.process.pid)

    def ended(self) -> list[tuple[str, Result | MedsegError | _Lost]]:
        """Outcomes of the cases that ended, waiting for the first at most ``LOOK_S``."""
        busy = [worker for worker in self._workers if worker.case_id is not None]
        wait([handle for worker in busy for handle in (worker.pipe, worker.process.sentinel)], LOOK_S)
        now = time.monotonic()
        # However long this process itself stood still (Ctrl-Z, a laptop that slept), it counts as one look.
        passed, self._looked = min(now - self._looked, 2 * LOOK_S), now
        outcomes = []
        for worker in busy:
            outcome = self._outcome(worker, passed)
            if outcome is not None and worker.case_id is not None:
                outcomes.append((worker.case_id, outcome))
                worker.case_id = None
                if isinstance(outcome, _Lost):
                    worker.pipe.close()
                    self._workers.remove(worker)
        return outcomes

    def _outcome(self, worker: _Worker, passed_s: float) -> Result | MedsegError | _Lost | None:
        """What a busy worker sent, or how it was lost, or None if it is at work."""
        dead = not worker.process.is_alive()  # before the look into the pipe: what was sent before counts
        try:
            if worker.pipe.poll():
                outcome: Result | MedsegError = worker.pipe.recv()
                return outcome
        except (EOFError, OSError):
            dead = True
        if dead:
            worker.process.join(5)
            if worker.pulse.value == 0:  # no case is to blame, and the next worker would end in the same way
                raise _no_start(worker.process.exitcode)
            return _Lost(_how_it_ended(worker.process.exitcode))
        beats = worker.pulse.value
        worker.silent_s = 0.0 if beats != worker.seen else worker.silent_s + passed_s
        worker.seen = beats
        if worker.silent_s < (STANDSTILL_S if beats else START_S):
            return None
        worker.process.kill()
        worker.process.join(5)
        return _Lost(f"its worker process stood still for {worker.silent_s:.0f} s and was ended")

    def _hire(self) -> _Worker:
        here, there = self._context.Pipe()
        pulse = self._context.RawValue("Q", 0)
        process = self._context.Process(target=_serve, args=(there, pulse, self._function), daemon=True)
        process.start()
        there.close()
        worker = _Worker(process, here, pulse)
        self._workers.append(worker)
        return worker


def _serve(pipe: Connection, pulse: Any, function: Callable[[Job], Result]) -> None:
    """A worker's life: a case from the pipe, its outcome into the pipe, until the pipe ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's
    parent = multiprocessing.parent_process()
    if parent is not None:
        watch = functools.partial(_end_after, parent.join)
        threading.Thread(target=watch, name="parent-watch", daemon=True).start()
    threading.Thread(target=_beat, args=(pulse,), name="pulse", daemon=True).start()
    while True:
        try:
            case_id, job = pipe.recv()
        except (EOFError, OSError):
            return
        pipe.send(_guarded(function, case_id, job))


def _beat(pulse: Any) -> None:
    while True:
        pulse.value += 1
        time.sleep(PULSE_S)


def _guarded(function: Callable[[Job], Result], case_id: str, job: Job) -> Result | MedsegError:
    """The job's result, or its error with the case's name in every problem."""
    try:
        return function(job)
    except MedsegError as error:
        return type(error)([replace(p, case=p.case or case_id) for p in error.problems])
    except MemoryError:
        return ResourceError(
            Problem("E0600", "not enough memory for the case", "", "use fewer workers or a larger machine", case_id)
        )
    except (Exception, SystemExit) as error:
        logger.debug("case %s", case_id, exc_info=True)
        measured = f"{type(error).__name__}: {error}"
        return MedsegError(Problem("E7000", measured, "", "report it with the output of --debug", case_id))


def _how_it_ended(code: int | None) -> str:
    if code is None or code >= 0:
        return f"its worker process ended with exit code {code}"
    hint = ", most likely because memory ran out" if -code == 9 else ""
    return f"its worker process was killed by signal {-code}{hint}"


def _no_start(code: int | None) -> ResourceError:
    measured = f"a worker process ended with exit code {code} before it could start"
    action = 'use --workers 1; a script that calls medseg needs its `if __name__ == "__main__":`'
    return ResourceError(Problem("E0601", measured, "", action))


def _given_up(case_id: str, lost: _Lost) -> ResourceError:
    measured = f"{lost.reason}, and this was when it had the machine to itself"
    return ResourceError(Problem("E0601", measured, "", "use a larger machine, or leave the case out", case_id))


def _end_after(parent_ends: Callable[[], None]) -> None:
    parent_ends()
    os._exit(1)  # a killed parent cannot tell its workers, which would wait for work for ever
