"""Watching a training of a run: what journal, JSON progress and loggers are told while it trains, stops and goes on."""

from __future__ import annotations

import json
import logging

import pytest
from tiny_runs import CONFIGURATION, cpu

import medseg.pipeline.train as module
from medseg.errors import Stopped, UsageError
from medseg.pipeline.train import TrainOptions, train_run
from medseg.training.journal import read_journal
from medseg.training.scalars import scalars

FOLD = ("models", CONFIGURATION, "fold_0")


@pytest.fixture(autouse=True)
def without_pictures(monkeypatch):
    """Drawing the curves takes most of a tiny training."""
    monkeypatch.setattr(module, "training_picture", lambda path, points: None)


def train(run, calls: int = 1000, **options):
    left = iter(range(calls))
    options = {"epochs": 1, "device": cpu()} | options
    return train_run(
        run, CONFIGURATION, "0", TrainOptions(**options), stop_signal=lambda: None if next(left, -1) >= 0 else 15
    )


def events(folder):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    read = accumulator.EventAccumulator(str(folder), size_guidance={"scalars": 0})
    read.Reload()
    return {tag: [(event.step, event.value) for event in read.Scalars(tag)] for tag in read.Tags()["scalars"]}


def test_every_step_says_how_long_it_waited_and_what_its_loss_is_made_of(run):
    train(run)
    steps, validations = read_journal(run.joinpath(*FOLD, "log.jsonl"))
    for line in steps:
        assert sum(line.losses.values()) == pytest.approx(line.loss, abs=1e-5)
        assert set(line.losses) == {"CE", "Dice"}
        assert line.waited_s is not None
        assert 0 <= line.waited_s <= line.seconds
    assert steps[0].memory_gb > 0.05
    assert all(line.memory_gb is None for line in steps[1:])
    assert all(line.smoothed is not None for line in validations)


def test_a_stopped_training_that_goes_on_is_in_tensorboard_once(run):
    with pytest.raises(Stopped):
        train(run, calls=3, loggers=("tensorboard",))
    folder = run.joinpath(*FOLD)
    assert [step for step, _ in events(folder / "tensorboard")["loss/total"]] == [1, 2, 3]
    train(run, loggers=("tensorboard",))
    steps, validations = read_journal(folder / "log.jsonl")
    expected: dict[str, list] = {}
    for line in sorted([*steps, *validations], key=lambda line: line.step):
        for name, value in scalars(line).items():
            expected.setdefault(name, []).append((line.step, pytest.approx(value)))
    assert events(folder / "tensorboard") == expected
    assert len(expected["loss/total"]) == 5


def test_a_logger_that_cannot_write_costs_one_warning_and_nothing_else(run, caplog, monkeypatch):
    pytest.importorskip("tensorboard")
    monkeypatch.setattr(logging.getLogger("medseg"), "propagate", True)
    folder = run.joinpath(*FOLD)
    folder.mkdir(parents=True)
    (folder / "tensorboard").write_text("not a folder")
    card = train(run, loggers=("tensorboard",))
    assert card.steps == 5
    told = {id(record): record.getMessage().split()[0] for record in caplog.records}
    assert list(told.values()) == ["TensorBoard"]


def test_a_logger_that_there_is_not_is_refused_before_anything_is_done(run):
    with pytest.raises(UsageError, match="no logger is called wandb"):
        train(run, loggers=("wandb",))
    assert not run.joinpath("models").exists()


def test_the_json_of_the_command_has_the_facts_as_fields(medseg_json):
    updates = [event for event in medseg_json if event["event"] == "update" and event["stage"].startswith("train")]
    first, last = updates[0]["facts"], updates[-1]["facts"]
    assert (first["step"], last["step"]) == (1, 25)
    assert set(last["losses"]) == {"CE", "Dice"}
    assert last["samples_per_s"] > 0
    assert 0 <= last["wait_share"] <= 1
    assert set(last["dice"]) == {"outer", "inner"}
    assert last["best_dice"] >= last["smoothed_dice"]
    assert updates[-1]["seconds_left"] == 0


@pytest.fixture
def medseg_json(run, capsys):
    from medseg.cli import console

    train_run(run, CONFIGURATION, "0", TrainOptions(epochs=5, device=cpu()), console.make_progress("json"))
    return [json.loads(line) for line in capsys.readouterr().err.splitlines()]
