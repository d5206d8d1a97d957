"""Folds side by side: each on its device, none stops another, a signal reaches all, and all are waited for."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from tiny_runs import CONFIGURATION, STEPS_PER_EPOCH, WEAK, command, cpu

import medseg.pipeline.train
from medseg.errors import Stopped, UsageError
from medseg.pipeline import folds as module
from medseg.pipeline.folds import SideBySide, train_folds
from medseg.pipeline.train import TrainOptions
from medseg.training.checkpoint import newest_checkpoint

OPTIONS = TrainOptions(epochs=1, device=cpu())


@pytest.fixture(autouse=True)
def without_curves(monkeypatch):
    monkeypatch.setattr(medseg.pipeline.train, "training_picture", lambda path, points: None)


class Listener:
    """A progress that keeps what is said."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def begin(self, *_: object) -> None:
        """Nothing."""

    update = end = begin

    def say(self, message: str) -> None:
        """Keep a line."""
        self.lines.append(message)


def script(folder: Path, text: str) -> Callable[[str, str, str], list[str]]:
    """A command that runs Python lines; they know ``fold``, ``device`` and ``folder``."""
    head = "import sys, time, signal, os, pathlib\nfold, device, folder = sys.argv[1:3] + [pathlib.Path(sys.argv[3])]\n"
    return lambda configuration, fold, device: [sys.executable, "-ISc", head + text, fold, device, str(folder)]


def side_by_side(folder: Path, text: str, folds: str = "012", devices: tuple[str, ...] = ("a", "b"), stop=None):
    """Exit codes of the failed, and what was said."""
    listener = Listener()
    places = SideBySide(devices, script(folder, text))
    return module._side_by_side("3d", list(folds), places, listener, stop or (lambda: None)), listener.lines


def test_every_device_trains_one_fold_at_a_time_until_all_are_done(tmp_path):
    text = """
lock = folder / device
lock.mkdir()
print("on", device, flush=True)
time.sleep(0.15)
lock.rmdir()
"""
    failed, said = side_by_side(tmp_path, text, "01234", ("a", "b"))
    assert failed == {}
    assert {line.partition(":")[0] for line in said} == {f"fold {n}" for n in range(5)}
    told = [line for line in said if ": on " in line]
    assert sorted(told) == sorted(2 * [f"fold {n}: on {line[-1]}" for n, line in enumerate(sorted(set(told)))])
    assert {line[-1] for line in told} == {"a", "b"}


def test_one_that_fails_or_dies_does_not_stop_the_others(tmp_path, caplog):
    text = """
if fold == "0": sys.exit(10)
if fold == "1": os.kill(os.getpid(), signal.SIGKILL)
(folder / fold).touch()
"""
    failed, _ = side_by_side(tmp_path, text, "0123")
    assert failed == {"0": 10, "1": 137}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["2", "3"]
    assert {"fold 0 failed with exit code 10", "fold 1 failed with exit code 137"} <= set(caplog.messages)
    assert module.FoldsResult((), failed).exit_code == 137


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_goes_to_all_once_and_their_ends_are_waited_for(tmp_path, number):
    """They take a while to save; folds that wait are not begun."""
    text = f"""
count = 0
def handle(*_):
    global count
    count += 1
signal.signal({int(number)}, handle)
(folder / ("began" + fold)).touch()
while not count: time.sleep(0.01)
time.sleep(0.3)
(folder / ("saved" + fold)).write_text(str(count))
print("last words of", fold)
sys.exit(128 + {int(number)})
"""
    listener = Listener()
    places = SideBySide(("a", "b"), script(tmp_path, text))

    def stop() -> int | None:
        return number if len(list(tmp_path.glob("began*"))) == 2 else None

    with pytest.raises(Stopped, match="E1300") as caught:
        module._side_by_side("3d", list("0123"), places, listener, stop)
    assert caught.value.exit_code == 128 + number
    assert [(tmp_path / f"saved{n}").read_text() for n in "01"] == ["1", "1"]
    assert not (tmp_path / "began2").exists()
    assert {"fold 0: last words of 0", "fold 1: last words of 1"} <= set(listener.lines)


def test_a_second_ctrl_c_leaves_no_process_behind(tmp_path):
    text = "signal.signal(2, signal.SIG_IGN)\n(folder / fold).write_text(str(os.getpid()))\ntime.sleep(60)"

    def stop() -> int | None:
        if len(list(tmp_path.iterdir())) == 2 and all(path.read_text() for path in tmp_path.iterdir()):
            raise KeyboardInterrupt
        return None

    with pytest.raises(KeyboardInterrupt):
        side_by_side(tmp_path, text, "01", stop=stop)
    for path in tmp_path.iterdir():
        with pytest.raises(ProcessLookupError):
            os.kill(int(path.read_text()), 0)


def test_much_output_of_a_process_does_not_stall_it(tmp_path):
    failed, said = side_by_side(tmp_path, "for n in range(20000): print('line', n)", "0", ("a",))
    assert failed == {}
    assert said[-1] == "fold 0: line 19999"


def test_cores_are_shared_out():
    mine = os.sched_getaffinity(0)
    if len(mine) < 2:
        assert module._share_of_cores(0, 2) is None
        return
    first, second = module._share_of_cores(0, 2), module._share_of_cores(1, 2)
    assert first | second <= mine
    assert not first & second
    assert module._share_of_cores(0, 1) is None


def test_folds_in_turn_go_on_after_one_that_fails(run, monkeypatch, caplog):
    original = module.train_run

    def train_run(path, configuration, fold, *rest):
        if fold == "1":
            raise UsageError(module.Problem("E0001", "no"))
        return original(path, configuration, fold, *rest)

    monkeypatch.setattr(module, "train_run", train_run)
    result = train_folds(run, CONFIGURATION, ["1", "2", "2"], OPTIONS)
    assert [card.fold for card in result.cards] == ["2"]
    assert (result.failed, result.exit_code) == ({"1": 2}, 2)
    assert any("error[E0001]: fold 1: no" in message for message in caplog.messages)
    with pytest.raises(UsageError, match="E0001"):
        train_folds(run, CONFIGURATION, ["1"], OPTIONS)


def test_a_fold_that_does_not_exist_is_refused_before_any_is_trained(run):
    with pytest.raises(UsageError, match="E0001"):
        train_folds(run, CONFIGURATION, ["0", "9"], OPTIONS)
    assert not (run / "models").exists()


def test_without_names_every_fold_is_trained(run, monkeypatch):
    seen = []
    monkeypatch.setattr(module, "train_run", lambda path, configuration, fold, *rest: seen.append(fold))
    train_folds(run, CONFIGURATION, None, OPTIONS)
    assert seen == ["0", "1", "2", "3", "4"]


def real(run: Path, *more: object) -> SideBySide:
    """Trainings of medseg on two processors."""

    def line(configuration: str, fold: str, device: str) -> list[str]:
        fixed = ("train", "--run", run, "--configuration", configuration, "--precision", "float32")
        return command(*fixed, "--fold", fold, "--device", device, "--progress", "plain", *more)

    return SideBySide(("cpu", "cpu"), line)


@pytest.mark.slow
def test_trainings_side_by_side_end_with_models_of_their_own(run, monkeypatch):
    for name, value in WEAK.items():
        monkeypatch.setenv(name, value)
    listener = Listener()
    result = train_folds(run, CONFIGURATION, ["0", "3"], side_by_side=real(run, "--epochs", 1), progress=listener)
    assert [card.fold for card in result.cards] == ["0", "3"]
    assert {card.steps for card in result.cards} == {STEPS_PER_EPOCH}
    assert any(line.startswith("fold 3:   validation Dice mean") for line in listener.lines)


def test_trainings_side_by_side_are_stopped_with_checkpoints(run, monkeypatch):
    for name, value in WEAK.items():
        monkeypatch.setenv(name, value)
    models = run / "models" / CONFIGURATION

    def stop() -> int | None:
        time.sleep(0.05)
        steps = [path.read_text().count('"step"') for path in models.glob("fold_*/log.jsonl")]
        begun = [newest_checkpoint(path) is not None for path in models.glob("fold_*/checkpoints")]
        return signal.SIGTERM if len(steps) == 2 and begun == [True, True] else None

    places = real(run, "--epochs", 1000, "--checkpoint-every", "0.05s")
    with pytest.raises(Stopped):
        train_folds(run, CONFIGURATION, ["0", "1", "2"], side_by_side=places, stop_signal=stop)
    assert sorted(path.name for path in models.iterdir()) == ["fold_0", "fold_1"]
    assert not list(run.rglob(".medseg.lock"))
