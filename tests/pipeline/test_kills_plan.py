"""Kills of planning: what was measured is not lost, and the end is that of an undisturbed plan."""

from __future__ import annotations

import random

import pytest
from children import Children
from phantoms import make_dataset
from tiny_runs import contents


@pytest.fixture(scope="module")
def children(tmp_path_factory):
    with Children(tmp_path_factory.mktemp("stderr")) as children:
        yield children


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_a_plan_killed_after_random_cases_ends_byte_for_byte_the_same(tmp_path, children, seed):
    data = make_dataset(tmp_path / "data", 6, channels=2)
    expected, run = tmp_path / "expected", tmp_path / "run"
    assert children.run("plan", data, "--run", expected)[0] == 0
    rng = random.Random(seed)
    kills = 0
    while kills < 3 and children.kill(("plan", data, "--run", run), "fingerprint", rng.randint(1, 5)):
        kills += 1
        kept = [path for path in (run / "fingerprint").iterdir() if not path.name.startswith(".medseg")]
        for path in kept:
            assert path.read_bytes() == (expected / "fingerprint" / path.name).read_bytes()
    assert kills > 0
    assert children.run("plan", data, "--run", run)[0] == 0
    assert contents(run) == contents(expected)
