"""``medseg check``: read a whole data set, list everything that is wrong with it, and mend what can be mended."""

from __future__ import annotations

import argparse
import logging
from pathlib import Path

from medseg.cli import check_report, console, options

HELP = "find everything that is wrong with a data set"
DESCRIPTION = (
    "Read every file of a data set once and list all problems: missing files, grids that do not match, undeclared or "
    "fractional labels, damaged files, odd intensities, and more. A folder of images or one image file can be checked "
    "too. Exit code 0: usable; 3: errors were found; 4: the copy lacks some cases or still has errors."
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the command."""
    parser.add_argument("dataset", type=Path, metavar="DATASET", help="data set, folder of images, or image file")
    parser.add_argument("--fix", type=Path, metavar="OUT", help="write a corrected copy; the data set stays as it is")
    parser.add_argument(
        "--geometry", choices=["sform", "qform"], help="with --fix: which one to believe where a header has two"
    )
    parser.add_argument("--drop-duplicates", action="store_true", help="with --fix: keep one of several equal cases")
    parser.add_argument("--all", action="store_true", help="print long lists in full")
    parser.add_argument("--json", action="store_true", help="print the report as JSON")
    options.add_workers(parser)


def main(arguments: argparse.Namespace) -> int:
    """Run the command."""
    from medseg.errors import Problem, UsageError

    if arguments.fix is None and (arguments.geometry or arguments.drop_duplicates):
        raise UsageError(Problem("E0001", "--geometry and --drop-duplicates go with --fix OUT", "", "add --fix OUT"))
    readers = logging.getLogger("medseg.imaging")
    before = readers.level
    readers.setLevel(before if arguments.debug else logging.ERROR)  # what readers warn of is in the report
    try:
        return _check(arguments) if arguments.fix is None else _fix(arguments)
    finally:
        readers.setLevel(before)


def _check(arguments: argparse.Namespace) -> int:
    from medseg.dataset.check import check_dataset
    from medseg.dataset.check_record import check_record
    from medseg.errors import InputError

    progress = console.make_progress(arguments.progress)
    report = check_dataset(arguments.dataset, arguments.workers, progress)
    record = check_record(report)
    if arguments.json:
        _print_json(record.to_json())
    elif report.dataset is None and not report.findings:
        console.print_problems(report.problems)
    else:
        check_report.print_description(record)
        check_report.print_groups(report.problems, all_of_them=arguments.all)
        check_report.print_verdict(record, arguments.dataset)
    return InputError.exit_code if report.errors else 0


def _fix(arguments: argparse.Namespace) -> int:
    from medseg.dataset.check_record import check_record
    from medseg.errors import PartialFailure
    from medseg.pipeline.fix import FixOptions, fix_dataset
    from medseg.records.check import ProblemRecord

    chosen = FixOptions(arguments.geometry, arguments.drop_duplicates, arguments.workers)
    progress = console.make_progress(arguments.progress)
    report = fix_dataset(arguments.dataset, arguments.fix, chosen, progress)
    if arguments.json:
        left_out = [ProblemRecord.of(problem).to_json() for problem in report.left_out]
        fixed = {"cases": [case.to_json() for case in report.cases], "left_out": left_out}
        _print_json(
            check_record(report.before).to_json() | {"fix": fixed | {"after": check_record(report.after).to_json()}}
        )
    else:
        check_report.print_fixed(report, arguments.fix, all_of_them=arguments.all)
    return PartialFailure.exit_code if report.left_out or report.after.errors else 0


def _print_json(value: object) -> None:
    from medseg.artefacts import json_bytes

    print(json_bytes(value).decode(), end="")
