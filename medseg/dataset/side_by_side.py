"""Side by side: a function run on many cases in threads, as many as memory holds at a time."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from typing import TypeVar

from medseg.machine import free_memory_bytes, usable_cores
from medseg.records.case import Case

Result = TypeVar("Result")

MAX_WORKERS = 16
BYTES_PER_FILE_BYTE = {True: 8, False: 3}  # compressed or not: voxels, a mask and what is computed of them
_COMPRESSED = (".gz", ".mgz", ".png", ".jpg", ".jpeg", ".nrrd", ".mha")


def side_by_side(
    function: Callable[[Case], Result], cases: Sequence[Case], workers: int | None = None
) -> Iterator[tuple[Case, Result]]:
    """Run ``function`` on every case and yield (case, result) as they end; what it raises is raised here.

    Threads: reading is decompression and numpy, which release Python's lock. By the sizes of their files, no more
    cases run at a time than half of the free memory holds; one always does. Ctrl-C, or closing the generator, waits
    for the cases that are running and starts no more.

    Args:
        function: called in a thread.
        cases: taken in this order.
        workers: threads; None for one per core, at most 16.
    """
    workers = workers or min(usable_cores(), MAX_WORKERS)
    waiting, running = deque(cases), dict[Future[Result], tuple[Case, int]]()
    budget = free_memory_bytes() // 2
    executor = ThreadPoolExecutor(workers, thread_name_prefix="cases")
    try:
        while waiting or running:
            while waiting and len(running) < workers:
                need = bytes_needed(waiting[0])
                if running and sum(taken for _, taken in running.values()) + need > budget:
                    break
                case = waiting.popleft()
                running[executor.submit(function, case)] = case, need
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                case, _ = running.pop(future)
                yield case, future.result()
    finally:
        executor.shutdown(cancel_futures=True)


def bytes_needed(case: Case) -> int:
    """An estimate: the largest of its files in memory, one at a time. Nothing is opened for it."""
    sizes = [0]
    for path in (*case.files, *([case.label] if case.label else [])):
        try:
            parts = path.iterdir() if path.is_dir() else [path]
            size = sum(part.stat().st_size for part in parts)
        except OSError:  # reading says what is wrong
            continue
        sizes.append(size * BYTES_PER_FILE_BYTE[path.suffix.lower() in _COMPRESSED])
    return max(sizes)
