"""Record: the base of everything that is read from or written to JSON. Frozen, validated, closed."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from medseg.artefacts import commit_json
from medseg.errors import InputError, IntegrityError, Problem

MAX_JSON_BYTES = 256 * 2**20


class Record(BaseModel):
    """A frozen JSON record; unknown fields are refused, numbers are finite."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, ser_json_inf_nan="strings")

    def to_json(self) -> dict[str, Any]:
        """The record as plain JSON values."""
        return self.model_dump(mode="json")


R = TypeVar("R", bound=Record)


def read_json(path: Path) -> Any:
    """Read a JSON file that must be strict: one value, no duplicate keys, bounded size.

    Raises:
        InputError: E0100 not found.
        IntegrityError: E0711 not JSON, duplicate keys, or too large.
    """
    path = Path(path)
    try:
        if path.stat().st_size > MAX_JSON_BYTES:
            raise IntegrityError(Problem("E0711", f"{path.name} is larger than {MAX_JSON_BYTES >> 20} MiB"))
        return json.loads(path.read_bytes(), object_pairs_hook=_unique, parse_constant=_refuse_constant)
    except FileNotFoundError as error:
        raise InputError(Problem("E0100", f"{path} does not exist", "", "check the path")) from error
    except OSError as error:
        raise InputError(Problem("E0106", f"cannot read {path}: {error.strerror}", "", "check the file")) from error
    except (ValueError, RecursionError) as error:
        raise IntegrityError(Problem("E0711", f"{path} is not strict JSON: {error}", "", "repair the file")) from error


def read_record(path: Path, kind: type[R]) -> R:
    """Read a record; every field that does not follow the schema is named in the error.

    Raises:
        InputError: E0100 not found.
        IntegrityError: E0711 not JSON, or not the schema of ``kind``.
    """
    return parse_record(read_json(path), kind, Path(path).name)


def parse_record(value: Any, kind: type[R], name: str) -> R:
    """Validate a JSON value as a record; ``name`` says in errors where it came from."""
    try:
        return kind.model_validate(value)
    except ValidationError as error:
        problems = [
            Problem("E0711", f"{name}: {'.'.join(str(p) for p in e['loc']) or 'file'}: {e['msg']}", "", "correct it")
            for e in error.errors(include_url=False)[:20]
        ]
        raise IntegrityError(problems) from error


def write_record(path: Path, record: Record) -> str:
    """Commit a record as JSON and return the file's SHA-256."""
    return commit_json(path, record.to_json())


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        twice = sorted(key for key, count in Counter(key for key, _ in pairs).items() if count > 1)
        raise ValueError(f"duplicate keys {twice[:20]}")
    return result


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"{name} is not JSON")


def without_defaults(record: BaseModel, values: dict[str, Any], names: tuple[str, ...]) -> dict[str, Any]:
    """What is written of a record: of the fields in ``names`` only those that were chosen otherwise."""
    fields = type(record).model_fields
    return {key: v for key, v in values.items() if key not in names or getattr(record, key) != fields[key].default}
