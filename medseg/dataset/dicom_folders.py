"""DICOM folders: which folders of an input stand for an image each."""

from __future__ import annotations

from pathlib import Path

from medseg.dataset.naming import visible
from medseg.imaging.dicom import SNIFFED, is_dicom, split_path
from medseg.imaging.dicom_header import looks_like_dicom
from medseg.imaging.volumes import file_ending


def dicom_inputs(path: Path) -> list[Path]:
    """The folder itself if DICOM files lie in it, else the folders in it that hold some; none beside other images.

    ``PATH#…`` means DICOM whatever else is there, and one series of each (see ``medseg.imaging.dicom``).
    """
    folder, marked = split_path(path)
    if not folder.is_dir():
        return []
    if folder.name in ("", ".."):
        folder = folder.resolve()
    files = [entry for entry in visible(folder) if entry.is_file()]
    if marked is None and any(file_ending(entry.name) not in (None, ".dcm") for entry in files):
        return []
    if any(looks_like_dicom(entry) for entry in files[:SNIFFED]):
        found = [folder]
    else:
        found = [entry for entry in visible(folder) if entry.is_dir() and is_dicom(entry)]
    return found if marked is None else [entry.with_name(f"{entry.name}#{marked}") for entry in found]
