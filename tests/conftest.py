"""Fixtures shared by the tests."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

SHARED = Path(__file__).resolve().parents[2] / "shared"


@pytest.fixture(scope="session")
def shared() -> Path:
    """The developers' folder of real data; tests that need it are skipped where it is absent."""
    if not (SHARED / "data").is_dir():
        pytest.skip("../shared is not here")
    return SHARED


@pytest.fixture(scope="session")
def nnunet() -> str:
    """The Python of an environment that has nnU-Net; the variable NNUNET_PYTHON names it."""
    python = os.environ.get("NNUNET_PYTHON", sys.executable)
    found = subprocess.run([python, "-c", "import nnunetv2"], capture_output=True, check=False)
    if found.returncode:
        pytest.skip("nnU-Net is not installed; NNUNET_PYTHON names an environment's Python")
    return python


@pytest.fixture(scope="session")
def finished(tmp_path_factory) -> Path:
    """A tiny run with everything in it, beside its data set ``../data``. Not to be written to."""
    from tiny_runs import finished_run

    return finished_run(tmp_path_factory.mktemp("finished"))


@pytest.fixture(scope="session")
def prepared(tmp_path_factory) -> Path:
    """A tiny run that is prepared, not trained. Not to be written to."""
    from tiny_runs import prepared_run

    return prepared_run(tmp_path_factory.mktemp("prepared"))


@pytest.fixture
def run(prepared, tmp_path) -> Path:
    """A copy of the prepared run, to be written to."""
    return Path(shutil.copytree(prepared, tmp_path / "run"))
