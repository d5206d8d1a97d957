"""Declaration: what a ``dataset.json`` says, in nnU-Net v2's and in the Medical Segmentation Decathlon's words.

Both are validated whole, so that every mistake in the file is named at once. Fields that neither defines are left
alone: people keep licences and references there. Sources: nnU-Net documentation/dataset_format.md and
region_based_training.md; the Decathlon's dataset.json files.
"""

from __future__ import annotations

from pathlib import Path, PurePosixPath
from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from medseg.errors import InputError, IntegrityError, Problem
from medseg.imaging.volumes import IMAGE_ENDINGS
from medseg.records.base import read_json
from medseg.records.task import Task

FILE_NAME = "dataset.json"
IGNORE_NAME = "ignore"

_Value = Annotated[int, Field(strict=True, ge=0, le=65535)]


class _Declaration(BaseModel):
    model_config = ConfigDict(frozen=True, extra="ignore", strict=True)

    name: str = "dataset"
    numTraining: int | None = None  # noqa: N815 - the file's word


class ExplicitCase(_Declaration):
    """One entry of nnU-Net's optional ``dataset``: paths relative to the folder of dataset.json."""

    images: list[str]
    label: str


class NnunetDeclaration(_Declaration):
    """nnU-Net v2."""

    channel_names: dict[str, str]
    labels: dict[str, _Value | list[_Value]]
    file_ending: str
    overwrite_image_reader_writer: str | None = None
    regions_class_order: list[_Value] | None = None
    dataset: dict[str, ExplicitCase] | None = None


class MsdPair(_Declaration):
    """One training case of the Decathlon."""

    image: str
    label: str


class MsdDeclaration(_Declaration):
    """Medical Segmentation Decathlon: label names by value, a 4D image holds one volume per modality."""

    modality: dict[str, str]
    labels: dict[str, str]
    training: list[MsdPair]


D = TypeVar("D", bound=_Declaration)


def read_declaration(root: Path) -> NnunetDeclaration | MsdDeclaration:
    """Read and validate ``root/dataset.json``: nnU-Net v2 if it has ``file_ending``, else the Decathlon's.

    Raises:
        InputError: E0100 there is none; E0145 every field that is missing or wrong; E0106 unsupported file ending.
    """
    path = root / FILE_NAME
    if root.is_dir() and not path.exists():
        action = "point to an nnU-Net v2 or Medical Segmentation Decathlon folder"
        raise InputError(Problem("E0100", f"no {FILE_NAME} in {root}", "", action))
    return read_declaration_file(path)


def read_declaration_file(path: Path) -> NnunetDeclaration | MsdDeclaration:
    """Like ``read_declaration``, of a file by any name, wherever it lies.

    Raises:
        InputError: E0100, E0106, E0145.
    """
    try:
        value = read_json(path)
    except IntegrityError as error:
        raise InputError([_invalid(problem.measured) for problem in error.problems]) from error
    if not isinstance(value, dict):
        raise InputError(_invalid(f"{FILE_NAME} is not an object"))
    if "file_ending" in value or "training" not in value:
        return _check_ending(_parse(value, NnunetDeclaration))
    return _parse(value, MsdDeclaration)


def _parse(value: dict[str, Any], kind: type[D]) -> D:
    try:
        return kind.model_validate(value)
    except ValidationError as error:
        raise InputError(
            [
                _invalid(f"{FILE_NAME}: {'.'.join(str(part) for part in e['loc'])}: {e['msg']}")
                for e in error.errors(include_url=False)[:20]
            ]
        ) from error


def _check_ending(declaration: NnunetDeclaration) -> NnunetDeclaration:
    if declaration.file_ending not in IMAGE_ENDINGS:
        found = f"{FILE_NAME}: file_ending {declaration.file_ending!r}"
        raise InputError(Problem("E0106", found, f"one of {' '.join(IMAGE_ENDINGS)}", "convert the images"))
    return declaration


def task_of(declaration: NnunetDeclaration | MsdDeclaration) -> Task:
    """The task that a declaration describes.

    Raises:
        InputError: E0145 channels are not numbered from 0, background 0 is missing, values or regions clash.
    """
    nnunet = isinstance(declaration, NnunetDeclaration)
    names = declaration.channel_names if isinstance(declaration, NnunetDeclaration) else declaration.modality
    numbers = [str(n) for n in range(len(names))]
    if sorted(names) != sorted(numbers):
        field = "channel_names" if nnunet else "modality"
        raise InputError(_invalid(f"{FILE_NAME}: {field} has the keys {sorted(names)}", "0, 1, 2 …"))
    labels = _nnunet_labels(declaration) if isinstance(declaration, NnunetDeclaration) else _msd_labels(declaration)
    channels = [{"name": names[n]} for n in numbers]
    try:
        return Task.model_validate({"name": declaration.name[:200], "channels": channels, **labels})
    except ValidationError as error:
        raise InputError([_invalid(f"{FILE_NAME}: {e['msg']}") for e in error.errors(include_url=False)]) from error


def _msd_labels(declaration: MsdDeclaration) -> dict[str, Any]:
    wrong = [key for key in declaration.labels if not key.isdecimal()]
    if wrong:
        raise InputError(_invalid(f"{FILE_NAME}: labels has the keys {wrong}", 'value: name, such as "1": "liver"'))
    found = sorted((int(value), name) for value, name in declaration.labels.items())
    return {"labels": [{"name": name, "value": value} for value, name in found]}


def _nnunet_labels(declaration: NnunetDeclaration) -> dict[str, Any]:
    """Labels, and regions if one entry has more than one value: then every foreground entry is a region."""
    entries = {name: [v] if isinstance(v, int) else v for name, v in declaration.labels.items()}
    empty = [name for name, values in entries.items() if not values]
    if empty:
        raise InputError(_invalid(f"{FILE_NAME}: labels {empty} have no values"))
    ignore = entries.pop(IGNORE_NAME, None)
    if ignore is not None and len(ignore) > 1:
        raise InputError(_invalid(f"{FILE_NAME}: ignore has the values {ignore}", "one value"))
    single = [(values[0], name) for name, values in entries.items() if len(values) == 1]
    named = dict(single)
    if len(named) < len(single):
        raise InputError(_invalid(f"{FILE_NAME}: two labels have the same value", "one name per value"))
    values = sorted({v for values in entries.values() for v in values})
    result: dict[str, Any] = {
        "labels": [{"name": named.get(v, f"label_{v}"), "value": v} for v in values],
        "ignore_value": ignore[0] if ignore else None,
    }
    if any(len(values) > 1 for values in entries.values()):
        order = declaration.regions_class_order
        if order is None or not set(order) <= set(values):
            expected = "the label value to write for each region, in order"
            raise InputError(_invalid(f"{FILE_NAME}: regions_class_order is {order}", expected))
        regions = [{"name": name, "values": values} for name, values in entries.items() if values != [0]]
        result |= {"regions": regions, "regions_order": order}
    return result


def inside(root: Path, relative: str) -> Path:
    """``root / relative``, taken literally: no variables, nothing absolute, no ``..``.

    Raises:
        InputError: E0142 the path would leave the folder.
    """
    pure = PurePosixPath(relative)
    if not relative or pure.is_absolute() or ".." in pure.parts or "\\" in relative or "\0" in relative:
        expected = "a path inside the folder of dataset.json"
        raise InputError(Problem("E0142", f"path {relative!r}", expected, "move or link the files below it"))
    return root / pure


def _invalid(measured: str, expected: str = "") -> Problem:
    return Problem("E0145", measured, expected, f"correct {FILE_NAME}")
