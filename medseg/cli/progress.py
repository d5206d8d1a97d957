"""Progress as the command line shows it: a bar on a terminal, lines in a log, JSON for programs; all on stderr."""

from __future__ import annotations

import atexit
import json
import shutil
import sys
import time
from typing import TYPE_CHECKING, Any

from medseg.errors import escape
from medseg.progress import NOTHING, Facts

if TYPE_CHECKING:
    from rich.console import RenderableType

PLAIN_EVERY_S = 10.0
REFRESHES_PER_S = 4


class PlainProgress:
    """One line when a stage is over, and one every ten seconds before; on a terminal, as much as a line holds."""

    def __init__(self) -> None:
        self.stage, self.total, self.unit = "", 0, ""
        self.pace = Pace()
        self.shown, self.over = 0.0, False

    def begin(self, stage: str, total: int, unit: str) -> None:
        """Remember which stage begins."""
        self.stage, self.total, self.unit = stage, total, unit
        self.pace = Pace()
        self.shown, self.over = self.pace.begun, False

    def update(self, done: int, note: str = "", facts: Facts = NOTHING) -> None:
        """Say how far it is, if the last line is old enough."""
        if self.over or (done < self.total and time.monotonic() - self.shown < PLAIN_EVERY_S):
            return
        self.over = done >= self.total
        left = self.pace.seconds_left(done, self.total, facts)
        share = f"{self.stage}: {_share(done, self.total, self.unit)}"
        begin = (f"{share}, {_duration(left)} left" if left >= 1 else share, note)
        facts_with_details = [f"{f.name} {f.value}" + (f" ({f.detail})" if f.detail else "") for f in facts.lines]
        line = _one_line(*begin, *facts_with_details)
        if sys.stderr.isatty() and len(line) > (room := shutil.get_terminal_size().columns):
            parts = [*begin, *(f"{f.name} {f.value}" for f in facts.lines)]
            fitting = [_one_line(*parts[:count]) for count in range(1, len(parts) + 1)]
            line = [fitting[0][:room], *(line for line in fitting if len(line) <= room)][-1]
        print(line, file=sys.stderr, flush=True)
        self.shown = time.monotonic()

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

    def update(self, done: int, note: str = "", facts: Facts = NOTHING) -> None:
        """Units are done."""
        event: dict[str, Any] = {"event": "update", "done": done, "note": note}
        if facts.seconds_left is not None:
            event["seconds_left"] = round(facts.seconds_left, 1)
        self._write(event | ({"facts": dict(facts.values)} if facts.values else {}))

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
    """A bar on a terminal with the facts beneath it, drawn by rich; no line is ever wider than the terminal."""

    def __init__(self) -> None:
        from rich.console import Console

        self.console = Console(stderr=True, highlight=False)
        atexit.register(self.end)  # an error or Ctrl-C in a stage must not leave the terminal without its cursor
        self.live: Any = None
        self.stage, self.total, self.unit = "", 0, ""
        self.now: tuple[int, str, Facts] = 0, "", NOTHING
        self.pace = Pace()

    def begin(self, stage: str, total: int, unit: str) -> None:
        """Draw a new bar."""
        from rich.live import Live

        self.end()
        self.stage, self.total, self.unit = escape(stage), total, unit
        self.now, self.pace = (0, "", NOTHING), Pace()
        self.live = Live(get_renderable=self._picture, console=self.console, refresh_per_second=REFRESHES_PER_S)
        self.live.start()

    def update(self, done: int, note: str = "", facts: Facts = NOTHING) -> None:
        """Move the bar; it is drawn anew a few times a second."""
        self.now = done, note, facts

    def end(self) -> None:
        """Leave the bar as it stands."""
        if self.live is not None:
            self.live.stop()
            self.live = None

    def say(self, message: str) -> None:
        """Print a line above the bar."""
        self.console.print(escape(message), markup=False)

    def _picture(self) -> RenderableType:
        """The bar's line, and a line for each fact."""
        from rich.console import Group

        done, note, facts = self.now
        bar = self._bar(done, note, facts)
        return Group(bar, _fact_table(facts, self.console.width)) if facts.lines else bar

    def _bar(self, done: int, note: str, facts: Facts) -> RenderableType:
        """Stage, bar, count, time since the stage began, time left and note: one line as wide as the terminal."""
        from rich.progress_bar import ProgressBar
        from rich.table import Table
        from rich.text import Text

        left = self.pace.seconds_left(done, self.total, facts)
        cells: list[RenderableType] = [
            Text(self.stage),
            ProgressBar(total=max(self.total, 1), completed=done),
            Text(_share(done, self.total, self.unit)),
            Text(_clock(time.monotonic() - self.pace.begun), style="dim"),
        ]
        if left >= 1:
            cells.append(Text(f"{_duration(left)} left"))
        if note:
            cells.append(Text(escape(note), style="dim"))
        table = Table.grid(padding=(0, 2, 0, 0), expand=True)
        for cell in cells:
            table.add_column(no_wrap=True, overflow="ellipsis", ratio=1 if isinstance(cell, ProgressBar) else None)
        if note:
            table.columns[-1].max_width = self.console.width // 4
        table.add_row(*cells)
        return table


def _fact_table(facts: Facts, width: int) -> RenderableType:
    """Names, values and details in columns; details that do not fit are cut."""
    from rich.cells import cell_len
    from rich.table import Column, Table
    from rich.text import Text

    rows = [(f"  {escape(fact.name)}", escape(fact.value), escape(fact.detail)) for fact in facts.lines]
    names, values = (max(cell_len(row[column]) for row in rows) for column in (0, 1))
    table = Table.grid(
        Column(style="dim", no_wrap=True, min_width=names),
        Column(style="bold", no_wrap=True, min_width=values, justify="right"),
        Column(style="dim", no_wrap=True, overflow="ellipsis", max_width=max(1, width - names - values - 4)),
        padding=(0, 2, 0, 0),
        pad_edge=False,
    )
    for row in rows:
        table.add_row(*(Text(text) for text in row))
    return table


class Pace:
    """How fast a stage goes, from the time it began."""

    def __init__(self) -> None:
        self.begun = time.monotonic()

    def seconds_left(self, done: int, total: int, facts: Facts) -> float:
        """What the stage still takes, in seconds; 0 where nothing is known."""
        if facts.seconds_left is not None:
            return facts.seconds_left
        return (time.monotonic() - self.begun) / done * (total - done) if done else 0.0


def _share(done: int, total: int, unit: str) -> str:
    return f"{done / 10:.0f} %" if unit == "‰" else f"{done}/{total} {unit}"


def _one_line(*parts: str) -> str:
    return escape("  ".join(part for part in parts if part))


def _duration(seconds: float) -> str:
    """In the largest units that say enough: 45 s, 12 min, 3 h 20 min, 2 d 5 h."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    if minutes < 90:
        return f"{minutes} min"
    if minutes < 24 * 60:
        return f"{minutes // 60} h {minutes % 60} min"
    hours = round(seconds / 3600)
    return f"{hours // 24} d {hours % 24} h"


def _clock(seconds: float) -> str:
    """H:MM:SS."""
    minutes, second = divmod(int(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{second:02d}"
