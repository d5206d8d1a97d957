"""Pairing: images and labels of two folders, or of a BIDS tree, brought together case by case by their names."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from medseg.dataset.naming import clashes, composed, unsafe_id
from medseg.errors import InputError, Problem
from medseg.imaging.volumes import file_ending
from medseg.records.case import Case

_NOT_SAFE = re.compile(r"[^A-Za-z0-9._-]+")


@dataclass(frozen=True, slots=True)
class ChannelFiles:
    """A channel and how its files are told from others: ``end`` of the name, None where the name has to tell."""

    name: str
    end: str | None = None


@dataclass(frozen=True, slots=True)
class Pairing:
    """The complete cases, sorted; what does not fit together; and what was derived, one sentence each.

    ``one_file`` says that every image file holds all channels.
    """

    cases: tuple[Case, ...]
    problems: tuple[Problem, ...]
    notes: tuple[str, ...] = ()
    one_file: bool = False


@dataclass(frozen=True, slots=True)
class Files:
    """Files by case key: per channel, and the labels. A key is what is left of a name when its end is taken off."""

    channels: tuple[Mapping[str, list[Path]], ...]
    labels: Mapping[str, list[Path]]


def pair(files: Files, names: Sequence[str], *, allow_missing: bool) -> tuple[list[Case], list[Problem]]:
    """Cases for all keys, with ids made from them, and a problem for each that is not complete.

    E0100 a label without image; E0133 a channel is missing and may not be; E0140 two files for one place, or two
    keys for one id; E0142 no id can be made; E0144 an image without label.
    """
    cases, problems = [], []
    keys = sorted({*files.labels}.union(*files.channels))
    for key in keys:
        found = [channel.get(key, []) for channel in files.channels]
        problem = _incomplete(found, files.labels.get(key, []), names, allow_missing)
        case = safe_id(key)
        if problem is None and (problem := unsafe_id(case)) is None:
            images = tuple(paths[0] if paths else None for paths in found)
            cases.append(Case(case, images, files.labels[key][0]))
        if problem is not None:
            problems.append(replace(problem, case=key))
    return cases, [*problems, *clashes(case.id for case in cases)]


def _incomplete(
    images: Sequence[Sequence[Path]], labels: Sequence[Path], names: Sequence[str], allow_missing: bool
) -> Problem | None:
    if not any(images):
        return Problem("E0100", f"{labels[0].name} has no image", "one of its name", "add it, or --skip-incomplete")
    first = next(paths[0] for paths in images if paths)
    for what, paths in zip((*names, "label"), (*images, labels), strict=True):
        if len(paths) > 1:
            shown = ", ".join(str(Path(*path.parts[-2:])) for path in paths[:3])
            return Problem("E0140", f"{len(paths)} files for {what}: {shown}", "one", "name the end of the one to take")
    missing = [name for name, paths in zip(names, images, strict=True) if not paths]
    if missing and not allow_missing:
        return Problem("E0133", f"no {', '.join(missing)}", ", ".join(names), "add it, or --allow-missing")
    if not labels:
        return Problem("E0144", f"{first.name} has no label", "one of its name", "add it, or --skip-incomplete")
    return None


def safe_id(key: str) -> str:
    """A case id from a name: accents dropped, everything but ASCII letters, digits, ``.``, ``_``, ``-`` made ``_``."""
    plain = unicodedata.normalize("NFKD", key.replace("ß", "ss"))
    letters = "".join(c for c in plain if not unicodedata.combining(c))
    return _NOT_SAFE.sub("_", letters).strip("_.-")


def renamed(cases: Iterable[Case], keys: Iterable[str]) -> list[str]:
    """Sentences about ids that differ from the names they were made from."""
    safe = {safe_id(key): key for key in keys}
    return [f"{case.id} stands for {safe[case.id]!r}" for case in cases if safe.get(case.id, case.id) != case.id]


def with_groups(pairing: Pairing, pattern: str) -> Pairing:
    """The cases with what ``pattern``, a regular expression, finds first in their ids as group.

    Raises:
        InputError: E0145 the expression is wrong, or finds nothing in some ids; they are named.
    """
    try:
        found = {case.id: re.search(pattern, case.id) for case in pairing.cases}
    except re.error as error:
        raise InputError(
            Problem("E0145", f"group {pattern!r}: {error}", "a regular expression", "correct it")
        ) from error
    without = [case for case, match in found.items() if not (match and match[0])]
    if without:
        shown = ", ".join(without[:5]) + (f" and {len(without) - 5} more" if len(without) > 5 else "")
        raise InputError(Problem("E0145", f"group {pattern!r} is not in {shown}", "in each case id", "correct it"))
    groups = {case: match[0] for case, match in found.items() if match}
    return replace(pairing, cases=tuple(replace(case, group=groups[case.id]) for case in pairing.cases))


def by_key(files: Iterable[tuple[str, Path]]) -> dict[str, list[Path]]:
    """Paths by key; keys that differ only in their Unicode form are one."""
    result: dict[str, list[Path]] = {}
    for key, path in files:
        result.setdefault(composed(key), []).append(path)
    return result


def is_image(path: Path) -> bool:
    """Whether a name is that of an image, not hidden; also a link that leads nowhere, so that it is reported."""
    return not path.name.startswith(".") and file_ending(path.name) is not None and not path.is_dir()
