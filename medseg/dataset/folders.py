"""Two folders: images in one, labels in the other, paired by their names without ending."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from medseg.dataset.naming import channel_of, composed, ignored, visible
from medseg.dataset.pairing import ChannelFiles, Files, Pairing, by_key, is_image, pair, renamed
from medseg.errors import InputError, Problem
from medseg.imaging.dicom import is_dicom
from medseg.imaging.volumes import strip_ending

_SEPARATORS = "_-. "


def pair_folders(
    images: Path, labels: Path, channels: Sequence[ChannelFiles], label_end: str, *, allow_missing: bool
) -> Pairing:
    """Pair the files of two folders, not of folders within them, by name.

    Of an image's name the end that tells its channel is taken off, of a label's name ``label_end``. Without given
    ends, images are told apart by nnU-Net's numbers (``_0000``), else by the channels' names (``_T1``); else, and if
    there is only one channel, the whole name counts, and every file holds all channels. Where there are folders in
    ``images`` and no image files, each of them is a case with one DICOM series.

    Raises:
        InputError: E0100 there is no such folder; E0146 it holds no images.
    """
    for folder in (images, labels):
        if not folder.is_dir():
            raise InputError(Problem("E0100", f"{folder} is no folder", "", "check the path"))
    stems, what = _image_stems(images)
    ends, note = _ends([stem for stem, _ in stems], channels)
    found = [by_key(_cut(stems, end)) for end in ends]
    label_files = [(strip_ending(path.name), path) for path in visible(labels) if is_image(path)]
    files = Files(tuple(found), by_key(_cut(label_files, label_end)))
    names = [channel.name for channel in channels] if len(ends) > 1 else [", ".join(c.name for c in channels)]
    cases, problems = pair(files, names, allow_missing=allow_missing and len(ends) > 1)
    taken = {path for channel in (*found, files.labels) for paths in channel.values() for path in paths}
    for folder in (images, labels):
        others = [p.name for p in visible(folder) if p not in taken]
        problems += ignored(folder, others, "files with the ends that were named")
    notes = [f"{what} in {images}, labels in {labels}", note]
    notes += [f"names of labels end with {label_end}"] if label_end else []
    keys = {*files.labels}.union(*found)
    one_file = len(ends) < len(channels)
    return Pairing(tuple(cases), tuple(problems), (*notes, *renamed(cases, keys)), one_file)


def _image_stems(folder: Path) -> tuple[list[tuple[str, Path]], str]:
    entries = visible(folder)
    stems = [(strip_ending(path.name), path) for path in entries if is_image(path)]
    if stems:
        return stems, "image files"
    series = [(path.name, path) for path in entries if path.is_dir() and is_dicom(path)]
    if not series:
        raise InputError(Problem("E0146", f"no images in {folder}", "", "check the folder"))
    return series, "folders with a DICOM series each"


def _cut(stems: Sequence[tuple[str, Path]], end: str) -> list[tuple[str, Path]]:
    return [(stem.removesuffix(end), path) for stem, path in stems if stem.endswith(end) and stem != end]


def _ends(stems: Sequence[str], channels: Sequence[ChannelFiles]) -> tuple[list[str], str]:
    """The ends of the names by channel, or a single one that all share, and how they were found."""
    given = [channel.end for channel in channels]
    if any(end is not None for end in given):
        ends = [end if end is not None else f"_{c.name}" for c, end in zip(channels, given, strict=True)]
        return ends, _said(channels, ends)
    numbers = [found[1] if (found := channel_of(stem)) else None for stem in stems]
    if all(number is not None and number < len(channels) for number in numbers):
        if len(channels) > 1 and not any(numbers):  # as nnU-Net names colour pictures
            return ["_0000"], f"names of images end with _0000; {_all_in_one(channels)}"
        ends = [f"_{number:04d}" for number in range(len(channels))]
        return ends, _said(channels, ends)
    if len(channels) > 1:
        named = [_end_of_name(stems, channel.name) for channel in channels]
        ends = [end for end in named if end is not None]
        if len(ends) == len(channels):
            return ends, _said(channels, ends)
    return [""], _all_in_one(channels)


def _all_in_one(channels: Sequence[ChannelFiles]) -> str:
    return f"each image file holds {', '.join(channel.name for channel in channels)}"


def _end_of_name(stems: Sequence[str], name: str) -> str | None:
    """``_T1`` or the like if names end so; in one and the same way."""
    ends = {
        stem[-len(name) - 1 :] for stem in map(composed, stems) if stem.endswith(name) and len(stem) > len(name) + 1
    }
    separated = sorted(end for end in ends if end[0] in _SEPARATORS)
    return separated[0] if len(separated) == 1 else None


def _said(channels: Sequence[ChannelFiles], ends: Sequence[str]) -> str:
    return "names of images end with " + ", ".join(f"{end} for {c.name}" for c, end in zip(channels, ends, strict=True))
