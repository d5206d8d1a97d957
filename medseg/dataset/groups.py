"""Groups: which cases belong together, so that a patient is never on both sides of a split."""

from __future__ import annotations

import csv
import logging
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from medseg.errors import InputError, Problem, UsageError
from medseg.records.case import Case

logger = logging.getLogger(__name__)

REGEX = "regex:"
BIDS = "bids"
NONE = "none"
FORMS = f"{REGEX}PATTERN, {BIDS}, {NONE}, or FILE.csv, FILE.csv:GROUP_COLUMN, FILE.csv:CASE_COLUMN:GROUP_COLUMN"
CASE_COLUMN, GROUP_COLUMN = "case", "group"
_TABLE = re.compile(r"(?P<path>.+?\.(?:csv|tsv))(?::(?P<columns>.+))?", re.IGNORECASE)
_SUBJECT = r"(?:^|_)(sub-[A-Za-z0-9]+)(?:_|$)"  # BIDS: an entity ends at the next underscore
_MAX_TABLE_BYTES = 64 * 2**20
_SHOWN = 5


@dataclass(frozen=True, slots=True)
class Groups:
    """Case id → group, for the cases that have one, and in words where that comes from; empty: every case alone."""

    of: Mapping[str, str] = field(default_factory=dict)
    source: str = ""


def find_groups(cases: Sequence[Case], spec: str | None, identical: Iterable[Sequence[str]] = ()) -> Groups:
    """The groups that are asked for, or else those of the data set's layout; identical images join theirs.

    Args:
        cases: all of them.
        spec: one of ``FORMS``, or None for ``Case.group``. "none": every case alone, identical images too.
        identical: sets of case ids that share an image.

    Raises:
        UsageError: E0001 the spec has no known form, or its expression is wrong.
        InputError: E0100 no such file; E0161 it lacks a column or a case, holds one twice, or the expression does
            not match every case. All cases are named at once.
    """
    ids = [case.id for case in cases]
    if spec == NONE:
        return Groups()
    if spec is None:
        groups = Groups({case.id: case.group for case in cases if case.group is not None}, "the data set")
        groups = groups if groups.of else Groups()
    elif spec == BIDS:
        groups = Groups(_by_expression(ids, _SUBJECT, "BIDS sub-"), "BIDS sub-")
    elif spec.startswith(REGEX):
        groups = Groups(_by_expression(ids, spec.removeprefix(REGEX), spec), spec)
    else:
        groups = _by_table(ids, spec)
    return _joined(groups, identical)


def _by_expression(ids: Sequence[str], pattern: str, source: str) -> dict[str, str]:
    try:
        expression = re.compile(pattern)
    except re.error as error:
        raise UsageError(Problem("E0001", f"--group {source}: {error}", "", "correct the expression")) from error
    if expression.groups != 1:
        found = f"--group {source} has {expression.groups} capture groups"
        raise UsageError(Problem("E0001", found, "one, around the group's name", "such as regex:(patient[0-9]+)_"))
    matches = {case: expression.search(case) for case in ids}
    groups = {case: match[1] for case, match in matches.items() if match is not None and match[1]}
    missing = [case for case in ids if case not in groups]
    if missing:
        what = f"--group {source} finds no group in {len(missing)} of {len(ids)} case ids: {_some(missing)}"
        raise InputError(Problem("E0161", what, "a match in each", "correct the expression"))
    return groups


def _by_table(ids: Sequence[str], spec: str) -> Groups:
    match = _TABLE.fullmatch(spec)
    if match is None:
        raise UsageError(Problem("E0001", f"--group {spec}", FORMS, "choose one of these"))
    path = Path(match["path"])
    columns = match["columns"].split(":") if match["columns"] else [GROUP_COLUMN]
    if len(columns) > 2 or not all(columns):
        raise UsageError(Problem("E0001", f"--group {spec}", FORMS, "name one or two columns"))
    case_column, group_column = columns if len(columns) == 2 else (CASE_COLUMN, columns[0])
    rows = _rows(path)
    header = list(rows[0]) if rows else []
    absent = [name for name in (case_column, group_column) if name not in header]
    if absent:
        what = f"{path.name} has no column {' and no column '.join(map(repr, absent))}"
        there = f"its columns: {', '.join(header) or 'none'}"
        raise InputError(Problem("E0161", what, there, f"name them: --group {path.name}:CASE_COLUMN:GROUP_COLUMN"))
    return Groups(_table_groups(ids, rows, case_column, group_column, path.name), f"{path.name}:{group_column}")


def _table_groups(
    ids: Sequence[str], rows: Sequence[Mapping[str, str]], case_column: str, group_column: str, name: str
) -> dict[str, str]:
    known, groups, twice = set(ids), dict[str, str](), []
    for row in rows:
        case, group = row[case_column], row[group_column]
        if case in known:
            twice += [case] if case in groups else []
            groups[case] = group
    without = [case for case in ids if not groups.get(case)]
    problems = []
    if twice:
        problems.append(Problem("E0161", f"{name} has {_some(twice)} more than once", "a row per case", "remove rows"))
    if without:
        what = f"{name} gives no {group_column} for {len(without)} of {len(ids)} cases: {_some(without)}"
        problems.append(Problem("E0161", what, "one for each case", "add them"))
    if problems:
        raise InputError(problems)
    logger.info("%s: %d rows name no case of the data set", name, len(rows) - len(groups))
    return groups


def _rows(path: Path) -> list[dict[str, str]]:
    """Rows of a table with a header: .tsv by tabs, .csv by commas, or by semicolons if its header has no comma.

    Blanks around values are dropped, and rows that are empty or begin with #.
    """
    try:
        if path.stat().st_size > _MAX_TABLE_BYTES:
            limit = f"at most {_MAX_TABLE_BYTES >> 20} MiB"
            raise InputError(Problem("E0161", f"{path.name} is large", limit, "is it the right file?"))
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except FileNotFoundError as error:
        raise InputError(Problem("E0100", f"{path} does not exist", "", "check the path")) from error
    except OSError as error:
        raise InputError(Problem("E0106", f"cannot read {path}: {error.strerror}", "", "check the file")) from error
    except UnicodeDecodeError as error:
        raise InputError(Problem("E0161", f"{path.name} is not UTF-8 text", "", "save it as CSV UTF-8")) from error
    lines = [line for line in lines if line.strip() and not line.startswith("#")]
    header = lines[0] if lines else ""
    delimiter = "\t" if path.suffix.lower() == ".tsv" else ";" if ";" in header and "," not in header else ","
    try:
        table = [[value.strip() for value in row] for row in csv.reader(lines, delimiter=delimiter, strict=True)]
    except csv.Error as error:
        raise InputError(Problem("E0161", f"{path.name}: {error}", "", "correct the table")) from error
    names = table[0] if table else []
    uneven = [number for number, row in enumerate(table, start=1) if len(row) != len(names)]
    if uneven or len(set(names)) < len(names):
        what = f"row {uneven[0]} has not {len(names)} values" if uneven else "two columns have the same name"
        raise InputError(Problem("E0161", f"{path.name}: {what}", "", "correct the table"))
    return [dict(zip(names, row, strict=True)) for row in table[1:]]


def _joined(groups: Groups, identical: Iterable[Sequence[str]]) -> Groups:
    """Groups whose cases share an image become one; so do cases without a group."""
    parent: dict[str, str] = {}  # of a group's name, or of a case's with a mark that no name has

    def root(name: str) -> str:
        while parent.get(name, name) != name:
            name = parent[name]
        return name

    twins = [tuple(cases) for cases in identical]
    for cases in twins:
        first, *others = (root(_name(case, groups)) for case in cases)
        for other in others:
            parent[root(other)] = first
    if not twins:
        return groups
    members: dict[str, set[str]] = defaultdict(set)
    everyone = {*groups.of, *(case for cases in twins for case in cases)}
    for case in everyone:
        members[root(_name(case, groups))].add(groups.of.get(case, case))
    joined = {case: " + ".join(sorted(members[root(_name(case, groups))])) for case in everyone}
    source = f"{groups.source}, and identical images" if groups.source else "identical images"
    return Groups(dict(sorted(joined.items())), source)


def _name(case: str, groups: Groups) -> str:
    return groups.of.get(case, f"\0{case}")


def _some(cases: Iterable[str]) -> str:
    names = sorted(set(cases))
    return ", ".join(names[:_SHOWN]) + (f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else "")
