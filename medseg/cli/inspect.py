"""``medseg inspect``: what an image file or a folder holds."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from medseg.cli import console

if TYPE_CHECKING:
    from medseg.pipeline.inspect import Found

HELP = "show images: grid, type, values, DICOM series"
DESCRIPTION = (
    "Read an image, a folder of images or DICOM folders and show the format, shape, spacing, orientation, voxel type "
    "and range of values of each. Of a DICOM folder every series is listed with its number: FOLDER#2 is the second. "
    "Descriptions come from the DICOM headers and may hold names. Exit code 0: all is readable; 3: something is not."
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the command."""
    parser.add_argument("path", type=Path, metavar="PATH", help="image, folder, or FOLDER#SERIES")
    parser.add_argument("--json", action="store_true", help="print a list of objects as JSON")


def main(arguments: argparse.Namespace) -> int:
    """Run the command."""
    from medseg.artefacts import json_bytes
    from medseg.errors import InputError
    from medseg.pipeline.inspect import inspect

    rows: list[dict[str, Any]] = []
    refused = False
    for found in inspect(arguments.path):
        refused |= any(problem.severity == "error" for problem in found.problems)
        if arguments.json:
            rows.append(_row(found))
        else:
            print(_text(found), flush=True)
            console.print_problems(found.problems)
    if arguments.json:
        print(json_bytes(rows).decode())
    return InputError.exit_code if refused else 0


def _row(found: Found) -> dict[str, Any]:
    from dataclasses import fields

    row = {field.name: getattr(found, field.name) for field in fields(found)}
    return row | {"path": str(found.path), "problems": [str(problem) for problem in found.problems]}


def _text(found: Found) -> str:
    from medseg.errors import escape

    name = found.path.name or str(found.path)
    if found.number is not None and "#" not in name:
        name += f"#{found.number}"
    parts = [name, found.file_format]
    if found.files is not None:
        words = [found.modality or "", f"{found.files} files", repr(found.description) if found.description else ""]
        parts.append(" ".join(word for word in words if word))
    if found.shape is None or found.spacing_mm is None:
        return escape("  ".join([*parts, "cannot be read"]))
    channels = f"{found.channels} × " if found.channels != 1 else ""
    parts.append(channels + " × ".join(map(str, found.shape)))
    parts.append(" × ".join(f"{size:.4g}" for size in found.spacing_mm) + " mm")
    parts.append(f"{found.axes} (z, y, x)")
    values = "nothing finite" if found.lowest is None else f"{found.lowest:.6g} to {found.highest:.6g}"
    return escape("  ".join([*parts, f"{found.voxel_type} {values}"]))
