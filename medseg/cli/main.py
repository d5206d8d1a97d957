"""The ``medseg`` command: chooses the sub-command, and turns errors into messages and exit codes."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import NoReturn

from medseg import __version__
from medseg.cli import check, doctor, evaluate, plan, predict, preprocess, run, train
from medseg.errors import MedsegError, Problem, UsageError

COMMANDS = (check, plan, preprocess, train, predict, evaluate, run, doctor)

EPILOG = """\
A data set is an nnU-Net v2 or Medical Segmentation Decathlon folder. In one go:
  medseg run DATASET --run RUN --time-budget 15m
  medseg predict --model RUN -i IMAGES -o PREDICTIONS
Every command goes on where it was stopped. Exit codes and messages: docs/errors.md
"""


class _Parser(argparse.ArgumentParser):
    """Usage errors in the form of all other errors."""

    def error(self, message: str) -> NoReturn:
        raise UsageError(Problem("E0001", message, "", f"see {self.prog} --help"))


class _Formatter(argparse.RawDescriptionHelpFormatter):
    """Commands and their help on one line."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=16)


def build_parser() -> argparse.ArgumentParser:
    """The parser of all commands; nothing heavy is imported for it."""
    parser = _Parser(
        prog="medseg",
        description="Self-configuring segmentation of 2D and 3D medical images.",
        epilog=EPILOG,
        formatter_class=_Formatter,
    )
    parser.add_argument("--version", action="version", version=f"medseg {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True, dest="command")
    for command in COMMANDS:
        name = command.__name__.rpartition(".")[2]
        sub = commands.add_parser(name, help=command.HELP, description=command.DESCRIPTION)
        command.add_arguments(sub)
        sub.add_argument(
            "--progress",
            choices=["auto", "bar", "plain", "json", "none"],
            default="auto",
            help="how progress is shown on stderr (default: a bar on a terminal, lines elsewhere)",
        )
        sub.add_argument("--debug", action="store_true", help="more messages, and a traceback for errors")
        sub.set_defaults(function=command.main)
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    debug = "--debug" in arguments
    from medseg.cli import console

    try:
        parser = build_parser()
        if not arguments:
            parser.print_help()
            return UsageError.exit_code
        options = parser.parse_args(arguments)
        console.start_logging(options.debug)
        code: int = options.function(options)
        return code
    except MedsegError as error:
        console.print_error(error)
        if debug:
            raise
        return error.exit_code
    except KeyboardInterrupt:
        print("medseg: interrupted; the same command goes on where it stopped", file=sys.stderr)
        return 130
    except BrokenPipeError:
        return 141
    except Exception as error:
        if debug:
            raise
        problem = Problem("E7000", f"{type(error).__name__}: {error}", "", "this is a bug: report it with --debug")
        console.print_problems([problem])
        return MedsegError.exit_code


def entry() -> None:
    """Console entry point."""
    sys.exit(main())
