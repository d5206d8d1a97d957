"""A pool of processes that takes case after case, survives the death of any, and loses no case's outcome."""

from __future__ import annotations

import functools
import logging
import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import replace
from typing import TypeVar

from medseg.errors import EnvironmentFailure, MedsegError, Problem, ResourceError

logger = logging.getLogger(__name__)

Job = TypeVar("Job")
Result = TypeVar("Result")


def run_cases(
    function: Callable[[Job], Result], jobs: Mapping[str, Job], workers: int
) -> Iterator[tuple[str, Result | MedsegError]]:
    """Run ``function`` on every job and yield (case id, result or error) as they end.

    A worker that is killed takes no other case with it: the cases that were running are tried once more, each alone,
    then given up with E0601. After an ``EnvironmentFailure`` (disk full, read-only) no further case is started.

    Args:
        function: of a module (workers are spawned and import it); what it raises becomes the case's outcome.
        jobs: its argument by case id; jobs and results must pickle.
        workers: processes; 1 runs everything in this process.
    """
    if workers <= 1:
        for case_id, job in jobs.items():
            outcome = _guarded(function, case_id, job)
            yield case_id, outcome
            if isinstance(outcome, EnvironmentFailure):
                return
        return
    waiting = deque(jobs)
    suspects: list[str] = []
    while waiting:
        for case_id, outcome in _until_broken(function, jobs, waiting, suspects, workers):
            yield case_id, outcome
    for case_id in suspects:
        logger.warning("case %s: a worker was killed, trying it again alone", case_id)
        again: list[str] = []
        yield from _until_broken(function, jobs, deque([case_id]), again, 1)
        if again:
            yield case_id, _killed(case_id)


def _until_broken(
    function: Callable[[Job], Result],
    jobs: Mapping[str, Job],
    waiting: deque[str],
    suspects: list[str],
    workers: int,
) -> Iterator[tuple[str, Result | MedsegError]]:
    """One pool's life: take cases from ``waiting`` until none is left, or until a worker dies.

    No more cases are in flight than there are workers, so those in flight at a death are the only ``suspects``.
    """
    running: dict[Future[Result | MedsegError], str] = {}
    context = multiprocessing.get_context("spawn")  # fork is unsafe beside threads (BLAS, torch)
    with ProcessPoolExecutor(workers, mp_context=context, initializer=_begin_worker) as pool:
        try:
            while waiting or running:
                while waiting and len(running) < workers:
                    case_id = waiting[0]
                    running[pool.submit(_guarded, function, case_id, jobs[case_id])] = case_id
                    waiting.popleft()
                for future in wait(running, return_when=FIRST_COMPLETED).done:
                    outcome = future.result()
                    case_id = running.pop(future)
                    if isinstance(outcome, EnvironmentFailure):
                        waiting.clear()
                    yield case_id, outcome
        except BrokenProcessPool:
            suspects.extend(running.values())
        except BaseException:
            pool.shutdown(wait=True, cancel_futures=True)
            raise


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


def _killed(case_id: str) -> ResourceError:
    return ResourceError(
        Problem(
            "E0601",
            "the worker process was killed, and again when the case had the machine to itself",
            "",
            "most likely memory ran out: use a larger machine",
            case_id,
        )
    )


def _begin_worker() -> None:
    """In a new worker: leave Ctrl-C to the parent, and end when the parent is gone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    if parent is not None:
        watch = functools.partial(_end_after, parent.join)
        threading.Thread(target=watch, name="parent-watch", daemon=True).start()


def _end_after(parent_ends: Callable[[], None]) -> None:
    parent_ends()
    os._exit(1)  # a killed parent cannot tell its workers, which would wait for work for ever
