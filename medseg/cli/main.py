"""The ``medseg`` command: chooses the sub-command, and turns errors into messages and exit codes."""

from __future__ import annotations

import argparse
import contextlib
import errno
import io
import logging
import os
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from medseg import __version__
from medseg.cli import (
    check,
    dataset,
    doctor,
    ensemble,
    evaluate,
    export_model,
    import_model,
    info,
    inspect,
    plan,
    predict,
    preprocess,
    quantise,
    report,
    run,
    select,
    stats,
    train,
)
from medseg.cli.launch import launched
from medseg.errors import MedsegError, Problem, ResourceError, UsageError

COMMANDS = (
    dataset,
    inspect,
    check,
    plan,
    preprocess,
    train,
    predict,
    evaluate,
    select,
    ensemble,
    run,
    stats,
    report,
    quantise,
    import_model,
    export_model,
    info,
    doctor,
)

EPILOG = """\
A data set is an nnU-Net v2 or Medical Segmentation Decathlon folder, or a list of cases (.csv, .json). In one go:
  medseg run DATASET --run RUN --time-budget 15m
  medseg predict --model RUN -i IMAGES -o PREDICTIONS
Long commands go on where they were stopped. Exit codes and messages: docs/errors.md
"""


class _Parser(argparse.ArgumentParser):
    """Usage errors in the form of all other errors."""

    def error(self, message: str) -> NoReturn:
        raise UsageError(Problem("E0001", message, "", f"see {self.prog} --help"))


class _Formatter(argparse.RawDescriptionHelpFormatter):
    """Commands and their help on one line."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=18)
        self._action_max_length = 16  # argparse forgets that commands are indented once more, and breaks the longest


def build_parser() -> argparse.ArgumentParser:
    """The parser of all commands; nothing heavy is imported for it."""
    parser = _Parser(
        prog="medseg",
        allow_abbrev=False,
        description="Self-configuring segmentation of 2D and 3D medical images.",
        epilog=EPILOG,
        formatter_class=_Formatter,
    )
    parser.add_argument("--version", action="version", version=f"medseg {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True, dest="command")
    for command in COMMANDS:
        name = getattr(command, "NAME", command.__name__.rpartition(".")[2])  # import is no name for a module
        sub = commands.add_parser(name, help=command.HELP, description=command.DESCRIPTION, allow_abbrev=False)
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
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # a terminal without × is no reason to stop
    try:
        code = _run(list(sys.argv[1:] if arguments is None else arguments))
        if sys.stdout is not None:
            sys.stdout.flush()
    except OSError as error:  # whoever read our output is gone, or its disk is full: seen here, not at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if isinstance(error, BrokenPipeError):
            return 141
        from medseg.artefacts import environment_failure
        from medseg.cli import console

        failure = environment_failure(error, Path("standard output"))
        console.print_error(failure)
        return failure.exit_code
    return code


def share_cores() -> None:
    """Let threads that wait for one another sleep, not spin; must be called before torch is loaded.

    Spinning threads take the cores from whatever else runs, and from the very threads they wait for: beside one busy
    process on two cores a training step took 1.06 s, with sleeping threads 0.79 s; alone the two are equal. Who sets
    the OpenMP variable before us decides.
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    if launched():
        os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # a lost connection is told by us, in one line


def stay_offline() -> None:
    """Keep MLflow from sending statistics of its use, which it does unless told not to before it is loaded."""
    os.environ["MLFLOW_DISABLE_TELEMETRY"] = "true"


def _run(arguments: list[str]) -> int:
    debug = "--debug" in arguments
    from medseg.cli import console

    try:
        parser = build_parser()
        if not arguments:
            parser.print_help()
            return UsageError.exit_code
        options = parser.parse_args(arguments)
        console.start_logging(options.debug)
        share_cores()
        stay_offline()
        code: int = options.function(options)
        return code
    except SystemExit as end:  # of --help and --version
        return int(end.code or 0)
    except MedsegError as error:
        if debug:
            traceback.print_exc()
        console.print_error(error)
        return error.exit_code
    except KeyboardInterrupt:
        print("medseg: interrupted; the same command goes on where it stopped", file=sys.stderr)
        return 130
    except BrokenPipeError:
        raise
    except Exception as error:
        if debug:
            traceback.print_exc()
        meaning = _meaning(error)
        console.print_error(meaning)
        return meaning.exit_code


def _meaning(error: Exception) -> MedsegError:
    """What an error that no stage expected tells the user: a full disk or memory can show anywhere; else a bug."""
    from medseg.artefacts import environment_failure

    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS):
        return environment_failure(error, Path(error.filename or "output"))
    # torch, not to be imported here, has an error of its own for the GPU and a RuntimeError for the CPU
    torchs = type(error).__name__ == "OutOfMemoryError" or "can't allocate memory" in str(error)
    if isinstance(error, MemoryError) or torchs:
        smaller = "free memory, or plan with less --memory in another run"
        return ResourceError(Problem("E0600", "not enough memory", "", smaller))
    bug = f"{type(error).__name__}: {error}"
    return MedsegError(Problem("E7000", bug, "", "this is a bug: report it with --debug"))


def entry() -> NoReturn:
    """The command line as a process: run the command that it asks for, and end with its exit code.

    One of several processes that train together ends at once, without taking Python apart: threads of torch pass the
    messages between them, and once such a process ended with SIGABRT after its work, probably by one of these threads.
    """
    code = main()
    if not launched():
        sys.exit(code)
    logging.shutdown()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError):
            stream.flush()
    os._exit(code)
