"""The pool of processes and what it survives."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
import types
from dataclasses import dataclass
from pathlib import Path

import pytest

from medseg.errors import EnvironmentFailure, InputError, MedsegError, Problem, ResourceError
from medseg.preparation import pool
from medseg.preparation.pool import run_cases

FULL = Problem("E0502", "no space left to write x")


@dataclass(frozen=True)
class Order:
    """What a job does: ``what``, and a folder in which it leaves one file for each time it was tried."""

    what: str
    folder: Path
    name: str


class Unpicklable(Exception):
    def __init__(self, one, two):
        super().__init__("cannot be pickled", lambda: None)


def obey(order: Order) -> str:
    tried = len(list(order.folder.glob(f"{order.name}-*")))
    (order.folder / f"{order.name}-{tried}").write_text("")
    match order.what:
        case "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        case "kill once" if tried == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        case "stop":
            os.kill(os.getpid(), signal.SIGSTOP)
        case "stop once" if tried == 0:
            os.kill(os.getpid(), signal.SIGSTOP)
        case "wait":
            time.sleep(0.3)
        case "leave":
            os._exit(0)
        case "refuse":
            raise InputError([Problem("E0130", "not integers"), Problem("E0131", "not declared", case="other")])
        case "bug":
            raise Unpicklable(1, 2)
        case "exit":
            sys.exit(3)
        case "memory":
            raise MemoryError
        case "full":
            raise EnvironmentFailure(FULL)
    return order.name.upper()


def run(folder: Path, orders: dict[str, str], workers: int) -> dict[str, object]:
    jobs = {name: Order(what, folder, name) for name, what in orders.items()}
    return dict(run_cases(obey, jobs, workers))


def tries(folder: Path, name: str) -> int:
    return len(list(folder.glob(f"{name}-*")))


def test_a_killed_worker_costs_no_other_case_and_is_named(tmp_path, caplog):
    orders = {"a": "do", "b": "kill", "c": "do", "d": "kill once", "e": "leave", "f": "do", "g": "refuse", "h": "do"}
    outcomes = run(tmp_path, orders, workers=2)
    assert outcomes.keys() == orders.keys()
    assert {n: o for n, o in outcomes.items() if isinstance(o, str)} == {n: n.upper() for n in "acdfh"}
    for name, how in (("b", "killed by signal 9, most likely because memory ran out"), ("e", "ended with exit code 0")):
        assert isinstance(outcomes[name], ResourceError)
        assert [(p.code, p.case) for p in outcomes[name].problems] == [("E0601", name)]
        assert how in str(outcomes[name])
        assert f"case {name}: its worker process" in caplog.text
    assert isinstance(outcomes["g"], InputError)
    assert {name: tries(tmp_path, name) for name in orders} == {n: 2 if n in "bde" else 1 for n in orders}


@pytest.mark.skipif(not hasattr(signal, "SIGSTOP"), reason="needs SIGSTOP")
def test_a_worker_that_stands_still_is_ended_and_its_case_tried_again(tmp_path, monkeypatch):
    monkeypatch.setattr(pool, "STANDSTILL_S", 2.0)
    begun = time.monotonic()
    outcomes = run(tmp_path, {"a": "stop once", "b": "do", "c": "stop", "d": "do"}, workers=2)
    assert time.monotonic() - begun < 60  # it would stand for ever
    assert [outcomes[name] for name in "abd"] == ["A", "B", "D"]
    assert "E0601" in str(outcomes["c"])
    assert "stood still" in str(outcomes["c"])
    assert [tries(tmp_path, name) for name in "abcd"] == [2, 1, 2, 1]


def test_workers_that_cannot_start_are_told_at_once_and_blamed_on_no_case(tmp_path, monkeypatch):
    ghost = types.ModuleType("ghost")  # a worker cannot import it
    exec("def obey(order): pass", ghost.__dict__)
    monkeypatch.setitem(sys.modules, "ghost", ghost)
    with pytest.raises(ResourceError, match=r"E0601.: a worker process ended with exit code 1 before it could start"):
        list(run_cases(ghost.obey, {str(n): Order("do", tmp_path, "a") for n in range(50)}, workers=2))


def test_cases_that_need_much_memory_run_alone_and_the_others_together(tmp_path):
    room = pool._Room({"huge": 100, "a": 4, "b": 5, "c": 2}, memory=10)
    assert room.holds("huge")  # nothing else runs
    room.take("huge")
    assert not room.holds("a")
    room.leave("huge")
    room.take("a")
    assert room.holds("b")
    room.take("b")
    assert not room.holds("huge")
    assert not room.holds("c")
    assert room.holds("not measured")
    jobs = {name: Order("wait", tmp_path, name) for name in ("a", "huge", "b", "c")}
    outcomes = list(run_cases(obey, jobs, 2, {"huge": 100, "a": 4, "b": 5, "c": 2}, 10))
    assert sorted(outcomes) == [(name, name.upper()) for name in ("a", "b", "c", "huge")]


@pytest.mark.parametrize("workers", [1, 2])
def test_every_error_becomes_the_outcome_of_its_case(tmp_path, workers):
    orders = {"a": "refuse", "b": "bug", "c": "exit", "d": "memory", "e": "do"}
    outcomes = run(tmp_path, orders, workers)
    assert [(p.code, p.case) for p in outcomes["a"].problems] == [("E0130", "a"), ("E0131", "other")]
    assert type(outcomes["b"]) is MedsegError
    assert "Unpicklable" in outcomes["b"].problems[0].measured
    assert outcomes["c"].problems[0].code == "E7000"
    assert outcomes["d"].problems[0].code == "E0600"
    assert outcomes["e"] == "E"


def test_nothing_more_is_started_when_the_disk_is_full(tmp_path):
    outcomes = run(tmp_path, {"a": "do", "b": "full", "c": "do"}, workers=1)
    assert list(outcomes) == ["a", "b"]


ORPHANS = """
import os, sys, time
from pathlib import Path
from medseg.preparation.pool import run_cases
sys.path.insert(0, sys.argv[2])
from sleepers import sleep

if __name__ == "__main__":
    list(run_cases(sleep, {str(i): sys.argv[1] for i in range(2)}, 2))
"""
SLEEPERS = """
import os, time
from pathlib import Path

def sleep(folder):
    Path(folder, f"pid-{os.getpid()}").write_text("")
    time.sleep(600)
"""


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="needs /proc to see processes")
def test_workers_end_when_their_parent_is_killed(tmp_path):
    (tmp_path / "sleepers.py").write_text(SLEEPERS)
    (tmp_path / "main.py").write_text(ORPHANS)
    (tmp_path / "pids").mkdir()
    parent = subprocess.Popen([sys.executable, tmp_path / "main.py", tmp_path / "pids", tmp_path])
    try:
        wait_until(lambda: len(list((tmp_path / "pids").iterdir())) == 2)
        workers = [int(path.name.removeprefix("pid-")) for path in (tmp_path / "pids").iterdir()]
    finally:
        parent.kill()
        parent.wait()
    wait_until(lambda: not any(alive(pid) for pid in workers))


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def wait_until(condition) -> None:
    for _ in range(600):
        if condition():
            return
        time.sleep(0.05)
    pytest.fail("nothing happened in 30 s")


def test_threads_keep_the_order_and_start_nothing_more_when_the_disk_is_full(tmp_path):
    jobs = {name: Order("do", tmp_path, name) for name in "abcdef"}
    assert list(run_cases(obey, jobs, 1, threads=3)) == [(name, name.upper()) for name in "abcdef"]
    jobs["b"] = Order("full", tmp_path, "b")
    outcomes = list(run_cases(obey, jobs, 1, threads=2))
    assert [name for name, _ in outcomes] == ["a", "b", "c"]  # c had begun
    assert isinstance(outcomes[1][1], EnvironmentFailure)
