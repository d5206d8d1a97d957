"""Names: how files are called, which case and channel a name stands for, and which names are refused."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable
from pathlib import Path

from medseg.errors import Problem
from medseg.imaging.raw_data import DETACHED, named_data_file
from medseg.imaging.volumes import file_ending, strip_ending
from medseg.records.task import Task

SAFE_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
_CHANNEL = re.compile(r"(.+)_(\d{4})", re.DOTALL)  # a line break in a name is refused as such
_NAMES_SHOWN = 5
_ID_SHOWN = 40


def channel_of(name: str) -> tuple[str, int] | None:
    """Case id and channel of ``case_0001.nii.gz``; None without a four-digit channel number."""
    match = _CHANNEL.fullmatch(strip_ending(name))
    return (match[1], int(match[2])) if match else None


def unsafe_id(case: str) -> Problem | None:
    """E0142 unless an id is made of ASCII letters, digits, ``.``, ``_`` and ``-``: ids become file names."""
    if SAFE_ID.fullmatch(case):
        return None
    shown = case if len(case) <= _ID_SHOWN else f"{case[:_ID_SHOWN]}…"
    return Problem("E0142", f"case id {shown!r}", "letters, digits and . _ -, at most 128", "rename its files", case)


def composed(name: str) -> str:
    """A name in Unicode's composed form (NFC): macOS stores ``é`` as two characters, others as one."""
    return unicodedata.normalize("NFC", name)


def clashes(cases: Iterable[str]) -> list[Problem]:
    """E0140 for ids that are one file on some file systems: equal after Unicode normalisation and case folding."""
    seen: dict[str, str] = {}
    problems = []
    for case in cases:
        key = composed(case).casefold()
        if key in seen:
            measured = f"ids {seen[key]!r} and {case!r} are the same"
            problems.append(Problem("E0140", measured, "different ids", "rename or remove one", case))
        seen.setdefault(key, case)
    return problems


def absent(path: Path, code: str, case: str) -> Problem | None:
    """E0143 for a broken link, ``code`` for a file that is not there; says so if only its Unicode form is another."""
    if path.is_file():
        return None
    if path.is_symlink():
        return Problem("E0143", f"{path.name} links to nothing", "", "restore its target", case)
    measured = f"{Path(*path.parts[-2:])} does not exist"
    if not path.name.isascii() and any(composed(entry.name) == composed(path.name) for entry in visible(path.parent)):
        return Problem(code, measured, "the name as it is on disk, in its Unicode form", "copy it from there", case)
    return Problem(code, measured, "", "check the path, or remove the case", case)


def wrong_channels(found: Iterable[int], task: Task, case: str) -> Problem | None:
    """E0133 unless the channel numbers found are exactly those of the task."""
    numbers = sorted(found)
    if numbers == list(range(len(task.channels))):
        return None
    needed = ", ".join(f"{n} ({channel.name})" for n, channel in enumerate(task.channels))
    has = f"has channels {', '.join(map(str, numbers))}"
    action = "provide one file per channel; if the digits number cases, append _0000 to each name"
    return Problem("E0133", has, needed, action, case)


def visible(folder: Path) -> list[Path]:
    """Entries of a folder, sorted by name, without hidden ones; none if there is no such folder."""
    if not folder.is_dir():
        return []
    return sorted((p for p in folder.iterdir() if not p.name.startswith(".")), key=lambda p: p.name)


def ignored(folder: Path, names: list[str], reason: str) -> list[Problem]:
    """One W0147 for all files of a folder that are not used; voxels that a header beside them names are used."""
    named = _voxel_files(folder) if any(file_ending(name) is None for name in names) else set()
    names = [name for name in names if name not in named]
    if not names:
        return []
    shown = ", ".join(names[:_NAMES_SHOWN]) + (" …" if len(names) > _NAMES_SHOWN else "")
    return [Problem("W0147", f"{len(names)} of {folder.name} not used: {shown}", reason, "remove or rename")]


def _voxel_files(folder: Path) -> set[str]:
    """The files in which detached headers (``.mhd``, ``.nhdr``) of a folder keep their voxels."""
    headers = [path for path in folder.glob("*") if file_ending(path.name) in DETACHED] if folder.is_dir() else []
    return {data.name for data in map(named_data_file, headers) if data is not None}
