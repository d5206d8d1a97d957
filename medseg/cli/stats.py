"""``medseg stats``: volumes and intensities of labels."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from medseg.cli import console

HELP = "volumes and intensities of labels"
DESCRIPTION = (
    "Print voxels, volume, connected pieces and, with --images, intensities of every label of a label file or of all "
    "label files of a folder."
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the command."""
    parser.add_argument("labels", type=Path, metavar="LABELS", help="a label file, or a folder of them")
    parser.add_argument("--images", type=Path, metavar="IMAGES", help="CASE_0000.* or CASE.* on the same grids")
    parser.add_argument("--task", type=Path, metavar="DATASET_JSON", help="names of the labels; or a run")
    parser.add_argument("--output", type=Path, metavar="FILE", help="write all as .json or .csv")


def main(arguments: argparse.Namespace) -> int:
    """Run the command."""
    from medseg.errors import PartialFailure
    from medseg.evaluation.statistics import statistics_table
    from medseg.pipeline.evaluate import read_task
    from medseg.pipeline.stats import measure_files

    task = None if arguments.task is None else read_task(arguments.task)
    progress = console.make_progress(arguments.progress)
    statistics = measure_files(arguments.labels, arguments.images, task, arguments.output, progress)
    console.print_table(statistics_table(statistics))
    for problem in statistics.problems:
        print(f"medseg: {problem}", file=sys.stderr)
    return PartialFailure.exit_code if statistics.problems else 0
