"""Several processes and several folds from the command line: options, what a launcher says, and a real training."""

from __future__ import annotations

import argparse
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from tiny_runs import CONFIGURATION, WEAK, command

from medseg.cli import folds, run, train
from medseg.cli.launch import launch_of
from medseg.cli.main import build_parser
from medseg.errors import UsageError
from medseg.training.checkpoint import newest_checkpoint
from medseg.training.journal import read_journal
from medseg.training.launch import Launch

ELASTIC = {
    "RANK": "3",
    "WORLD_SIZE": "4",
    "LOCAL_RANK": "1",
    "LOCAL_WORLD_SIZE": "2",
    "MASTER_ADDR": "node7",
    "MASTER_PORT": "29501",
    "TORCHELASTIC_USE_AGENT_STORE": "True",
    "TORCHELASTIC_RESTART_COUNT": "2",
}


def parsed(*words: object) -> argparse.Namespace:
    return build_parser().parse_args([str(word) for word in words])


def training(*words: object) -> argparse.Namespace:
    return parsed("train", "--run", "R", "--configuration", "2d", *words)


def test_what_torchrun_says_is_read():
    assert launch_of(ELASTIC) == Launch(3, 4, 1, 2, "node7", 29501, hosted=True, attempt=2)
    plain = {name: ELASTIC[name] for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")}
    assert launch_of(plain) == Launch(3, 4, 0, 1, "node7", 29501)


@pytest.mark.parametrize("changes", [{"WORLD_SIZE": "1"}, {"RANK": None}, {"MASTER_ADDR": None}])
def test_one_process_is_not_launched(changes):
    environment = {name: value for name, value in (ELASTIC | changes).items() if value is not None}
    assert launch_of(environment) is None


@pytest.mark.parametrize("changes", [{"RANK": "x"}, {"RANK": "4"}, {"LOCAL_RANK": "-1"}, {"MASTER_PORT": ""}])
def test_what_makes_no_sense_is_refused(changes):
    with pytest.raises(UsageError, match="E0001"):
        launch_of(ELASTIC | changes)


@pytest.mark.parametrize(
    ("words", "names"),
    [
        (("--fold", "3"), ("3",)),
        (("--fold", "all"), ("all",)),
        (("--folds", "0,2"), ("0", "2")),
        (("--folds", "0", "2"), ("0", "2")),
        (("--folds", "all"), None),
    ],
)
def test_folds_are_named_one_or_several_or_all(words, names):
    assert folds.folds_of(training(*words)) == names


def test_a_run_trains_fold_0_unless_told_otherwise():
    assert folds.folds_of(parsed("run", "D", "--run", "R")) == ("0",)
    assert folds.folds_of(parsed("run", "D", "--run", "R", "--folds", "all")) is None


@pytest.mark.parametrize("words", [("--folds", "0,all"), ("--folds", ",")])
def test_all_among_other_folds_is_refused(words):
    with pytest.raises(UsageError, match="E0001"):
        folds.folds_of(training(*words))


@pytest.mark.parametrize("words", [(), ("--fold", "0", "--folds", "1"), ("--fold",)])
def test_train_needs_either_a_fold_or_folds(words):
    with pytest.raises(UsageError, match="E0001"):
        training(*words)


def test_the_command_of_a_fold_has_the_options_that_were_given(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    given = ("--time-budget", "10m", "--seed", "7", "--precision", "float32", "--overwrite", "--debug")
    given = (*given, "--logger", "mlflow", "--logger", "tensorboard")
    arguments = training("--folds", "all", "--gpus", "all", "--progress", "json", *given)
    places = folds.side_by_side_of(arguments, train.add_arguments)
    assert places.devices == ("cuda:0", "cuda:1")
    words = places.command("3d_fullres", "2", "cuda:1")
    assert words[:4] == [sys.executable, "-m", "medseg", "train"]
    chosen = ("--fold", "2", "--device", "cuda:1", "--progress", "plain")
    expected = parsed("train", "--run", "R", "--configuration", "3d_fullres", *given, *chosen)
    assert vars(parsed(*words[3:])) == vars(expected)


def test_the_command_of_a_fold_of_a_run_has_its_options_of_training():
    arguments = parsed("run", "D", "--run", "R", "--epochs", "3", "--memory", "4", "--workers", "2", "--loss", "ce")
    assert folds.passed_on(arguments, train.add_arguments) == ["--epochs", "3"]
    assert run.train is train


@pytest.mark.parametrize(
    ("words", "there"),
    [(("--gpus", "all"), 0), (("--gpus", "2"), 2), (("--gpus", "x"), 2), (("--gpus", "0", "--device", "cpu"), 2)],
)
def test_gpus_that_are_not_there_are_refused(monkeypatch, words, there):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: there > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: there)
    with pytest.raises(UsageError, match="E0001"):
        folds.side_by_side_of(training("--folds", "all", *words), train.add_arguments)
    assert folds.side_by_side_of(training("--folds", "all", "--gpus", "none"), train.add_arguments) is None


def test_processes_that_were_started_together_train_one_fold(medseg, prepared, monkeypatch):
    for name, value in ELASTIC.items():
        monkeypatch.setenv(name, value)
    fixed = ("train", "--run", prepared, "--configuration", CONFIGURATION)
    for words in (("--folds", "0,1"), ("--folds", "all"), ("--fold", "0", "--gpus", "all")):
        assert medseg(*fixed, *words).code == 2
    ended = medseg("run", "D", "--run", "R")
    assert (ended.code, "started as several processes" in ended.err) == (2, True)


def start(run: Path, port: int, *words: object) -> list[subprocess.Popen[str]]:
    """Two processes of a training, started as by a launcher."""
    fixed = ("train", "--run", run, "--configuration", CONFIGURATION, "--fold", "all", "--precision", "float32")
    given = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    return [
        subprocess.Popen(
            command(*fixed, *words),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=os.environ | WEAK | given | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
        )
        for rank in range(2)
    ]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def stop_two(run: Path) -> int:
    """Send SIGTERM to the second of two processes; the step that both stopped at."""
    fold = run / "models" / CONFIGURATION / "fold_all"
    processes = start(run, free_port(), "--epochs", 1000, "--checkpoint-every", "1d")
    while not (fold / "log.jsonl").is_file() and processes[0].poll() is None:
        time.sleep(0.02)
    processes[1].send_signal(signal.SIGTERM)
    said = [process.communicate(timeout=120) for process in processes]
    assert [process.returncode for process in processes] == [143, 143], said
    step = int(re.search(r"E1300\]: stopped at step (\d+)", said[0][1])[1])
    assert newest_checkpoint(fold / "checkpoints").state.step == step
    assert "medseg:" not in said[1][1]
    assert not list(run.rglob(".medseg.lock"))
    return step


def test_a_signal_to_one_of_two_processes_stops_both_and_one_of_them_talks(run):
    assert stop_two(run) >= 0


def test_one_of_several_processes_ends_without_taking_python_apart():
    """What runs at the end of Python does not run: there, one process was seen to end with SIGABRT."""
    script = "import atexit, sys; atexit.register(print, 'late'); sys.argv = ['medseg', 'run', 'D', '--run', 'R']; "
    command = [sys.executable, "-c", script + "from medseg.cli.main import entry; entry()"]
    given = {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}
    for more, late in ((given, False), ({}, True)):
        done = subprocess.run(command, env=os.environ | more, capture_output=True, text=True, check=False)
        assert done.returncode == (3 if late else 2)  # no such data set; run was started as several processes
        assert "error[E" in done.stderr
        assert ("late" in done.stdout) == late


@pytest.mark.slow
def test_two_processes_that_were_stopped_go_on_to_a_model_and_one_of_them_talks(run):
    step, fold = stop_two(run), run / "models" / CONFIGURATION / "fold_all"
    processes = start(run, free_port(), "--iterations", step + 3)
    said = [process.communicate(timeout=120) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], said
    assert f"fold all: {step + 3} steps" in said[0][0]
    assert said[1] == ("", "")
    assert [line.step for line in read_journal(fold / "log.jsonl")[0]] == list(range(1, step + 4))
