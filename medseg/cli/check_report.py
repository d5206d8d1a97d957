"""The printed report of a check: what the data set is, what is wrong with it, grouped by kind, and what to do next."""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Sequence
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING

from medseg.errors import CODES, Problem, escape

if TYPE_CHECKING:
    from medseg.pipeline.fix import FixReport
    from medseg.records.check import CheckRecord, Spread

SHOWN = 4
_LAYOUTS = {"nnunet": "nnU-Net v2", "msd": "Medical Segmentation Decathlon", "bids": "BIDS"}


def print_description(record: CheckRecord) -> None:
    """What kind of data was read: channels, sizes, spacing, orientation, labels."""
    if not record.files_read:
        return
    layout = _LAYOUTS.get(record.layout or "", record.layout)
    print(f"{layout} data set" if layout else "Images without a data set")
    rows = [("read", f"{_count(record.cases, 'case')}, {_count(record.files_read, 'file')}")]
    rows += [("channels", ", ".join(record.channels))] if record.channels else []
    rows += [("size", _range(record.shape, ""))] if record.shape else []
    rows += [("spacing", _range(record.spacing_mm, " mm"))] if record.spacing_mm else []
    if record.orientations:
        rows.append(("stored as", ", ".join(f"{name} ({count})" for name, count in record.orientations.items())))
    for label in record.labels[:12]:
        share = "in every case" if label.cases == record.cases else f"in {_count(label.cases, 'case')}"
        rows.append((f"label {label.value}", f"{label.name}, {share}"))
    if len(record.labels) > 12:
        rows.append(("", f"and {len(record.labels) - 12} more labels"))
    floats = sum(count for kind, count in record.label_types.items() if kind.startswith("float"))
    if floats:
        rows.append(("note", f"{_count(floats, 'label file')} in floating point; --fix stores whole numbers"))
    for name, value in rows:
        print(escape(f"  {name:<10} {value}"))
    print()


def print_groups(problems: Sequence[Problem], *, all_of_them: bool) -> None:
    """Every kind of problem with its cases, errors first, then the action; long lists are cut short."""
    for code, group in groupby(sorted(problems, key=lambda p: (p.severity, p.code)), key=lambda p: p.code):
        rows = list(group)
        cases = len({problem.case for problem in rows if problem.case is not None})
        where = f" in {_count(cases, 'case')}" if cases else ""
        print(f"{rows[0].severity} {code}  {CODES[code]}{where}")
        width = min(max((len(escape(problem.case or "")) for problem in rows), default=0), 40)
        shown = rows if all_of_them or len(rows) <= SHOWN + 1 else rows[:SHOWN]
        for problem in shown:
            against = f" (expected: {problem.expected})" if problem.expected else ""
            print(escape(f"  {problem.case or '':<{width}}  {problem.measured}{against}").rstrip())
        if len(rows) > len(shown):
            print(f"  … and {len(rows) - len(shown)} more (--all shows them)")
        for action in dict.fromkeys(problem.action for problem in shown if problem.action):
            print(escape(f"  → {action}"))
        print()


def print_verdict(record: CheckRecord, dataset: Path) -> None:
    """The last lines: how much is wrong, and what to do next."""
    faulty = {problem.case for problem in record.problems if problem.severity == "error" and problem.case}
    where = f" in {_count(len(faulty), 'case')}" if faulty else ""
    summary = f"{_count(record.errors, 'error')}{where}, {_count(record.warnings, 'warning')}"
    what = "complete case" if record.layout else "image"
    print(f"{_count(record.cases, what)}, {_count(record.files_read, 'file')} read: {summary}")
    mendable = sum(problem.fixable for problem in record.problems)
    name = shlex.quote(str(dataset))
    if record.layout is None and not record.errors:
        return
    if mendable and record.layout:
        print(escape(f"Next: medseg check {name} --fix COPY mends {mendable} of these problems in a corrected copy"))
        if record.errors > sum(problem.fixable for problem in record.problems if problem.severity == "error"):
            print("      Cases with other errors are left out of it; or correct them, each says how")
    elif record.errors:
        print("Next: correct the errors, each says how; docs/errors.md explains every code")
    else:
        print(escape(f"Next: medseg run {name} --run RUN --time-budget 15m"))


def print_fixed(report: FixReport, copy: Path, *, all_of_them: bool) -> None:
    """What was done to which case, which were left out, and what is left in the copy."""
    changes = [f"  {case.id}: {change}" for case in report.mended for change in case.changes]
    print(f"Mended {_count(len(report.mended), 'case')}, copied {len(report.cases) - len(report.mended)} unchanged")
    _print_lines(changes, all_of_them=all_of_them)
    if report.left_out:
        cases = {problem.case for problem in report.left_out}
        print(f"Left out {_count(len(cases), 'case')}")
        _print_lines((f"  {p.case}: {p.code} {p.measured}" for p in report.left_out), all_of_them=all_of_them)
    print()
    left = len(report.after.problems)
    if left:
        print("Left in the copy:")
        print_groups(report.after.problems, all_of_them=all_of_them)
    errors = len(report.after.errors)
    summary = f"{_count(errors, 'error')}, {_count(left - errors, 'warning')}"
    print(escape(f"{copy}: {_count(len(report.after.cases), 'complete case')}, {summary}"))


def _print_lines(lines: Iterable[str], *, all_of_them: bool) -> None:
    rows = list(lines)
    shown = rows if all_of_them or len(rows) <= 2 * SHOWN + 1 else rows[: 2 * SHOWN]
    for row in shown:
        print(escape(row))
    if len(rows) > len(shown):
        print(f"  … and {len(rows) - len(shown)} more (--all shows them)")


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"


def _range(spread: Spread, unit: str) -> str:
    if spread.smallest == spread.largest:
        return f"{_joined(spread.median)}{unit} (z × y × x)"
    between = f"{_joined(spread.smallest)} to {_joined(spread.largest)}"
    return f"{_joined(spread.median)}{unit} (z × y × x, median; {between})"


def _joined(values: Sequence[float]) -> str:
    return " × ".join(f"{value:.4g}" for value in values)
