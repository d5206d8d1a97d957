"""``medseg evaluate``: score label files against references."""

from __future__ import annotations

import argparse
from pathlib import Path

from medseg.cli import console, options

HELP = "score predictions against references"
DESCRIPTION = (
    "Compare label files of the same name and print Dice, surface Dice, HD95 and volume errors per label. Missed and "
    "spurious structures are counted, never dropped."
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the command."""
    parser.add_argument("--predictions", type=Path, required=True, metavar="DIR", help="folder of predicted labels")
    parser.add_argument("--references", type=Path, required=True, metavar="DIR", help="folder of true labels")
    parser.add_argument(
        "--task", type=Path, required=True, metavar="DATASET_JSON", help="names and values of the labels"
    )
    parser.add_argument("--output", type=Path, metavar="FILE", help="write the scores as JSON, and as CSV beside it")
    parser.add_argument(
        "--tolerance",
        type=options.millimetres,
        default=2.0,
        metavar="MM",
        help="of the surface Dice (default: 2 mm)",
    )
    options.add_workers(parser)


def main(arguments: argparse.Namespace) -> int:
    """Run the command."""
    from medseg.evaluation.scores import summary_table
    from medseg.pipeline.evaluate import evaluate_files, raise_if_partial, read_task

    scores = evaluate_files(
        arguments.predictions,
        arguments.references,
        read_task(arguments.task),
        arguments.output,
        arguments.tolerance,
        arguments.workers,
        console.make_progress(arguments.progress),
    )
    console.print_table(summary_table(scores))
    console.print_problems(problem for problem in scores.problems if problem.severity == "warning")
    raise_if_partial(scores)
    return 0
