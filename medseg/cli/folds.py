"""Folds: the options that say which folds are trained on which GPUs, and the command that trains one of them."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING

from medseg.errors import Problem, UsageError

if TYPE_CHECKING:
    from medseg.pipeline.folds import SideBySide

EVERY = "all"
CHOSEN = ("run", "configuration", "fold", "folds", "gpus", "device", "progress", "help")  # for each fold, not passed on


def add_folds(parser: argparse.ArgumentParser, *, required: bool) -> None:
    """``--fold``, ``--folds`` and ``--gpus``."""
    group = parser.add_mutually_exclusive_group(required=required)
    group.add_argument("--fold", metavar="0|1|…|all", help="one fold; all: on all cases, without validation")
    group.add_argument(
        "--folds", nargs="+", metavar="FOLD", help="several folds, as 0 2 or 0,2; all: every fold of the splits"
    )
    parser.add_argument(
        "--gpus", metavar="all|none|0,1", help="train folds at the same time, one on each of these GPUs (default: none)"
    )


def folds_of(arguments: argparse.Namespace) -> tuple[str, ...] | None:
    """The folds of ``--fold`` or ``--folds``, "0" without either; None: every fold of the splits.

    Raises:
        UsageError: E0001 "all" among others.
    """
    if arguments.folds is None:
        return (arguments.fold or "0",)
    names = tuple(name for text in arguments.folds for name in text.split(",") if name)
    if names == (EVERY,):
        return None
    if EVERY in names or not names:
        action = "--folds all alone is every fold; --fold all is one model of all cases"
        raise UsageError(Problem("E0001", f"--folds {' '.join(arguments.folds)}", "numbers of folds, or all", action))
    return names


def side_by_side_of(arguments: argparse.Namespace, add_arguments: Callable[..., None]) -> SideBySide | None:
    """Where ``--gpus`` says that folds are trained at the same time; None: in turn, in this process.

    Args:
        arguments: of ``train``, or of a command that has some of its options under the same names.
        add_arguments: of ``train``.

    Raises:
        UsageError: E0001 no such GPU, or another ``--device``.
    """
    numbers = _gpus(arguments)
    if not numbers:
        return None
    from medseg.pipeline.folds import SideBySide

    passed = passed_on(arguments, add_arguments)
    head = [sys.executable, "-m", "medseg", "train", "--run", str(arguments.run)]

    def command(configuration: str, fold: str, device: str) -> list[str]:
        chosen = ["--configuration", configuration, "--fold", fold, "--device", device, "--progress", "plain"]
        return [*head, *chosen, *passed]

    return SideBySide(tuple(f"cuda:{number}" for number in numbers), command)


def passed_on(arguments: argparse.Namespace, add_arguments: Callable[..., None]) -> list[str]:
    """The options of ``train`` that were given, as they are given on a command line."""
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    parser.add_argument("--debug", action="store_true")
    words: list[str] = []
    for action in parser._actions:
        value = getattr(arguments, action.dest, action.default)
        if action.dest in CHOSEN or value == action.default:
            continue
        option = action.option_strings[-1]
        if action.nargs == 0:
            words.append(option)
        elif isinstance(action, argparse._AppendAction):
            words += [word for one in value for word in (option, str(one))]
        else:
            words += [option, *map(str, value if isinstance(value, list | tuple) else [value])]
    return words


def _gpus(arguments: argparse.Namespace) -> tuple[int, ...]:
    asked = arguments.gpus or "none"
    if asked == "none":
        return ()
    if arguments.device not in ("auto", "cuda"):
        raise UsageError(Problem("E0001", f"--gpus {asked} with --device {arguments.device}", "", "leave one out"))
    import torch

    there = range(torch.cuda.device_count() if torch.cuda.is_available() else 0)
    if not there:
        raise UsageError(Problem("E0001", f"--gpus {asked}: no CUDA device is usable", "", "use --gpus none"))
    if asked == "all":
        return tuple(there)
    texts = asked.split(",")
    if not all(text.isdecimal() and int(text) in there for text in texts):
        expected = f"all, none or numbers from 0 to {there[-1]}"
        raise UsageError(Problem("E0001", f"--gpus {asked}", expected, "choose some of these"))
    return tuple(int(text) for text in texts)
