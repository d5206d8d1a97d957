"""Side by side: a function run on many cases in threads, as many as memory holds at a time."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from typing import TypeVar

from medseg.imaging.dicom import split_path
from medseg.machine import free_memory_bytes, usable_cores
from medseg.records.case import Case

Result = TypeVar("Result")

MAX_WORKERS = 16
BYTES_PER_FILE_BYTE = {True: 8, False: 3}  # compressed or not: voxels, a mask and what is computed of them
COPIES = 3  # measuring real cases took up to 23 bytes per byte of their compressed files
_COMPRESSED = (".gz", ".mgz", ".png", ".jpg", ".jpeg", ".nrrd", ".mha")


def side_by_side(
    function: Callable[[Case], Result],
    cases: Sequence[Case],
    workers: int | None = None,
    need: Callable[[Case], int] | None = None,
) -> Iterator[tuple[Case, Result]]:
    """Run ``function`` on every case and yield (case, result) as they end; what it raises is raised here.

    Threads: reading is decompression and numpy, which release Python's lock. By the sizes of their files, no more
    cases run at a time than half of the free memory holds; one always does. Ctrl-C, or closing the generator, waits
    for the cases that are running and starts no more.

    Args:
        function: called in a thread.
        cases: taken in this order.
        workers: threads; None for one per core, at most 16.
        need: memory that a case takes, in bytes; by default ``bytes_of_largest``.
    """
    need = need or bytes_of_largest
    workers = workers or min(usable_cores(), MAX_WORKERS)
    waiting, running = deque(cases), dict[Future[Result], tuple[Case, int]]()
    budget = free_memory_bytes() // 2
    executor = ThreadPoolExecutor(workers, thread_name_prefix="cases")
    try:
        while waiting or running:
            while waiting and len(running) < workers:
                needed = need(waiting[0])
                if running and sum(taken for _, taken in running.values()) + needed > budget:
                    break
                case = waiting.popleft()
                running[executor.submit(function, case)] = case, needed
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                case, _ = running.pop(future)
                yield case, future.result()
    finally:
        executor.shutdown(cancel_futures=True)


def bytes_of_largest(case: Case) -> int:
    """An estimate: the largest of its files in memory, one at a time. Nothing is opened for it."""
    return max(_file_bytes(case), default=0)


def bytes_of_all(case: Case) -> int:
    """An estimate: all its files in memory at once, with copies. Nothing is opened for it."""
    return COPIES * sum(_file_bytes(case))


def _file_bytes(case: Case) -> Iterator[int]:
    for named in (*case.files, *([case.label] if case.label else [])):
        path, _ = split_path(named)
        try:
            parts = path.iterdir() if path.is_dir() else [path]
            size = sum(part.stat().st_size for part in parts)
        except OSError:  # reading says what is wrong
            continue
        yield size * BYTES_PER_FILE_BYTE[path.suffix.lower() in _COMPRESSED]
