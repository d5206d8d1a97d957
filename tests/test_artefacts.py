"""Committing several files at once: each whole, the last one last."""

from __future__ import annotations

from pathlib import Path

import pytest

from medseg import artefacts
from medseg.artefacts import commit_all, owned, owned_in_turn
from medseg.errors import EnvironmentFailure, IntegrityError, OwnershipError

FILES = {"a.bin": b"first" * 1000, "b.bin": b"", "c.json": b"{}\n"}


def test_files_are_put_in_place_together(tmp_path):
    commit_all(tmp_path / "new" / "folder", FILES)
    assert {path.name: path.read_bytes() for path in (tmp_path / "new" / "folder").iterdir()} == FILES
    commit_all(tmp_path / "new" / "folder", {"a.bin": b"other"})
    assert (tmp_path / "new" / "folder" / "a.bin").read_bytes() == b"other"


@pytest.mark.parametrize("failing", [0, 1, 2])
def test_after_a_failure_only_whole_files_are_there_and_never_the_last(tmp_path, monkeypatch, failing):
    real, count = Path.replace, iter(range(9))

    def replace(self, target):
        if next(count) == failing:
            raise OSError(28, "No space left on device")
        return real(self, target)

    monkeypatch.setattr(Path, "replace", replace)
    with pytest.raises(EnvironmentFailure, match="E0502"):
        commit_all(tmp_path, FILES)
    found = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert found == dict(list(FILES.items())[:failing])


@pytest.mark.parametrize("damage", [lambda content: content[:-1], lambda c: c + b"x", lambda c: b"?" + c[1:]])
def test_what_reads_back_differently_is_refused(tmp_path, monkeypatch, damage):
    real = artefacts._fsync

    def fsync(path):  # the disk changes what was written
        if path.is_file():
            path.write_bytes(damage(path.read_bytes()))
        real(path)

    monkeypatch.setattr(artefacts, "_fsync", fsync)
    with pytest.raises(IntegrityError, match=r"E0701.*bin read back"):
        commit_all(tmp_path, FILES)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_is_owned_in_turn_and_patience_ends(tmp_path):
    with owned(tmp_path), pytest.raises(OwnershipError), owned_in_turn(tmp_path, patience_s=0.25):
        raise AssertionError("two owners")
    with owned_in_turn(tmp_path, patience_s=0):
        assert list(tmp_path.iterdir())
    assert not list(tmp_path.iterdir())
