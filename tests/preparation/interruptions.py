"""A script: interrupt ``preprocess`` in forked children and see what is left. Run by ``test_preprocess.py``.

Usage: interruptions.py FOLDER SEED CASES KILLS POINTS. It is killed around every commit, KILLS times at random, and
meets a full disk at POINTS sizes. One process imports medseg once; each child inherits that.
"""

from __future__ import annotations

import itertools
import os
import random
import resource
import shutil
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from prepared_phantoms import files_of, make_plan, read_phantoms

from medseg.errors import EnvironmentFailure, IncompatibleError
from medseg.preparation.preprocess import preprocess
from medseg.preparation.store import open_store


def in_child(action: Callable[[], None], kill_after_s: float | None = None) -> int:
    """Run ``action`` in a forked child, kill it after a while, and return how it ended (as ``waitpid`` says)."""
    child = os.fork()
    if child == 0:
        try:
            action()
        except BaseException as error:
            sys.stderr.write(f"child: {error!r}\n")
            os._exit(1)
        os._exit(0)
    if kill_after_s is not None:
        time.sleep(kill_after_s)
        os.kill(child, signal.SIGKILL)
    return os.waitpid(child, 0)[1]


def check_left_behind(store: Path, expected: dict[str, bytes]) -> None:
    """Nothing partial has a final name, and what is not complete cannot be opened."""
    found = files_of(store) if store.exists() else {}
    for name, content in found.items():
        assert name.startswith(".medseg") or content == expected[name], name
    if "manifest.json" not in found:
        with pytest.raises(IncompatibleError, match="E0801"):
            open_store(store)


def check_rerun(run: Callable[[], object], store: Path, expected: dict[str, bytes]) -> None:
    """Running again gives the undisturbed store and does not touch finished cases."""
    before = {path.name: path.stat().st_ino for path in store.iterdir()} if store.exists() else {}
    complete = [name.removesuffix(".case.json") for name in before if name.endswith(".case.json") and name[0] != "."]
    run()
    assert files_of(store) == expected
    for case in complete:
        for name in (f"{case}.image.b2nd", f"{case}.case.json"):
            assert (store / name).stat().st_ino == before[name], f"{name} was written again"


def main(folder: Path, seed: int, cases: int, kills: int, points: int) -> None:
    dataset = read_phantoms(folder / "raw", cases)
    commits = 4 * cases + 1  # three arrays and a record for each case, then the manifest
    plan, _ = make_plan()

    def run(store: Path) -> None:
        preprocess(dataset, plan, "3d_fullres", store, workers=1)

    started = time.monotonic()
    run(folder / "undisturbed")
    duration = time.monotonic() - started
    expected = files_of(folder / "undisturbed")
    assert len(expected) == commits

    def killed_at_commit(store: Path, number: int, before: bool) -> None:
        real, counter = Path.replace, itertools.count(1)  # several threads count

        def replace(self: Path, target: Path) -> Path:
            mine = next(counter)
            if mine == number and before:
                os.kill(os.getpid(), signal.SIGKILL)
            result = real(self, target)
            if mine == number:
                os.kill(os.getpid(), signal.SIGKILL)
            return result

        Path.replace = replace
        run(store)

    for number in range(1, commits + 1):
        for before in (True, False):
            store = folder / f"commit_{number}_{before}"
            ended = in_child(lambda s=store, n=number, b=before: killed_at_commit(s, n, b))
            assert ended == signal.SIGKILL
            check_left_behind(store, expected)
            check_rerun(lambda s=store: run(s), store, expected)

    generator = random.Random(seed)
    store = folder / "random"
    killed = 0
    while killed < kills:
        killed += in_child(lambda: run(store), generator.uniform(0, duration)) == signal.SIGKILL
        check_left_behind(store, expected)
        if (store / "manifest.json").exists():  # beside it the lock, if killed before that was released
            check_rerun(lambda: run(store), store, expected)
            shutil.rmtree(store)
    check_rerun(lambda: run(store), store, expected)

    largest = max(len(content) for content in expected.values())
    for share in ((point + 0.5) / points for point in range(points)):
        store = folder / f"full_{share}"

        def fill(store: Path = store, share: float = share) -> None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (int(largest * share), int(largest * share)))
            with pytest.raises(EnvironmentFailure, match=r"E0502. case=case_0"):
                run(store)

        assert in_child(fill) == 0
        check_left_behind(store, expected)
        check_rerun(lambda s=store: run(s), store, expected)


if __name__ == "__main__":
    main(Path(sys.argv[1]), *map(int, sys.argv[2:]))
