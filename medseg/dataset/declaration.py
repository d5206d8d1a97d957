"""Declaration: what a ``dataset.json`` or a list of cases says, in nnU-Net v2's, the Decathlon's or our words.

All are validated whole, so that every mistake in the file is named at once. Fields that a form does not define are
left alone: people keep licences and references there. Sources: nnU-Net documentation/dataset_format.md and
region_based_training.md; the Decathlon's dataset.json files.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path, PurePosixPath
from typing import Annotated, Any, Self, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from medseg.dataset.table import IGNORE_NAME, MAX_BYTES, read_table
from medseg.errors import InputError, IntegrityError, Problem
from medseg.imaging.volumes import IMAGE_ENDINGS
from medseg.records.base import read_json
from medseg.records.task import Task

FILE_NAME = "dataset.json"
LIST_ENDINGS = (".csv", ".json")
_LONGEST = 300  # characters of a message that quotes the file

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
    """nnU-Net v2. ``missing_channels`` is ours: numbers of the channels that a case does not have."""

    channel_names: dict[str, str]
    labels: dict[str, _Value | list[_Value]]
    file_ending: str
    overwrite_image_reader_writer: str | None = None
    regions_class_order: list[_Value] | None = None
    dataset: dict[str, ExplicitCase] | None = None
    missing_channels: dict[str, list[_Value]] = Field(default_factory=dict)


class MsdPair(_Declaration):
    """One training case of the Decathlon."""

    image: str
    label: str


class MsdDeclaration(_Declaration):
    """Medical Segmentation Decathlon: label names by value, a 4D image holds one volume per modality.

    A label called ``ignore`` and the regions are understood as in a list of cases.
    """

    modality: dict[str, str]
    labels: dict[str, str]
    regions: dict[str, list[_Value]] | None = None
    regions_class_order: list[_Value] | None = None
    training: list[MsdPair]


class ListedCase(BaseModel):
    """One entry of a list: an image per channel, None where the case has none; or one image with all channels."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    images: list[str | None] | None = None
    image: str | None = None
    label: str | None = None
    group: Annotated[str, Field(min_length=1, max_length=200)] | None = None

    @model_validator(mode="after")
    def _check(self) -> Self:
        if (self.images is None) == (self.image is None):
            raise ValueError("give either images, one per channel, or one image that holds all channels")
        return self


class ListDeclaration(_Declaration):
    """A list of cases. Label values by name, as in nnU-Net; regions are given apart."""

    channel_names: dict[str, str]
    labels: dict[str, _Value]
    regions: dict[str, list[_Value]] | None = None
    regions_class_order: list[_Value] | None = None
    cases: dict[str, ListedCase]
    unused_columns: list[str] = Field(default_factory=list)


Declaration = NnunetDeclaration | MsdDeclaration | ListDeclaration
D = TypeVar("D", bound=_Declaration)


def read_declaration(path: Path) -> Declaration:
    """Read and validate the declaration of a data set: a list file, or ``dataset.json`` in a folder.

    Raises:
        InputError: E0100 there is none; E0145 every field that is missing or wrong; E0106 unsupported file ending.
    """
    if path.is_dir():
        if not (path / FILE_NAME).exists():
            action = "write a list of its cases: medseg dataset --help; or give a folder that has one"
            raise InputError(Problem("E0100", f"no {FILE_NAME} in {path}", "", action))
        return read_declaration_file(path / FILE_NAME)
    if path.is_file() and path.suffix.lower() not in LIST_ENDINGS:
        raise InputError(
            Problem("E0106", f"{path.name} is no data set", "a folder, or a list: .csv, .json", "give one")
        )
    declaration = read_declaration_file(path)
    if path.name != FILE_NAME and not isinstance(declaration, ListDeclaration):
        raise InputError(_invalid("no cases", "a list, or the folder of a dataset.json", path.name))
    return declaration


def read_declaration_file(path: Path) -> Declaration:
    """Like ``read_declaration``, of a file by any name, wherever it lies.

    Raises:
        InputError: E0100, E0106, E0140, E0145.
    """
    if path.suffix.lower() == ".csv":
        return _parse(read_table(path), ListDeclaration, path.name)
    try:
        if path.is_file() and path.stat().st_size > MAX_BYTES:
            raise InputError(_invalid(f"larger than {MAX_BYTES >> 20} MiB", "", path.name))
        value = read_json(path)
    except IntegrityError as error:
        action = f"correct {path.name}"
        raise InputError([Problem("E0145", p.measured[:_LONGEST], "", action) for p in error.problems]) from error
    if not isinstance(value, dict):
        raise InputError(_invalid("not an object", "", path.name))
    if "cases" in value and "file_ending" not in value:
        return _parse(value, ListDeclaration, path.name)
    if "file_ending" in value or "training" not in value:
        return _check_ending(_parse(value, NnunetDeclaration, path.name))
    return _parse(value, MsdDeclaration, path.name)


def _parse(value: dict[str, Any], kind: type[D], file: str) -> D:
    try:
        return kind.model_validate(value)
    except ValidationError as error:
        raise InputError(
            [
                _invalid(f"{'.'.join(str(part)[:80] for part in e['loc'])}: {e['msg']}", "", file)
                for e in error.errors(include_url=False)[:20]
            ]
        ) from error


def _check_ending(declaration: NnunetDeclaration) -> NnunetDeclaration:
    if declaration.file_ending not in IMAGE_ENDINGS:
        found = f"{FILE_NAME}: file_ending {declaration.file_ending[:80]!r}"
        raise InputError(Problem("E0106", found, f"one of {' '.join(IMAGE_ENDINGS)}", "convert the images"))
    return declaration


def task_of(declaration: Declaration, file: str = FILE_NAME) -> Task:
    """The task that a declaration describes; ``file`` is how messages call it.

    Raises:
        InputError: E0145 channels are not numbered from 0, background 0 is missing, values or regions clash.
    """
    try:
        return _task_of(declaration)
    except InputError as error:
        raise InputError(
            replace(p, measured=p.measured.replace(FILE_NAME, file, 1), action=p.action.replace(FILE_NAME, file))
            for p in error.problems
        ) from error


def _task_of(declaration: Declaration) -> Task:
    msd = isinstance(declaration, MsdDeclaration)
    names = declaration.modality if isinstance(declaration, MsdDeclaration) else declaration.channel_names
    numbers = [str(n) for n in range(len(names))]
    if sorted(names) != sorted(numbers):
        field = "modality" if msd else "channel_names"
        raise InputError(_invalid(f"{field} has the keys {sorted(names)[:20]}", "0, 1, 2 …"))
    if isinstance(declaration, NnunetDeclaration):
        labels = _nnunet_labels(declaration)
    else:
        values = _msd_values(declaration) if isinstance(declaration, MsdDeclaration) else dict(declaration.labels)
        labels = _scheme(values, declaration.regions, declaration.regions_class_order)
    channels = [{"name": names[n]} for n in numbers]
    try:
        return Task.model_validate({"name": declaration.name[:200], "channels": channels, **labels})
    except ValidationError as error:
        raise InputError([_invalid(e["msg"]) for e in error.errors(include_url=False)[:20]]) from error


def _msd_values(declaration: MsdDeclaration) -> dict[str, int]:
    """Values by name; numbers that are too large are refused by the task."""
    wrong = [key for key in declaration.labels if not (key.isascii() and key.isdecimal() and len(key) < 10)]
    if wrong:
        raise InputError(_invalid(f"labels has the keys {wrong[:20]}", 'value: name, such as "1": "liver"'))
    if len(set(declaration.labels.values())) < len(declaration.labels):
        raise InputError(_invalid("two labels have the same name", "different names"))
    return {name: int(value) for value, name in declaration.labels.items()}


def _scheme(values: dict[str, int], regions: dict[str, list[int]] | None, order: list[int] | None) -> dict[str, Any]:
    """Labels by value, one of them called ``ignore`` apart, and regions that are given apart."""
    ignore = values.pop(IGNORE_NAME, None)
    if len(set(values.values())) < len(values):
        raise InputError(_invalid("two labels have the same value", "one name per value"))
    found = sorted((value, name) for name, value in values.items())
    result: dict[str, Any] = {"labels": [{"name": n, "value": v} for v, n in found], "ignore_value": ignore}
    if regions:
        _check_order(order, set(values.values()))
        named = [{"name": name, "values": of_region} for name, of_region in regions.items()]
        result |= {"regions": named, "regions_order": order}
    return result


def _check_order(order: list[int] | None, values: set[int]) -> None:
    if order is None or not set(order) <= values:
        expected = "the label value to write for each region, in order"
        raise InputError(_invalid(f"regions_class_order is {order}", expected))


def _nnunet_labels(declaration: NnunetDeclaration) -> dict[str, Any]:
    """Labels, and regions if one entry has more than one value: then every foreground entry is a region."""
    entries = {name: [v] if isinstance(v, int) else v for name, v in declaration.labels.items()}
    empty = [name for name, values in entries.items() if not values]
    if empty:
        raise InputError(_invalid(f"labels {empty[:20]} have no values"))
    ignore = entries.pop(IGNORE_NAME, None)
    if ignore is not None and len(ignore) > 1:
        raise InputError(_invalid(f"ignore has the values {ignore[:20]}", "one value"))
    single = [(values[0], name) for name, values in entries.items() if len(values) == 1]
    named = dict(single)
    if len(named) < len(single):
        raise InputError(_invalid("two labels have the same value", "one name per value"))
    values = sorted({v for values in entries.values() for v in values})
    result: dict[str, Any] = {
        "labels": [{"name": named.get(v, f"label_{v}"), "value": v} for v in values],
        "ignore_value": ignore[0] if ignore else None,
    }
    if any(len(values) > 1 for values in entries.values()):
        order = declaration.regions_class_order
        _check_order(order, set(values))
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
        raise InputError(Problem("E0142", f"path {relative[:_LONGEST]!r}", expected, "move or link the files below it"))
    return root / pure


def _invalid(measured: str, expected: str = "", file: str = FILE_NAME) -> Problem:
    return Problem("E0145", f"{file}: {measured}"[:_LONGEST], expected, f"correct {file}")
