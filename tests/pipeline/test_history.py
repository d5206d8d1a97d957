"""History: what of a journal becomes points of the curves."""

from __future__ import annotations

import pytest

from medseg.pipeline.history import training_history
from medseg.training.journal import Journal, StepLine, ValidationLine


def test_the_share_of_waiting_is_of_the_time_between_two_steps_without_a_validation(tmp_path):
    journal = Journal.open(tmp_path, 0)
    for line in (
        StepLine(step=1, loss=1, lr=0.1, seconds=2, waited_s=2),  # how long it took is not known
        StepLine(step=2, loss=1, lr=0.1, seconds=4, waited_s=0.5, losses={"Dice": -0.5}),
        ValidationLine(step=2, dice={"a": 0.5}, seconds=4, smoothed=0.25),
        StepLine(step=3, loss=1, lr=0.1, seconds=10, waited_s=0.5),
        StepLine(step=4, loss=1, lr=0.1, seconds=11, waited_s=3),
        StepLine(step=5, loss=1, lr=0.1, seconds=11, waited_s=0),
        StepLine(step=6, loss=1, lr=0.1, seconds=12),
    ):
        journal.write(line)
    journal.close()
    points = training_history(tmp_path / "log.jsonl")
    assert [point.wait_share for point in points] == [None, pytest.approx(0.25), None, None, 1.0, None, None]
    assert (points[1].losses, points[2].smoothed_dice, points[2].mean_dice) == ({"Dice": -0.5}, 0.25, 0.5)


def test_a_journal_of_an_older_version_is_drawn_too(tmp_path):
    lines = (
        '{"step": 1, "loss": -0.41, "lr": 0.0091, "seconds": 2.9}\n{"step": 1, "dice": {"a": null}, "seconds": 3.1}\n'
    )
    (tmp_path / "log.jsonl").write_text(lines)
    first, second = training_history(tmp_path / "log.jsonl")
    assert (first.train_loss, first.wait_share, second.mean_dice) == (-0.41, None, None)
