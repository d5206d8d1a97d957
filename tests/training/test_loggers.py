"""Loggers: what TensorBoard and MLflow read back is what the journal holds, once, whatever interrupted the training."""

from __future__ import annotations

import errno
import logging
from pathlib import Path

import pytest

from medseg.errors import UsageError
from medseg.training import loggers
from medseg.training.journal import Journal, Line, StepLine, ValidationLine, read_journal
from medseg.training.loggers import Logged, check_loggers, open_loggers
from medseg.training.mlflow_log import BATCH, EXPERIMENT, MLflow
from medseg.training.scalars import scalars
from medseg.training.tensorboard_log import TensorBoard


def step(number: int, loss: float = 0.0) -> StepLine:
    memory = 1.25 if number == 1 else None
    losses = {"Dice": -0.5, "CE": 0.25}
    return StepLine(
        step=number,
        loss=loss or -0.125 * number,
        lr=0.5**number,
        seconds=1.5 * number,
        losses=losses,
        waited_s=0.25,
        memory_gb=memory,
    )


def validation(number: int, dice: float = 0.5) -> ValidationLine:
    return ValidationLine(
        step=number, dice={"kidney ä": dice, "tumour": None}, seconds=1.5 * number, smoothed=dice - 0.125
    )


def train(folder: Path, observer, lines: list[Line], start: int = 0, *, killed: bool = False) -> None:
    journal = Journal.open(folder, start, [observer])
    for line in lines:
        journal.write(line)
    if killed:  # what a process that dies leaves: the system has what was flushed, nobody closes anything
        journal.sync()
        journal.file.close()
        if isinstance(observer, TensorBoard):
            observer.records.close()
    else:
        journal.close(finished=True)


def test_every_number_of_a_line_has_a_name():
    assert scalars(step(1)) == {
        "loss/total": -0.125,
        "loss/Dice": -0.5,
        "loss/CE": 0.25,
        "learning rate": 0.5,
        "seconds/waiting for data": 0.25,
        "memory/process GB": 1.25,
    }
    assert scalars(validation(1)) == {
        "validation/mean Dice": 0.5,
        "validation/smoothed Dice": 0.375,
        "Dice/kidney ä": 0.5,
    }


def test_odd_labels_keep_names_of_their_own():
    dice = {"a/b": 0.1, "a(b": 0.2, "..": 0.3, "": 0.4, "x" * 300: 0.5, "a_b": 0.6}
    found = scalars(ValidationLine(step=1, dice=dice, seconds=1))
    assert list(found.values())[1:] == list(dice.values())
    assert all(len(name) < 150 and name.count("/") == 1 for name in found)


# TensorBoard


def events(folder: Path) -> dict[str, list[tuple[int, float]]]:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    read = accumulator.EventAccumulator(str(folder), size_guidance={"scalars": 0})
    read.Reload()
    return {tag: [(event.step, event.value) for event in read.Scalars(tag)] for tag in read.Tags()["scalars"]}


def expected(folder: Path) -> dict[str, list[tuple[int, float]]]:
    steps, validations = read_journal(folder / "log.jsonl")
    found: dict[str, list[tuple[int, float]]] = {}
    for line in sorted([*steps, *validations], key=lambda line: line.step):
        for name, value in scalars(line).items():
            found.setdefault(name, []).append((line.step, pytest.approx(value)))
    return found


def test_tensorboard_reads_what_the_journal_holds(tmp_path):
    train(tmp_path, TensorBoard(tmp_path / "tb"), [step(1), step(2), validation(2), step(3)])
    assert events(tmp_path / "tb") == expected(tmp_path)
    assert len(events(tmp_path / "tb")["loss/total"]) == 3


def test_tensorboard_shows_every_step_once_after_a_kill(tmp_path):
    train(tmp_path, TensorBoard(tmp_path / "tb"), [step(1), step(2), step(3), validation(3), step(4)], killed=True)
    train(tmp_path, TensorBoard(tmp_path / "tb"), [step(3, 9.0), step(4, 9.0), step(5)], start=2)
    assert events(tmp_path / "tb") == expected(tmp_path)
    assert [loss for _, loss in events(tmp_path / "tb")["loss/total"]] == [-0.125, -0.25, 9.0, 9.0, -0.625]
    train(tmp_path, TensorBoard(tmp_path / "tb"), [step(6)], start=5)
    assert events(tmp_path / "tb") == expected(tmp_path)
    assert sorted(path.stat().st_size > 0 for path in (tmp_path / "tb").iterdir()) == [False, True]


def test_a_tensorboard_that_is_looking_forgets_the_steps_that_were_lost(tmp_path):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    train(tmp_path, TensorBoard(tmp_path / "tb"), [step(1), step(2), step(3)], killed=True)
    read = accumulator.EventAccumulator(str(tmp_path / "tb"))
    read.Reload()
    assert len(read.Scalars("loss/total")) == 3
    train(tmp_path, TensorBoard(tmp_path / "tb"), [step(2, 9.0)], start=1)
    read.Reload()
    assert [(event.step, event.value) for event in read.Scalars("loss/total")] == [(1, -0.125), (2, 9.0)]


def test_a_logger_that_is_asked_for_later_shows_the_training_from_its_start(tmp_path):
    journal = Journal.open(tmp_path, 0)
    for line in (step(1), step(2), validation(2)):
        journal.write(line)
    journal.close()
    train(tmp_path, TensorBoard(tmp_path / "tb"), [step(3)], start=2)
    assert events(tmp_path / "tb") == expected(tmp_path)


def test_times_are_those_of_the_training(tmp_path):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    train(tmp_path, TensorBoard(tmp_path / "tb"), [step(1), step(3)])
    read = accumulator.EventAccumulator(str(tmp_path / "tb"))
    read.Reload()
    first, second = (event.wall_time for event in read.Scalars("loss/total"))
    assert second - first == pytest.approx(3.0, abs=1e-3)


# MLflow


def runs(database: Path):
    """Of every run that is not deleted: id, status, and its numbers by name."""
    mlflow = pytest.importorskip("mlflow")
    client = mlflow.MlflowClient(f"sqlite:///{database}")
    experiment = client.get_experiment_by_name(EXPERIMENT)
    return [
        (
            run.info.run_id,
            run.info.status,
            {
                name: [(m.step, m.value) for m in client.get_metric_history(run.info.run_id, name)]
                for name in run.data.metrics
            },
        )
        for run in client.search_runs([experiment.experiment_id])
    ]


@pytest.fixture
def mlflow(tmp_path):
    pytest.importorskip("mlflow")
    pytest.importorskip("sqlalchemy")
    return lambda fold="3d/fold_0": MLflow(tmp_path / "mlflow.db", fold, {"patch": "8 9 10"})


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_mlflow_reads_what_the_journal_holds_and_goes_on_in_the_same_run(tmp_path, mlflow):
    train(tmp_path, mlflow(), [step(1), step(2), validation(2)])
    ((first, status, _),) = runs(tmp_path / "mlflow.db")
    assert status == "FINISHED"
    train(tmp_path, mlflow(), [step(3), validation(3)], start=2)
    ((second, _, found),) = runs(tmp_path / "mlflow.db")
    assert (second, found) == (first, expected(tmp_path))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_mlflow_holds_every_step_once_after_a_kill_and_other_folds_keep_theirs(tmp_path, mlflow):
    train(tmp_path / "other", mlflow("3d/fold_1"), [step(1)])
    train(tmp_path, mlflow(), [step(1), step(2), step(3), validation(3)], killed=True)
    train(tmp_path, mlflow(), [step(2, 9.0), step(3, 9.0)], start=1)
    found = [numbers for _, _, numbers in runs(tmp_path / "mlflow.db")]
    assert expected(tmp_path) in found
    assert expected(tmp_path / "other") in found
    assert len(found) == 2


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_batch_that_a_kill_cut_off_is_completed(tmp_path, mlflow, monkeypatch):
    lines: list[Line] = [step(number) for number in range(1, 2 * BATCH // 5)]
    log = mlflow()
    journal = Journal.open(tmp_path, 0, [log])
    log.flushed = float("inf")  # nothing is written before the batch is full
    for line in lines[:50]:
        journal.write(line)
    whole, log.waiting = log.waiting, log.waiting[:100]
    log.client.set_tag(log.run_id, "medseg.writing", f"{whole[0].step} {whole[-1].step}")
    log.client.log_batch(log.run_id, metrics=log.waiting)
    journal.file.close()
    train(tmp_path, mlflow(), lines[50:], start=50)
    ((_, _, found),) = runs(tmp_path / "mlflow.db")
    assert found == expected(tmp_path)


# What goes wrong


class Full:
    """An observer whose disk is full from the second line on."""

    def __init__(self) -> None:
        self.told = 0

    def begin(self, lines) -> None:
        pass

    def write(self, line: Line) -> None:
        self.told += 1
        if self.told > 1:
            raise OSError(errno.ENOSPC, "No space left on device")

    def sync(self) -> None:
        raise AssertionError("told although it failed")

    def close(self, *, finished: bool) -> None:
        raise AssertionError("told although it failed")


def test_a_logger_that_fails_is_left_out_with_one_warning_and_the_journal_is_whole(tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("medseg"), "propagate", True)
    full, other = Full(), TensorBoard(tmp_path / "tb")
    journal = Journal.open(tmp_path, 0, [full, other])
    for number in range(1, 6):
        journal.write(step(number))
    journal.close(finished=True)
    assert full.told == 2
    (record,) = {id(r): r for r in caplog.records}.values()  # handlers of the command line may see it too
    assert "Full failed" in record.getMessage()
    assert "No space left" in record.getMessage()
    assert [line.step for line in read_journal(tmp_path / "log.jsonl")[0]] == [1, 2, 3, 4, 5]
    assert events(tmp_path / "tb") == expected(tmp_path)


def test_a_logger_that_cannot_begin_is_left_out_too(tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("medseg"), "propagate", True)
    (tmp_path / "file").write_text("not a folder")
    train(tmp_path, TensorBoard(tmp_path / "file"), [step(1)])
    assert len({id(record) for record in caplog.records}) == 1
    assert [line.step for line in read_journal(tmp_path / "log.jsonl")[0]] == [1]


def test_a_logger_without_its_library_names_what_to_install(monkeypatch):
    def missing() -> None:
        raise ModuleNotFoundError("No module named 'mlflow'", name="mlflow")

    monkeypatch.setitem(loggers.LOGGERS, "mlflow", loggers._Kind(missing, loggers.LOGGERS["mlflow"].make))
    with pytest.raises(UsageError, match=r'needs mlflow; pip install "medseg\[mlflow\]"'):
        check_loggers(["mlflow"])


def test_a_logger_that_there_is_not_is_refused():
    with pytest.raises(UsageError, match="wandb vs tensorboard, mlflow"):
        check_loggers(["tensorboard", "wandb"])


def test_a_logger_named_twice_is_opened_once(tmp_path):
    pytest.importorskip("tensorboard")
    assert len(open_loggers(["tensorboard", "tensorboard"], Logged(tmp_path, tmp_path, "2d/fold_0"))) == 1
