"""The console: what a person sees while something runs, in a terminal of 80 or 140 columns, in a log, as JSON."""

from __future__ import annotations

import io
import json
import sys

import pytest
from rich.console import Console

from medseg.cli import console, progress
from medseg.progress import Fact, Facts

FACTS = Facts(
    lines=(
        Fact("step", "1800", "of 3000"),
        Fact("loss", "-0.731", "Dice -0.842, CE 0.111"),
        Fact("Dice", "0.871", ", ".join(f"a label with a long name {n} 0.9{n}0" for n in range(6))),
        Fact("lr", "0.0081"),
        Fact("speed", "12.3/s", "samples; 0.16 s/step"),
        Fact("waiting", "3 %", "of the time, for data"),
        Fact("memory", "2.1 GB", "GPU 10.2 GB"),
    ),
    values={"step": 1800, "loss": -0.731, "dice": {"a": 0.9, "b": None}},
    seconds_left=372.0,
)


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def bar(width: int) -> tuple[progress.BarProgress, io.StringIO]:
    shown_by = progress.BarProgress()
    shown = io.StringIO()
    shown_by.console = Console(file=shown, width=width, force_terminal=True, highlight=False, color_system=None)
    return shown_by, shown


def drawn(width: int, note: str, facts: Facts) -> list[str]:
    """The lines of a bar's picture."""
    shown_by, _ = bar(width)
    shown_by.stage, shown_by.total, shown_by.unit = "train 3d_fullres", 1000, "‰"
    shown_by.update(600, note, facts)
    captured = Console(file=io.StringIO(), width=width, highlight=False)
    captured.print(shown_by._picture())
    return captured.file.getvalue().splitlines()


@pytest.mark.parametrize("width", [60, 80, 140])
def test_a_bar_and_its_facts_take_one_line_each_and_none_is_wider_than_the_terminal(width):
    lines = drawn(width, "", FACTS)
    assert len(lines) == 1 + len(FACTS.lines)
    assert max(len(line) for line in lines) <= width
    assert lines[0].startswith("train 3d_fullres  ━")
    assert lines[0].rstrip().endswith("60 %  0:00:00  6 min left")
    for line, fact in zip(lines[1:], FACTS.lines, strict=True):
        assert line.split()[0] == fact.name
        assert fact.value in line
    assert lines[3].rstrip().endswith("…")


@pytest.mark.parametrize("width", [80, 140])
def test_a_long_name_of_a_case_leaves_room_for_the_bar(width):
    (line,) = drawn(width, "case_" + "x" * 200, Facts())
    assert len(line) <= width
    assert line.count("━") + line.count("╺") + line.count("╸") >= 10
    assert line.rstrip().endswith("…")


def test_odd_signs_in_facts_are_shown_as_what_they_are():
    lines = drawn(80, "", Facts((Fact("Dice", "0.5", "[red]tumour[/] \x1b[31m\nnew 0.5"),)))
    assert len(lines) == 2
    assert "[red]tumour[/] \\x1b[31m\\nnew 0.5" in lines[1]


def test_facts_stay_beneath_the_bar_when_the_stage_is_over_and_messages_stand_above():
    shown_by, shown = bar(80)
    shown_by.begin("train", 1000, "‰")
    shown_by.update(500, "", FACTS)
    shown_by.say("step 10: validation Dice 0.9")
    shown_by.update(1000, "", FACTS)
    shown_by.end()
    text = shown.getvalue()
    assert text.index("validation Dice") < text.rindex("loss")
    assert text.rstrip().endswith("\x1b[?25h")  # the cursor is back
    assert "100 %" in text


def test_a_line_of_a_log_holds_all_facts_and_comes_every_ten_seconds(monkeypatch, capsys):
    now = [100.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    shown_by = progress.PlainProgress()
    shown_by.begin("train", 1000, "‰")
    for second in range(25):
        now[0] = 100.0 + second
        shown_by.update(second, "", FACTS)
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 2
    assert lines[0].startswith("train: 1 %, 6 min left  step 1800 (of 3000)  loss -0.731 (Dice -0.842, CE 0.111)  Dice")
    assert lines[0].endswith(
        "lr 0.0081  speed 12.3/s (samples; 0.16 s/step)  waiting 3 % (of the time, for data)"
        "  memory 2.1 GB (GPU 10.2 GB)"
    )


def test_a_stage_that_is_over_is_said_so_once(capsys):
    shown_by = progress.PlainProgress()
    for stage in ("one", "two"):
        shown_by.begin(stage, 2, "cases")
        shown_by.update(2)
        shown_by.update(2, "", FACTS)
        shown_by.end()
    assert capsys.readouterr().err == "one: 2/2 cases\ntwo: 2/2 cases\n"


@pytest.mark.parametrize("columns", [80, 140])
def test_a_line_on_a_terminal_has_as_many_facts_as_fit(monkeypatch, columns):
    shown = Terminal()
    monkeypatch.setattr(sys, "stderr", shown)
    monkeypatch.setenv("COLUMNS", f"{columns}")
    shown_by = progress.PlainProgress()
    shown_by.begin("train 3d_fullres", 1000, "‰")
    shown_by.update(1000, "", FACTS)
    (line,) = shown.getvalue().splitlines()
    assert len(line) <= columns
    assert "loss -0.731  Dice 0.871" in line
    assert ("memory 2.1 GB" in line) == (columns == 140)


def test_facts_are_fields_of_the_json(capsys):
    shown_by = progress.JsonProgress()
    shown_by.begin("train", 1000, "‰")
    shown_by.update(3, "", FACTS)
    shown_by.update(4)
    _, first, second = (json.loads(line) for line in capsys.readouterr().err.splitlines())
    assert first["facts"] == {"step": 1800, "loss": -0.731, "dice": {"a": 0.9, "b": None}}
    assert first["seconds_left"] == 372
    assert "facts" not in second


@pytest.mark.parametrize(
    ("seconds", "said"),
    [
        (5, "5 s"),
        (89, "89 s"),
        (100, "2 min"),
        (89 * 60, "89 min"),
        (3.35 * 3600, "3 h 21 min"),
        (23.7 * 3600, "23 h 42 min"),
        (29 * 3600, "1 d 5 h"),
        (119.9 * 60, "2 h 0 min"),
        (24 * 3600 - 1, "1 d 0 h"),
    ],
)
def test_durations_are_said_in_units_that_fit(seconds, said):
    assert progress._duration(seconds) == said


def test_warnings_go_to_what_stderr_is_at_the_time(monkeypatch, medseg):
    import logging

    medseg("--version")
    logger = logging.getLogger("medseg")
    before = logger.handlers, logger.propagate
    console.start_logging(False)
    later = io.StringIO()
    monkeypatch.setattr(sys, "stderr", later)
    logging.getLogger("medseg.somewhere").warning("the disk is nearly full")
    logger.handlers, logger.propagate = before
    assert later.getvalue() == "medseg: warning: the disk is nearly full\n"
