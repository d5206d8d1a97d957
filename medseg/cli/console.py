"""Console: how the command line shows progress, problems and tables. Results on stdout, the rest on stderr."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Literal

from medseg.cli.progress import BarProgress, JsonProgress, PlainProgress
from medseg.errors import MedsegError, Problem, escape
from medseg.progress import Progress

if TYPE_CHECKING:
    from medseg.records.run import RunManifest

Style = Literal["auto", "bar", "plain", "json", "none"]


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
    handler = _Stderr()
    handler.setFormatter(_OneLine(debug))
    handler.addFilter(_Once())
    logger = logging.getLogger("medseg")
    logger.handlers = [handler]
    logger.setLevel(logging.DEBUG if debug else logging.WARNING)
    logger.propagate = False


class _Stderr(logging.Handler):
    """Writes to what stderr is at the moment: while a bar is drawn, that is a place above it."""

    def emit(self, record: logging.LogRecord) -> None:
        try:
            print(self.format(record), file=sys.stderr, flush=True)
        except Exception:
            self.handleError(record)


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
