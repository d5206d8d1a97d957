"""BIDS: images of a brain imaging data structure, and the label maps in its derivatives, paired by entities.

A name is made of entities and a suffix, ``sub-01_ses-2_acq-mprage_T1w.nii.gz``. Source: BIDS specification, "Common
principles" (file names) and "Imaging derivatives" (masks and segmentations, entities ``space``, ``desc`` and others).
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from dataclasses import replace
from pathlib import Path

from medseg.dataset.pairing import ChannelFiles, Files, Pairing, by_key, is_image, pair
from medseg.errors import InputError, Problem
from medseg.imaging.volumes import strip_ending

LABEL_SUFFIX = "dseg"
_ENTITY = re.compile(r"[A-Za-z]+-[A-Za-z0-9+]+")
# Entities that a derivative adds to those of its source; they say what it is, not what it was made from.
_ADDED = {"space", "res", "den", "desc", "label", "seg", "atlas", "scale", "hemi"}


def is_bids(folder: Path) -> bool:
    """Whether there are ``sub-…`` folders."""
    return folder.is_dir() and any(path.is_dir() for path in folder.glob("sub-*"))


def pair_bids(
    root: Path, labels: Path | None, channels: Sequence[ChannelFiles], label_end: str, *, allow_missing: bool
) -> Pairing:
    """Pair images of ``root/sub-…`` with label maps in ``labels``, or in ``root/derivatives``.

    A channel's ``end`` (by default its name) and ``label_end`` choose files: the suffix, and before it entities or
    words that the name must have, as ``acq-mprage_T1w`` or ``T1w_seg-manual``. The other entities are the case:
    those of all channels and of the label must be equal, but for entities such as ``space`` and ``desc``, which a
    derivative adds, and those of a channel's ``end``, which a label that was drawn on it keeps. The subject is the
    group.

    Raises:
        InputError: E0100 there is no such folder; E0146 nothing matches; what there is instead is listed.
    """
    labelled = labels if labels is not None else root / "derivatives"
    for folder in (root, labelled):
        if not folder.is_dir():
            raise InputError(Problem("E0100", f"{folder} is no folder", "", "check the path; name the labels' folder"))
    images = [path for path in sorted(root.glob("sub-*/**/*")) if is_image(path)]
    maps = [path for path in sorted(labelled.rglob("sub-*")) if is_image(path)]
    ends = [channel.name if channel.end is None else channel.end for channel in channels]
    found = [by_key(_chosen(images, end)) for end in ends]
    kept = {part for end in ends for part in _words(end) if _ENTITY.fullmatch(part)}
    labels_found = by_key(_chosen(maps, label_end, added=_ADDED, kept=kept))
    problems = [_nothing(end, images, root) for end, files in zip(ends, found, strict=True) if not files]
    problems += [] if labels_found else [_nothing(label_end, maps, labelled)]
    if problems:
        raise InputError(problems)
    files = Files(tuple(found), labels_found)
    cases, problems = pair(files, [channel.name for channel in channels], allow_missing=allow_missing)
    grouped = tuple(replace(case, group=case.id.partition("_")[0]) for case in cases)
    said = ", ".join(f"{end} for {channel.name}" for channel, end in zip(channels, ends, strict=True))
    notes = (f"BIDS: images in {root}, {said}; labels {label_end} in {labelled}", "each subject is a group")
    return Pairing(grouped, tuple(problems), notes)


def _words(end: str) -> list[str]:
    return end.strip("_").split("_")


def _chosen(
    paths: Iterable[Path], end: str, added: Collection[str] = (), kept: Collection[str] = ()
) -> list[tuple[str, Path]]:
    """The files that ``end`` chooses, with the entities as key that are neither wanted, ``added`` nor ``kept``."""
    wanted = _words(end)
    chosen = []
    for path in paths:
        parts = strip_ending(path.name).split("_")
        if parts[-1] != wanted[-1] or not {*wanted} <= {*parts}:
            continue
        own = [part for part in parts if part not in wanted and part not in kept]
        left = [part for part in own if part.partition("-")[0] not in added]
        if left and all(_ENTITY.fullmatch(part) for part in left):
            chosen.append(("_".join(left), path))
    return chosen


def _nothing(end: str, paths: Iterable[Path], folder: Path) -> Problem:
    """E0146 with what names do end with."""
    parts = (strip_ending(path.name).split("_") for path in paths)
    ends = Counter("_".join(name[_first_word(name) :]) for name in parts)
    there = ", ".join(f"{name} ({count})" for name, count in ends.most_common(8)) or "no images"
    return Problem("E0146", f"no names in {folder} end with {end!r}", there, "choose one of these")


def _first_word(parts: Sequence[str]) -> int:
    """Where the first part lies that is no entity, for instance T1w of ``sub-01_T1w_seg-manual``."""
    return next((n for n, part in enumerate(parts) if not _ENTITY.fullmatch(part)), len(parts) - 1)
