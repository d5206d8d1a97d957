"""The journal: what was written is read, what came after the checkpoint is dropped, crashes leave it readable."""

from __future__ import annotations

import pytest

from medseg.training.journal import NAME, Journal, StepLine, ValidationLine, read_journal


def step(number: int) -> StepLine:
    return StepLine(step=number, loss=-0.1 * number, lr=0.01 / number, seconds=1.5 * number)


def validation(number: int) -> ValidationLine:
    return ValidationLine(step=number, dice={"kidney ä": 0.5, "tumour": None}, seconds=1.5 * number)


def write(folder, lines, start: int = 0) -> None:
    journal = Journal.open(folder, start)
    for line in lines:
        journal.write(line)
    journal.sync()
    journal.close()


def test_lines_come_back_as_they_were_written(tmp_path):
    write(tmp_path, [step(1), step(2), validation(2), step(3)])
    assert read_journal(tmp_path / NAME) == ([step(1), step(2), step(3)], [validation(2)])


def test_there_is_one_line_for_each(tmp_path):
    write(tmp_path, [step(1), validation(1)])
    assert len((tmp_path / NAME).read_text().splitlines()) == 2


def test_a_journal_that_does_not_exist_is_empty(tmp_path):
    assert read_journal(tmp_path / NAME) == ([], [])


def test_going_on_from_a_step_drops_what_came_after_it(tmp_path):
    write(tmp_path, [step(1), step(2), validation(2), step(3), step(4), validation(4)])
    write(tmp_path, [step(3)], start=2)
    assert read_journal(tmp_path / NAME) == ([step(1), step(2), step(3)], [validation(2)])


def test_beginning_anew_drops_everything(tmp_path):
    write(tmp_path, [step(1), validation(1)])
    write(tmp_path, [], start=0)
    assert (tmp_path / NAME).read_bytes() == b""


@pytest.mark.parametrize("tail", [b'{"step": 3, "lo', b"\x00" * 64, b"\xff\xfe\x80", b"{"])
def test_a_tail_that_a_crash_left_is_left_out_and_then_replaced(tmp_path, tail):
    write(tmp_path, [step(1), step(2)])
    with (tmp_path / NAME).open("ab") as file:
        file.write(tail)
    assert read_journal(tmp_path / NAME) == ([step(1), step(2)], [])
    write(tmp_path, [step(3)], start=2)
    assert read_journal(tmp_path / NAME) == ([step(1), step(2), step(3)], [])


def test_the_mean_is_taken_over_the_labels_that_have_a_value():
    assert ValidationLine(step=1, dice={"a": 0.4, "b": None, "c": 0.8}, seconds=1).mean_dice == pytest.approx(0.6)
    assert ValidationLine(step=1, dice={"a": None}, seconds=1).mean_dice is None
    assert ValidationLine(step=1, dice={}, seconds=1).mean_dice is None
