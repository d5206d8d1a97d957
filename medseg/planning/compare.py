"""Compare: what differs between two plans, field by field."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from medseg.planning.wording import number
from medseg.records.plan import Plan

ABSENT = "–"


def plan_differences(one: Plan, other: Plan) -> list[tuple[str, str, str]]:
    """Rows (field, value in ``one``, value in ``other``) of all fields that differ; the reasons follow from them.

    A configuration that only one of them has is a single row.
    """
    left, right = _fields(one), _fields(other)
    for name in one.configurations.keys() ^ other.configurations.keys():
        for fields in (left, right):
            there = [field for field in fields if field.startswith(f"{name} ")]
            for field in there:
                del fields[field]
            if there:
                fields[name] = "planned"
    rows = []
    for field in dict.fromkeys((*left, *right)):
        a, b = left.get(field, ABSENT), right.get(field, ABSENT)
        if a != b:
            rows.append((field, *_texts(a, b)))
    return rows


def _fields(plan: Plan) -> dict[str, Any]:
    value = plan.to_json()
    configurations = value.pop("configurations")
    for without in ("reasons", "schema_version"):
        del value[without]
    fields = dict(_leaves(value, ""))
    for name, configuration in configurations.items():
        del configuration["name"]
        fields |= {f"{name} {path}": leaf for path, leaf in _leaves(configuration, "")}
    return fields


def _leaves(value: Any, path: str) -> Iterator[tuple[str, Any]]:
    """Values by their dotted path; lists of numbers stay whole."""
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from _leaves(inner, f"{path}.{key}" if path else key)
    elif isinstance(value, list) and any(isinstance(inner, dict) for inner in value):
        for index, inner in enumerate(value):
            yield from _leaves(inner, f"{path}.{index}")
    else:
        yield path, value


def _texts(a: Any, b: Any) -> tuple[str, str]:
    """Both in short; in full where they differ only in digits that short leaves out."""
    short = _text(a), _text(b)
    return short if short[0] != short[1] else (str(a), str(b))


def _text(value: Any) -> str:
    if isinstance(value, bool) or value is None:
        return str(value).lower()
    if isinstance(value, int | float):
        return number(value)
    if isinstance(value, list) and value and isinstance(value[0], list):
        return " ".join("×".join(_text(inner) for inner in group) for group in value)
    if isinstance(value, list):
        return " ".join(_text(inner) for inner in value)
    return str(value)
