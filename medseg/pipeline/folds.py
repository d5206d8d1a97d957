"""Folds: several folds of a configuration trained in turn in this process, or side by side in one process each."""

from __future__ import annotations

import contextlib
import logging
import os
import subprocess
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from queue import Empty, SimpleQueue

from medseg.errors import MedsegError, Problem, Stopped
from medseg.machine import usable_cores
from medseg.pipeline.run_folder import RunFolder, check_fold, every_fold
from medseg.pipeline.train import TrainOptions, train_run
from medseg.progress import SILENT, Progress, never
from medseg.records.base import read_record
from medseg.records.model import CARD, ModelCard

log = logging.getLogger(__name__)

LOOK_S = 0.1  # between two looks at the processes
LAST_LINES_S = 5.0  # for the rest of what an ended process said


@dataclass(frozen=True, slots=True)
class SideBySide:
    """Where folds are trained at the same time, one on each of ``devices``, and the command that trains one there.

    ``command`` (configuration, fold, device) is a command line that ends with medseg's exit codes.
    """

    devices: tuple[str, ...]
    command: Callable[[str, str, str], Sequence[str]]


@dataclass(frozen=True, slots=True)
class FoldsResult:
    """The trained folds, and the exit codes of those that failed."""

    cards: tuple[ModelCard, ...] = ()
    failed: dict[str, int] = field(default_factory=dict)

    @property
    def exit_code(self) -> int:
        """0, or the worst of the failed folds."""
        return max(self.failed.values(), default=0)


def train_folds(
    run: Path,
    configuration: str,
    folds: Sequence[str] | None,
    options: TrainOptions | None = None,
    side_by_side: SideBySide | None = None,
    progress: Progress = SILENT,
    stop_signal: Callable[[], int | None] = never,
) -> FoldsResult:
    """Train several folds; one that fails does not stop the others, its problems are logged.

    Args:
        run: a run folder with a plan and the prepared configuration.
        configuration: for instance ``3d_fullres``.
        folds: their names; None: every fold of the splits.
        options: of each fold's training, in this process.
        side_by_side: train in processes instead; ``options`` are then those of its command.
        progress: told of steps and validations, of processes what they say, after the name of the fold.
        stop_signal: asked after every step; a signal number stops all trainings with a checkpoint.

    Raises:
        UsageError: E0001 no such fold; nothing was trained.
        Stopped: by ``stop_signal``.
    """
    folder = RunFolder(run)
    splits = folder.read_splits()
    names = tuple(dict.fromkeys(every_fold(splits) if folds is None else folds))
    for name in names:
        check_fold(name, splits)
    if side_by_side is None:
        return _in_turn(run, configuration, names, options, progress, stop_signal)
    failed = _side_by_side(configuration, names, side_by_side, progress, stop_signal)
    finished = [name for name in names if name not in failed]
    return FoldsResult(tuple(read_record(folder.fold(configuration, n) / CARD, ModelCard) for n in finished), failed)


def _in_turn(
    run: Path,
    configuration: str,
    names: Sequence[str],
    options: TrainOptions | None,
    progress: Progress,
    stop_signal: Callable[[], int | None],
) -> FoldsResult:
    cards, failed = [], {}
    for name in names:
        if len(names) > 1:
            progress.say(f"fold {name}")
        try:
            cards.append(train_run(run, configuration, name, options, progress, stop_signal))
        except Stopped:
            raise
        except MedsegError as error:
            if len(names) == 1:
                raise
            failed[name] = error.exit_code
            for problem in error.problems:
                log.error("%s", replace(problem, measured=f"fold {name}: {problem.measured}"))
    return FoldsResult(tuple(cards), failed)


def _side_by_side(
    configuration: str,
    names: Sequence[str],
    side_by_side: SideBySide,
    progress: Progress,
    stop_signal: Callable[[], int | None],
) -> dict[str, int]:
    """Exit codes of the folds that failed; each device trains the next fold when it is free."""
    waiting, free = deque(names), list(enumerate(side_by_side.devices[: len(names)]))
    shares = len(free)
    running: list[_Training] = []
    said: SimpleQueue[str] = SimpleQueue()
    failed: dict[str, int] = {}
    stop: int | None = None
    try:
        while running or (waiting and stop is None):
            if stop is None and (stop := stop_signal()) is not None:
                progress.say(f"stopping {len(running)} folds")
                for training in running:
                    training.process.send_signal(stop)
            while waiting and free and stop is None:
                name, (number, device) = waiting.popleft(), free.pop(0)
                progress.say(f"fold {name}: on {device}")
                command = side_by_side.command(configuration, name, device)
                running.append(_Training(name, (number, device), command, _share_of_cores(number, shares), said))
            _pass_on(said, progress)
            for training in [one for one in running if one.process.poll() is not None]:
                running.remove(training)
                free.append(training.slot)
                if (code := training.end()) != 0:
                    failed[training.fold] = code
                    if stop is None:
                        log.error("fold %s failed with exit code %d", training.fold, code)
    finally:
        for training in running:  # an error of ours, or a second Ctrl-C: checkpoints bear it
            training.process.kill()
            training.end()
        _pass_on(said, progress, wait_s=0)
    if stop is not None:
        raise Stopped(Problem("E1300", "stopped while training folds", "", "the same command goes on here"), stop)
    return failed


class _Training:
    """A process that trains a fold; what it says goes to a queue, line by line, after the name of the fold."""

    def __init__(
        self, fold: str, slot: tuple[int, str], command: Sequence[str], cores: set[int] | None, said: SimpleQueue[str]
    ) -> None:
        self.fold, self.slot, self.said = fold, slot, said
        # in a session of its own: Ctrl-C comes from here, once, and not from the terminal too
        self.process = subprocess.Popen(  # noqa: S603
            list(command),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            encoding="utf-8",
            errors="replace",
            start_new_session=True,
        )
        if cores is not None:
            with contextlib.suppress(OSError):  # it has ended already
                os.sched_setaffinity(self.process.pid, cores)
        self.reader = threading.Thread(target=self._read, name=f"medseg-fold-{fold}", daemon=True)
        self.reader.start()

    def end(self) -> int:
        """Wait for the end; the exit code, as shells report it."""
        code = self.process.wait()
        self.reader.join(LAST_LINES_S)
        if not self.reader.is_alive() and self.process.stdout is not None:
            self.process.stdout.close()
        return code if code >= 0 else 128 - code

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.said.put(f"fold {self.fold}: {line.rstrip()}")


def _pass_on(said: SimpleQueue[str], progress: Progress, wait_s: float = LOOK_S) -> None:
    """Say what the processes said within ``wait_s`` seconds."""
    until = time.monotonic() + wait_s
    with contextlib.suppress(Empty):
        while True:
            progress.say(said.get(timeout=max(0.0, until - time.monotonic())))


def _share_of_cores(number: int, of: int) -> set[int] | None:
    """Every ``of``-th of the cores from ``number`` on, so that trainings do not get into each other's way."""
    if not hasattr(os, "sched_getaffinity") or of < 2:
        return None
    cores = sorted(os.sched_getaffinity(0))
    return set(cores[number % of :: of]) if usable_cores() >= of else None
