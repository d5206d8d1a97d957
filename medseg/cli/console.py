"""Console: how the command line shows progress, problems and tables. Results on stdout, the rest on stderr."""

from __future__ import annotations

import atexit
import json
import logging
import sys
import time
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, Literal

from medseg.errors import MedsegError, Problem, escape
from medseg.progress import Progress

if TYPE_CHECKING:
    from medseg.records.run import RunManifest

Style = Literal["auto", "bar", "plain", "json", "none"]
PLAIN_EVERY_S = 10.0


class PlainProgress:
    """One line when a stage is over, and one every ten seconds before."""

    def __init__(self) -> None:
        self.stage, self.total, self.unit = "", 0, ""
        self.begun = self.shown = 0.0

    def begin(self, stage: str, total: int, unit: str) -> None:
        """Remember which stage begins."""
        self.stage, self.total, self.unit = stage, total, unit
        self.begun = self.shown = time.monotonic()

    def update(self, done: int, note: str = "") -> None:
        """Say how far it is, if the last line is old enough."""
        now = time.monotonic()
        if done >= self.total or now - self.shown >= PLAIN_EVERY_S:
            left = (now - self.begun) / done * (self.total - done) if done else 0.0
            self.say(f"{self.stage}: {_share(done, self.total, self.unit)}{_left(left)}  {note}".rstrip())
            self.shown = now

    def end(self) -> None:
        """Nothing: the last update said so."""

    def say(self, message: str) -> None:
        """Print a line."""
        print(escape(message), file=sys.stderr, flush=True)


class JsonProgress:
    """One JSON object per line on stderr, for other programs."""

    def __init__(self) -> None:
        self.stage, self.total, self.unit = "", 0, ""

    def begin(self, stage: str, total: int, unit: str) -> None:
        """A stage begins."""
        self.stage, self.total, self.unit = stage, total, unit
        self._write({"event": "begin"})

    def update(self, done: int, note: str = "") -> None:
        """Units are done."""
        self._write({"event": "update", "done": done, "note": note})

    def end(self) -> None:
        """A stage is over."""
        self._write({"event": "end"})

    def say(self, message: str) -> None:
        """A message."""
        print(json.dumps({"event": "message", "message": message}), file=sys.stderr, flush=True)

    def _write(self, event: dict[str, Any]) -> None:
        value = event | {"stage": self.stage, "total": self.total, "unit": self.unit}
        print(json.dumps(value), file=sys.stderr, flush=True)


class BarProgress:
    """A bar on a terminal, drawn by rich."""

    def __init__(self) -> None:
        from rich.console import Console

        self.console = Console(stderr=True, highlight=False)
        atexit.register(self.end)  # an error or Ctrl-C in a stage must not leave the terminal without its cursor
        self.bar: Any = None
        self.task: Any = None

    def begin(self, stage: str, total: int, unit: str) -> None:
        """Draw a new bar."""
        from rich.progress import BarColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
        from rich.progress import Progress as RichProgress

        self.end()
        count = "{task.percentage:>4.0f} %" if unit == "‰" else f"{{task.completed}}/{{task.total}} {unit}"
        columns = (TextColumn("{task.description}"), BarColumn(), TextColumn(count))
        times = (TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn(), TextColumn("{task.fields[note]}"))
        self.bar = RichProgress(*columns, *times, console=self.console)
        self.task = self.bar.add_task(stage, total=total, note="")
        self.bar.start()

    def update(self, done: int, note: str = "") -> None:
        """Move the bar."""
        if self.bar is not None:
            self.bar.update(self.task, completed=done, note=escape(note))

    def end(self) -> None:
        """Leave the bar as it stands."""
        if self.bar is not None:
            self.bar.stop()
            self.bar = None

    def say(self, message: str) -> None:
        """Print a line above the bar."""
        self.console.print(escape(message), markup=False)


def make_progress(style: Style) -> Progress:
    """The progress of a style; "auto" is a bar on a terminal and plain lines elsewhere."""
    from medseg.progress import SILENT

    if style == "auto":
        style = "bar" if sys.stderr.isatty() else "plain"
    if style == "none":
        return SILENT
    if style == "bar":
        return BarProgress()
    return JsonProgress() if style == "json" else PlainProgress()


def start_logging(debug: bool) -> None:
    """Warnings (everything with ``debug``, tracebacks too) of medseg on stderr, one line each, none twice."""
    handler = logging.StreamHandler()
    handler.setFormatter(_OneLine(debug))
    handler.addFilter(_Once())
    logger = logging.getLogger("medseg")
    logger.handlers = [handler]
    logger.setLevel(logging.DEBUG if debug else logging.WARNING)
    logger.propagate = False


class _OneLine(logging.Formatter):
    def __init__(self, debug: bool) -> None:
        super().__init__()
        self.debug = debug

    def format(self, record: logging.LogRecord) -> str:
        message = record.getMessage()
        level = "" if message.startswith(("error[", "warning[")) else f"{record.levelname.lower()}: "
        line = escape(f"medseg: {level}{message}")
        if self.debug and record.exc_info:
            line += "\n" + self.formatException(record.exc_info)
        return line


class _Once:
    """Passes a message only the first time: every stage reads the data set, and each would warn of the same."""

    def __init__(self) -> None:
        self.said: set[tuple[int, str]] = set()

    def filter(self, record: logging.LogRecord) -> bool:
        said = (record.levelno, record.getMessage())
        new = said not in self.said
        self.said.add(said)
        return new or record.levelno < logging.WARNING


def print_problems(problems: Iterable[Problem]) -> None:
    """One line per problem on stderr."""
    for problem in problems:
        print(f"medseg: {problem}", file=sys.stderr)


def print_error(error: MedsegError) -> None:
    """The problems of an error on stderr."""
    print_problems(error.problems)


def print_failures(manifest: RunManifest) -> None:
    """The problems of the cases that failed, and how many did, on stderr."""
    for case in manifest.failed:
        for problem in case.problems:
            print(f"medseg: {problem}", file=sys.stderr)
    if manifest.failed:
        count = f"{len(manifest.failed)} of {len(manifest.cases)} images failed"
        print_problems([Problem("E0400", count, "", "see above; the same command does only what is missing")])


def print_table(rows: Sequence[Sequence[str]]) -> None:
    """Rows, header first, as aligned columns on stdout; the first column to the left, the others to the right."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    for row in rows:
        cells = [
            cell.ljust(width) if index == 0 else cell.rjust(width)
            for index, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        print("  ".join(cells).rstrip())


def _share(done: int, total: int, unit: str) -> str:
    return f"{done / 10:.0f} %" if unit == "‰" else f"{done}/{total} {unit}"


def _left(seconds: float) -> str:
    return f", {seconds / 60:.0f} min left" if seconds >= 90 else f", {seconds:.0f} s left" if seconds >= 1 else ""
