"""``medseg check``: read a whole data set and list everything that is wrong with it."""

from __future__ import annotations

import argparse
from pathlib import Path

from medseg.cli import console, options

HELP = "find everything that is wrong with a data set"
DESCRIPTION = (
    "Read every file of a data set once and list all problems: missing files, grids that do not match, undeclared or "
    "fractional labels, damaged files, and more. Exit code 0: usable; 3: errors were found."
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the command."""
    parser.add_argument("dataset", type=Path, metavar="DATASET", help="nnU-Net v2 or Decathlon folder")
    options.add_workers(parser)
    parser.add_argument("--json", action="store_true", help="print the report as JSON")


def main(arguments: argparse.Namespace) -> int:
    """Run the command."""
    from medseg.artefacts import json_bytes
    from medseg.dataset.check import check_dataset
    from medseg.errors import InputError

    report = check_dataset(arguments.dataset, arguments.workers, console.make_progress(arguments.progress))
    if arguments.json:
        rows = [
            {
                "severity": p.severity,
                "code": p.code,
                "case": p.case,
                "measured": p.measured,
                "expected": p.expected,
                "action": p.action,
            }
            for p in report.problems
        ]
        print(json_bytes({"cases": len(report.cases), "files_read": report.files_read, "problems": rows}).decode())
    else:
        console.print_problems(report.problems)
        warnings = len(report.problems) - len(report.errors)
        print(
            f"{len(report.cases)} complete cases, {report.files_read} files read: "
            f"{len(report.errors)} errors, {warnings} warnings"
        )
    return InputError.exit_code if report.errors else 0
